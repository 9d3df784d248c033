#pragma once

#include <type_traits>

#include "common/elementary.h"
#include "common/macros.h"

// Every activation f and its derivative f', in one place.

namespace fdfa {

enum class Activation : int { identity, relu, leaky_relu, tanh, sigmoid, gelu, silu };

// Names in the order of the enum; they are the strings of the Python API.
constexpr const char* kActivationNames[] = {"identity", "relu", "leaky_relu", "tanh",
                                            "sigmoid",  "gelu", "silu"};
constexpr int kActivationCount = 7;

// f' is taken from the activation y where y determines it (so that the pre-activation need not be
// kept), and from the pre-activation a otherwise.
FDFA_HD constexpr bool derivative_needs_pre_activation(Activation f) {
  return f == Activation::gelu || f == Activation::silu;
}

constexpr float kLeakySlope = 0.01f;  // torch.nn.LeakyReLU's default

FDFA_HD float sigmoid(float a) { return 1.0f / (1.0f + exponential(-a)); }

// f(a). Comparisons are written so that NaN passes through, as in torch.
template <Activation f>
FDFA_HD float activate(float a) {
  if constexpr (f == Activation::relu) return a < 0.0f ? 0.0f : a;
  if constexpr (f == Activation::leaky_relu) return a < 0.0f ? kLeakySlope * a : a;
  if constexpr (f == Activation::tanh) return hyperbolic_tangent(a);
  if constexpr (f == Activation::sigmoid) return sigmoid(a);
  if constexpr (f == Activation::gelu) return a * normal(a).cdf;
  if constexpr (f == Activation::silu) return a * sigmoid(a);
  return a;
}

// f' at `saved`: y or a, as derivative_needs_pre_activation says.
template <Activation f>
FDFA_HD float derivative(float saved) {
  if constexpr (f == Activation::relu) return saved <= 0.0f ? 0.0f : 1.0f;
  if constexpr (f == Activation::leaky_relu) return saved <= 0.0f ? kLeakySlope : 1.0f;
  if constexpr (f == Activation::tanh) return 1.0f - saved * saved;
  if constexpr (f == Activation::sigmoid) return saved * (1.0f - saved);
  if constexpr (f == Activation::gelu) {
    const Normal at_saved = normal(saved);
    return at_saved.cdf + saved * (0.39894228040143268f * at_saved.decay);
  }
  if constexpr (f == Activation::silu) {
    const float s = sigmoid(saved);
    return s * (1.0f + saved * (1.0f - s));
  }
  return 1.0f;
}

// Calls f(std::integral_constant<Activation, ...>) with the run-time value as a template argument.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable  // f is of the caller's side
#endif
template <class F>
FDFA_HD auto with_activation(Activation value, F&& f) {
  switch (value) {
    case Activation::relu:
      return f(std::integral_constant<Activation, Activation::relu>{});
    case Activation::leaky_relu:
      return f(std::integral_constant<Activation, Activation::leaky_relu>{});
    case Activation::tanh:
      return f(std::integral_constant<Activation, Activation::tanh>{});
    case Activation::sigmoid:
      return f(std::integral_constant<Activation, Activation::sigmoid>{});
    case Activation::gelu:
      return f(std::integral_constant<Activation, Activation::gelu>{});
    case Activation::silu:
      return f(std::integral_constant<Activation, Activation::silu>{});
    default:
      return f(std::integral_constant<Activation, Activation::identity>{});
  }
}

}  // namespace fdfa

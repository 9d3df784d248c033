#pragma once

#include <cmath>
#include <cstdint>

#include "common/bits.h"
#include "common/macros.h"

// exp, tanh and the normal distribution, free of branches so that compilers vectorise loops over them:
// the C library's take ten times as long. NaN passes through. CUDA has functions of its own.

namespace fdfa {

// e^x, relative error below 2e-7.
FDFA_HD float exponential(float x) {
#if defined(__CUDA_ARCH__)
  return expf(x);
#else
  x = x > 89.0f ? 89.0f : x;  // infinite from there on, and zero below the other
  x = x < -105.0f ? -105.0f : x;
  constexpr float kLog2E = 1.44269504f, kRounder = 12582912.0f;  // 1.5 * 2^23: x log2(e) + it is whole
  const float rounded = x * kLog2E + kRounder;
  const int32_t power = static_cast<int32_t>(bits_from_float(rounded) - bits_from_float(kRounder));
  const float whole = rounded - kRounder;
  // ln 2 in two parts, the first exact in a few digits.
  const float r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // 2^power as a product of two, since the power of a subnormal number has no exponent of its own.
  const int32_t half = power >> 1;
  const auto power_of_two = [](int32_t k) {
    return float_from_bits(static_cast<uint32_t>(k + 127) << 23);
  };
  return p * power_of_two(half) * power_of_two(power - half);
#endif
}

// tanh(x), absolute error below 2e-7, and relative below 3e-7.
FDFA_HD float hyperbolic_tangent(float x) {
#if defined(__CUDA_ARCH__)
  return tanhf(x);
#else
  const float size = fabsf(x), x2 = x * x;
  const float large = 1.0f - 2.0f / (exponential(2.0f * size) + 1.0f);
  float p = -5.70498872745e-3f;
  p = p * x2 + 2.06390887954e-2f;
  p = p * x2 - 5.37397155531e-2f;
  p = p * x2 + 1.33314422036e-1f;
  p = p * x2 - 3.33332819422e-1f;
  const float small = p * x2 * x + x;
  return size < 0.625f ? small : copysignf(large, x);
#endif
}

// e^(-x^2 / 2), the density of the standard normal distribution but for 1 / sqrt(2 pi), and its
// distribution function, absolute error below 3e-7.
struct Normal {
  float decay, cdf;
};

FDFA_HD Normal normal(float x) {
  const float decay = exponential(-0.5f * x * x);
#if defined(__CUDA_ARCH__)
  return {decay, 0.5f * (1.0f + erff(x * 0.70710678118654752f))};
#else
  // erfc(z) e^(z^2) / t by t = 1 / (1 + 0.4 z), z = |x| / sqrt(2): a fit of relative error 1.3e-7.
  const float t = 1.0f / (1.0f + 0.28284271247f * fabsf(x));
  float p = 5.02726026e-2f;
  p = p * t - 1.82943642e-1f;
  p = p * t + 1.69154868e-1f;
  p = p * t - 5.66771720e-3f;
  p = p * t + 1.41460866e-1f;
  p = p * t + 1.68533906e-1f;
  p = p * t + 2.07843855e-1f;
  p = p * t + 2.25669518e-1f;
  p = p * t + 2.25675866e-1f;
  const float tail = 0.5f * decay * (t * p);
  return {decay, x < 0.0f ? tail : 1.0f - tail};
#endif
}

}  // namespace fdfa

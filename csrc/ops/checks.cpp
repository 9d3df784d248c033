#include "ops/checks.h"

#include <ATen/autocast_mode.h>

namespace fdfa {
namespace {

template <class Enum>
Enum parse(const char* op, const char* argument, c10::string_view name, const char* const* names,
           int count) {
  for (int i = 0; i < count; ++i) {
    if (name == names[i]) return static_cast<Enum>(i);
  }
  std::string known;
  for (int i = 0; i < count; ++i) known += (i ? ", " : "") + std::string(names[i]);
  TORCH_CHECK_VALUE(false, "fdfa::", op, ": ", argument, " must be one of ", known, "; got '", name,
                    "'");
}

}  // namespace

Activation parse_activation(const char* op, c10::string_view name) {
  return parse<Activation>(op, "activation", name, kActivationNames, kActivationCount);
}

Noise parse_noise(const char* op, c10::string_view name, bool may_be_none) {
  static_assert(static_cast<int>(Noise::none) == kNoiseCount - 1);
  return parse<Noise>(op, "noise", name, kNoiseNames, kNoiseCount - (may_be_none ? 0 : 1));
}

void check_floating(const char* op, const char* argument, const at::Tensor& t) {
  TORCH_CHECK_TYPE(
      t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16 || t.scalar_type() == at::kHalf,
      "fdfa::", op, ": ", argument, " must be float32, bfloat16 or float16; got ", t.scalar_type(),
      " (float64 runs with FDFA(..., backend=\"reference\"))");
}

void check_shape(const char* op, const char* argument, const at::Tensor& t, at::IntArrayRef expected) {
  TORCH_CHECK(t.sizes() == expected, "fdfa::", op, ": ", argument, " must have shape ", expected,
              "; got ", t.sizes());
}

void check_like(const char* op, const char* argument, const at::Tensor& t, const char* other_argument,
                const at::Tensor& other) {
  TORCH_CHECK_TYPE(t.scalar_type() == other.scalar_type(), "fdfa::", op, ": ", argument,
                   " must have the dtype of ", other_argument, ", ", other.scalar_type(), "; got ",
                   t.scalar_type());
  TORCH_CHECK(t.device() == other.device(), "fdfa::", op, ": ", argument, " must be on the device of ",
              other_argument, ", ", other.device(), "; got ", t.device());
}

void check_product(const char* op, const at::Tensor& x, const std::optional<at::Tensor>& tangent,
                   const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  if (at::autocast::is_autocast_enabled(x.device().type())) return;
  TORCH_CHECK_TYPE(at::isFloatingType(x.scalar_type()), "fdfa::", op,
                   ": x must be of a floating-point dtype; got ", x.scalar_type());
  if (tangent) check_like(op, "tangent", *tangent, "x", x);
  check_like(op, "weight", weight, "x", x);
  if (bias) check_like(op, "bias", *bias, "x", x);
}

void check_counter(const char* op, const char* argument, const at::Tensor& t, int64_t size,
                   const at::Tensor& other) {
  TORCH_CHECK(t.scalar_type() == at::kLong && t.dim() == 1 && t.size(0) == size && t.is_contiguous(),
              "fdfa::", op, ": ", argument, " must be a contiguous int64 tensor of shape [", size,
              "]; got ", t.scalar_type(), " ", t.sizes());
  TORCH_CHECK(t.device() == other.device(), "fdfa::", op, ": ", argument, " must be on ",
              other.device(), "; got ", t.device());
}

at::MemoryFormat feature_order(const char* op, const at::Tensor& feedback) {
  if (feedback.is_contiguous()) return at::MemoryFormat::Contiguous;
  TORCH_CHECK(feedback.is_contiguous(at::MemoryFormat::ChannelsLast), "fdfa::", op,
              ": feedback must be contiguous or channels_last; got strides ", feedback.strides());
  return at::MemoryFormat::ChannelsLast;
}

}  // namespace fdfa

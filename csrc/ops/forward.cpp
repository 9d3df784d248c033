#include <ATen/ops/as_strided.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>

#include <cstring>

#include "ops/checks.h"
#include "ops/launch.h"
#include "ops/ops.h"

namespace fdfa {
namespace {

// Below, turning z over costs more than the product gains.
constexpr int64_t kTransposedMultiplications = int64_t{1} << 20;

int64_t features_of(const Tensor& t) { return t.size(0) == 0 ? 0 : t.numel() / t.size(0); }

// The pass after the library's products z = W x and tz = W tangent, which is undefined where there is
// no tangent. They are dense in feature order, and are overwritten by y and ty, or transposed,
// [features, N].
Dual finish(const Tensor& z, const Tensor& tz, bool transposed, const OptionalTensor& bias,
            int64_t channels, const Tensor& noise_state, int64_t block, Activation activation,
            Noise noise) {
  const bool has_tangent = tz.defined();
  const Tensor y = transposed ? at::empty({z.size(1), z.size(0)}, z.options()) : z;
  const bool zero = !has_tangent && noise == Noise::none;
  const Tensor ty = zero ? gradient_carrier(y) : has_tangent && !transposed ? tz : at::empty_like(y);
  const bool keep_pre = derivative_needs_pre_activation(activation);
  const Tensor pre = keep_pre ? at::empty_like(y) : gradient_carrier(y);
  const Tensor bias_dense = bias ? bias->contiguous() : Tensor();
  with_storage(y.scalar_type(), [&](auto storage) {
    using T = decltype(storage);
    EpilogueParams<T> p{};
    p.z = pointer<T>(z);
    p.tz = has_tangent ? pointer<T>(tz) : nullptr;
    p.y = pointer<T>(y);
    p.ty = zero ? nullptr : pointer<T>(ty);
    p.bias = bias ? pointer<T>(bias_dense) : nullptr;
    p.pre = keep_pre ? pointer<T>(pre) : nullptr;
    p.samples = y.size(0);
    p.features = features_of(y);
    p.channels = channels;
    p.activation = activation;
    p.noise = NoiseParams{noise_state.const_data_ptr<int64_t>(), block, noise};
    p.transposed = transposed;
    launch(p, y.device());
  });
  return {y, ty, pre};
}

void check_operands(const char* op, const Tensor& x, const OptionalTensor& tangent,
                    const Tensor& weight, const OptionalTensor& bias, const Tensor& noise_state) {
  check_floating(op, "x", x);
  check_like(op, "weight", weight, "x", x);
  if (tangent) {
    check_like(op, "tangent", *tangent, "x", x);
    check_shape(op, "tangent", *tangent, x.sizes());
  }
  if (bias) {
    check_like(op, "bias", *bias, "x", x);
    check_shape(op, "bias", *bias, {weight.size(0)});
  }
  check_counter(op, "noise_state", noise_state, 3, x);
}

}  // namespace

Tensor gradient_carrier(const Tensor& y) {
  const std::vector<int64_t> strides(y.dim(), 0);
  Tensor zero = at::empty_strided(y.sizes(), strides, y.options());
  if (zero.numel() == 0) return zero;
  if (zero.is_cpu()) {
    std::memset(zero.data_ptr(), 0, zero.element_size());  // zero_() takes three times as long
  } else {
    zero.as_strided({1}, {1}).zero_();
  }
  return zero;
}

Tensor next_noise(Tensor state) {
  check_counter("next_noise", "state", state, 3, state);
  Tensor snapshot = at::empty_like(state);
  if (state.is_cpu()) {
    std::memcpy(snapshot.data_ptr(), state.const_data_ptr(), state.nbytes());
  } else {
    snapshot.copy_(state);
  }
  count_up(state, 1);
  return snapshot;
}

Dual linear(const Tensor& x, const OptionalTensor& tangent, const Tensor& weight,
            const OptionalTensor& bias, const Tensor& noise_state, int64_t block,
            c10::string_view activation, c10::string_view noise) {
  const char* op = "linear";
  TORCH_CHECK(weight.dim() == 2, "fdfa::linear: weight must be [out_features, in_features]; got ",
              weight.sizes());
  TORCH_CHECK(x.dim() >= 2 && x.size(-1) == weight.size(1), "fdfa::linear: x must be [N, *, ",
              weight.size(1), "]; got ", x.sizes());
  check_operands(op, x, tangent, weight, bias, noise_state);
  const Activation f = parse_activation(op, activation);
  const Noise kind = parse_noise(op, noise, /*may_be_none=*/true);

  const bool has_tangent = tangent.has_value();
  const int64_t out_features = weight.size(0);
  if (x.is_cpu() && x.dim() == 2 && x.scalar_type() == at::kFloat && x.size(0) < 512 &&
      x.numel() * out_features >= kTransposedMultiplications) {
    // W xᵀ, and the pass after it turns it over. The product alone, cold, on two cores, by oneDNN: 0.8
    // of the time of x Wᵀ for [64, 800] by [800, 800], 0.9 for [256, 800], 1.0 for [512, 800].
    const Tensor z = mm(weight, x.t());
    const Tensor tz = has_tangent ? mm(weight, tangent->t()) : Tensor();
    return finish(z, tz, /*transposed=*/true, bias, out_features, noise_state, block, f, kind);
  }
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = out_features;
  const int64_t rows = c10::multiply_integers(sizes.begin(), sizes.end() - 1);
  const auto product = [&](const Tensor& input) {
    return mm(input.reshape({rows, weight.size(1)}), weight.t()).view(sizes);
  };
  const Tensor z = product(x);
  const Tensor tz = has_tangent ? product(*tangent) : Tensor();
  return finish(z, tz, /*transposed=*/false, bias, out_features, noise_state, block, f, kind);
}

Dual conv2d(const Tensor& x, const OptionalTensor& tangent, const Tensor& weight,
            const OptionalTensor& bias, at::IntArrayRef stride, at::IntArrayRef padding,
            at::IntArrayRef dilation, int64_t groups, const Tensor& noise_state, int64_t block,
            c10::string_view activation, c10::string_view noise) {
  const char* op = "conv2d";
  TORCH_CHECK(x.dim() == 4, "fdfa::conv2d: x must be [N, C, H, W]; got ", x.sizes());
  TORCH_CHECK(weight.dim() == 4,
              "fdfa::conv2d: weight must be [out_channels, in_channels / groups, kh, "
              "kw]; got ",
              weight.sizes());
  check_operands(op, x, tangent, weight, bias, noise_state);
  const Activation f = parse_activation(op, activation);
  const Noise kind = parse_noise(op, noise, /*may_be_none=*/true);

  constexpr auto kOrder = at::MemoryFormat::ChannelsLast;
  const Tensor weight_dense = weight.contiguous(kOrder);
  const auto product = [&](const Tensor& input) {
    return at::convolution(input.contiguous(kOrder), weight_dense, {}, stride, padding, dilation,
                           /*transposed=*/false, /*output_padding=*/{0, 0}, groups)
        .contiguous(kOrder);
  };
  const Tensor z = product(x);
  const Tensor tz = tangent ? product(*tangent) : Tensor();
  return finish(z, tz, /*transposed=*/false, bias, weight.size(0), noise_state, block, f, kind);
}

Tensor perturb(const Tensor& y, const OptionalTensor& tangent, const Tensor& noise_state, int64_t block,
               c10::string_view noise) {
  const char* op = "perturb";
  TORCH_CHECK(y.dim() >= 2, "fdfa::perturb: y must be [N, *features]; got ", y.sizes());
  check_floating(op, "y", y);
  if (tangent) {
    check_like(op, "tangent", *tangent, "y", y);
    check_shape(op, "tangent", *tangent, y.sizes());
  }
  check_counter(op, "noise_state", noise_state, 3, y);
  const Noise kind = parse_noise(op, noise);

  const auto order = y.dim() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const Tensor tz = tangent ? tangent->contiguous(order) : Tensor();
  Tensor ty = at::empty(y.sizes(), y.options(), order);
  with_storage(y.scalar_type(), [&](auto storage) {
    using T = decltype(storage);
    EpilogueParams<T> p{};
    p.tz = tangent ? pointer<T>(tz) : nullptr;
    p.ty = pointer<T>(ty);
    p.samples = y.size(0);
    p.features = p.channels = features_of(y);
    p.noise = NoiseParams{noise_state.const_data_ptr<int64_t>(), block, kind};
    launch(p, y.device());
  });
  return ty;
}

}  // namespace fdfa

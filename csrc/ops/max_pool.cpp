#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "ops/checks.h"
#include "ops/launch.h"
#include "ops/ops.h"

namespace fdfa {
namespace {

constexpr auto kOrder = at::MemoryFormat::ChannelsLast;

Tensor empty_pooled(const PoolShape& shape, const Tensor& x) {
  return at::empty({shape.samples, shape.channels, shape.out_height, shape.out_width}, x.options(),
                   kOrder);
}

// ty is undefined where there is no tangent.
std::tuple<Tensor, Tensor> pool_both(const char* op, const Tensor& x, const OptionalTensor& tangent,
                                     at::IntArrayRef kernel, at::IntArrayRef stride,
                                     at::IntArrayRef padding) {
  const PoolShape shape = check_pool(op, x, kernel, stride, padding);
  const Tensor x_dense = x.contiguous(kOrder), y = empty_pooled(shape, x);
  Tensor tx_dense, ty;
  if (tangent) {
    check_like(op, "tangent", *tangent, "x", x);
    check_shape(op, "tangent", *tangent, x.sizes());
    tx_dense = tangent->contiguous(kOrder);
    ty = at::empty_like(y);
  }
  launch(MaxPoolParams{x_dense.const_data_ptr<float>(),
                       tangent ? tx_dense.const_data_ptr<float>() : nullptr, y.data_ptr<float>(),
                       tangent ? ty.data_ptr<float>() : nullptr, shape},
         x.device());
  return {y, ty};
}

}  // namespace

PoolShape check_pool(const char* op, const Tensor& x, at::IntArrayRef kernel, at::IntArrayRef stride,
                     at::IntArrayRef padding) {
  TORCH_CHECK(x.scalar_type() == at::kFloat && x.dim() == 4, "fdfa::", op,
              ": x must be [N, C, H, W] in float32; got ", x.scalar_type(), " ", x.sizes());
  for (int i = 0; i < 2; ++i) {
    TORCH_CHECK(kernel[i] > 0 && stride[i] > 0 && padding[i] >= 0 && 2 * padding[i] <= kernel[i] &&
                    x.size(2 + i) + 2 * padding[i] >= kernel[i],
                "fdfa::", op, ": kernel and stride must be positive, padding at most half the kernel, ",
                "and the kernel no larger than the padded image; got kernel ", kernel, ", stride ",
                stride, ", padding ", padding, " for ", x.sizes());
  }
  const auto out_size = [&](int64_t i) {
    return (x.size(2 + i) + 2 * padding[i] - kernel[i]) / stride[i] + 1;
  };
  return {x.size(0),
          x.size(2),
          x.size(3),
          x.size(1),
          out_size(0),
          out_size(1),
          {kernel[0], kernel[1]},
          {stride[0], stride[1]},
          {padding[0], padding[1]}};
}

std::tuple<Tensor, Tensor> run_pooled(EpilogueParams<float> epilogue, const Tensor& y,
                                      const PoolShape& shape, const Tensor& spare) {
  const bool zero = epilogue.tz == nullptr && epilogue.noise.kind == Noise::none;
  const Tensor pooled = empty_pooled(shape, y);
  const Tensor pooled_tangent = zero ? empty_carrier(pooled) : at::empty_like(pooled);
  if (zero) epilogue.zeros[1] = pooled_tangent.data_ptr<float>();
  Tensor ty;
  if (!y.is_cpu() && !zero) {  // CUDA's epilogue hands it over to the pool in memory
    ty = spare.defined() ? spare : at::empty(y.sizes(), y.options(), kOrder);
    epilogue.ty = ty.data_ptr<float>();
  }
  launch(PooledEpilogueParams{epilogue, pooled.data_ptr<float>(),
                              zero ? nullptr : pooled_tangent.data_ptr<float>(), shape},
         y.device());
  return {pooled, pooled_tangent};
}

std::tuple<Tensor, Tensor> max_pool2d(const Tensor& x, const Tensor& tangent, at::IntArrayRef kernel,
                                      at::IntArrayRef stride, at::IntArrayRef padding) {
  return pool_both("max_pool2d", x, tangent, kernel, stride, padding);
}

Dual max_pool2d_end(const Tensor& x, const OptionalTensor& tangent, const Tensor& handle,
                    at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                    const Tensor& noise_state, int64_t block, c10::string_view noise) {
  const char* op = "max_pool2d_end";
  check_shape(op, "handle", handle, x.sizes());
  check_counter(op, "noise_state", noise_state, 3, x);
  const Noise kind = parse_noise(op, noise, /*may_be_none=*/true);
  auto [y, ty] = pool_both(op, x, tangent, kernel, stride, padding);
  if (!tangent) {
    if (kind == Noise::none) return {y, gradient_carrier(y), gradient_carrier(y)};
    ty = at::empty_like(y);
  }
  EpilogueParams<float> p{};
  p.tz = tangent ? ty.data_ptr<float>() : nullptr;
  p.ty = ty.data_ptr<float>();
  p.samples = y.size(0);
  p.features = p.channels = y.size(0) == 0 ? 0 : y.numel() / y.size(0);
  p.noise = NoiseParams{noise_state.const_data_ptr<int64_t>(), block, kind};
  const Tensor pre = empty_carrier(y);
  p.zeros[0] = pre.data_ptr<float>();
  launch(p, y.device());
  return {y, ty, pre};
}

Tensor max_pool2d_backward(const Tensor& delta, const Tensor& x, at::IntArrayRef kernel,
                           at::IntArrayRef stride, at::IntArrayRef padding) {
  const char* op = "max_pool2d_backward";
  const PoolShape shape = check_pool(op, x, kernel, stride, padding);
  check_like(op, "delta", delta, "x", x);
  check_shape(op, "delta", delta, {shape.samples, shape.channels, shape.out_height, shape.out_width});
  const Tensor x_dense = x.contiguous(kOrder), delta_dense = delta.contiguous(kOrder);
  Tensor dx = at::empty(x.sizes(), x.options(), kOrder);
  launch(MaxPoolBackwardParams{x_dense.const_data_ptr<float>(), delta_dense.const_data_ptr<float>(),
                               dx.data_ptr<float>(), shape},
         x.device());
  return dx;
}

}  // namespace fdfa

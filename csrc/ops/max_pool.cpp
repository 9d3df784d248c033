#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "ops/checks.h"
#include "ops/launch.h"
#include "ops/ops.h"

namespace fdfa {
namespace {

constexpr auto kOrder = at::MemoryFormat::ChannelsLast;

Tensor empty_pooled(const PoolShape& shape, const at::TensorOptions& options) {
  return at::empty({shape.samples, shape.channels, shape.out_height, shape.out_width}, options, kOrder);
}

void check_tangent(const char* op, const Tensor& tangent, const Tensor& x) {
  check_like(op, "tangent", tangent, "x", x);
  check_shape(op, "tangent", tangent, x.sizes());
}

void check_window(const char* op, at::IntArrayRef kernel) {
  TORCH_CHECK(kernel[0] * kernel[1] <= 256, "fdfa::", op,
              ": a window must have at most 256 places, since its winner's is kept in a byte; got ",
              "kernel_size ", kernel, ". Pool larger ones by torch's max_pool2d, and perturb after it");
}

// Whether 32 bits count what lies within an image (see PoolShape).
bool fits(const Tensor& x, at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding) {
  constexpr int64_t kMaxElements = (int64_t{1} << 31) - 1, kMaxSize = kMaxElements / 2;
  int64_t elements = x.size(1);
  for (int i = 0; i < 2; ++i) {
    if (elements > kMaxElements || x.size(2 + i) > kMaxSize || kernel[i] > kMaxSize ||
        stride[i] > kMaxSize) {
      return false;
    }
    elements *= x.size(2 + i) + 2 * padding[i];
  }
  return elements <= kMaxElements;
}

}  // namespace

PoolShape check_pool(const char* op, const Tensor& x, at::IntArrayRef kernel, at::IntArrayRef stride,
                     at::IntArrayRef padding) {
  TORCH_CHECK(x.scalar_type() == at::kFloat && x.dim() == 4, "fdfa::", op,
              ": x must be [N, C, H, W] in float32; got ", x.scalar_type(), " ", x.sizes());
  TORCH_CHECK(kernel.size() == 2 && stride.size() == 2 && padding.size() == 2, "fdfa::", op,
              ": kernel, stride and padding must be two numbers each; got kernel ", kernel, ", stride ",
              stride, ", padding ", padding);
  for (int i = 0; i < 2; ++i) {
    // Twice a padding may be more than 64 bits hold.
    TORCH_CHECK(x.size(2 + i) > 0 && kernel[i] > 0 && stride[i] > 0 && padding[i] >= 0 &&
                    padding[i] <= kernel[i] / 2 && kernel[i] - padding[i] <= x.size(2 + i) + padding[i],
                "fdfa::", op, ": height, width, kernel and stride must be positive, padding at most ",
                "half the kernel, and the kernel no larger than the padded image; got kernel ", kernel,
                ", stride ", stride, ", padding ", padding, " for ", x.sizes());
  }
  const auto out_size = [&](int64_t i) {
    return (x.size(2 + i) + 2 * padding[i] - kernel[i]) / stride[i] + 1;
  };
  TORCH_CHECK(
      fits(x, kernel, stride, padding), "fdfa::", op,
      ": an image with its padding must have less than 2^31 elements, and kernel and stride be ",
      "less than 2^30; got kernel ", kernel, ", stride ", stride, ", padding ", padding, " for ",
      x.sizes(), ". Larger ones run with FDFA(..., backend=\"reference\")");
  const auto small = [](int64_t size) { return static_cast<int32_t>(size); };
  return {x.size(0),
          small(x.size(2)),
          small(x.size(3)),
          small(x.size(1)),
          small(out_size(0)),
          small(out_size(1)),
          {small(kernel[0]), small(kernel[1])},
          {small(stride[0]), small(stride[1])},
          {small(padding[0]), small(padding[1])}};
}

PoolShape check_pool(const char* op, const Tensor& x, at::IntArrayRef pool) {
  TORCH_CHECK(pool.size() == 6, "fdfa::", op,
              ": pool must be kernel, stride and padding, two numbers each; got ", pool);
  return check_pool(op, x, pool.slice(0, 2), pool.slice(2, 2), pool.slice(4, 2));
}

std::tuple<Tensor, Tensor> run_pooled(EpilogueParams<float> epilogue, const Tensor& y,
                                      const PoolShape& shape, const Tensor& donated) {
  const bool zero = epilogue.tz == nullptr && epilogue.noise.is_none();
  const Tensor pooled = empty_pooled(shape, y.options());
  const Tensor pooled_tangent = zero ? empty_placeholder(pooled) : at::empty_like(pooled);
  if (zero) epilogue.zeros[1] = pooled_tangent.data_ptr<float>();
  Tensor ty;
  if (!y.is_cpu() && !zero) {  // CUDA's epilogue hands it over to the pool in memory
    ty = donated.defined() ? donated : at::empty(y.sizes(), y.options(), kOrder);
    epilogue.ty = ty.data_ptr<float>();
  }
  launch(PooledEpilogueParams{epilogue, pooled.data_ptr<float>(),
                              zero ? nullptr : pooled_tangent.data_ptr<float>(), shape},
         y.device());
  return {pooled, pooled_tangent};
}

std::tuple<Tensor, Tensor> max_pool2d(const Tensor& x, const Tensor& tangent, at::IntArrayRef kernel,
                                      at::IntArrayRef stride, at::IntArrayRef padding) {
  const char* op = "max_pool2d";
  const PoolShape shape = check_pool(op, x, kernel, stride, padding);
  check_tangent(op, tangent, x);
  const Tensor x_dense = x.contiguous(kOrder), tx_dense = tangent.contiguous(kOrder);
  const Tensor y = empty_pooled(shape, x.options()), ty = at::empty_like(y);
  launch(MaxPoolParams{x_dense.const_data_ptr<float>(), tx_dense.const_data_ptr<float>(),
                       y.data_ptr<float>(), ty.data_ptr<float>(), /*winners=*/nullptr, shape, kNoNoise},
         x.device());
  return {y, ty};
}

PoolEnd max_pool2d_end(const Tensor& x, const OptionalTensor& tangent, const Tensor& anchor,
                       at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                       const Tensor& noise_state, int64_t block, c10::string_view noise,
                       int64_t patch) {
  const char* op = "max_pool2d_end";
  const PoolShape shape = check_pool(op, x, kernel, stride, padding);
  check_window(op, kernel);
  if (tangent) check_tangent(op, *tangent, x);
  check_shape(op, "anchor", anchor, x.sizes());
  check_counter(op, "noise_state", noise_state, 3, x);
  const Noise kind = parse_noise(op, noise, /*may_be_none=*/true);
  const Tensor x_dense = x.contiguous(kOrder);
  const Tensor tx_dense = tangent ? tangent->contiguous(kOrder) : Tensor();
  const bool zero = !tangent && kind == Noise::none;
  const Tensor y = empty_pooled(shape, x.options()), pre = empty_placeholder(y);
  const Tensor ty = zero ? empty_placeholder(y) : at::empty_like(y);
  const Tensor winners = empty_pooled(shape, x.options().dtype(at::kByte));
  const BlockNoise u = block_noise(op, y.sizes(), noise_state, block, kind, patch);
  launch(MaxPoolParams{x_dense.const_data_ptr<float>(),
                       tangent ? tx_dense.const_data_ptr<float>() : nullptr,
                       y.data_ptr<float>(),
                       zero ? nullptr : ty.data_ptr<float>(),
                       winners.data_ptr<uint8_t>(),
                       shape,
                       u.params,
                       {pre.data_ptr<float>(), zero ? ty.data_ptr<float>() : nullptr}},
         x.device());
  return {y, ty, pre, winners};
}

Tensor max_pool2d_backward(const Tensor& delta, const Tensor& winners, at::IntArrayRef input_size,
                           at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding) {
  const char* op = "max_pool2d_backward";
  TORCH_CHECK(delta.scalar_type() == at::kFloat && delta.dim() == 4, "fdfa::", op,
              ": delta must be [N, C, H', W'] in float32; got ", delta.scalar_type(), " ",
              delta.sizes());
  TORCH_CHECK(input_size.size() == 2, "fdfa::", op, ": input_size must be two numbers; got ",
              input_size);
  const Tensor dx =
      at::empty({delta.size(0), delta.size(1), input_size[0], input_size[1]}, delta.options(), kOrder);
  const PoolShape shape = check_pool(op, dx, kernel, stride, padding);
  check_window(op, kernel);
  check_shape(op, "delta", delta, {shape.samples, shape.channels, shape.out_height, shape.out_width});
  check_shape(op, "winners", winners, delta.sizes());
  TORCH_CHECK_TYPE(winners.scalar_type() == at::kByte, "fdfa::", op, ": winners must be uint8; got ",
                   winners.scalar_type());
  TORCH_CHECK(winners.device() == delta.device(), "fdfa::", op,
              ": winners must be on the device of delta, ", delta.device(), "; got ", winners.device());
  const Tensor winners_dense = winners.contiguous(kOrder), delta_dense = delta.contiguous(kOrder);
  launch(MaxPoolBackwardParams{winners_dense.const_data_ptr<uint8_t>(),
                               delta_dense.const_data_ptr<float>(), dx.data_ptr<float>(), shape},
         dx.device());
  return dx;
}

}  // namespace fdfa

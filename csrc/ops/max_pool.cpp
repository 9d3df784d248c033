#include <ATen/ops/empty.h>

#include "ops/checks.h"
#include "ops/launch.h"
#include "ops/ops.h"

namespace fdfa {

std::tuple<Tensor, Tensor> max_pool2d(const Tensor& x, const Tensor& tangent, at::IntArrayRef kernel,
                                      at::IntArrayRef stride, at::IntArrayRef padding) {
  const char* op = "max_pool2d";
  TORCH_CHECK(x.scalar_type() == at::kFloat && x.dim() == 4,
              "fdfa::max_pool2d: x must be [N, C, H, W] in float32; got ", x.scalar_type(), " ",
              x.sizes());
  check_like(op, "tangent", tangent, "x", x);
  check_shape(op, "tangent", tangent, x.sizes());
  for (int i = 0; i < 2; ++i) {
    TORCH_CHECK(
        kernel[i] > 0 && stride[i] > 0 && padding[i] >= 0 && 2 * padding[i] <= kernel[i] &&
            x.size(2 + i) + 2 * padding[i] >= kernel[i],
        "fdfa::max_pool2d: kernel and stride must be positive, padding at most half the kernel, ",
        "and the kernel no larger than the padded image; got kernel ", kernel, ", stride ", stride,
        ", padding ", padding, " for ", x.sizes());
  }
  constexpr auto kOrder = at::MemoryFormat::ChannelsLast;
  const Tensor x_dense = x.contiguous(kOrder), tx_dense = tangent.contiguous(kOrder);
  const auto out_size = [&](int64_t i) {
    return (x.size(2 + i) + 2 * padding[i] - kernel[i]) / stride[i] + 1;
  };
  const Tensor y = at::empty({x.size(0), x.size(1), out_size(0), out_size(1)}, x.options(), kOrder);
  const Tensor ty = at::empty(y.sizes(), x.options(), kOrder);
  launch(MaxPoolParams{x_dense.const_data_ptr<float>(),
                       tx_dense.const_data_ptr<float>(),
                       y.data_ptr<float>(),
                       ty.data_ptr<float>(),
                       x.size(0),
                       x.size(2),
                       x.size(3),
                       x.size(1),
                       y.size(2),
                       y.size(3),
                       {kernel[0], kernel[1]},
                       {stride[0], stride[1]},
                       {padding[0], padding[1]}},
         x.device());
  return {y, ty};
}

}  // namespace fdfa

#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <tuple>
#include <vector>

namespace fdfa {

// The pixels of x [N, C, H, W] that a convolution reads, and the stride at which it goes over them: an
// unpadded 1×1 kernel reads one pixel of each stride × stride, and goes over these by one.
//
// On the CPU: oneDNN's weight gradient of such a kernel writes beyond its buffer for fewer than 16
// channels in channels_last (torch 2.13).
inline std::tuple<at::Tensor, std::vector<int64_t>> read_pixels(const at::Tensor& x,
                                                                const at::Tensor& weight,
                                                                at::IntArrayRef stride,
                                                                at::IntArrayRef padding) {
  const auto is = [](at::IntArrayRef sizes, int64_t value) {
    return std::all_of(sizes.begin(), sizes.end(), [&](int64_t size) { return size == value; });
  };
  if (!x.is_cpu() || !is(weight.sizes().slice(2), 1) || !is(padding, 0) || is(stride, 1)) {
    return {x, stride.vec()};
  }
  const at::Tensor pixels = x.slice(/*dim=*/2, 0, std::nullopt, stride[0])
                                .slice(/*dim=*/3, 0, std::nullopt, stride[1])
                                .contiguous(at::MemoryFormat::ChannelsLast);
  return {pixels, {1, 1}};
}

}  // namespace fdfa

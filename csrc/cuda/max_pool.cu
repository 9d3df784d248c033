#include <algorithm>

#include "common/max_pool.h"
#include "cuda/kernels.h"

// Max-pooling of an image and its tangent, if it has one, in one pass. Memory bound: reads x and tx,
// writes y and ty.

namespace fdfa::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kMaxGridY = 65535;

// One thread for an element of y in every gridDim.y-th row of windows. Neighbouring threads hold
// neighbouring channels, so that a warp reads whole lines.
__global__ void __launch_bounds__(kThreads) max_pool_kernel(MaxPoolParams p) {
  const PoolShape& s = p.shape;
  const int64_t row_size = s.out_width * s.channels;
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (place >= row_size) return;
  const int64_t column = place / s.channels, channel = place % s.channels;
  for (int64_t unit = blockIdx.y; unit < s.samples * s.out_height; unit += gridDim.y) {
    const PoolWindow window = pool_window(s, unit, column);
    const int64_t from = window.first + channel, to = unit * row_size + place;
    float y, ty;  // in registers until the window is done
    if (p.tx == nullptr) {
      pool(window, LoadFloat{}, p.x + from, y);
    } else {
      pool(window, LoadFloat{}, p.x + from, p.tx + from, y, ty);
      p.ty[to] = ty;
    }
    p.y[to] = y;
  }
}

// One thread for an element of dx in every gridDim.y-th row of x: it looks at each window that holds
// it, so that nothing is added by two threads and sums have one order.
__global__ void __launch_bounds__(kThreads) max_pool_backward_kernel(MaxPoolBackwardParams p) {
  const PoolShape& s = p.shape;
  const int64_t row_size = s.width * s.channels;
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (place >= row_size) return;
  const int64_t column = place / s.channels, channel = place % s.channels;
  for (int64_t unit = blockIdx.y; unit < s.samples * s.height; unit += gridDim.y) {
    const int64_t sample = unit / s.height, row = unit % s.height, own = unit * row_size + place;
    const WindowRange rows = windows_holding(row, s.kernel[0], s.stride[0], s.padding[0], s.out_height);
    const WindowRange columns =
        windows_holding(column, s.kernel[1], s.stride[1], s.padding[1], s.out_width);
    float sum = 0.0f;
    for (int64_t i = rows.first; i < rows.end; ++i) {
      for (int64_t j = columns.first; j < columns.end; ++j) {
        const PoolWindow window = pool_window(s, sample * s.out_height + i, j);
        const int64_t from = window.first + channel;
        const auto winner = static_cast<int64_t>(pool_winner(window, LoadFloat{}, p.x + from, 0.0f));
        const int64_t at = from + winner / window.columns * window.row_stride +
                           winner % window.columns * window.column_stride;
        if (at == own)
          sum += p.delta[((sample * s.out_height + i) * s.out_width + j) * s.channels + channel];
      }
    }
    p.dx[own] = sum;
  }
}

dim3 grid_of(int64_t row_size, int64_t units) {
  return dim3(static_cast<unsigned>((row_size + kThreads - 1) / kThreads),
              static_cast<unsigned>(std::min(units, kMaxGridY)));
}

}  // namespace

cudaError_t launch_max_pool(const MaxPoolParams& params, cudaStream_t stream) {
  const PoolShape& s = params.shape;
  const int64_t units = s.samples * s.out_height, row_size = s.out_width * s.channels;
  if (units == 0 || row_size == 0) return cudaSuccess;
  return launch(max_pool_kernel, grid_of(row_size, units), dim3(kThreads), stream, params);
}

cudaError_t launch_max_pool_backward(const MaxPoolBackwardParams& params, cudaStream_t stream) {
  const PoolShape& s = params.shape;
  const int64_t units = s.samples * s.height, row_size = s.width * s.channels;
  if (units == 0 || row_size == 0) return cudaSuccess;
  return launch(max_pool_backward_kernel, grid_of(row_size, units), dim3(kThreads), stream, params);
}

}  // namespace fdfa::cuda

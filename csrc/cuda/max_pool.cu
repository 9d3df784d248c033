#include <algorithm>

#include "common/max_pool.h"
#include "cuda/kernels.h"

// Max-pooling of an image and its tangent in one pass. Memory bound: reads x and tx, writes y and ty.

namespace fdfa::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kMaxGridY = 65535;

// One thread for an element of y in every gridDim.y-th row of windows. Neighbouring threads hold
// neighbouring channels, so that a warp reads whole lines.
__global__ void __launch_bounds__(kThreads) max_pool_kernel(MaxPoolParams p) {
  const int64_t row_size = p.out_width * p.channels;
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (place >= row_size) return;
  const int64_t column = place / p.channels, channel = place % p.channels;
  for (int64_t unit = blockIdx.y; unit < p.samples * p.out_height; unit += gridDim.y) {
    const PoolWindow window = pool_window(p, unit, column);
    const int64_t from = window.first + channel, to = unit * row_size + place;
    float y, ty;
    pool(window, LoadFloat{}, p.x + from, p.tx + from, y, ty);
    p.y[to] = y;
    p.ty[to] = ty;
  }
}

}  // namespace

cudaError_t launch_max_pool(const MaxPoolParams& params, cudaStream_t stream) {
  const int64_t units = params.samples * params.out_height;
  const int64_t row_size = params.out_width * params.channels;
  if (units == 0 || row_size == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>((row_size + kThreads - 1) / kThreads),
                  static_cast<unsigned>(std::min(units, kMaxGridY)));
  return launch(max_pool_kernel, grid, dim3(kThreads), stream, params);
}

}  // namespace fdfa::cuda

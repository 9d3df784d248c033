#include <algorithm>

#include "common/batch_norm.h"
#include "cuda/kernels.h"

// Batch normalisation around the epilogue: sums over rows, what they make of each channel, and the map
// of a gradient. The passes over [rows, channels] are memory bound; a warp reads 32 neighbouring
// channels of a row.

namespace fdfa::cuda {
namespace {

constexpr int kChannels = 32;
constexpr int kRows = 8;           // that a thread block reads at once
constexpr int64_t kBlocks = 1024;  // of a launch, about: some for each multiprocessor
constexpr int kFinishThreads = 128;

int64_t channel_tiles(int64_t channels) { return (channels + kChannels - 1) / kChannels; }

// Part i has rows i * part_rows up to the next one's.
__device__ int64_t part_begin(int64_t part, int64_t parts, int64_t rows) {
  const int64_t part_rows = (rows + parts - 1) / parts;
  return part * part_rows < rows ? part * part_rows : rows;
}

__global__ void __launch_bounds__(kChannels* kRows) moments_kernel(MomentParams p) {
  __shared__ float shared[4][kRows][kChannels];
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kChannels + threadIdx.x;
  float sums[4] = {};
  if (channel < p.channels) {
    const float pivot = p.pivot[channel];
    const int64_t end = part_begin(blockIdx.y + 1, gridDim.y, p.rows);
    for (int64_t row = part_begin(blockIdx.y, gridDim.y, p.rows) + threadIdx.y; row < end;
         row += kRows) {
      const int64_t at = row * p.channels + channel;
      const float d = p.x[at] - pivot, t = p.t != nullptr ? p.t[at] : 0.0f;
      sums[0] += d;
      sums[1] += d * d;
      sums[2] += t;
      sums[3] += d * t;
    }
  }
  for (int i = 0; i < 4; ++i) shared[i][threadIdx.y][threadIdx.x] = sums[i];
  __syncthreads();
  if (threadIdx.y < 4 && channel < p.channels) {
    double sum = 0.0;
    for (int row = 0; row < kRows; ++row) sum += shared[threadIdx.y][row][threadIdx.x];
    p.sums[(static_cast<int64_t>(blockIdx.y) * 4 + threadIdx.y) * p.channels + channel] = sum;
  }
}

__device__ void finish_channel(const NormForwardParams& p, int64_t c, const double (&total)[4]) {
  normalize_channel(p, c, total);
}
__device__ void finish_channel(const NormBackwardParams& p, int64_t c, const double (&total)[4]) {
  normalize_channel_backward(p, c, total);
}

// A thread block for a channel.
template <class Params>
__global__ void __launch_bounds__(kFinishThreads) finish_kernel(Params p) {
  __shared__ double shared[4][kFinishThreads];
  const int64_t channel = blockIdx.x;
  for (int i = 0; i < 4; ++i) {
    double sum = 0.0;
    for (int64_t part = threadIdx.x; p.sums != nullptr && part < p.parts; part += kFinishThreads) {
      sum += p.sums[(part * 4 + i) * p.channels + channel];
    }
    shared[i][threadIdx.x] = sum;
  }
  for (unsigned half = kFinishThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x >= half) continue;
    for (int i = 0; i < 4; ++i) shared[i][threadIdx.x] += shared[i][threadIdx.x + half];
  }
  if (threadIdx.x != 0) return;
  const double total[4] = {shared[0][0], shared[1][0], shared[2][0], shared[3][0]};
  finish_channel(p, channel, total);
}

__global__ void __launch_bounds__(kChannels* kRows) combine_kernel(CombineParams p) {
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kChannels + threadIdx.x;
  if (channel >= p.channels) return;
  const float scale = p.map.scale[channel], slope = p.map.slope[channel];
  const float offset = p.map.offset[channel];
  const int64_t stride = static_cast<int64_t>(gridDim.y) * kRows;
  for (int64_t row = static_cast<int64_t>(blockIdx.y) * kRows + threadIdx.y; row < p.rows;
       row += stride) {
    const int64_t at = row * p.channels + channel;
    p.out[at] = scale * p.t[at] + (slope * p.x[at] + offset);
  }
}

dim3 grid_of(int64_t channels, int64_t parts) {
  return dim3(static_cast<unsigned>(channel_tiles(channels)), static_cast<unsigned>(parts));
}

template <class Params>
cudaError_t launch_finish(const Params& params, cudaStream_t stream) {
  if (params.channels == 0) return cudaSuccess;
  return launch(finish_kernel<Params>, dim3(static_cast<unsigned>(params.channels)),
                dim3(kFinishThreads), stream, params);
}

}  // namespace

int64_t moment_parts(int64_t rows, int64_t channels) {
  const int64_t most = (rows + 4 * kRows - 1) / (4 * kRows);  // four rows a thread are worth a part
  const int64_t wanted = kBlocks / std::max<int64_t>(1, channel_tiles(channels));
  return std::max<int64_t>(1, std::min(most, wanted));
}

cudaError_t launch_moments(const MomentParams& params, cudaStream_t stream) {
  if (params.channels == 0) return cudaSuccess;
  const int64_t parts = moment_parts(params.rows, params.channels);
  return launch(moments_kernel, grid_of(params.channels, parts), dim3(kChannels, kRows), stream,
                params);
}

cudaError_t launch_norm(const NormForwardParams& params, cudaStream_t stream) {
  return launch_finish(params, stream);
}

cudaError_t launch_norm_backward(const NormBackwardParams& params, cudaStream_t stream) {
  return launch_finish(params, stream);
}

cudaError_t launch_combine(const CombineParams& params, cudaStream_t stream) {
  if (params.channels == 0 || params.rows == 0) return cudaSuccess;
  const int64_t parts = moment_parts(params.rows, params.channels);
  return launch(combine_kernel, grid_of(params.channels, parts), dim3(kChannels, kRows), stream,
                params);
}

}  // namespace fdfa::cuda

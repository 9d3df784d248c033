#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/batch_norm.h"
#include "cuda/device.h"
#include "cuda/kernels.h"

// Batch normalisation around the epilogue: sums over rows, what they make of each channel, and the map
// of a gradient. The passes over [rows, channels] are memory bound: the sums read x and t once, 8 bytes
// an element, and the map reads both and writes one, 12 bytes.

namespace fdfa::cuda {
namespace {

// A thread block of the passes over rows: so many lanes along the channels, the rest along the rows.
constexpr int kThreads = 256;
constexpr int kMostLanes = 32;
// Thread blocks that a multiprocessor holds at once. 85 registers for each thread keep the sums and the
// loads of kRowsAtOnce rows without spills, and 768 threads with 128 bytes each on their way are
// several times what latency asks for (reckoned).
constexpr int kResident = 3;
// Rows whose loads a thread has in flight.
constexpr int kRowsAtOnce = 4;
// Rows of a thread of which single precision takes the sum.
constexpr int64_t kMostRows = 512;
constexpr int64_t kMostParts = 65535;  // gridDim.y
constexpr int kFinishThreads = 128;

// Neighbouring channels of one row that a thread takes, by one load or store.
template <int kChannels>
struct alignas(kChannels * sizeof(float)) Pack {
  float values[kChannels];
};

template <int kChannels>
__device__ Pack<kChannels> load_pack(const float* p) {
  return *reinterpret_cast<const Pack<kChannels>*>(p);
}

// Part i has rows i * part_rows up to the next one's.
__device__ int64_t part_begin(int64_t part, int64_t parts, int64_t rows) {
  const int64_t part_rows = (rows + parts - 1) / parts;
  return part * part_rows < rows ? part * part_rows : rows;
}

// The thread's rows of the part that its thread block has.
struct ThreadRows {
  int64_t begin, end;
  int step;
};

__device__ ThreadRows own_rows(int64_t rows) {
  return {part_begin(blockIdx.y, gridDim.y, rows) + threadIdx.y,
          part_begin(blockIdx.y + 1, gridDim.y, rows), static_cast<int>(blockDim.y)};
}

// f(row, std::integral_constant of how many rows from there on, own.step apart): kRowsAtOnce, and at
// the end one by one.
template <class F>
__device__ void for_rows(const ThreadRows& own, const F& f) {
  int64_t row = own.begin;
  for (; row + (kRowsAtOnce - 1) * own.step < own.end; row += kRowsAtOnce * own.step) {
    f(row, std::integral_constant<int, kRowsAtOnce>{});
  }
  for (; row < own.end; row += own.step) f(row, std::integral_constant<int, 1>{});
}

// The first of the thread's channels, which may be none.
template <int kChannels>
__device__ int64_t own_channel() {
  return (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kChannels;
}

// sums[part] = (sums of d, d², t, d t), each [channels]; thread blocks are parts along y.
template <int kChannels, bool kHasT>
__global__ void __launch_bounds__(kThreads, kResident) moments_kernel(MomentParams p) {
  constexpr int kKinds = 4;
  __shared__ float shared[kKinds][kThreads * kChannels];
  const int64_t channel = own_channel<kChannels>();
  const bool inside = channel < p.channels;  // threads outside still meet the barrier
  float sums[kKinds][kChannels] = {};
  if (inside) {
    const auto pivot = load_pack<kChannels>(p.pivot + channel);
    const ThreadRows own = own_rows(p.rows);
    for_rows(own, [&](int64_t row, auto count) {
      constexpr int kCount = decltype(count)::value;
      Pack<kChannels> x[kCount], t[kCount] = {};
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int64_t at = (row + i * own.step) * p.channels + channel;
        x[i] = load_pack<kChannels>(p.x + at);
        if (kHasT) t[i] = load_pack<kChannels>(p.t + at);
      }
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
          const float d = x[i].values[c] - pivot.values[c];
          sums[0][c] += d;
          sums[1][c] += d * d;
          if (!kHasT) continue;
          sums[2][c] += t[i].values[c];
          sums[3][c] += d * t[i].values[c];
        }
      }
    });
  }
  const int width = static_cast<int>(blockDim.x) * kChannels;  // channels of the thread block
#pragma unroll
  for (int kind = 0; kind < kKinds; ++kind) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      shared[kind][threadIdx.y * width + threadIdx.x * kChannels + c] = sums[kind][c];
    }
  }
  __syncthreads();
  // A sum of a channel for each thread.
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  for (int i = thread; i < kKinds * width; i += kThreads) {
    const int kind = i / width, c = i % width;
    const int64_t own = static_cast<int64_t>(blockIdx.x) * width + c;
    if (own >= p.channels) continue;
    double sum = 0.0;
    for (int row = 0; row < static_cast<int>(blockDim.y); ++row) sum += shared[kind][row * width + c];
    p.sums[(static_cast<int64_t>(blockIdx.y) * kKinds + kind) * p.channels + own] = sum;
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

// out = scale t + slope x + offset; out is memory of its own.
template <int kChannels>
__global__ void __launch_bounds__(kThreads, kResident) combine_kernel(CombineParams p) {
  const int64_t channel = own_channel<kChannels>();
  if (channel >= p.channels) return;
  const auto scale = load_pack<kChannels>(p.map.scale + channel);
  const auto slope = load_pack<kChannels>(p.map.slope + channel);
  const auto offset = load_pack<kChannels>(p.map.offset + channel);
  const float* __restrict__ const x_rows = p.x;
  const float* __restrict__ const t_rows = p.t;
  float* __restrict__ const out_rows = p.out;
  const ThreadRows own = own_rows(p.rows);
  for_rows(own, [&](int64_t row, auto count) {
    constexpr int kCount = decltype(count)::value;
    Pack<kChannels> x[kCount], t[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int64_t at = (row + i * own.step) * p.channels + channel;
      x[i] = load_pack<kChannels>(x_rows + at);
      t[i] = load_pack<kChannels>(t_rows + at);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        t[i].values[c] =
            scale.values[c] * t[i].values[c] + (slope.values[c] * x[i].values[c] + offset.values[c]);
      }
      const int64_t at = (row + i * own.step) * p.channels + channel;
      *reinterpret_cast<Pack<kChannels>*>(out_rows + at) = t[i];
    }
  });
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Threads along `width` channels or packs of them: the power of two that leaves the fewest idle.
int lanes_for(int64_t width) {
  int best = kMostLanes;
  // Eight packs are a line of 128 bytes.
  for (int lanes = kMostLanes / 2; lanes > 0 && (lanes >= 8 || lanes >= width); lanes /= 2) {
    if (ceil_div(width, lanes) * lanes < ceil_div(width, best) * best) best = lanes;
  }
  return best;
}

// What the threads of a launch over [rows, channels] are.
struct Shape {
  dim3 grid, block;
};

Shape shape_of(int64_t channels, int channels_of_thread, int64_t parts) {
  const int64_t width = channels / channels_of_thread;
  const int lanes = lanes_for(width);
  return {dim3(static_cast<unsigned>(ceil_div(width, lanes)), static_cast<unsigned>(parts)),
          dim3(static_cast<unsigned>(lanes), static_cast<unsigned>(kThreads / lanes))};
}

// Whether all of a thread's loads may be of four floats. A null pointer is never followed.
template <class... Pointers>
bool takes_packs(int64_t channels, Pointers... pointers) {
  return channels % 4 == 0 && ((reinterpret_cast<uintptr_t>(pointers) % sizeof(Pack<4>) == 0) && ...);
}

template <class Params>
cudaError_t launch_finish(const Params& params, cudaStream_t stream) {
  if (params.channels == 0) return cudaSuccess;
  return launch(finish_kernel<Params>, dim3(static_cast<unsigned>(params.channels)),
                dim3(kFinishThreads), stream, params);
}

}  // namespace

// As many as the device holds thread blocks at once, each with rows for all of its threads to have
// kRowsAtOnce in flight; more where these would be too many rows for single precision.
int64_t moment_parts(int64_t rows, int64_t channels) {
  const int64_t width = channels % 4 == 0 ? channels / 4 : channels;
  const int lanes = lanes_for(width);
  const int64_t rows_of_block = kThreads / lanes;
  const int64_t wave =
      int64_t{multiprocessors()} * kResident / std::max<int64_t>(1, ceil_div(width, lanes));
  const int64_t useful = ceil_div(rows, kRowsAtOnce * rows_of_block);
  const int64_t exact = ceil_div(rows, kMostRows * (kThreads / kMostLanes));
  return std::clamp<int64_t>(std::max(std::min(wave, useful), exact), 1, kMostParts);
}

cudaError_t launch_moments(const MomentParams& params, cudaStream_t stream) {
  if (params.channels == 0) return cudaSuccess;
  const bool packs = takes_packs(params.channels, params.x, params.t, params.pivot);
  const Shape shape = shape_of(params.channels, packs ? 4 : 1, params.parts);
  const auto kernel = packs
                          ? (params.t != nullptr ? moments_kernel<4, true> : moments_kernel<4, false>)
                          : (params.t != nullptr ? moments_kernel<1, true> : moments_kernel<1, false>);
  return launch(kernel, shape.grid, shape.block, stream, params);
}

cudaError_t launch_norm(const NormForwardParams& params, cudaStream_t stream) {
  return launch_finish(params, stream);
}

cudaError_t launch_norm_backward(const NormBackwardParams& params, cudaStream_t stream) {
  return launch_finish(params, stream);
}

cudaError_t launch_combine(const CombineParams& params, cudaStream_t stream) {
  if (params.channels == 0 || params.rows == 0) return cudaSuccess;
  const ChannelMap& map = params.map;
  const bool packs =
      takes_packs(params.channels, params.x, params.t, params.out, map.scale, map.slope, map.offset);
  const Shape shape =
      shape_of(params.channels, packs ? 4 : 1, moment_parts(params.rows, params.channels));
  return launch(packs ? combine_kernel<4> : combine_kernel<1>, shape.grid, shape.block, stream, params);
}

}  // namespace fdfa::cuda

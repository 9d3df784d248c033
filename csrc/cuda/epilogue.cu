#include <algorithm>
#include <cstdint>

#include "common/activation.h"
#include "common/dtype.h"
#include "common/noise.h"
#include "cuda/device.h"
#include "cuda/kernels.h"
#include "cuda/vectors.h"

// The pass after a block's matrix product, for N samples of D features: y = f(a) and ty = f'(a) ta + u,
// with a and ta from the products z and tz as EpilogueParams says. Memory bound: z and tz are read
// once, y and ty, and the pre-activation where f' needs it, written once, 16 N D bytes in float. The
// noise u is made from the sample's and the feature's number.

namespace fdfa::cuda {
namespace {

// A warp has 128 neighbouring features of a sample, a thread the four that share one Philox block. A
// thread block has that many features of 8 samples at a time, and goes on to later samples.
constexpr int kQuads = 32;
constexpr int kSamples = 8;
constexpr int kThreads = kQuads * kSamples;
constexpr int kBlocksPerSm = 4;             // 64 registers a thread
constexpr int64_t kMostFeatures = 1 << 30;  // of a sample, which int counts

// What the samples have in common at a thread's four features.
struct Channels {
  float bias[4] = {}, scale[4] = {1, 1, 1, 1}, slope[4] = {}, offset[4] = {};
};

template <class T>
__device__ Channels own_channels(const EpilogueParams<T>& p, int feature) {
  Channels own;
  const int channels = static_cast<int>(p.channels);
  int channel = feature % channels;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (feature + i >= p.features) break;
    if (p.bias != nullptr) own.bias[i] = to_float(p.bias[channel]);
    if (p.map.scale != nullptr) own.scale[i] = p.map.scale[channel];
    if (p.map.slope != nullptr) {
      own.slope[i] = p.map.slope[channel];
      own.offset[i] = p.map.offset[channel];
    }
    if (++channel == channels) channel = 0;
  }
  return own;
}

// Every gridDim.y-th group of samples of the thread's features. Results may be written over what they
// are made from, so a thread loads all of a quad before it stores any.
template <bool kWhole, Activation kActivation, Noise kNoise, class T>
__device__ void pass_over_samples(const EpilogueParams<T>& p, int feature) {
  constexpr bool kSlopeFromPre = derivative_needs_pre_activation(kActivation);
  const Channels own = own_channels(p, feature);
  const int count = static_cast<int>(p.features) - feature;
  int given[4] = {};  // whose noise the features take, where it is given
  if (kNoise == Noise::none && p.noise.given != nullptr) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      given[i] = p.noise.patches.feature_of(feature + (i < count ? i : 0));
    }
  }
  NoiseStream stream{};
  if constexpr (kNoise != Noise::none) stream = noise_stream(p.noise.state, p.noise.block, 0);
  const uint32_t first_sample = stream.sample;
  const int64_t step = int64_t{gridDim.y} * kSamples, ahead = step * p.features;
  int64_t sample = blockIdx.y * kSamples + threadIdx.y;
  int64_t at = sample * p.features + feature;
#pragma unroll 1
  for (; sample < p.samples; sample += step, at += ahead) {
    float z[4], tangent[4] = {}, u[4];
    if (p.z != nullptr) load_quad<kWhole>(p.z + at, count, z);
    if (p.tz != nullptr) load_quad<kWhole>(p.tz + at, count, tangent);
    // Registers have no room for the next sample's, but the L2 cache has.
    if (sample + step < p.samples) {
      if (p.z != nullptr) prefetch_to_l2(p.z + at + ahead);
      if (p.tz != nullptr) prefetch_to_l2(p.tz + at + ahead);
    }
    // Ahead of what needs the loads, so that it hides them.
    stream.sample = first_sample + static_cast<uint32_t>(sample);
    noise4<kNoise>(stream, static_cast<uint32_t>(feature) / 4, u[0], u[1], u[2], u[3]);
    if (kNoise == Noise::none && p.noise.given != nullptr) {
      const float* own_noise = p.noise.given + sample * p.noise.patches.features();
#pragma unroll
      for (int i = 0; i < 4; ++i) u[i] = own_noise[given[i]];
    }
    if (p.z != nullptr) {
      float y[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        tangent[i] = own.scale[i] * tangent[i] + (own.slope[i] * z[i] + own.offset[i]);
        z[i] = own.scale[i] * z[i] + own.bias[i];
        y[i] = to_float(from_float<T>(activate<kActivation>(z[i])));  // as stored, and read by f' later
        tangent[i] *= derivative<kActivation>(kSlopeFromPre ? z[i] : y[i]);
      }
      store_quad<kWhole>(p.y + at, count, y);
      if (p.pre != nullptr) store_quad<kWhole>(p.pre + at, count, z);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) tangent[i] += u[i];
    if (p.ty != nullptr) store_quad<kWhole>(p.ty + at, count, tangent);
  }
}

template <class T, Activation kActivation, Noise kNoise>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    epilogue_kernel(const __grid_constant__ EpilogueParams<T> p, bool whole) {
  write_zeros(p.zeros);
  const int feature = 4 * (blockIdx.x * kQuads + threadIdx.x);
  if (feature >= p.features) return;
  if (whole) {
    pass_over_samples<true, kActivation, kNoise>(p, feature);
  } else {
    pass_over_samples<false, kActivation, kNoise>(p, feature);
  }
}

// A null pointer is aligned: it is never followed.
template <class T>
bool quads_aligned(const EpilogueParams<T>& p) {
  const auto aligned = [](const T* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % (4 * sizeof(T)) == 0;
  };
  return p.features % 4 == 0 && aligned(p.z) && aligned(p.tz) && aligned(p.y) && aligned(p.ty) &&
         aligned(p.pre);
}

}  // namespace

template <class T>
cudaError_t launch_epilogue(const EpilogueParams<T>& params, cudaStream_t stream) {
  if (params.transposed_pitch || params.features > kMostFeatures) return cudaErrorInvalidValue;
  if (params.samples == 0 || params.features == 0) return cudaSuccess;
  const int64_t columns = (params.features + 4 * kQuads - 1) / (4 * kQuads);
  const int64_t rows = (params.samples + kSamples - 1) / kSamples;
  // No more thread blocks than the device holds at once: each reads the channels' values once.
  const int64_t resident = std::max<int64_t>(1, multiprocessors() * kBlocksPerSm / columns);
  const dim3 grid(static_cast<unsigned>(columns), static_cast<unsigned>(std::min(rows, resident)));
  const bool whole = quads_aligned(params);
  return with_activation(params.activation, [&](auto activation) {
    return with_noise(params.noise.kind, [&](auto noise) {
      return launch(epilogue_kernel<T, decltype(activation)::value, decltype(noise)::value>, grid,
                    dim3(kQuads, kSamples), stream, params, whole);
    });
  });
}

template cudaError_t launch_epilogue(const EpilogueParams<float>&, cudaStream_t);
template cudaError_t launch_epilogue(const EpilogueParams<bfloat16>&, cudaStream_t);
template cudaError_t launch_epilogue(const EpilogueParams<float16>&, cudaStream_t);

}  // namespace fdfa::cuda

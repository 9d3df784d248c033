#include <algorithm>
#include <cstdint>

#include "common/activation.h"
#include "common/dtype.h"
#include "cuda/device.h"
#include "cuda/kernels.h"
#include "cuda/vectors.h"

// The projected errors of patches, given to their pixels: delta = projected ⊙ f'. Memory bound: the
// saved activation is read once and delta written once, 8 N D bytes in float; what is projected is less
// by the pixels of a patch, and stays in the caches.

namespace fdfa::cuda {
namespace {

// As an epilogue has them: a thread has four neighbouring features of every gridDim.y-th group of
// samples.
constexpr int kQuads = 32;
constexpr int kSamples = 8;
constexpr int kThreads = kQuads * kSamples;
constexpr int kBlocksPerSm = 4;  // 64 registers a thread

// kWhole: all four features exist in every row, and every row is aligned for vectors. The activation at
// run time: the loads are waited for longer than it is asked.
template <bool kWhole, class T>
__device__ void spread_quad(const SpreadParams<T>& p, int feature) {
  const int64_t features = p.patches.image(), patch_features = p.patches.features();
  const int count = p.patches.image() - feature;
  int from[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    from[i] = p.patches.feature_of(feature + (i < count ? i : 0));
  }
  const int64_t step = int64_t{gridDim.y} * kSamples;
#pragma unroll 1
  for (int64_t sample = blockIdx.y * kSamples + threadIdx.y; sample < p.samples; sample += step) {
    const int64_t at = sample * features + feature;
    const float* projected = p.projected + sample * patch_features;
    float delta[4], saved[4];
    for (int i = 0; i < 4; ++i) delta[i] = projected[from[i]];
    if (p.saved_activation != nullptr) {
      load_quad<kWhole>(p.saved_activation + at, count, saved);
      with_activation(p.activation, [&](auto f) {
        for (int i = 0; i < 4; ++i) delta[i] *= derivative<decltype(f)::value>(saved[i]);
      });
    }
    store_quad<kWhole>(p.delta + at, count, delta);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    spread_kernel(const __grid_constant__ SpreadParams<T> p, bool whole) {
  const int feature = 4 * (blockIdx.x * kQuads + threadIdx.x);
  if (feature >= p.patches.image()) return;
  if (whole) {
    spread_quad<true>(p, feature);
  } else {
    spread_quad<false>(p, feature);
  }
}

}  // namespace

template <class T>
cudaError_t launch_spread(const SpreadParams<T>& params, cudaStream_t stream) {
  const int64_t features = params.patches.image();
  if (params.samples == 0 || features == 0) return cudaSuccess;
  const int64_t columns = (features + 4 * kQuads - 1) / (4 * kQuads);
  const int64_t rows = (params.samples + kSamples - 1) / kSamples;
  // No more thread blocks than the device holds at once: each finds its features' patches once.
  const int64_t resident = std::max<int64_t>(1, multiprocessors() * kBlocksPerSm / columns);
  const dim3 grid(static_cast<unsigned>(columns), static_cast<unsigned>(std::min(rows, resident)));
  const auto aligned = [](const T* pointer) {  // a null pointer is: it is never followed
    return reinterpret_cast<uintptr_t>(pointer) % (4 * sizeof(T)) == 0;
  };
  const bool whole = features % 4 == 0 && aligned(params.saved_activation) && aligned(params.delta);
  return launch(spread_kernel<T>, grid, dim3(kQuads, kSamples), stream, params, whole);
}

template cudaError_t launch_spread(const SpreadParams<float>&, cudaStream_t);
template cudaError_t launch_spread(const SpreadParams<bfloat16>&, cudaStream_t);
template cudaError_t launch_spread(const SpreadParams<float16>&, cudaStream_t);

}  // namespace fdfa::cuda

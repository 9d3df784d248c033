#include "cuda/counters.h"
#include "cuda/kernels.h"

namespace fdfa::cuda {
namespace {

constexpr int kStateWords = 3, kStepWord = 1;

// snapshot [3] = state [3], and the state's step counted up: 24 bytes read and 32 written, where a copy
// and an addition would be two launches.
__global__ void __launch_bounds__(kStateWords) next_noise_kernel(NextNoiseParams p) {
  const int64_t word = p.state[threadIdx.x];
  p.snapshot[threadIdx.x] = word;
  if (threadIdx.x == kStepWord) p.state[kStepWord] = word + 1;
}

__global__ void __launch_bounds__(1) count_kernel(int64_t* counter) { ++*counter; }

}  // namespace

cudaError_t launch_next_noise(const NextNoiseParams& params, cudaStream_t stream) {
  return launch(next_noise_kernel, dim3(1), dim3(kStateWords), stream, params);
}

cudaError_t launch_count(int64_t* counter, cudaStream_t stream) {
  return launch(count_kernel, dim3(1), dim3(1), stream, counter);
}

}  // namespace fdfa::cuda

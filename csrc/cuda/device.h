#pragma once

#include "cuda/launch.h"

namespace fdfa::cuda {

// Of the current device. The runtime knows it without asking the device. One where it fails, since the
// launch that follows reports the error.
inline int multiprocessors() {
  int device = 0, count = 1;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    return 1;
  }
  return count;
}

#if defined(FDFA_EMULATE_CUDA) || defined(__CUDACC__)
// Begins to bring the line of global memory at p into the L2 cache; nobody waits for it.
__device__ inline void prefetch_to_l2(const void* p) {
#if defined(FDFA_EMULATE_CUDA)
  static_cast<void>(p);
#else
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}
#endif

}  // namespace fdfa::cuda

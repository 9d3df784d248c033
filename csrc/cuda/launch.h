#pragma once

#if defined(FDFA_EMULATE_CUDA)
#include "emulation/cuda_emulation.h"
#else
#include <cuda_runtime.h>
#endif

// FDFA_EMULATE_CUDA: the kernels run on the host, compiled as C++ (see emulation/cuda_emulation.h).

namespace fdfa::cuda {

#if defined(FDFA_EMULATE_CUDA)
using emulation::launch;
#elif defined(__CUDACC__)
// Queues kernel(arguments...) on the stream and returns the launch error.
template <class... Arguments>
cudaError_t launch(void (*kernel)(Arguments...), dim3 grid, dim3 block, cudaStream_t stream,
                   Arguments... arguments) {
  // clang-format off: in a header it takes the launch brackets for operators
  kernel<<<grid, block, 0, stream>>>(arguments...);
  // clang-format on
  return cudaGetLastError();
}
#endif

#if defined(FDFA_EMULATE_CUDA) || defined(__CUDACC__)
// The one thread that writes `zeros`, as EpilogueParams has them.
template <class T>
__device__ void write_zeros(T* const (&zeros)[2]) {
  if (blockIdx.x + blockIdx.y + threadIdx.x + threadIdx.y > 0) return;
  for (T* zero : zeros) {
    if (zero != nullptr) *zero = T{};
  }
}
#endif

}  // namespace fdfa::cuda

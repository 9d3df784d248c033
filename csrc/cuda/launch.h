#pragma once

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include "emulation/cuda_emulation.h"
#endif

namespace fdfa::cuda {

#if defined(__CUDACC__)
// Queues kernel(arguments...) on the stream and returns the launch error.
template <class... Arguments>
cudaError_t launch(void (*kernel)(Arguments...), dim3 grid, dim3 block, cudaStream_t stream,
                   Arguments... arguments) {
  kernel<<<grid, block, 0, stream>>>(arguments...);
  return cudaGetLastError();
}
#else
using emulation::launch;
#endif

}  // namespace fdfa::cuda

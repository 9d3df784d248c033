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

}  // namespace fdfa::cuda

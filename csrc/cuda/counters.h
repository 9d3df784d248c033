#pragma once

#include <cstdint>

#include "cuda/launch.h"

// Counters in device memory, which a replayed CUDA graph finds as the replay before left them.

namespace fdfa::cuda {

// The number of this Adam step, from 1, for *updates steps before it; one thread of each thread block
// asks. With `counter`, which is `updates` or null, the launch also counts the step, and needs no other
// launch for it: thread blocks start at any time, so that none may change the count before all have
// read it. Until then the upper half of the 64 bits, which is zero between launches, holds how many
// have; the last of them writes the new count. Counts below 2³².
__device__ inline int64_t update_number(const int64_t* updates, int64_t* counter) {
  const uint32_t before = *reinterpret_cast<const volatile uint32_t*>(updates);
  if (counter != nullptr) {
    auto* halves = reinterpret_cast<unsigned*>(counter);  // of a little-endian word
    __threadfence();
    if (atomicInc(halves + 1, gridDim.x - 1) == gridDim.x - 1) {
      __threadfence();
      halves[0] = before + 1;
    }
  }
  return int64_t{before} + 1;
}

}  // namespace fdfa::cuda

#pragma once

#include "cpu/kernels.h"

// Each instruction set's translation unit fills one table; kernels.cpp picks one when first used.

namespace fdfa::cpu {

// Features of one sample that an epilogue unit covers: noise, biases and operands stay in L1.
constexpr int64_t kEpilogueRun = 1024;
// The unit of a transposed product: a cache line of samples, and features whose rows stay in L1.
constexpr int64_t kTransposedSamples = 16, kTransposedRun = 128;
// Columns of B in a feedback tile: the noise of 64 samples and B's tile for 10 outputs take 19 KiB.
constexpr int64_t kTileColumns = 64;

template <class T>
struct KernelTable {
  void (*epilogue)(const EpilogueParams<T>&, int64_t begin, int64_t end);
  void (*feedback_step)(const FeedbackParams<T>&, int64_t begin, int64_t end);
  void (*spread)(const SpreadParams<T>&, int64_t begin, int64_t end);
};

struct IsaKernels {
  KernelTable<float> f32;
  KernelTable<bfloat16> bf16;
  KernelTable<float16> f16;
  void (*moments)(const MomentParams&, int64_t begin, int64_t end);
  void (*combine)(const CombineParams&, int64_t begin, int64_t end);
  void (*max_pool)(const MaxPoolParams&, int64_t begin, int64_t end);
  void (*max_pool_backward)(const MaxPoolBackwardParams&, int64_t begin, int64_t end);
  void (*pooled_epilogue)(const PooledEpilogueParams&, int64_t begin, int64_t end);
};

namespace baseline {
extern const IsaKernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const IsaKernels kernels;
}
namespace avx512 {
extern const IsaKernels kernels;
}
#endif

}  // namespace fdfa::cpu

#pragma once

// Functions of csrc/common run in CUDA kernels, in the CPU kernels (once for each instruction set, so
// they must be inlined into the caller's target) and in the C++ tests.
#if defined(__CUDACC__)
#define FDFA_HD __host__ __device__ __forceinline__
#else
#define FDFA_HD inline __attribute__((always_inline))
#endif

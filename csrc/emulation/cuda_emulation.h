#pragma once

#include <cstdint>

// Runs CUDA kernels on the host with an ordinary C++ compiler, to test them, and their barriers under a
// thread sanitizer, where there is no GPU. Each thread of a thread block is a real thread; thread
// blocks run one after another, so __shared__ is static storage. Covers what this project's kernels
// use.

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;  // launches are synchronous, so that streams mean nothing

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(4) uchar4 {
  unsigned char x, y, z, w;
};

extern thread_local dim3 threadIdx, blockIdx;
extern thread_local dim3 blockDim, gridDim;

namespace emulation {

// Waits for the threads of the block that have not left the kernel.
void block_barrier();
// c += a b for a [16, 8] and b [8, 8], whose elements lie in the threads of the warp as PTX says for
// mma.m16n8k8 of tf32. All threads of the warp must take part.
void multiply_tiles(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

// Calls body(context) once for every thread of the grid.
cudaError_t run_grid(dim3 grid, dim3 block, void (*body)(const void*), const void* context);

// kernel(arguments...) over the grid; returns when it has ended.
template <class... Arguments>
cudaError_t launch(void (*kernel)(Arguments...), dim3 grid, dim3 block, cudaStream_t,
                   Arguments... arguments) {
  const auto call = [&] { kernel(arguments...); };
  using Call = decltype(call);
  return run_grid(grid, block, [](const void* context) { (*static_cast<Call*>(context))(); }, &call);
}

}  // namespace emulation

inline void __syncthreads() { emulation::block_barrier(); }

#pragma once

#include <algorithm>
#include <cstdint>

// Runs CUDA kernels on the host with an ordinary C++ compiler, to test them, and their barriers under a
// thread sanitizer, where there is no GPU. The threads of a thread block are fibers that change places
// at barriers, and threads to the sanitizer; thread blocks run one after another, so __shared__ is
// static storage. Covers what this project's kernels use.

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

// A device of two multiprocessors.
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;  // launches are synchronous, so that streams mean nothing

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// CUDA's vector types, with its alignment, which kernels must not assume where memory has less.
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(4) uchar4 {
  unsigned char x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

#define threadIdx (::emulation::thread_index())
#define blockIdx (::emulation::block_index())
#define blockDim (::emulation::block_dim())
#define gridDim (::emulation::grid_dim())

namespace emulation {

dim3 thread_index();
dim3 block_index();
dim3 block_dim();
dim3 grid_dim();

// Waits for the threads of the block that have not left the kernel.
void block_barrier();

// c + Σ a[i] b[i] for `depth` tf32 numbers, as a tensor core adds: products exact, then all addends cut
// off, toward zero, at the last place that the largest of them has in single precision, and so is their
// sum (Fasi et al., "Numerical behavior of NVIDIA tensor cores", PeerJ Computer Science 7:e330, 2021).
// That is Volta's arithmetic; later tensor cores keep a few places more, so that no error is
// understated.
float tensor_core_sum(float c, const float* a, const float* b, int depth);
// How many products one such sum takes (Ampere's tf32): two sums make the 8 of a tile.
constexpr int kTensorCoreDepth = 4;

// c += a b for a [16, 8] and b [8, 8], whose elements lie in the threads of the warp as PTX says for
// mma.m16n8k8 of tf32, by tensor_core_sum. All threads of the warp must take part.
void multiply_tiles(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

// `value` of the thread of the warp whose lane differs from the caller's by the mask's bits.
float exchange(float value, unsigned lane_mask);

// Whether launches run the last thread block of their grid and no other, for tests of sizes that all of
// them would take hours for.
void run_last_block_alone(bool alone);

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

using std::min;
inline void __syncthreads() { emulation::block_barrier(); }
inline float __shfl_xor_sync(unsigned, float value, unsigned lane_mask) {
  return emulation::exchange(value, lane_mask);
}

inline void __threadfence() {}  // its atomics are sequentially consistent

// Adds one, or goes back to zero from `last` on; returns the old value.
inline unsigned atomicInc(unsigned* address, unsigned last) {
  unsigned old = __atomic_load_n(address, __ATOMIC_SEQ_CST);
  while (!__atomic_compare_exchange_n(address, &old, old >= last ? 0 : old + 1, /*weak=*/true,
                                      __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
  }
  return old;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int /*device*/) {
  *value = 2;
  return cudaSuccess;
}

#include "emulation/cuda_emulation.h"
#include "tests/check.h"

namespace {

constexpr unsigned kThreads = 96;

// Every thread reads what another wrote, twice, so that both barriers are needed.
__global__ void reverse_twice(int* values) {
  __shared__ int shared[kThreads];
  int* block = values + blockIdx.x * kThreads;
  for (int round = 0; round < 2; ++round) {
    shared[threadIdx.x] = block[threadIdx.x] + 1;
    __syncthreads();
    block[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
    __syncthreads();
  }
}

// Threads that have left the kernel are not waited for.
__global__ void leave_early(int* count) {
  __shared__ int shared[kThreads];
  if (threadIdx.x >= 40) return;
  shared[threadIdx.x] = 1;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 0; i < 40; ++i) *count += shared[i];
}

__global__ void indices(unsigned* seen) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  ++seen[block * blockDim.x * blockDim.y * blockDim.z + thread];
}

}  // namespace

int main() {
  int values[2 * kThreads];
  for (int i = 0; i < static_cast<int>(2 * kThreads); ++i) values[i] = i;
  CHECK(emulation::launch(reverse_twice, 2, kThreads, nullptr, &values[0]) == cudaSuccess);
  for (int i = 0; i < static_cast<int>(2 * kThreads); ++i) CHECK(values[i] == i + 2);

  int count = 0;
  CHECK(emulation::launch(leave_early, 1, kThreads, nullptr, &count) == cudaSuccess);
  CHECK(count == 40);

  unsigned seen[2 * 3 * 2 * 4 * 2 * 3] = {};
  CHECK(emulation::launch(indices, dim3(2, 3, 2), dim3(4, 2, 3), nullptr, &seen[0]) == cudaSuccess);
  for (const unsigned times : seen) CHECK(times == 1);

  CHECK(emulation::launch(indices, 1, 1025, nullptr, &seen[0]) == cudaErrorInvalidConfiguration);
  CHECK(emulation::launch(indices, 0, 1, nullptr, &seen[0]) == cudaErrorInvalidConfiguration);
  return fdfa::test::failures();
}

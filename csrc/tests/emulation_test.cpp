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

// What an addend has below the last place of the largest is lost, where a rounded sum would keep it.
void test_that_a_tensor_core_cuts_off() {
  const float ones[4] = {1, 1, 1, 1};
  const float small[4] = {0x1.8p-24f, 0x1.8p-24f, 0x1.8p-24f, 0x1.8p-24f};
  const float negative[4] = {-0x1.8p-24f, 0, 0, 0};
  CHECK(emulation::tensor_core_sum(0, ones, small, 4) == 0x1.8p-22f);
  CHECK(emulation::tensor_core_sum(1, ones, small, 4) == 1);  // rounded: 1 + 2^-22
  CHECK(emulation::tensor_core_sum(-1, ones, negative, 4) == -1);
  CHECK(emulation::tensor_core_sum(0x1p24f, ones, ones, 3) == 0x1p24f);  // rounded: 2^24 + 4
  const float infinite[4] = {INFINITY, 0, 0, 0};
  CHECK(emulation::tensor_core_sum(1, ones, infinite, 4) == INFINITY);
}

__global__ void exchange_halves(float* values) {
  values[threadIdx.x] = __shfl_xor_sync(~0u, values[threadIdx.x], 16);
}

}  // namespace

int main() {
  test_that_a_tensor_core_cuts_off();
  float lanes[64];
  for (int i = 0; i < 64; ++i) lanes[i] = static_cast<float>(i);
  CHECK(emulation::launch(exchange_halves, 1, 64, nullptr, &lanes[0]) == cudaSuccess);
  for (int i = 0; i < 64; ++i) CHECK(lanes[i] == static_cast<float>(i ^ 16));

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

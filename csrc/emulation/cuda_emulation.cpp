#include "emulation/cuda_emulation.h"

#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

thread_local dim3 threadIdx, blockIdx;
thread_local dim3 blockDim, gridDim;

namespace emulation {
namespace {

constexpr unsigned kWarpSize = 32;
constexpr unsigned kMaxThreads = 1024;

class Barrier {
 public:
  explicit Barrier(unsigned threads) : expected_(threads) {}

  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const unsigned round = round_;
    if (++waiting_ == expected_) {
      open();
    } else {
      opened_.wait(lock, [&] { return round_ != round; });
    }
  }

  // The calling thread will not come again.
  void leave() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (waiting_ == --expected_) open();
  }

 private:
  void open() {
    waiting_ = 0;
    ++round_;
    opened_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable opened_;
  unsigned expected_, waiting_ = 0, round_ = 0;
};

struct Warp {
  explicit Warp(unsigned threads) : barrier(threads) {}
  Barrier barrier;
  uint32_t a[kWarpSize][4] = {}, b[kWarpSize][2] = {};
};

struct Block {
  explicit Block(unsigned threads) : barrier(threads) {
    for (; threads > kWarpSize; threads -= kWarpSize) warps.emplace_back(kWarpSize);
    warps.emplace_back(threads);
  }
  Barrier barrier;
  std::deque<Warp> warps;  // a deque, since barriers cannot move
};

thread_local Block* current_block;

unsigned thread_in_block() {
  return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}

unsigned lane() { return thread_in_block() % kWarpSize; }

Warp& current_warp() { return current_block->warps[thread_in_block() / kWarpSize]; }

void run_block(dim3 grid, dim3 block, dim3 index, void (*body)(const void*), const void* context) {
  const unsigned count = block.x * block.y * block.z;
  Block state(count);
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < count; ++t) {
    threads.emplace_back([=, &state] {
      gridDim = grid;
      blockDim = block;
      blockIdx = index;
      threadIdx = dim3(t % block.x, t / block.x % block.y, t / block.x / block.y);
      current_block = &state;
      body(context);
      current_warp().barrier.leave();
      state.barrier.leave();
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

void block_barrier() { current_block->barrier.wait(); }

void multiply_tiles(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Warp& warp = current_warp();
  std::memcpy(warp.a[lane()], a, sizeof a);
  std::memcpy(warp.b[lane()], b, sizeof b);
  warp.barrier.wait();
  const auto value = [](uint32_t word) {
    float result;
    std::memcpy(&result, &word, sizeof result);
    return result;
  };
  const unsigned group = lane() / 4, place = lane() % 4;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row_half = i / 2, column = 2 * place + i % 2;
    for (unsigned k = 0; k < 8; ++k) {
      c[i] += value(warp.a[4 * group + k % 4][row_half + 2 * (k / 4)]) *
              value(warp.b[4 * column + k % 4][k / 4]);
    }
  }
  warp.barrier.wait();  // all have read before any writes again
}

cudaError_t run_grid(dim3 grid, dim3 block, void (*body)(const void*), const void* context) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > kMaxThreads || blocks == 0 || grid.y > 65535 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) run_block(grid, block, dim3(x, y, z), body, context);
    }
  }
  return cudaSuccess;
}

}  // namespace emulation

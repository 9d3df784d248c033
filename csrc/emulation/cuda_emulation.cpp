#include "emulation/cuda_emulation.h"

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

// What takes fibers in and out of their turns is none of their own accesses.
#define FDFA_UNWATCHED __attribute__((no_sanitize("thread")))

namespace emulation {
namespace {

constexpr unsigned kWarpSize = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kStackBytes = 1 << 16;

// What the thread sanitizer is told. Fibers are threads to it, ordered by nothing but barriers.
// Inlined, because it keeps the calls of each fiber apart, and a call may not end in another fiber.
#define FDFA_SANITIZER FDFA_UNWATCHED __attribute__((always_inline)) static inline
struct Sanitizer {
#if defined(__SANITIZE_THREAD__)
  FDFA_SANITIZER void* current() { return __tsan_get_current_fiber(); }
  FDFA_SANITIZER void* create() { return __tsan_create_fiber(0); }
  FDFA_SANITIZER void destroy(void* fiber) { __tsan_destroy_fiber(fiber); }
  FDFA_SANITIZER void switch_to(void* fiber) {
    __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync);
  }
  FDFA_SANITIZER void arrive(void* barrier) { __tsan_release(barrier); }
  FDFA_SANITIZER void leave(void* barrier) { __tsan_acquire(barrier); }
#else
  FDFA_SANITIZER void* current() { return nullptr; }
  FDFA_SANITIZER void* create() { return nullptr; }
  FDFA_SANITIZER void destroy(void*) {}
  FDFA_SANITIZER void switch_to(void*) {}
  FDFA_SANITIZER void arrive(void*) {}
  FDFA_SANITIZER void leave(void*) {}
#endif
};
#undef FDFA_SANITIZER

struct Barrier {
  unsigned expected = 0, waiting = 0, round = 0;
};

struct Warp {
  Barrier barrier;
  uint32_t words[kWarpSize][6] = {};
};

// A CUDA thread.
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  void* sanitized = Sanitizer::create();
  dim3 index;
  unsigned number = 0;
  bool ended = false;

  Fiber() = default;
  ~Fiber() { Sanitizer::destroy(sanitized); }
};

// A thread block, whose fibers take turns on one host thread.
struct Block {
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<Fiber> fibers;
  ucontext_t scheduler;
  void* sanitized = Sanitizer::current();
  Fiber* running = nullptr;
  void (*body)(const void*) = nullptr;
  const void* context = nullptr;
};

thread_local Block* current_block;
thread_local dim3 current_block_index, current_block_dim, current_grid_dim;
bool last_block_alone = false;

FDFA_UNWATCHED void open(Barrier& barrier) {
  barrier.waiting = 0;
  ++barrier.round;
}

FDFA_UNWATCHED void give_way() {
  Block& block = *current_block;
  Sanitizer::switch_to(block.sanitized);
  swapcontext(&block.running->context, &block.scheduler);
}

FDFA_UNWATCHED void wait(Barrier& barrier) {
  Sanitizer::arrive(&barrier);
  const unsigned round = barrier.round;
  if (++barrier.waiting == barrier.expected) {
    open(barrier);
  } else {
    while (barrier.round == round) give_way();
  }
  Sanitizer::leave(&barrier);
}

// The calling thread will not come again.
FDFA_UNWATCHED void leave(Barrier& barrier) {
  Sanitizer::arrive(&barrier);
  if (barrier.waiting == --barrier.expected && barrier.waiting > 0) open(barrier);
}

FDFA_UNWATCHED unsigned own_number() { return current_block->running->number; }

FDFA_UNWATCHED Warp& own_warp() { return current_block->warps[own_number() / kWarpSize]; }

FDFA_UNWATCHED void run_fiber() {
  Block& block = *current_block;
  block.body(block.context);
  leave(own_warp().barrier);
  leave(block.barrier);
  block.running->ended = true;
  give_way();
}

void run_block(dim3 dim, dim3 index, void (*body)(const void*), const void* context) {
  const unsigned count = dim.x * dim.y * dim.z;
  Block block;
  block.body = body;
  block.context = context;
  block.barrier.expected = count;
  block.warps.resize((count + kWarpSize - 1) / kWarpSize);
  for (unsigned t = 0; t < count; ++t) ++block.warps[t / kWarpSize].barrier.expected;
  block.fibers = std::vector<Fiber>(count);
  current_block = &block;
  current_block_index = index;
  current_block_dim = dim;
  for (unsigned t = 0; t < count; ++t) {
    Fiber& fiber = block.fibers[t];
    fiber.number = t;
    fiber.index = dim3(t % dim.x, t / dim.x % dim.y, t / dim.x / dim.y);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.context, run_fiber, 0);
  }
  for (unsigned left = count; left > 0;) {
    for (Fiber& fiber : block.fibers) {
      if (fiber.ended) continue;
      block.running = &fiber;
      Sanitizer::switch_to(fiber.sanitized);
      swapcontext(&block.scheduler, &fiber.context);
      left -= fiber.ended ? 1 : 0;
    }
  }
  Sanitizer::leave(&block.barrier);  // what the threads wrote is to be read
}

float from_word(uint32_t word) {
  float result;
  std::memcpy(&result, &word, sizeof result);
  return result;
}

}  // namespace

FDFA_UNWATCHED dim3 thread_index() { return current_block->running->index; }
FDFA_UNWATCHED dim3 block_index() { return current_block_index; }
FDFA_UNWATCHED dim3 block_dim() { return current_block_dim; }
FDFA_UNWATCHED dim3 grid_dim() { return current_grid_dim; }

FDFA_UNWATCHED void block_barrier() { wait(current_block->barrier); }

float tensor_core_sum(float c, const float* a, const float* b, int depth) {
  constexpr int kFractionBits = 23;
  const auto exponent = [](float x) { return x == 0.0f ? -1000 : std::ilogb(x); };
  int largest = exponent(c);
  float plain = c;  // for what is not finite, where nothing is cut off
  for (int i = 0; i < depth; ++i) {
    largest = std::max(largest, exponent(a[i]) + exponent(b[i]));
    plain += a[i] * b[i];
  }
  if (!std::isfinite(plain)) return plain;
  const auto cut = [&](double x) { return std::trunc(std::ldexp(x, kFractionBits - largest)); };
  double sum = cut(c);
  for (int i = 0; i < depth; ++i) sum += cut(double{a[i]} * b[i]);
  sum = std::ldexp(sum, largest - kFractionBits);
  const auto rounded = static_cast<float>(sum);
  return std::abs(rounded) > std::abs(sum) ? std::nextafter(rounded, 0.0f) : rounded;
}

void multiply_tiles(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Warp& warp = own_warp();
  const unsigned lane = own_number() % kWarpSize;
  std::memcpy(warp.words[lane], a, sizeof a);
  std::memcpy(warp.words[lane] + 4, b, sizeof b);
  wait(warp.barrier);
  const unsigned group = lane / 4, place = lane % 4;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row_half = i / 2, column = 2 * place + i % 2;
    for (unsigned half = 0; half < 2; ++half) {
      float row[kTensorCoreDepth], other[kTensorCoreDepth];
      for (unsigned k = 0; k < kTensorCoreDepth; ++k) {
        row[k] = from_word(warp.words[4 * group + k][row_half + 2 * half]);
        other[k] = from_word(warp.words[4 * column + k][4 + half]);
      }
      c[i] = tensor_core_sum(c[i], row, other, kTensorCoreDepth);
    }
  }
  wait(warp.barrier);  // all have read before any writes again
}

float exchange(float value, unsigned lane_mask) {
  Warp& warp = own_warp();
  const unsigned lane = own_number() % kWarpSize;
  std::memcpy(warp.words[lane], &value, sizeof value);
  wait(warp.barrier);
  const float result = from_word(warp.words[lane ^ lane_mask][0]);
  wait(warp.barrier);
  return result;
}

void run_last_block_alone(bool alone) { last_block_alone = alone; }

cudaError_t run_grid(dim3 grid, dim3 block, void (*body)(const void*), const void* context) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > kMaxThreads || blocks == 0 || grid.y > 65535 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  current_grid_dim = grid;
  if (last_block_alone) {
    run_block(block, dim3(grid.x - 1, grid.y - 1, grid.z - 1), body, context);
    return cudaSuccess;
  }
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) run_block(block, dim3(x, y, z), body, context);
    }
  }
  return cudaSuccess;
}

}  // namespace emulation

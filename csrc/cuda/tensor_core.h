#pragma once

#include <cstdint>

#include "common/bits.h"
#include "cuda/launch.h"

// Products of tiles by a warp on tensor cores (compute capability 8.0 and later), in tf32 or in single
// precision: for that each factor is split into two tf32, whose three larger products are added up. A
// tensor core cuts off where it adds, so that what it adds up must stay short.

namespace fdfa::cuda {

// A tile's share of each thread, lane = 4 g + t, as PTX defines it for mma.m16n8k8:
//   a [16, 8]: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)
//   b [8, 8]:  (t, g), (t + 4, g)
//   c [16, 8]: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)

// x rounded to the 11 leading bits that tensor cores take, and what that leaves, in the same form.
struct alignas(8) Split {
  uint32_t high, low;
};

__device__ inline uint32_t to_tf32(float x) {
#if defined(FDFA_EMULATE_CUDA)
  return (bits_from_float(x) + 0x1000u) & 0xFFFFE000u;
#else
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#endif
}

__device__ inline Split split(float x) {
  const uint32_t high = to_tf32(x);
  return {high, to_tf32(x - float_from_bits(high))};
}

// a b + c in tf32. All threads of the warp must take part.
struct Product {
  float c[4];
};

__device__ inline Product multiply_tiles(const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                         const Product& c = {}) {
  Product d = c;
#if defined(FDFA_EMULATE_CUDA)
  emulation::multiply_tiles(d.c, a, {b0, b1});
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d.c[0]), "=f"(d.c[1]), "=f"(d.c[2]), "=f"(d.c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c.c[0]), "f"(c.c[1]),
        "f"(c.c[2]), "f"(c.c[3]));
#endif
  return d;
}

}  // namespace fdfa::cuda

#pragma once

#include <cstdint>
#include <cstring>

#include "common/macros.h"

namespace fdfa {

FDFA_HD float float_from_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

FDFA_HD uint32_t bits_from_float(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

// Neither infinite nor NaN. Integer arithmetic, so that no compiler flag can assume it true.
FDFA_HD bool is_finite(float value) { return (bits_from_float(value) & 0x7F800000u) != 0x7F800000u; }

}  // namespace fdfa

#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "common/bits.h"

// Storage types of activations. Arithmetic is always in float. A GPU converts in one instruction; a NaN
// may become another NaN there.

namespace fdfa {

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

FDFA_HD float to_float(float x) { return x; }

FDFA_HD float to_float(bfloat16 x) { return float_from_bits(static_cast<uint32_t>(x.bits) << 16); }

// Exact for every half, subnormals, infinities and NaN included.
FDFA_HD float to_float(float16 x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7FFFu) << 13;
  const uint32_t exponent = magnitude & 0x0F800000u;
  // Normals: rebias the exponent by 112. Infinity and NaN: rebias once more. Subnormals: renormalise
  // by letting the float unit subtract the implicit bit.
  const uint32_t normal = magnitude + (112u << 23);
  const uint32_t special = normal + (112u << 23);
  const float subnormal = float_from_bits(magnitude + (113u << 23)) - float_from_bits(113u << 23);
  uint32_t bits = exponent == 0x0F800000u ? special : normal;
  bits = exponent == 0 ? bits_from_float(subnormal) : bits;
  return float_from_bits(bits | sign);
#endif
}

template <class T>
FDFA_HD T from_float(float x);

template <>
FDFA_HD float from_float<float>(float x) {
  return x;
}

// Round to nearest, ties to even; NaN stays a quiet NaN.
template <>
FDFA_HD bfloat16 from_float<bfloat16>(float x) {
#if defined(__CUDA_ARCH__)
  return bfloat16{__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  const uint32_t bits = bits_from_float(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x0040u;
  const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  return bfloat16{static_cast<uint16_t>(is_nan ? nan : rounded)};
#endif
}

template <>
FDFA_HD float16 from_float<float16>(float x) {
#if defined(__CUDA_ARCH__)
  return float16{__half_as_ushort(__float2half_rn(x))};
#else
  const uint32_t bits = bits_from_float(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  // Subnormal halves: adding 0.5 lines up the last place of the half with that of the float.
  const uint32_t subnormal = bits_from_float(float_from_bits(magnitude) + 0.5f) - bits_from_float(0.5f);
  const uint32_t normal = (magnitude - (112u << 23) + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= 0x477FF000u ? 0x7C00u : half;  // 65520 and above round to infinity
  half = magnitude > 0x7F800000u ? 0x7E00u : half;
  return float16{static_cast<uint16_t>(half | sign)};
#endif
}

// Two numbers of 16 bits in a word, the first in its lower half.
template <class T>
FDFA_HD uint32_t two_from_floats(float first, float second) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return __bfloat16_as_ushort(pair.x) | static_cast<uint32_t>(__bfloat16_as_ushort(pair.y)) << 16;
  } else {
    const __half2 pair = __floats2half2_rn(first, second);
    return __half_as_ushort(pair.x) | static_cast<uint32_t>(__half_as_ushort(pair.y)) << 16;
  }
#else
  return from_float<T>(first).bits | static_cast<uint32_t>(from_float<T>(second).bits) << 16;
#endif
}

}  // namespace fdfa

#pragma once

#include <cstdint>
#include <type_traits>

#include "common/dtype.h"
#include "cuda/launch.h"

// Neighbouring elements by as few accesses as the hardware has: 16 bytes in one. Values are float
// whatever the storage type is.

namespace fdfa::cuda {

__device__ inline void load_words(const void* from, uint32_t (&words)[1]) {
  words[0] = *static_cast<const uint32_t*>(from);
}
__device__ inline void load_words(const void* from, uint32_t (&words)[2]) {
  const uint2 v = *static_cast<const uint2*>(from);
  words[0] = v.x, words[1] = v.y;
}
__device__ inline void load_words(const void* from, uint32_t (&words)[4]) {
  const uint4 v = *static_cast<const uint4*>(from);
  words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
}
__device__ inline void load_words(const void* from, uint32_t (&words)[8]) {
  const uint4 v = static_cast<const uint4*>(from)[0], w = static_cast<const uint4*>(from)[1];
  words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  words[4] = w.x, words[5] = w.y, words[6] = w.z, words[7] = w.w;
}

__device__ inline void store_words(void* to, const uint32_t (&words)[1]) {
  *static_cast<uint32_t*>(to) = words[0];
}
__device__ inline void store_words(void* to, const uint32_t (&words)[2]) {
  *static_cast<uint2*>(to) = uint2{words[0], words[1]};
}
__device__ inline void store_words(void* to, const uint32_t (&words)[4]) {
  *static_cast<uint4*>(to) = uint4{words[0], words[1], words[2], words[3]};
}
__device__ inline void store_words(void* to, const uint32_t (&words)[8]) {
  static_cast<uint4*>(to)[0] = uint4{words[0], words[1], words[2], words[3]};
  static_cast<uint4*>(to)[1] = uint4{words[4], words[5], words[6], words[7]};
}

// values = from[0..n), where `from` is a multiple of the n elements' bytes, or of 16.
template <class T, int n>
__device__ void load_vector(const T* from, float (&values)[n]) {
  uint32_t words[n * sizeof(T) / 4];
  load_words(from, words);
#pragma unroll
  for (int i = 0; i < n; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      values[i] = float_from_bits(words[i]);
    } else {
      values[i] = to_float(T{static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)))});
    }
  }
}

template <class T, int n>
__device__ void store_vector(T* to, const float (&values)[n]) {
  uint32_t words[n * sizeof(T) / 4];
#pragma unroll
  for (int i = 0; i < static_cast<int>(n * sizeof(T) / 4); ++i) {
    if constexpr (std::is_same_v<T, float>) {
      words[i] = bits_from_float(values[i]);
    } else {
      words[i] = two_from_floats<T>(values[2 * i], values[2 * i + 1]);
    }
  }
  store_words(to, words);
}

// The first `count` of n elements, any number, one by one; the rest are zeros.
template <class T, int n>
__device__ void load_some(const T* from, int count, float (&values)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) values[i] = i < count ? to_float(from[i]) : 0.0f;
}

template <class T, int n>
__device__ void store_some(T* to, int count, const float (&values)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    if (i < count) to[i] = from_float<T>(values[i]);
  }
}

// Four neighbouring features of a sample, of which `count` exist. kWhole: all four do in every row, and
// every row is aligned for vectors.
template <bool kWhole, class T>
__device__ void load_quad(const T* from, int count, float (&values)[4]) {
  if constexpr (kWhole) {
    load_vector(from, values);
  } else {
    load_some(from, count, values);
  }
}

template <bool kWhole, class T>
__device__ void store_quad(T* to, int count, const float (&values)[4]) {
  if constexpr (kWhole) {
    store_vector(to, values);
  } else {
    store_some(to, count, values);
  }
}

}  // namespace fdfa::cuda

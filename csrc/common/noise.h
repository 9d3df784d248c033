#pragma once

#include <cmath>
#include <cstdint>

#include "common/bits.h"
#include "common/params.h"
#include "common/philox.h"

// The perturbation u as a pure function of (seed, step, block, sample, feature), so that it is never
// stored: the forward pass adds it, the feedback step makes it again.

namespace fdfa {

// -2 ln(k / 2^24) for k in [1, 2^24], relative error below 2e-7 and free of branches so that compilers
// vectorise it. A polynomial on [sqrt(1/2), sqrt(2)), in two halves that need not wait for each other.
FDFA_HD float minus_two_log(int32_t k) {
  const int32_t bits = static_cast<int32_t>(bits_from_float(static_cast<float>(k))) - (24 << 23);
  // A whole exponent, where it stands in the bits, that leaves a mantissa in [sqrt(1/2), sqrt(2)).
  const int32_t exponent = (bits - 0x3F3504F3) & static_cast<int32_t>(0xFF800000u);
  const float m = float_from_bits(static_cast<uint32_t>(bits - exponent)) - 1.0f;
  const float m2 = m * m;
  float even = -1.40753673e-1f;
  even = even * m2 - 2.33539975e-1f;
  even = even * m2 - 2.84986446e-1f;
  even = even * m2 - 4.00014295e-1f;
  even = even * m2 - 6.66666662e-1f;
  float odd = 2.30292206e-1f;
  odd = odd * m2 + 2.48402817e-1f;
  odd = odd * m2 + 3.33361155e-1f;
  odd = odd * m2 + 4.99999880e-1f;
  const float log_m = (m2 - 2.0f * m) + (odd * m + even) * (m2 * m);
  constexpr float k2Ln2Pow23 = 1.38629436112f / 8388608.0f;
  return log_m - static_cast<float>(exponent) * k2Ln2Pow23;
}

// Two independent standard normals from two words (Box-Muller). The radius takes 24 bits of `a`. `b` is
// the angle from the nearest of the four half axes, in parts of pi/4 / 2^31; its two lowest bits, far
// below the angle's last digit, choose the half axis.
FDFA_HD void normal_pair(uint32_t a, uint32_t b, float& first, float& second) {
  const float radius = sqrtf(minus_two_log(static_cast<int32_t>(a >> 8) + 1));
  constexpr float kQuarterPi = 0.785398163397448f;
  const float x = static_cast<float>(static_cast<int32_t>(b)) * (kQuarterPi / 2147483648.0f);
  const float x2 = x * x;
  const float sine = x + x * x2 * (-1.6666654611e-1f + x2 * (8.3321608736e-3f - x2 * 1.9515295891e-4f));
  const float cosine =
      1.0f - 0.5f * x2 +
      x2 * x2 * (4.166664568298827e-2f + x2 * (-1.388731625493765e-3f + x2 * 2.443315711809948e-5f));
  const float along = radius * float_from_bits(bits_from_float(cosine) ^ (b << 31));
  const float across = radius * sine;
  const bool second_axis = static_cast<int32_t>(b << 30) < 0;
  first = second_axis ? across : along;
  second = second_axis ? along : across;
}

// +1 or -1 from the top bit.
FDFA_HD float random_sign(uint32_t a) { return float_from_bits((a & 0x80000000u) | 0x3F800000u); }

// Key and the part of the counter that one sample of one block shares.
struct NoiseStream {
  uint32_t key0, key1;
  uint32_t sample, step, block;
};

// state: int64 [3] = seed, step, global index of the batch's first sample.
FDFA_HD NoiseStream noise_stream(const int64_t* state, int64_t block, int64_t sample) {
  const uint64_t seed = static_cast<uint64_t>(state[0]);
  return NoiseStream{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32),
                     static_cast<uint32_t>(state[2] + sample), static_cast<uint32_t>(state[1]),
                     static_cast<uint32_t>(block)};
}

// Four perturbations from the words of one Philox block.
template <Noise kNoise>
FDFA_HD void noise4(const Philox4& r, float& u0, float& u1, float& u2, float& u3) {
  if constexpr (kNoise == Noise::gaussian) {
    normal_pair(r.x0, r.x1, u0, u1);
    normal_pair(r.x2, r.x3, u2, u3);
  } else if constexpr (kNoise == Noise::none) {
    u0 = u1 = u2 = u3 = 0.0f;
  } else {
    u0 = random_sign(r.x0);
    u1 = random_sign(r.x1);
    u2 = random_sign(r.x2);
    u3 = random_sign(r.x3);
  }
}

// u[4 * quad], ..., u[4 * quad + 3] of the stream's sample.
template <Noise kNoise>
FDFA_HD void noise4(const NoiseStream& s, uint32_t quad, float& u0, float& u1, float& u2, float& u3) {
  noise4<kNoise>(philox4x32_10(Philox4{quad, s.sample, s.step, s.block}, s.key0, s.key1), u0, u1, u2,
                 u3);
}

}  // namespace fdfa

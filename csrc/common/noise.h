#pragma once

#include <cmath>
#include <cstdint>

#include "common/bits.h"
#include "common/params.h"
#include "common/philox.h"

// The perturbation u as a pure function of (seed, step, block, sample, feature), so that it is never
// stored: the forward pass adds it, the feedback step makes it again.

namespace fdfa {

// -2 ln(u) for u in (0, 1]. Polynomial on [sqrt(1/2), sqrt(2)), relative error below 2e-7; free of
// branches so that compilers vectorise it.
FDFA_HD float minus_two_log(float u) {
  // Shift the exponent so that the mantissa falls into [sqrt(1/2), sqrt(2)).
  const uint32_t bits = bits_from_float(u) + (0x3F800000u - 0x3F3504F3u);
  const float exponent = static_cast<float>(static_cast<int32_t>(bits >> 23) - 127);
  const float m = float_from_bits((bits & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
  float p = 7.0376836292e-2f;
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const float m2 = m * m;
  const float log_m = m - 0.5f * m2 + p * m * m2;
  return -2.0f * (log_m + exponent * 0.693147180559945f);
}

// Two independent standard normals from two words (Box-Muller). The radius takes 24 bits of `a`, the
// angle two bits of `b` for the quadrant and 24 for the place in it, so both uniforms are exact floats.
FDFA_HD void normal_pair(uint32_t a, uint32_t b, float& first, float& second) {
  constexpr float k2Pow24 = 1.0f / 16777216.0f;
  const float u = static_cast<float>(static_cast<int32_t>(a >> 8) + 1) * k2Pow24;
  const float radius = sqrtf(minus_two_log(u));
  // The angle is (quadrant + t) * pi/2 less a fixed pi/4, which a uniform angle does not feel.
  constexpr float kQuarterPi = 0.785398163397448f;
  const float t = static_cast<float>(static_cast<int32_t>((b << 2) >> 8));
  const float x = t * (2.0f * kQuarterPi * k2Pow24) - kQuarterPi;  // [-pi/4, pi/4)
  const float x2 = x * x;
  const float sine = x + x * x2 * (-1.6666654611e-1f + x2 * (8.3321608736e-3f - x2 * 1.9515295891e-4f));
  const float cosine =
      1.0f - 0.5f * x2 +
      x2 * x2 * (4.166664568298827e-2f + x2 * (-1.388731625493765e-3f + x2 * 2.443315711809948e-5f));
  // Rotate (cosine, sine) by the quadrant: swap in odd ones, then set the signs. Its upper bit is the
  // sign of b, its lower bit that of b << 1.
  const uint32_t c = bits_from_float(cosine), s = bits_from_float(sine), odd = b << 1;
  const uint32_t swap = (c ^ s) & static_cast<uint32_t>(static_cast<int32_t>(odd) >> 31);
  first = radius * float_from_bits(c ^ swap ^ ((b ^ odd) & 0x80000000u));
  second = radius * float_from_bits(s ^ swap ^ (b & 0x80000000u));
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

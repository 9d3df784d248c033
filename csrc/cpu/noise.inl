// Perturbations u, many at a time: common/noise.h over vectors of Philox counters.

namespace fdfa::cpu::FDFA_ISA {
namespace {

typedef uint64_t Lanes __attribute__((vector_size(FDFA_VECTOR_BYTES)));

// The 64-bit products of the low words of each lane.
inline __attribute__((always_inline)) Lanes multiply_low_words(Lanes a, uint32_t b) {
  const Lanes factor = Lanes{} + b;
#if FDFA_VECTOR_BYTES == 64
  // With a full mask: GCC 12 warns of the plain one's undefined register.
  return (Lanes)_mm512_maskz_mul_epu32(0xFF, (__m512i)a, (__m512i)factor);
#elif FDFA_VECTOR_BYTES == 32
  return (Lanes)_mm256_mul_epu32((__m256i)a, (__m256i)factor);
#else
  return (a & 0xFFFFFFFFu) * factor;
#endif
}

// The high words of each lane in the place of the low ones. A shuffle and not a shift, since the
// products and shifts of 64-bit lanes share a port on Intel's processors: a normal takes 0.92 of the
// time there.
inline __attribute__((always_inline)) Lanes high_words(Lanes a) {
#if FDFA_VECTOR_BYTES == 64
  return (Lanes)_mm512_maskz_shuffle_epi32(0xFFFF, (__m512i)a, _MM_PERM_DDBB);
#elif FDFA_VECTOR_BYTES == 32
  return (Lanes)_mm256_shuffle_epi32((__m256i)a, _MM_SHUFFLE(3, 3, 1, 1));
#else
  return a >> 32;
#endif
}

// The low words of both, alternating: even's first.
inline __attribute__((always_inline)) Lanes join_low_words(Lanes even, Lanes odd) {
#if FDFA_VECTOR_BYTES == 64
  return (Lanes)_mm512_mask_blend_epi32(0xAAAA, (__m512i)even, (__m512i)(odd << 32));
#elif FDFA_VECTOR_BYTES == 32
  return (Lanes)_mm256_blend_epi32((__m256i)even, (__m256i)(odd << 32), 0xAA);
#else
  return (even & 0xFFFFFFFFu) | (odd << 32);
#endif
}

// philox4x32_10 of many counters: one in each 64-bit lane, so that a product's two words fall into
// place without a shuffle. High words of x0 to x3 mean nothing.
inline __attribute__((always_inline)) void philox_round(Lanes& x0, Lanes& x1, Lanes& x2, Lanes& x3,
                                                        const Lanes& k0, const Lanes& k1) {
  const Lanes p0 = multiply_low_words(x0, kPhiloxMul0), p1 = multiply_low_words(x2, kPhiloxMul1);
  x0 = high_words(p1) ^ (x1 ^ k0);
  x1 = p1;
  x2 = high_words(p0) ^ (x3 ^ k1);
  x3 = p0;
}

// Philox blocks that fill_noise makes at a time: as many as words of 32 bits in a vector.
constexpr int64_t kQuadGroup = FDFA_VECTOR_BYTES / sizeof(uint32_t);
static_assert(kEpilogueRun % (4 * kQuadGroup) == 0 && kTileColumns % (4 * kQuadGroup) == 0);

// The keys of all rounds, in every lane: the same for all samples of a step.
struct RoundKeys {
  explicit RoundKeys(const NoiseParams& noise) {
    if (noise.kind == Noise::none) return;
    const NoiseStream any = noise_stream(noise.state, noise.block, 0);
    uint32_t k0 = any.key0, k1 = any.key1;
    for (auto& key : values) {
      key[0] = Lanes{} + k0;
      key[1] = Lanes{} + k1;
      k0 += kPhiloxWeyl0;
      k1 += kPhiloxWeyl1;
    }
  }
  Lanes values[kPhiloxRounds][2];
};

// words[j][i] ← word j of the block of quad first_quad + i.
inline __attribute__((always_inline)) void fill_words(const RoundKeys& keys, const NoiseStream& s,
                                                      uint32_t first_quad,
                                                      uint32_t (&words)[4][kQuadGroup]) {
  Lanes even;
  for (int i = 0; i < kQuadGroup / 2; ++i) even[i] = 2 * i;
  // Even quads in one vector, odd ones in its partner: they are joined into 32-bit lanes at the end.
  Lanes x[2][4];
  for (uint32_t odd = 0; odd < 2; ++odd) {
    x[odd][0] = even + (first_quad + odd);
    x[odd][1] = Lanes{} + s.sample;
    x[odd][2] = Lanes{} + s.step;
    x[odd][3] = Lanes{} + s.block;
  }
#pragma GCC unroll 10
  for (const auto& key : keys.values) {
    for (auto& block : x) philox_round(block[0], block[1], block[2], block[3], key[0], key[1]);
  }
  for (int j = 0; j < 4; ++j) {
    const Lanes joined = join_low_words(x[0][j], x[1][j]);
    std::memcpy(words[j], &joined, sizeof joined);
  }
}

// out[0 .. 4 * quads) ← u[4 * first_quad ...] of one sample. Writes up to the next multiple of
// 4 * kQuadGroup.
template <Noise kNoise>
void fill_noise(const RoundKeys& keys, const NoiseStream& stream, int64_t first_quad, int64_t quads,
                float* __restrict out) {
  alignas(64) uint32_t words[4][kQuadGroup];
  for (int64_t q = 0; q < quads; q += kQuadGroup, out += 4 * kQuadGroup) {
    fill_words(keys, stream, static_cast<uint32_t>(first_quad + q), words);
    for (int i = 0; i < kQuadGroup; ++i) {
      noise4<kNoise>(Philox4{words[0][i], words[1][i], words[2][i], words[3][i]}, out[4 * i],
                     out[4 * i + 1], out[4 * i + 2], out[4 * i + 3]);
    }
  }
}

}  // namespace
}  // namespace fdfa::cpu::FDFA_ISA

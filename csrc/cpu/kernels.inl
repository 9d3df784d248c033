// The CPU kernels, written once and compiled for each instruction set. The including file sets
// FDFA_ISA (a namespace) and FDFA_VECTOR_BYTES, and the target of the functions that follow.

// Its template of vectors must have that target, so it is not among kernels_includes.h.
#include "common/max_pool.h"

namespace fdfa::cpu::FDFA_ISA {
namespace {

constexpr int64_t kLanes = FDFA_VECTOR_BYTES / sizeof(float);
typedef float Vector __attribute__((vector_size(FDFA_VECTOR_BYTES)));
typedef float HalfVector __attribute__((vector_size(FDFA_VECTOR_BYTES / 2)));

inline __attribute__((always_inline)) Vector load(const float* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline __attribute__((always_inline)) void store(float* p, Vector v) { std::memcpy(p, &v, sizeof v); }

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
  x0 = (p1 >> 32) ^ (x1 ^ k0);
  x1 = p1;
  x2 = (p0 >> 32) ^ (x3 ^ k1);
  x3 = p0;
}

// Philox blocks that fill_noise makes at a time: as many as words of 32 bits in a vector.
constexpr int64_t kQuadGroup = FDFA_VECTOR_BYTES / sizeof(uint32_t);
static_assert(kEpilogueRun % (4 * kQuadGroup) == 0 && kTileColumns % (4 * kQuadGroup) == 0);

constexpr int64_t kNoiseSamples = 4096 / kTileColumns;  // whose noise is held at a time: 16 KiB
constexpr int kRowBlock = 5;

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

// The values of each channel repeated, so that a run may start at any channel: entry i belongs to
// channel i % channels. Zero where there is no source.
template <class T>
std::vector<float> repeated(const T* source, int64_t channels, int64_t run) {
  std::vector<float> values(channels + run, 0.0f);
  if (source == nullptr) return values;
  for (int64_t i = 0; i < channels; ++i) values[i] = to_float(source[i]);
  for (size_t i = channels; i < values.size(); ++i) values[i] = values[i - channels];
  return values;
}

// What the channels of a run add and multiply.
struct RunMap {
  const float *bias, *scale, *slope, *offset;
};

// Neighbouring features of one sample. Whether z and tz exist is a template argument, so that the loops
// have no branches. Outputs may be the inputs' own memory, element by element.
template <class T, Activation kActivation, bool kHasTangent, bool kMapped>
void epilogue_run(int64_t count, const T* z, const T* tz, const RunMap& map, const float* noise, T* y,
                  T* ty, T* pre) {
  const float *bias = map.bias, *scale = map.scale, *slope = map.slope, *offset = map.offset;
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const float a = kMapped ? scale[i] * to_float(z[i]) + bias[i] : to_float(z[i]) + bias[i];
    const T y_stored = from_float<T>(activate<kActivation>(a));
    const float gate = derivative_needs_pre_activation(kActivation) ? a : to_float(y_stored);
    float tangent = 0.0f;
    if constexpr (kHasTangent) {
      tangent = to_float(tz[i]);
      if constexpr (kMapped) tangent = scale[i] * tangent + (slope[i] * to_float(z[i]) + offset[i]);
      tangent *= derivative<kActivation>(gate);
    }
    ty[i] = from_float<T>(tangent + noise[i]);
    y[i] = y_stored;
    if constexpr (derivative_needs_pre_activation(kActivation)) pre[i] = from_float<T>(a);
  }
}

template <class T>
void perturb_run(int64_t count, const T* tz, const float* noise, T* ty) {
  for (int64_t i = 0; i < count; ++i) {
    const float tangent = tz ? to_float(tz[i]) : 0.0f;
    ty[i] = from_float<T>(tangent + noise[i]);
  }
}

// A unit's part of z or tz [features, samples], row by row as the other matrices lie.
template <class T>
void transpose(const T* matrix, int64_t samples, int64_t features, int64_t matrix_samples,
               T (&rows)[kTransposedSamples][kTransposedRun]) {
  for (int64_t i = 0; i < features; ++i) {
    for (int64_t n = 0; n < samples; ++n) rows[n][i] = matrix[i * matrix_samples + n];
  }
}

// What an epilogue needs of all its units.
template <class T, Noise kNoise, Activation kActivation>
class EpilogueRuns {
 public:
  EpilogueRuns(const EpilogueParams<T>& p, int64_t run)
      : p_(p),
        mapped_(p.map.scale != nullptr),
        bias_(repeated(p.bias, p.channels, run)),
        scale_(repeated(p.map.scale, mapped_ ? p.channels : 0, run)),
        slope_(repeated(p.map.slope, mapped_ ? p.channels : 0, run)),
        offset_(repeated(p.map.offset, mapped_ ? p.channels : 0, run)),
        keys_(p.noise) {}

  // `count` features of a sample from `first` on; the pointers are those of its first one.
  void operator()(int64_t sample, int64_t first, int64_t count, const T* z, const T* tz, T* y, T* ty,
                  T* pre) {
    if constexpr (kNoise != Noise::none) {
      fill_noise<kNoise>(keys_, noise_stream(p_.noise.state, p_.noise.block, sample), first / 4,
                         (count + 3) / 4, noise_);
    }
    if (z == nullptr) return perturb_run(count, tz, noise_, ty);
    const int64_t c = first % p_.channels;
    RunMap map{bias_.data() + c, nullptr, nullptr, nullptr};
    if (mapped_) map = {map.bias, scale_.data() + c, slope_.data() + c, offset_.data() + c};
    const auto run_with = [&](auto has_tangent, auto is_mapped) {
      epilogue_run<T, kActivation, has_tangent(), is_mapped()>(count, z, tz, map, noise_, y, ty, pre);
    };
    if (mapped_) {
      tz ? run_with(std::true_type{}, std::true_type{}) : run_with(std::false_type{}, std::true_type{});
    } else {
      tz ? run_with(std::true_type{}, std::false_type{})
         : run_with(std::false_type{}, std::false_type{});
    }
  }

 private:
  const EpilogueParams<T>& p_;
  const bool mapped_;
  const std::vector<float> bias_, scale_, slope_, offset_;
  const RoundKeys keys_;
  alignas(64) float noise_[kEpilogueRun] = {};
};

// f(EpilogueRuns of p's noise and activation)
template <class T, class F>
void with_epilogue_runs(const EpilogueParams<T>& p, int64_t run, const F& f) {
  with_noise(p.noise.kind, [&](auto kind) {
    with_activation(p.activation, [&](auto activation) {
      EpilogueRuns<T, kind(), activation()> runs(p, run);
      f(runs);
    });
  });
}

template <class T>
T* at_or_null(T* matrix, int64_t offset) {
  return matrix ? matrix + offset : nullptr;
}

template <class T>
void epilogue(const EpilogueParams<T>& p, int64_t begin, int64_t end) {
  if (begin == end) return;
  const int64_t run = p.transposed ? kTransposedRun : kEpilogueRun;
  const int64_t samples_of_unit = p.transposed ? kTransposedSamples : 1;
  const int64_t units_of_row = (p.features + run - 1) / run;
  alignas(64) T unwanted[kEpilogueRun];
  alignas(64) T z_rows[kTransposedSamples][kTransposedRun], tz_rows[kTransposedSamples][kTransposedRun];
  with_epilogue_runs(p, run, [&](auto& runs) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first_sample = unit / units_of_row * samples_of_unit;
      const int64_t first = unit % units_of_row * run;
      const int64_t samples = std::min(samples_of_unit, p.samples - first_sample);
      const int64_t count = std::min(run, p.features - first);
      if (p.transposed) {
        const int64_t corner = first * p.samples + first_sample;
        transpose(p.z + corner, samples, count, p.samples, z_rows);
        if (p.tz) transpose(p.tz + corner, samples, count, p.samples, tz_rows);
      }
      for (int64_t n = 0; n < samples; ++n) {
        const int64_t sample = first_sample + n, at = sample * p.features + first;
        const T* z = p.transposed ? z_rows[n] : at_or_null(p.z, at);
        const T* tz = p.transposed && p.tz ? tz_rows[n] : at_or_null(p.tz, at);
        runs(sample, first, count, z, tz, at_or_null(p.y, at), p.ty ? p.ty + at : unwanted,
             at_or_null(p.pre, at));
      }
    }
  });
}

// out[m, 0 .. kTileColumns) ← Σ_r a[r * a_r + m * a_m] x[r, 0 .. kTileColumns), or += with kAdd: five
// rows of `out` and two vectors at a time stay in registers. Classes come in fives and tens.
template <bool kAdd>
void multiply(int64_t rows, int64_t depth, const float* a, int64_t a_r, int64_t a_m, const float* x,
              float* out) {
  constexpr int kVectors = 2;
  static_assert(kTileColumns % (kVectors * kLanes) == 0);
  for (int64_t m = 0; m < rows; m += kRowBlock) {
    const int64_t live = std::min<int64_t>(kRowBlock, rows - m);
    // Rows past the end repeat the last one; their sums are not stored.
    const float* row[kRowBlock];
    for (int i = 0; i < kRowBlock; ++i) row[i] = a + (m + std::min<int64_t>(i, live - 1)) * a_m;
    for (int64_t c = 0; c < kTileColumns; c += kVectors * kLanes) {
      Vector sum[kRowBlock][kVectors] = {};
      for (int64_t r = 0; r < depth; ++r) {
        const float* xr = x + r * kTileColumns + c;
        const Vector x0 = load(xr), x1 = load(xr + kLanes);
#pragma GCC unroll 5
        for (int i = 0; i < kRowBlock; ++i) {
          const float w = row[i][r * a_r];
          sum[i][0] += w * x0;
          sum[i][1] += w * x1;
        }
      }
      for (int i = 0; i < live; ++i) {
        float* o = out + (m + i) * kTileColumns + c;
        store(o, kAdd ? load(o) + sum[i][0] : sum[i][0]);
        store(o + kLanes, kAdd ? load(o + kLanes) + sum[i][1] : sum[i][1]);
      }
    }
  }
}

// One row of B's tile: `b` becomes what the error is projected through, memory gets the update.
void update_row(Rule rule, int64_t count, const float* __restrict g, float* __restrict b,
                float* __restrict memory, float* __restrict exp_avg, float* __restrict exp_avg_sq,
                float* __restrict gradient, const AdamStep& adam, float lr, float decay) {
  switch (rule) {
    case Rule::ema:
      for (int64_t i = 0; i < count; ++i) {
        const float moved = memory[i] + lr * (g[i] - decay * memory[i]);
        memory[i] = b[i] = is_finite(g[i]) ? moved : memory[i];
      }
      break;
    case Rule::adam:
      for (int64_t i = 0; i < count; ++i) {
        float m = exp_avg[i], v = exp_avg_sq[i];
        const float moved = adam_update(adam, memory[i], decay * memory[i] - g[i], m, v);
        const bool finite = is_finite(g[i]);
        memory[i] = b[i] = finite ? moved : memory[i];
        exp_avg[i] = finite ? m : exp_avg[i];
        exp_avg_sq[i] = finite ? v : exp_avg_sq[i];
      }
      break;
    case Rule::gradient:
      for (int64_t i = 0; i < count; ++i) {
        b[i] = memory[i];
        gradient[i] = decay * memory[i] - g[i];
      }
      break;
    case Rule::fixed:
      std::copy(memory, memory + count, b);
      break;
  }
}

// Towards the caches, to be read or, with kWrite, written: rows of a tile lie too far apart for the
// processor to see them coming.
template <int kWrite, class T>
void prefetch_row(const T* row, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(row + i, kWrite, 2);
}

template <class T>
void feedback_step(const FeedbackParams<T>& p, int64_t begin, int64_t end) {
  if (p.samples == 0) return;
  alignas(64) float s[kNoiseSamples * kTileColumns], projected[kRowBlock * kTileColumns];
  alignas(64) T turned[kRowBlock][kTileColumns];
  const RoundKeys keys(p.noise);
  std::vector<float> g(p.outputs * kTileColumns), b(p.outputs * kTileColumns, 0.0f);
  const AdamStep adam =
      p.rule == Rule::adam ? adam_step(p.lr, p.beta1, p.beta2, p.eps, *p.updates) : AdamStep{};
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile * kTileColumns;
    const int64_t count = std::min(kTileColumns, p.features - first);

    std::fill(g.begin(), g.end(), 0.0f);
    for (int64_t n0 = 0; n0 < p.samples; n0 += kNoiseSamples) {
      const int64_t samples = std::min(kNoiseSamples, p.samples - n0);
      with_noise(p.noise.kind, [&](auto kind) {
        for (int64_t n = 0; n < samples; ++n) {
          if (p.gate) prefetch_row<0>(p.gate + (n0 + n) * p.features + first, count);
          if (!p.transposed) prefetch_row<1>(p.delta + (n0 + n) * p.features + first, count);
          float* row = s + n * kTileColumns;
          if constexpr (kind() != Noise::none) {
            fill_noise<kind()>(keys, noise_stream(p.noise.state, p.noise.block, n0 + n), first / 4,
                               (count + 3) / 4, row);
          } else if (p.source) {
            const T* source = p.source + (n0 + n) * p.features + first;
            for (int64_t i = 0; i < count; ++i) row[i] = to_float(source[i]);
          }
        }
      });
      if (p.rule == Rule::fixed) continue;
      multiply<true>(p.outputs, samples, p.factor + n0 * p.outputs, p.outputs, 1, s, g.data());
    }
    for (float& value : g) value *= p.scale;

    for (int64_t k = 0; k < p.outputs; ++k) {
      const int64_t offset = k * p.features + first;
      update_row(p.rule, count, g.data() + k * kTileColumns, b.data() + k * kTileColumns,
                 p.feedback + offset, at_or_null(p.exp_avg, offset), at_or_null(p.exp_avg_sq, offset),
                 at_or_null(p.gradient, offset), adam, p.lr, p.decay);
    }

    with_activation(p.gate ? p.activation : Activation::identity, [&](auto activation) {
      for (int64_t n0 = 0; n0 < p.samples; n0 += kRowBlock) {
        const int64_t samples = std::min<int64_t>(kRowBlock, p.samples - n0);
        multiply<false>(samples, p.outputs, p.error + n0 * p.outputs, 1, p.outputs, b.data(),
                        projected);
        for (int64_t n = 0; n < samples; ++n) {
          const int64_t offset = (n0 + n) * p.features + first;
          const float* row = projected + n * kTileColumns;
          T* delta = p.transposed ? turned[n] : p.delta + offset;
          if constexpr (activation() == Activation::identity) {
            for (int64_t i = 0; i < count; ++i) delta[i] = from_float<T>(row[i]);
          } else {
            const T* gate = p.gate + offset;
#pragma GCC ivdep  // delta may be gate itself
            for (int64_t i = 0; i < count; ++i) {
              delta[i] = from_float<T>(row[i] * derivative<activation()>(to_float(gate[i])));
            }
          }
        }
        for (int64_t i = 0; p.transposed && i < count; ++i) {
          T* delta = p.delta + (first + i) * p.samples + n0;
          for (int64_t n = 0; n < samples; ++n) delta[n] = turned[n][i];
        }
      }
    });
  }
}

// The rows of several parts. Sums are kept for a period of whole rows, so that the loop over it is long
// enough for vectors whatever the number of channels.
void moments(const MomentParams& p, int64_t begin, int64_t end) {
  constexpr int64_t kPeriod = 256;
  const int64_t c = p.channels, period_rows = (kPeriod + c - 1) / c, period = period_rows * c;
  const int64_t part_rows = moment_part_rows(c);
  const auto pivots = repeated(p.pivot, c, period);
  std::vector<float> storage(4 * period);
  float *d_sum = storage.data(), *d_square = d_sum + period, *t_sum = d_square + period,
        *product = t_sum + period;
  const float* pivot = pivots.data();
  for (int64_t part = begin; part < end; ++part) {
    std::fill(storage.begin(), storage.end(), 0.0f);
    const int64_t last = std::min((part + 1) * part_rows, p.rows);
    for (int64_t row = part * part_rows; row < last; row += period_rows) {
      const int64_t count = std::min(period_rows, last - row) * c;
      const float* x = p.x + row * c;
      if (p.t == nullptr) {
#pragma GCC ivdep
        for (int64_t i = 0; i < count; ++i) {
          const float d = x[i] - pivot[i];
          d_sum[i] += d;
          d_square[i] += d * d;
        }
        continue;
      }
      const float* t = p.t + row * c;
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) {
        const float d = x[i] - pivot[i];
        d_sum[i] += d;
        d_square[i] += d * d;
        t_sum[i] += t[i];
        product[i] += d * t[i];
      }
    }
    double* sums = p.sums + part * 4 * c;
    std::fill(sums, sums + 4 * c, 0.0);
    for (int64_t kind = 0; kind < 4; ++kind) {
      for (int64_t i = 0; i < period; ++i) sums[kind * c + i % c] += storage[kind * period + i];
    }
  }
}

void combine(const CombineParams& p, int64_t begin, int64_t end) {
  if (begin == end) return;
  const auto scale = repeated(p.map.scale, p.channels, kEpilogueRun);
  const auto slope = repeated(p.map.slope, p.channels, kEpilogueRun);
  const auto offset = repeated(p.map.offset, p.channels, kEpilogueRun);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit * kEpilogueRun, c = first % p.channels;
    const int64_t count = std::min(kEpilogueRun, p.rows * p.channels - first);
    const float *x = p.x + first, *t = p.t + first;
    const float *a = scale.data() + c, *b = slope.data() + c, *d = offset.data() + c;
    float* out = p.out + first;
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) out[i] = a[i] * t[i] + (b[i] * x[i] + d[i]);
  }
}

template <class V>
struct LoadVector {
  FDFA_HD V operator()(const float* p) const {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
};

// Of all channels, at least as many as V has lanes.
template <class V>
void pool_window_channels(const PoolWindow& window, int64_t channels, const float* x, const float* tx,
                          float* y, float* ty) {
  constexpr int64_t lanes = sizeof(V) / sizeof(float);
  for (int64_t next = 0; next < channels; next += lanes) {
    // At the end once more over some channels rather than one by one; they come out the same.
    const int64_t c = std::min(next, channels - lanes);
    V greatest, tangent;
    if (tx == nullptr) {
      pool(window, LoadVector<V>{}, x + c, greatest);
    } else {
      pool(window, LoadVector<V>{}, x + c, tx + c, greatest, tangent);
      std::memcpy(ty + c, &tangent, sizeof tangent);
    }
    std::memcpy(y + c, &greatest, sizeof greatest);
  }
}

// One row of an image's windows; y and ty are those of the row. tx and ty may be null.
void pool_row(const PoolShape& s, int64_t row, const float* x, const float* tx, float* y, float* ty) {
  for (int64_t column = 0; column < s.out_width; ++column) {
    const PoolWindow window = pool_window(s, row, column);
    const float *from = x + window.first, *from_tangent = at_or_null(tx, window.first);
    float *to = y + column * s.channels, *to_tangent = at_or_null(ty, column * s.channels);
    if (s.channels >= kLanes) {
      pool_window_channels<Vector>(window, s.channels, from, from_tangent, to, to_tangent);
    } else if (s.channels >= kLanes / 2) {  // 15 channels in lanes of 8 take a tenth of one by one
      pool_window_channels<HalfVector>(window, s.channels, from, from_tangent, to, to_tangent);
    } else if (tx == nullptr) {
      for (int64_t c = 0; c < s.channels; ++c) pool(window, LoadFloat{}, from + c, to[c]);
    } else {
      for (int64_t c = 0; c < s.channels; ++c) {
        pool(window, LoadFloat{}, from + c, from_tangent + c, to[c], to_tangent[c]);
      }
    }
  }
}

// A unit is one row of windows.
void max_pool(const MaxPoolParams& p, int64_t begin, int64_t end) {
  const PoolShape& s = p.shape;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / s.out_height * s.height * s.width * s.channels;
    const int64_t to = unit * s.out_width * s.channels;
    pool_row(s, unit % s.out_height, p.x + image, at_or_null(p.tx, image), p.y + to,
             at_or_null(p.ty, to));
  }
}

// A unit is a sample, whose activations and tangents are still in the cache when they are pooled.
void pooled_epilogue(const PooledEpilogueParams& p, int64_t begin, int64_t end) {
  const EpilogueParams<float>& e = p.epilogue;
  const PoolShape& s = p.shape;
  const bool pools_tangent = p.pooled_tangent != nullptr;
  // Without, each run writes over that of the one before.
  std::vector<float> tangent(pools_tangent ? e.features : kEpilogueRun);
  with_epilogue_runs(e, kEpilogueRun, [&](auto& runs) {
    for (int64_t sample = begin; sample < end; ++sample) {
      for (int64_t first = 0; first < e.features; first += kEpilogueRun) {
        const int64_t at = sample * e.features + first;
        runs(sample, first, std::min(kEpilogueRun, e.features - first), e.z + at, at_or_null(e.tz, at),
             e.y + at, tangent.data() + (pools_tangent ? first : 0), at_or_null(e.pre, at));
      }
      for (int64_t row = 0; row < s.out_height; ++row) {
        const int64_t to = (sample * s.out_height + row) * s.out_width * s.channels;
        pool_row(s, row, e.y + sample * e.features, pools_tangent ? tangent.data() : nullptr,
                 p.pooled + to, at_or_null(p.pooled_tangent, to));
      }
    }
  });
}

template <class V>
V lane_numbers() {
  V numbers;
  for (size_t i = 0; i < sizeof(V) / sizeof(float); ++i) numbers[i] = static_cast<float>(i);
  return numbers;
}

// As pool_window_channels; what it adds in the channels that it meets once more is zero.
template <class V>
void pool_window_backward(const PoolWindow& window, int64_t channels, const float* x,
                          const float* delta, float* dx) {
  constexpr int64_t lanes = sizeof(V) / sizeof(float);
  for (int64_t next = 0; next < channels; next += lanes) {
    const int64_t c = std::min(next, channels - lanes);
    const V winner = pool_winner(window, LoadVector<V>{}, x + c, V{});
    V own;
    std::memcpy(&own, delta + c, sizeof own);
    own = lane_numbers<V>() < static_cast<float>(next - c) ? V{} : own;
    V place = {};
    for (int64_t row = 0; row < window.rows; ++row) {
      for (int64_t column = 0; column < window.columns; ++column) {
        float* to = dx + c + row * window.row_stride + column * window.column_stride;
        V sum;
        std::memcpy(&sum, to, sizeof sum);
        sum += place == winner ? own : V{};
        std::memcpy(to, &sum, sizeof sum);
        place += 1.0f;
      }
    }
  }
}

// A unit is a sample, since windows of different rows may share elements.
void max_pool_backward(const MaxPoolBackwardParams& p, int64_t begin, int64_t end) {
  const PoolShape& s = p.shape;
  const int64_t image = s.height * s.width * s.channels;
  std::fill(p.dx + begin * image, p.dx + end * image, 0.0f);
  for (int64_t unit = begin * s.out_height; unit < end * s.out_height; ++unit) {
    for (int64_t column = 0; column < s.out_width; ++column) {
      const PoolWindow window = pool_window(s, unit, column);
      const float *x = p.x + window.first,
                  *delta = p.delta + (unit * s.out_width + column) * s.channels;
      float* dx = p.dx + window.first;
      if (s.channels >= kLanes) {
        pool_window_backward<Vector>(window, s.channels, x, delta, dx);
      } else if (s.channels >= kLanes / 2) {
        pool_window_backward<HalfVector>(window, s.channels, x, delta, dx);
      } else {
        for (int64_t c = 0; c < s.channels; ++c) {
          const auto winner = static_cast<int64_t>(pool_winner(window, LoadFloat{}, x + c, 0.0f));
          const int64_t row = winner / window.columns, column_of = winner % window.columns;
          dx[c + row * window.row_stride + column_of * window.column_stride] += delta[c];
        }
      }
    }
  }
}

template <class T>
constexpr KernelTable<T> table() {
  return {epilogue<T>, feedback_step<T>};
}

}  // namespace

extern const IsaKernels kernels;
const IsaKernels kernels = {table<float>(), table<bfloat16>(), table<float16>(),  moments,
                            combine,        max_pool,          max_pool_backward, pooled_epilogue};

}  // namespace fdfa::cpu::FDFA_ISA

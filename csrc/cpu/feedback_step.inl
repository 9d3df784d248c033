// B moved, and delta = (error B) f' through it: FeedbackParams.

namespace fdfa::cpu::FDFA_ISA {
namespace {

constexpr int64_t kNoiseSamples = 4096 / kTileColumns;  // whose noise is held at a time: 16 KiB
constexpr int kRowBlock = 5;

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
        const bool finite = is_finite(v);  // nor g, nor its square
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

// Of G [outputs, kTileColumns], whose columns are the features of patches from `first` on.
void divide_by_pixels(const Patches& patches, int64_t first, int64_t count, std::vector<float>& g) {
  float share[kTileColumns] = {};
  for (int64_t i = 0; i < count; ++i) share[i] = 1.0f / static_cast<float>(patches.pixels(first + i));
  for (size_t i = 0; i < g.size(); ++i) g[i] *= share[i % kTileColumns];
}

template <class T>
void feedback_step(const FeedbackParams<T>& p, int64_t begin, int64_t end) {
  if (p.samples == 0) return;
  alignas(64) float s[kNoiseSamples * kTileColumns];  // then the error projected
  alignas(64) T turned[kNoiseSamples][kTileColumns];
  alignas(64) float delta_sum[kTileColumns];
  const RoundKeys keys(p.noise);
  std::vector<float> g(p.outputs * kTileColumns), b(p.outputs * kTileColumns, 0.0f);
  const AdamStep adam =
      p.rule == Rule::adam ? adam_step(p.lr, p.beta1, p.beta2, p.eps, *p.updates + 1) : AdamStep{};
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile * kTileColumns;
    const int64_t count = std::min(kTileColumns, p.features - first);

    std::fill(g.begin(), g.end(), 0.0f);
    for (int64_t n0 = 0; n0 < p.samples; n0 += kNoiseSamples) {
      const int64_t samples = std::min(kNoiseSamples, p.samples - n0);
      with_noise(p.noise.kind, [&](auto kind) {
        for (int64_t n = 0; n < samples; ++n) {
          if (p.saved_activation)
            prefetch_row<0>(p.saved_activation + (n0 + n) * p.features + first, count);
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
    if (p.patches.size > 0) divide_by_pixels(p.patches, first, count, g);

    for (int64_t k = 0; k < p.outputs; ++k) {
      const int64_t offset = k * p.features + first;
      update_row(p.rule, count, g.data() + k * kTileColumns, b.data() + k * kTileColumns,
                 p.feedback + offset, at_or_null(p.exp_avg, offset), at_or_null(p.exp_avg_sq, offset),
                 at_or_null(p.gradient, offset), adam, p.lr, p.decay);
    }

    std::fill(delta_sum, delta_sum + kTileColumns, 0.0f);
    with_activation(p.saved_activation ? p.activation : Activation::identity, [&](auto activation) {
      for (int64_t n0 = 0; n0 < p.samples; n0 += kNoiseSamples) {
        const int64_t samples = std::min(kNoiseSamples, p.samples - n0);
        multiply<false>(samples, p.outputs, p.error + n0 * p.outputs, 1, p.outputs, b.data(), s);
        for (int64_t n = 0; n < samples; ++n) {
          const int64_t offset = (n0 + n) * p.features + first;
          const float* row = s + n * kTileColumns;
          T* delta = p.transposed ? turned[n] : p.delta + offset;
          if constexpr (activation() == Activation::identity) {
            for (int64_t i = 0; i < count; ++i) delta[i] = from_float<T>(row[i]);
          } else {
            const T* saved_activation = p.saved_activation + offset;
#pragma GCC ivdep  // delta may be in its memory
            for (int64_t i = 0; i < count; ++i) {
              delta[i] =
                  from_float<T>(row[i] * derivative<activation()>(to_float(saved_activation[i])));
            }
          }
          for (int64_t i = 0; p.bias_grad && i < count; ++i) delta_sum[i] += to_float(delta[i]);
        }
        if (p.transposed) {
          transpose(turned[0], kTileColumns, samples, count, p.delta + first * p.samples + n0,
                    p.samples);
        }
      }
    });
    if (p.bias_grad) std::copy(delta_sum, delta_sum + count, p.bias_grad + first);
  }
}

}  // namespace
}  // namespace fdfa::cpu::FDFA_ISA

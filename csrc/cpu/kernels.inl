// The CPU kernels, written once and compiled for each instruction set. The including file sets
// FDFA_ISA (a namespace) and FDFA_VECTOR_BYTES, and the target of the functions that follow.

namespace fdfa::cpu::FDFA_ISA {
namespace {

constexpr int64_t kLanes = FDFA_VECTOR_BYTES / sizeof(float);
typedef float Vector __attribute__((vector_size(FDFA_VECTOR_BYTES)));

inline __attribute__((always_inline)) Vector load(const float* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline __attribute__((always_inline)) void store(float* p, Vector v) { std::memcpy(p, &v, sizeof v); }

// out[0 .. 4 * quads) ← u[4 * first_quad ...] of one sample.
template <Noise kNoise>
void fill_noise(const NoiseStream& stream, int64_t first_quad, int64_t quads, float* __restrict out) {
  const NoiseStream s = stream;
  for (int64_t i = 0; i < quads; ++i) {
    noise4<kNoise>(s, static_cast<uint32_t>(first_quad + i), out[4 * i], out[4 * i + 1], out[4 * i + 2],
                   out[4 * i + 3]);
  }
}

// A run of kEpilogueRun features of one sample. Whether z and tz exist is a template argument, so that
// the loops have no branches.
template <class T, Activation kActivation, bool kHasTangent>
void epilogue_run(const EpilogueParams<T>& p, int64_t offset, int64_t count, const float* bias,
                  const float* noise) {
  const T* z = p.z + offset;
  const T* tz = kHasTangent ? p.tz + offset : nullptr;
  T* y = p.y + offset;
  T* ty = p.ty + offset;
  T* pre = derivative_needs_pre_activation(kActivation) ? p.pre + offset : nullptr;
  // Outputs may be the inputs' own memory, element by element, which does not hinder vectors.
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const float a = to_float(z[i]) + bias[i];
    const T y_stored = from_float<T>(activate<kActivation>(a));
    const float gate = derivative_needs_pre_activation(kActivation) ? a : to_float(y_stored);
    const float tangent = kHasTangent ? derivative<kActivation>(gate) * to_float(tz[i]) : 0.0f;
    ty[i] = from_float<T>(tangent + noise[i]);
    y[i] = y_stored;
    if constexpr (derivative_needs_pre_activation(kActivation)) pre[i] = from_float<T>(a);
  }
}

template <class T>
void perturb_run(const EpilogueParams<T>& p, int64_t offset, int64_t count, const float* noise) {
  for (int64_t i = 0; i < count; ++i) {
    const float tangent = p.tz ? to_float(p.tz[offset + i]) : 0.0f;
    p.ty[offset + i] = from_float<T>(tangent + noise[i]);
  }
}

template <class T>
void epilogue(const EpilogueParams<T>& p, int64_t begin, int64_t end) {
  if (begin == end) return;
  // bias[i % channels] for a run that starts at any channel: one period more than a run.
  std::vector<float> bias(p.channels + kEpilogueRun, 0.0f);
  if (p.bias) {
    for (size_t i = 0; i < bias.size(); ++i) bias[i] = to_float(p.bias[i % p.channels]);
  }
  alignas(64) float noise[kEpilogueRun];
  const int64_t runs = (p.features + kEpilogueRun - 1) / kEpilogueRun;
  with_noise(p.noise.kind, [&](auto kind) {
    with_activation(p.activation, [&](auto activation) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t sample = unit / runs;
        const int64_t first = unit % runs * kEpilogueRun;
        const int64_t count = std::min(kEpilogueRun, p.features - first);
        const NoiseStream stream = noise_stream(p.noise.state, p.noise.block, sample);
        fill_noise<kind()>(stream, first / 4, (count + 3) / 4, noise);
        const int64_t offset = sample * p.features + first;
        const float* run_bias = bias.data() + first % p.channels;
        if (p.z == nullptr) {
          perturb_run(p, offset, count, noise);
        } else if (p.tz) {
          epilogue_run<T, activation(), true>(p, offset, count, run_bias, noise);
        } else {
          epilogue_run<T, activation(), false>(p, offset, count, run_bias, noise);
        }
      }
    });
  });
}

// out[m, 0 .. kTileColumns) += Σ_r a[r * a_r + m * a_m] x[r, 0 .. kTileColumns): four rows of `out` and
// two vectors at a time stay in registers.
void accumulate(int64_t rows, int64_t depth, const float* a, int64_t a_r, int64_t a_m, const float* x,
                float* out) {
  constexpr int kRows = 4, kVectors = 2;
  static_assert(kTileColumns % (kVectors * kLanes) == 0);
  for (int64_t m = 0; m < rows; m += kRows) {
    const int64_t live = std::min<int64_t>(kRows, rows - m);
    for (int64_t c = 0; c < kTileColumns; c += kVectors * kLanes) {
      Vector sum[kRows][kVectors] = {};
      // Rows past the end repeat the last one; their sums are not stored.
      const float* row[kRows];
      for (int i = 0; i < kRows; ++i) row[i] = a + (m + std::min<int64_t>(i, live - 1)) * a_m;
      for (int64_t r = 0; r < depth; ++r) {
        const float* xr = x + r * kTileColumns + c;
        const Vector x0 = load(xr), x1 = load(xr + kLanes);
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) {
          const float w = row[i][r * a_r];
          sum[i][0] += w * x0;
          sum[i][1] += w * x1;
        }
      }
      for (int i = 0; i < live; ++i) {
        float* o = out + (m + i) * kTileColumns + c;
        store(o, load(o) + sum[i][0]);
        store(o + kLanes, load(o + kLanes) + sum[i][1]);
      }
    }
  }
}

// One row of B's tile: `b` becomes what the error is projected through, memory gets the update.
void update_row(Rule rule, int64_t count, const float* __restrict g, float* __restrict b,
                float* __restrict memory, float* __restrict exp_avg, float* __restrict exp_avg_sq,
                float* __restrict gradient, const AdamStep& adam, float lr) {
  switch (rule) {
    case Rule::ema:
      for (int64_t i = 0; i < count; ++i) {
        const float moved = memory[i] + lr * (g[i] - memory[i]);
        memory[i] = b[i] = is_finite(g[i]) ? moved : memory[i];
      }
      break;
    case Rule::adam:
      for (int64_t i = 0; i < count; ++i) {
        float m = exp_avg[i], v = exp_avg_sq[i];
        const float moved = adam_update(adam, memory[i], memory[i] - g[i], m, v);
        const bool finite = is_finite(g[i]);
        memory[i] = b[i] = finite ? moved : memory[i];
        exp_avg[i] = finite ? m : exp_avg[i];
        exp_avg_sq[i] = finite ? v : exp_avg_sq[i];
      }
      break;
    case Rule::gradient:
      for (int64_t i = 0; i < count; ++i) {
        b[i] = memory[i];
        gradient[i] = memory[i] - g[i];
      }
      break;
  }
}

template <class T>
void feedback_step(const FeedbackParams<T>& p, int64_t begin, int64_t end) {
  constexpr int64_t kSamples = 64;  // samples whose noise or projected error is held at a time
  if (p.samples == 0) return;
  alignas(64) float rows[kSamples * kTileColumns];
  std::vector<float> g(p.outputs * kTileColumns), b(p.outputs * kTileColumns, 0.0f);
  const AdamStep adam =
      p.rule == Rule::adam ? adam_step(p.lr, p.beta1, p.beta2, p.eps, *p.updates) : AdamStep{};
  const float inverse_samples = 1.0f / static_cast<float>(p.samples);
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile * kTileColumns;
    const int64_t count = std::min(kTileColumns, p.features - first);

    std::fill(g.begin(), g.end(), 0.0f);
    std::fill(std::begin(rows), std::end(rows), 0.0f);
    for (int64_t n0 = 0; n0 < p.samples; n0 += kSamples) {
      const int64_t samples = std::min(kSamples, p.samples - n0);
      with_noise(p.noise.kind, [&](auto kind) {
        for (int64_t n = 0; n < samples; ++n) {
          fill_noise<kind()>(noise_stream(p.noise.state, p.noise.block, n0 + n), first / 4,
                             (count + 3) / 4, rows + n * kTileColumns);
        }
      });
      accumulate(p.outputs, samples, p.tangent + n0 * p.outputs, p.outputs, 1, rows, g.data());
    }
    for (float& value : g) value *= inverse_samples;

    const auto at = [](float* matrix, int64_t offset) { return matrix ? matrix + offset : nullptr; };
    for (int64_t k = 0; k < p.outputs; ++k) {
      const int64_t offset = k * p.features + first;
      update_row(p.rule, count, g.data() + k * kTileColumns, b.data() + k * kTileColumns,
                 p.feedback + offset, at(p.exp_avg, offset), at(p.exp_avg_sq, offset),
                 at(p.gradient, offset), adam, p.lr);
    }

    for (int64_t n0 = 0; n0 < p.samples; n0 += kSamples) {
      const int64_t samples = std::min(kSamples, p.samples - n0);
      std::fill(rows, rows + samples * kTileColumns, 0.0f);
      accumulate(samples, p.outputs, p.error + n0 * p.outputs, 1, p.outputs, b.data(), rows);
      with_activation(p.gate ? p.activation : Activation::identity, [&](auto activation) {
        for (int64_t n = 0; n < samples; ++n) {
          const int64_t offset = (n0 + n) * p.features + first;
          const float* projected = rows + n * kTileColumns;
          T* delta = p.delta + offset;
          if constexpr (activation() == Activation::identity) {
            for (int64_t i = 0; i < count; ++i) delta[i] = from_float<T>(projected[i]);
          } else {
            const T* gate = p.gate + offset;
            for (int64_t i = 0; i < count; ++i) {
              delta[i] = from_float<T>(projected[i] * derivative<activation()>(to_float(gate[i])));
            }
          }
        }
      });
    }
  }
}

template <class T>
constexpr KernelTable<T> table() {
  return {epilogue<T>, feedback_step<T>};
}

}  // namespace

extern const IsaKernels kernels;
const IsaKernels kernels = {table<float>(), table<bfloat16>(), table<float16>()};

}  // namespace fdfa::cpu::FDFA_ISA

// y = f(a), ty = f'(a) ta + u: EpilogueParams.

namespace fdfa::cpu::FDFA_ISA {
namespace {

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
    const float saved_activation =
        derivative_needs_pre_activation(kActivation) ? a : to_float(y_stored);
    float tangent = 0.0f;
    if constexpr (kHasTangent) {
      tangent = to_float(tz[i]);
      if constexpr (kMapped) tangent = scale[i] * tangent + (slope[i] * to_float(z[i]) + offset[i]);
      tangent *= derivative<kActivation>(saved_activation);
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
        keys_(p.noise),
        given_(p.noise.patches) {}

  // `count` features of a sample from `first` on; the pointers are those of its first one.
  void operator()(int64_t sample, int64_t first, int64_t count, const T* z, const T* tz, T* y, T* ty,
                  T* pre) {
    if constexpr (kNoise == Noise::none) {
      if (p_.noise.given) return run_given(sample, first, count, z, tz, y, ty, pre);
    } else {
      fill_noise<kNoise>(keys_, noise_stream(p_.noise.state, p_.noise.block, sample), first / 4,
                         (count + 3) / 4, noise_);
    }
    run(first, count, z, tz, noise_, y, ty, pre);
  }

 private:
  // With the noise of the patches, row of pixels by row.
  void run_given(int64_t sample, int64_t first, int64_t count, const T* z, const T* tz, T* y, T* ty,
                 T* pre) {
    const Patches& patches = p_.noise.patches;
    const int64_t row_size = int64_t{patches.width} * patches.channels;
    for (int64_t done = 0; done < count;) {
      const int64_t row = (first + done) / row_size, skipped = (first + done) % row_size;
      const int64_t part = std::min(count - done, row_size - skipped);
      const float* noise = given_(p_.noise.given + sample * patches.features(), row) + skipped;
      run(first + done, part, at_or_null(z, done), at_or_null(tz, done), noise, at_or_null(y, done),
          ty + done, at_or_null(pre, done));
      done += part;
    }
  }

  void run(int64_t first, int64_t count, const T* z, const T* tz, const float* noise, T* y, T* ty,
           T* pre) {
    if (z == nullptr) return perturb_run(count, tz, noise, ty);
    const int64_t c = first % p_.channels;
    RunMap map{bias_.data() + c, nullptr, nullptr, nullptr};
    if (mapped_) map = {map.bias, scale_.data() + c, slope_.data() + c, offset_.data() + c};
    const auto run_with = [&](auto has_tangent, auto is_mapped) {
      epilogue_run<T, kActivation, has_tangent(), is_mapped()>(count, z, tz, map, noise, y, ty, pre);
    };
    if (mapped_) {
      tz ? run_with(std::true_type{}, std::true_type{}) : run_with(std::false_type{}, std::true_type{});
    } else {
      tz ? run_with(std::true_type{}, std::false_type{})
         : run_with(std::false_type{}, std::false_type{});
    }
  }

  const EpilogueParams<T>& p_;
  const bool mapped_;
  const std::vector<float> bias_, scale_, slope_, offset_;
  const RoundKeys keys_;
  PatchRows given_;
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
void epilogue(const EpilogueParams<T>& p, int64_t begin, int64_t end) {
  if (begin == end) return;
  const bool transposed = p.transposed_pitch > 0;
  const int64_t run = transposed ? kTransposedRun : kEpilogueRun;
  const int64_t samples_of_unit = transposed ? kTransposedSamples : 1;
  const int64_t units_of_row = (p.features + run - 1) / run;
  alignas(64) T unwanted_tangent[kEpilogueRun], unwanted_pre[kEpilogueRun];
  alignas(64) T z_rows[kTransposedSamples][kTransposedRun], tz_rows[kTransposedSamples][kTransposedRun];
  with_epilogue_runs(p, run, [&](auto& runs) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first_sample = unit / units_of_row * samples_of_unit;
      const int64_t first = unit % units_of_row * run;
      const int64_t samples = std::min(samples_of_unit, p.samples - first_sample);
      const int64_t count = std::min(run, p.features - first);
      if (transposed) {
        const int64_t corner = first * p.transposed_pitch + first_sample;
        const int64_t pitch = p.transposed_pitch;
        transpose(p.z + corner, pitch, count, samples, z_rows[0], kTransposedRun);
        if (p.tz) transpose(p.tz + corner, pitch, count, samples, tz_rows[0], kTransposedRun);
      }
      for (int64_t n = 0; n < samples; ++n) {
        const int64_t sample = first_sample + n, at = sample * p.features + first;
        const T* z = transposed ? z_rows[n] : at_or_null(p.z, at);
        const T* tz = transposed && p.tz ? tz_rows[n] : at_or_null(p.tz, at);
        runs(sample, first, count, z, tz, at_or_null(p.y, at), p.ty ? p.ty + at : unwanted_tangent,
             p.pre ? p.pre + at : unwanted_pre);
      }
    }
  });
}

}  // namespace
}  // namespace fdfa::cpu::FDFA_ISA

#include "common/batch_norm.h"

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "common/philox.h"
#include "cpu/kernels.h"
#include "cuda/kernels.h"
#include "tests/check.h"

// Statistics, maps and gradients of a batch normalisation, on the CPU and, in emulation, on CUDA,
// against the textbook's formulas in double.

namespace {

using namespace fdfa;

std::vector<float> values(int64_t size, uint32_t key, float mean) {
  std::vector<float> v(size);
  for (int64_t i = 0; i < size; ++i) {
    const Philox4 r = philox4x32_10({static_cast<uint32_t>(i), 0, 0, 0}, key, 0);
    v[i] = mean + static_cast<float>(r.x0) / 2147483648.0f - 1.0f;
  }
  return v;
}

struct Cpu {
  static int64_t parts(int64_t rows, int64_t channels) {
    return cpu::moment_units({nullptr, nullptr, nullptr, nullptr, rows, channels, 0});
  }
  static void moments(const MomentParams& p) {
    const int64_t units = cpu::moment_units(p);
    cpu::moments(p, 0, units / 2);
    cpu::moments(p, units / 2, units);
  }
  static void norm(const NormForwardParams& p) { cpu::norm(p); }
  static void norm_backward(const NormBackwardParams& p) { cpu::norm_backward(p); }
  static void combine(const CombineParams& p) {
    const int64_t units = cpu::combine_units(p);
    cpu::combine(p, 0, units / 2);
    cpu::combine(p, units / 2, units);
  }
};

struct EmulatedCuda {
  static int64_t parts(int64_t rows, int64_t channels) { return cuda::moment_parts(rows, channels); }
  static void moments(const MomentParams& p) { CHECK(cuda::launch_moments(p, nullptr) == cudaSuccess); }
  static void norm(const NormForwardParams& p) { CHECK(cuda::launch_norm(p, nullptr) == cudaSuccess); }
  static void norm_backward(const NormBackwardParams& p) {
    CHECK(cuda::launch_norm_backward(p, nullptr) == cudaSuccess);
  }
  static void combine(const CombineParams& p) {
    CHECK(cuda::launch_combine(p, nullptr) == cudaSuccess);
  }
};

struct Textbook {
  double mean = 0, variance = 0, t_mean = 0, product = 0;  // mean (x - mean) t
};

Textbook textbook(const std::vector<float>& x, const std::vector<float>& t, int64_t c,
                  int64_t channels) {
  Textbook m;
  const int64_t rows = static_cast<int64_t>(x.size()) / channels;
  const auto n = static_cast<double>(rows);
  for (int64_t r = 0; r < rows; ++r) m.mean += x[r * channels + c] / n;
  for (int64_t r = 0; r < rows; ++r) {
    const double d = x[r * channels + c] - m.mean, tr = t[r * channels + c];
    m.variance += d * d / n;
    m.t_mean += tr / n;
    m.product += d * tr / n;
  }
  return m;
}

// A copy of v that begins `shift` floats off the alignment of four.
class Shifted {
 public:
  Shifted(const std::vector<float>& v, int64_t shift) : start_(shift), memory_(v.size() + shift + 4) {
    while (reinterpret_cast<uintptr_t>(data()) % 16 != 4 * static_cast<uintptr_t>(shift)) ++start_;
    std::copy(v.begin(), v.end(), data());
  }
  float* data() { return memory_.data() + start_; }

 private:
  int64_t start_;
  std::vector<float> memory_;
};

// training: by the batch's statistics, else by running ones. shift: of x, t and out off an alignment.
template <class Backend>
void test_case(int64_t rows, int64_t channels, float mean, bool training, int64_t shift) {
  const std::vector<float> x = values(rows * channels, 1, mean), t = values(rows * channels, 2, 0.3f);
  Shifted x_memory(x, shift), t_memory(t, shift), out_memory(x, shift);
  const std::vector<float> weight = values(channels, 3, 1.5f), bias = values(channels, 4, 0.0f);
  std::vector<float> running_mean = values(channels, 5, mean), running_var = values(channels, 6, 1.5f);
  const std::vector<float> old_mean = running_mean, old_var = running_var;
  const float *x_data = x_memory.data(), *t_data = t_memory.data();
  const int64_t parts = Backend::parts(rows, channels);
  std::vector<double> sums(parts * 4 * channels, -1.0), sums_of_x = sums;
  Backend::moments({x_data, t_data, x_data, sums.data(), rows, channels, parts});
  Backend::moments({x_data, nullptr, x_data, sums_of_x.data(), rows, channels, parts});
  for (size_t i = 0; i < sums.size(); ++i) {
    const bool of_x = i / channels % 4 < 2;
    CHECK(sums_of_x[i] == (of_x ? sums[i] : 0.0));
  }

  constexpr double kMomentum = 0.1, kEps = 1e-5;
  std::vector<float> mu(channels), inverse(channels), map(4 * channels), backward_map(4 * channels),
      weight_grad(channels), bias_grad(channels);
  int64_t batches = 6;
  Backend::norm({training ? sums.data() : nullptr, x_data, parts, rows, channels, weight.data(),
                 bias.data(), running_mean.data(), running_var.data(), kMomentum, kEps, mu.data(),
                 inverse.data(), NormMap{map.data(), channels}, &batches});
  CHECK(batches == (training ? 7 : 6));
  const NormMap maps{map.data(), channels};
  Backend::norm_backward({sums.data(), x_data, parts, rows, channels, weight.data(), mu.data(),
                          inverse.data(), training, weight_grad.data(), bias_grad.data(),
                          NormMap{backward_map.data(), channels}});
  float* out = out_memory.data();
  Backend::combine({x_data, t_data, out, maps.channel_map(), rows, channels});

  const auto n = static_cast<double>(rows);
  for (int64_t c = 0; c < channels; ++c) {
    const Textbook batch = textbook(x, t, c, channels);
    const double m = training ? batch.mean : old_mean[c];
    const double variance = training ? batch.variance : old_var[c];
    const double s = 1 / std::sqrt(variance + kEps), w = weight[c];
    CHECK_NEAR(mu[c], m, 1e-6 * (1 + std::abs(m)));
    CHECK_NEAR(inverse[c], s, 1e-5 * s);
    const double unbiased = batch.variance * n / (n - 1);
    CHECK_NEAR(running_mean[c], training ? 0.9 * old_mean[c] + 0.1 * batch.mean : old_mean[c],
               1e-6 * (1 + std::abs(m)));
    CHECK_NEAR(running_var[c], training ? 0.9 * old_var[c] + 0.1 * unbiased : old_var[c], 1e-5);
    CHECK_NEAR(maps.bias()[c], bias[c] - w * s * m, 1e-5 * (1 + std::abs(w * s * m)));
    const double product = batch.product + (batch.mean - m) * batch.t_mean;  // about m
    CHECK_NEAR(weight_grad[c], n * product * s, 2e-5 * n * s);
    CHECK_NEAR(bias_grad[c], n * batch.t_mean, 1e-6 * n);
    // The same map for a gradient, from μ and 1/σ as stored; two values can be too close to each other.
    if (rows > 2) {
      for (int64_t i : {c, 2 * channels + c, 3 * channels + c}) {
        CHECK_NEAR(backward_map[i], map[i], 1e-4 * (1 + std::abs(map[i])));
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = r * channels + c;
      const double hat = (x[at] - m) * s, moves = training ? 1.0 : 0.0;
      const double expected = w * s * (t[at] - moves * (batch.t_mean + hat * batch.product * s));
      // Three rounded terms, which may cancel: two values a channel can be close to each other.
      const float terms = std::abs(maps.scale()[c] * t[at]) + std::abs(maps.slope()[c] * x[at]) +
                          std::abs(maps.offset()[c]);
      CHECK_NEAR(out[at], expected, 3e-7 * terms + 1e-5);
    }
  }
}

template <class Backend>
void test_cases(std::initializer_list<int64_t> channel_counts,
                std::initializer_list<int64_t> row_counts) {
  for (int64_t channels : channel_counts) {
    for (int64_t rows : row_counts) {
      for (float mean : {0.0f, 10.0f}) {
        test_case<Backend>(rows, channels, mean, /*training=*/true, /*shift=*/0);
        test_case<Backend>(rows, channels, mean, /*training=*/false, /*shift=*/1);
      }
    }
  }
}

}  // namespace

int main() {
  for (const char* isa : {"baseline", "avx2", "avx512"}) {
    if (cpu::select_isa(isa)) test_cases<Cpu>({1, 3, 15, 40, 300}, {2, 63, 1100});
  }
  // Channels that a thread takes one by one and by four, in one tile and in several; one part of the
  // rows and several.
  test_cases<EmulatedCuda>({1, 35, 68}, {2, 300});
  return test::failures();
}

#include "common/batch_norm.h"

#include <vector>

#include "common/philox.h"
#include "cpu/kernels.h"
#include "tests/check.h"

// Statistics and maps of a batch normalisation against the textbook's formulas in double.

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

void test_case(int64_t rows, int64_t channels, float mean) {
  const std::vector<float> x = values(rows * channels, 1, mean), t = values(rows * channels, 2, 0.3f);
  MomentParams p{x.data(), t.data(), x.data(), nullptr, rows, channels};
  const int64_t parts = cpu::moment_units(p);
  std::vector<double> sums(parts * 4 * channels, -1.0);
  p.sums = sums.data();
  cpu::moments(p, 0, parts / 2);
  cpu::moments(p, parts / 2, parts);

  BatchNormMap map(channels);
  const double w = 1.5, eps = 1e-5, n = static_cast<double>(rows);
  std::vector<double> expected(rows * channels);
  for (int64_t c = 0; c < channels; ++c) {
    double total[4] = {};
    for (int64_t i = 0; i < parts * 4; ++i) total[i % 4] += sums[i * channels + c];
    const ChannelMoments m = channel_moments(total, x[c], n);
    double mu = 0, variance = 0, t_mean = 0, product = 0;
    for (int64_t r = 0; r < rows; ++r) mu += x[r * channels + c] / n;
    for (int64_t r = 0; r < rows; ++r) {
      const double d = x[r * channels + c] - mu, tr = t[r * channels + c];
      variance += d * d / n;
      t_mean += tr / n;
      product += d * tr / n;
    }
    CHECK_NEAR(m.mean, mu, 1e-6 * (1 + std::abs(mu)));
    CHECK_NEAR(m.variance, variance, 1e-5 * variance);
    CHECK_NEAR(m.t_mean, t_mean, 1e-6);
    CHECK_NEAR(m.t_product, product, 1e-5);
    const double inverse = 1 / std::sqrt(variance + eps);
    map.set(c, w, 0.0, m.mean, 1 / std::sqrt(m.variance + eps), m.t_mean, m.t_product, true);
    for (int64_t r = 0; r < rows; ++r) {
      const double hat = (x[r * channels + c] - mu) * inverse;
      expected[r * channels + c] =
          w * inverse * (t[r * channels + c] - t_mean - hat * product * inverse);
    }
  }
  std::vector<float> out(rows * channels);
  const CombineParams q{x.data(), t.data(), out.data(), map.map(), rows, channels};
  const int64_t units = cpu::combine_units(q);
  cpu::combine(q, 0, units / 2);
  cpu::combine(q, units / 2, units);
  // Three rounded terms, which may cancel: two values a channel can be close to each other.
  for (size_t i = 0; i < out.size(); ++i) {
    const size_t c = i % channels;
    const float terms =
        std::abs(map.scale[c] * t[i]) + std::abs(map.slope[c] * x[i]) + std::abs(map.offset[c]);
    CHECK_NEAR(out[i], expected[i], 3e-7 * terms + 1e-5);
  }
}

}  // namespace

int main() {
  for (const char* isa : {"baseline", "avx2", "avx512"}) {
    if (!cpu::select_isa(isa)) continue;
    for (int64_t channels : {1, 3, 15, 40, 300}) {
      for (int64_t rows : {2, 63, 1100}) {
        for (float mean : {0.0f, 10.0f}) test_case(rows, channels, mean);
      }
    }
  }
  return test::failures();
}

#include "common/noise.h"

#include <algorithm>
#include <vector>

#include "tests/check.h"

namespace {

using namespace fdfa;

// Every radius that normal_pair can ask for.
void test_minus_two_log() {
  double worst = 0.0;
  for (int32_t k = 1; k <= (1 << 24); ++k) {
    const double expected = -2.0 * std::log(k / 16777216.0);
    const double error = std::abs(minus_two_log(k) - expected);
    worst = std::max(worst, expected == 0.0 ? error : error / expected);
    CHECK(minus_two_log(k) >= 0.0f);  // its square root is taken
  }
  CHECK_NEAR(worst, 0.0, 2e-7);
}

template <Noise kNoise>
std::vector<float> draw(const int64_t (&state)[3], int64_t block, int64_t samples, int64_t quads) {
  std::vector<float> u(samples * quads * 4);
  for (int64_t n = 0; n < samples; ++n) {
    const NoiseStream stream = noise_stream(state, block, n);
    for (int64_t q = 0; q < quads; ++q) {
      float* out = &u[(n * quads + q) * 4];
      noise4<kNoise>(stream, static_cast<uint32_t>(q), out[0], out[1], out[2], out[3]);
    }
  }
  return u;
}

double correlation(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0.0;
  for (size_t i = 0; i < a.size(); ++i) sum += static_cast<double>(a[i]) * b[i];
  return sum / static_cast<double>(a.size());
}

constexpr int64_t kState[3] = {0x123456789ABCDEF, 7, 0};
constexpr int64_t kSamples = 64, kQuads = 4096;

template <Noise kNoise>
void test_moments(double expected_kurtosis) {
  const std::vector<float> u = draw<kNoise>(kState, 3, kSamples, kQuads);
  const double n = static_cast<double>(u.size());
  const double five_sigma = 5.0 / std::sqrt(n);
  double mean = 0.0, square = 0.0, cube = 0.0, fourth = 0.0;
  for (const double x : u) {
    mean += x / n;
    square += x * x / n;
    cube += x * x * x / n;
    fourth += x * x * x * x / n;
  }
  // Standard deviations of the powers of a normal: 1, √2, √15, √96; those of signs are smaller.
  CHECK_NEAR(mean, 0.0, five_sigma);
  CHECK_NEAR(square, 1.0, five_sigma * std::sqrt(2.0));
  CHECK_NEAR(cube, 0.0, five_sigma * std::sqrt(15.0));
  CHECK_NEAR(fourth, expected_kurtosis, five_sigma * std::sqrt(96.0));
}

// A change of any part of the counter or the key makes an independent stream, and so are the four
// values of one quad, squared too (the two normals of a pair share their radius).
template <Noise kNoise>
void test_independence() {
  const double five_sigma = 5.0 / std::sqrt(static_cast<double>(kSamples * kQuads * 4));
  const std::vector<float> u = draw<kNoise>(kState, 3, kSamples, kQuads);
  const int64_t other_seed[3] = {kState[0] ^ (int64_t{1} << 40), kState[1], kState[2]};
  const int64_t other_step[3] = {kState[0], kState[1] + 1, kState[2]};
  const int64_t other_sample[3] = {kState[0], kState[1], kState[2] + kSamples};
  CHECK_NEAR(correlation(u, draw<kNoise>(other_seed, 3, kSamples, kQuads)), 0.0, five_sigma);
  CHECK_NEAR(correlation(u, draw<kNoise>(other_step, 3, kSamples, kQuads)), 0.0, five_sigma);
  CHECK_NEAR(correlation(u, draw<kNoise>(other_sample, 3, kSamples, kQuads)), 0.0, five_sigma);
  CHECK_NEAR(correlation(u, draw<kNoise>(kState, 4, kSamples, kQuads)), 0.0, five_sigma);
  for (size_t lag = 1; lag < 8; ++lag) {
    std::vector<float> shifted(u.begin() + lag, u.end());
    shifted.resize(u.size(), 0.0f);
    CHECK_NEAR(correlation(u, shifted), 0.0, five_sigma);
    double squares = 0.0;
    for (size_t i = 0; i < u.size(); ++i)
      squares += (u[i] * u[i] - 1.0) * (shifted[i] * shifted[i] - 1.0);
    CHECK_NEAR(squares / static_cast<double>(u.size()), 0.0, 2.0 * five_sigma + 1e-4);
  }
}

// Sample i of a batch that starts at global index s is sample 0 of one that starts at s + i.
void test_samples_are_global() {
  const int64_t shifted[3] = {kState[0], kState[1], kState[2] + 5};
  const std::vector<float> whole = draw<Noise::gaussian>(kState, 0, 6, 3);
  const std::vector<float> last = draw<Noise::gaussian>(shifted, 0, 1, 3);
  for (size_t i = 0; i < last.size(); ++i) CHECK(last[i] == whole[5 * 12 + i]);
}

// Box-Muller in double from the same words.
void test_normals_against_double() {
  for (uint32_t i = 0; i < 100000; ++i) {
    const Philox4 r = philox4x32_10({i, 0, 0, 0}, 1, 2);
    float first, second;
    normal_pair(r.x0, r.x1, first, second);
    const double radius = std::sqrt(-2.0 * std::log(((r.x0 >> 8) + 1) / 16777216.0));
    const double angle = static_cast<int32_t>(r.x1) / 2147483648.0 * (std::acos(-1.0) / 4.0);
    const double along = radius * std::cos(angle) * (r.x1 & 1 ? -1.0 : 1.0);
    const double across = radius * std::sin(angle);
    CHECK_NEAR(first, r.x1 & 2 ? across : along, 2e-6);
    CHECK_NEAR(second, r.x1 & 2 ? along : across, 2e-6);
  }
}

void test_signs() {
  for (const float u : draw<Noise::rademacher>(kState, 0, 8, 64)) CHECK(u == 1.0f || u == -1.0f);
  CHECK(random_sign(0x7FFFFFFF) == 1.0f && random_sign(0x80000000) == -1.0f);
}

}  // namespace

int main() {
  test_minus_two_log();
  test_moments<Noise::gaussian>(3.0);
  test_moments<Noise::rademacher>(1.0);
  test_independence<Noise::gaussian>();
  test_independence<Noise::rademacher>();
  test_samples_are_global();
  test_normals_against_double();
  test_signs();
  return fdfa::test::failures();
}

#include "common/elementary.h"

#include "tests/check.h"

namespace {

using namespace fdfa;

// exp and tanh to a relative error, the normal distribution to an absolute one, against double.
void test_accuracy() {
  for (double at = -103.0; at <= 88.7; at += 1.0 / 1024) {
    const float x = static_cast<float>(at);
    const double exact = std::exp(static_cast<double>(x));
    CHECK_NEAR(exponential(x), exact, 2e-7 * exact + 1.5e-45);  // a subnormal's last digit
    const float part = x / 8;
    const double tangent = std::tanh(static_cast<double>(part));
    CHECK_NEAR(hyperbolic_tangent(part), tangent, 3e-7 * std::abs(tangent));
    CHECK_NEAR(normal(part).cdf, 0.5 * std::erfc(-part / std::sqrt(2.0)), 3e-7);
    const double decay = std::exp(-0.5 * static_cast<double>(part) * part);
    CHECK_NEAR(normal(part).decay, decay, 6e-6 * decay + 1.5e-45);  // of part², rounded
  }
  for (float x = 1e-30f; x < 0.7f; x *= 1.3f) {
    CHECK_NEAR(hyperbolic_tangent(-x), std::tanh(-static_cast<double>(x)), 3e-7 * x);
  }
}

void test_limits() {
  const float infinity = INFINITY;
  CHECK(exponential(infinity) == infinity && exponential(89.0f) == infinity);
  CHECK(exponential(-infinity) == 0.0f && exponential(0.0f) == 1.0f && std::isnan(exponential(NAN)));
  CHECK(hyperbolic_tangent(infinity) == 1.0f && hyperbolic_tangent(-infinity) == -1.0f);
  CHECK(std::isnan(hyperbolic_tangent(NAN)));
  CHECK(normal(infinity).cdf == 1.0f && normal(-infinity).cdf == 0.0f && std::isnan(normal(NAN).cdf));
  CHECK(normal(1e20f).decay == 0.0f && normal(-1e20f).cdf == 0.0f);
}

}  // namespace

int main() {
  test_accuracy();
  test_limits();
  return fdfa::test::failures();
}

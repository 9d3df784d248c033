#include "common/activation.h"

#include "tests/check.h"
#include "tests/reference.h"

namespace {

using namespace fdfa;

constexpr double kStep = 1e-5;

// f and f' of the kernels against the reference in double, whose f' is checked by differences of its f.
template <Activation f>
void test_activation() {
  for (double a = -8.0; a <= 8.0; a += 0.0078125) {
    const float x = static_cast<float>(a);
    CHECK_NEAR(activate<f>(x), test::activate(f, a), 1e-6 + 1e-6 * std::abs(a));
    const float saved_activation = derivative_needs_pre_activation(f) ? x : activate<f>(x);
    CHECK_NEAR(derivative<f>(saved_activation), test::slope(f, a), 2e-6);
    if (std::abs(a) < kStep) continue;  // relu's corner
    const double difference =
        (test::activate(f, a + kStep) - test::activate(f, a - kStep)) / (2 * kStep);
    CHECK_NEAR(test::slope(f, a), difference, 1e-9);
  }
  CHECK(std::isnan(activate<f>(NAN)));
  CHECK(std::isfinite(activate<f>(-200.0f)) && std::isfinite(activate<f>(200.0f)));
  const bool slope_feels_nan =
      f != Activation::identity && f != Activation::relu && f != Activation::leaky_relu;
  if (slope_feels_nan) CHECK(std::isnan(derivative<f>(NAN)));
}

}  // namespace

int main() {
  for (int i = 0; i < kActivationCount; ++i) {
    with_activation(static_cast<Activation>(i), [&](auto f) {
      CHECK(static_cast<int>(f()) == i);
      test_activation<f()>();
    });
  }
  return fdfa::test::failures();
}

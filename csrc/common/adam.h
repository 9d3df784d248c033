#pragma once

#include <cmath>
#include <cstdint>

#include "common/macros.h"

namespace fdfa {

// torch.optim.Adam's update with what does not change within a step worked out beforehand.
struct AdamStep {
  float rate1, rate2;  // 1 - beta1, 1 - beta2
  float eps;
  float step_size;                // lr / (1 - beta1^t)
  float inverse_sqrt_correction;  // 1 / sqrt(1 - beta2^t)
};

// base^n for n >= 0, of two powers at once. A GPU takes microseconds for two of pow's.
struct TwoPowers {
  double first, second;
};
FDFA_HD TwoPowers powers(double first, double second, int64_t n) {
  TwoPowers result{1.0, 1.0};
  for (; n > 0; n /= 2) {
    if (n % 2 != 0) result = {result.first * first, result.second * second};
    first *= first;
    second *= second;
  }
  return result;
}

// t counts from 1. 1 - beta and 1 - beta^t in double: they are small and differences of floats would
// lose them.
FDFA_HD AdamStep adam_step(float lr, double beta1, double beta2, float eps, int64_t t) {
  const TwoPowers decayed = powers(beta1, beta2, t);
  const double correction1 = 1.0 - decayed.first;
  const double correction2 = 1.0 - decayed.second;
  return AdamStep{static_cast<float>(1.0 - beta1), static_cast<float>(1.0 - beta2), eps,
                  static_cast<float>(lr / correction1), static_cast<float>(1.0 / sqrt(correction2))};
}

// Within two units of the last place on a GPU: exact ones would be calls of functions there.
FDFA_HD float divide(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdividef(a, b);
#else
  return a / b;
#endif
}
FDFA_HD float square_root(float x) {
#if defined(__CUDA_ARCH__)
  float root;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
#else
  return sqrtf(x);
#endif
}

// Moves the moments in place and returns the parameter's new value.
FDFA_HD float adam_update(const AdamStep& s, float parameter, float gradient, float& exp_avg,
                          float& exp_avg_sq) {
  exp_avg += s.rate1 * (gradient - exp_avg);
  exp_avg_sq += s.rate2 * (gradient * gradient - exp_avg_sq);
  return parameter -
         divide(s.step_size * exp_avg, square_root(exp_avg_sq) * s.inverse_sqrt_correction + s.eps);
}

}  // namespace fdfa

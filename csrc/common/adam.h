#pragma once

#include <cmath>
#include <cstdint>

#include "common/macros.h"

namespace fdfa {

// torch.optim.Adam's update with what does not change within a step worked out beforehand.
struct AdamStep {
  float beta1, beta2, eps;
  float step_size;                // lr / (1 - beta1^t)
  float inverse_sqrt_correction;  // 1 / sqrt(1 - beta2^t)
};

// t counts from 1. 1 - beta^t in double: it is small and differences of floats would lose it.
inline
#if defined(__CUDACC__)
    __host__ __device__
#endif
        AdamStep adam_step(float lr, float beta1, float beta2, float eps, int64_t t) {
  const double correction1 = 1.0 - pow(static_cast<double>(beta1), static_cast<double>(t));
  const double correction2 = 1.0 - pow(static_cast<double>(beta2), static_cast<double>(t));
  return AdamStep{beta1, beta2, eps, static_cast<float>(lr / correction1),
                  static_cast<float>(1.0 / sqrt(correction2))};
}

// Moves the moments in place and returns the parameter's new value.
FDFA_HD float adam_update(const AdamStep& s, float parameter, float gradient, float& exp_avg,
                          float& exp_avg_sq) {
  exp_avg += (1.0f - s.beta1) * (gradient - exp_avg);
  exp_avg_sq += (1.0f - s.beta2) * (gradient * gradient - exp_avg_sq);
  return parameter - s.step_size * exp_avg / (sqrtf(exp_avg_sq) * s.inverse_sqrt_correction + s.eps);
}

}  // namespace fdfa

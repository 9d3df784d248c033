#pragma once

#include <cstdint>
#include <vector>

#include "common/params.h"

// Batch normalisation of one channel, a = w (x - μ) / σ + b, and of a tangent or gradient t with it.
// Its Jacobian is symmetric, so both are the same map:  t ↦ w/σ (t - mean t - x̂ mean(x̂ t)).

namespace fdfa {

struct ChannelMoments {
  double mean, variance;     // of x; the biased variance
  double t_mean, t_product;  // mean t, mean (x - μ) t
};

// From one channel's sums over n rows, as MomentParams has them.
inline ChannelMoments channel_moments(const double (&sums)[4], double pivot, double n) {
  const double d = sums[0] / n, t = sums[2] / n;
  const double variance = sums[1] / n - d * d;
  // Rounding may leave less than nothing of it; NaN stays.
  return {pivot + d, variance < 0.0 ? 0.0 : variance, t, sums[3] / n - d * t};
}

// The maps of all channels. The arrays of ChannelMap point into it.
struct BatchNormMap {
  explicit BatchNormMap(int64_t channels)
      : scale(channels), bias(channels), slope(channels), offset(channels) {}

  // moves_statistics: μ and σ are those of this batch, rather than constants.
  void set(int64_t c, double weight, double b, double mean, double inverse_std, double t_mean,
           double t_product, bool moves_statistics) {
    const double s = weight * inverse_std;
    const double q = moves_statistics ? -s * inverse_std * inverse_std * t_product : 0.0;
    const double p = moves_statistics ? -s * t_mean - q * mean : 0.0;
    scale[c] = static_cast<float>(s);
    bias[c] = static_cast<float>(b - s * mean);
    slope[c] = static_cast<float>(q);
    offset[c] = static_cast<float>(p);
  }
  ChannelMap map() const { return {scale.data(), slope.data(), offset.data()}; }

  std::vector<float> scale, bias, slope, offset;
};

}  // namespace fdfa

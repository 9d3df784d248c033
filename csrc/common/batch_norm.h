#pragma once

#include <cmath>
#include <cstdint>

#include "common/macros.h"
#include "common/params.h"

// Batch normalisation of one channel, a = w (x - μ) / σ + b, and of a tangent or gradient t with it.
// Its Jacobian is symmetric, so both are the same map:  t ↦ w/σ (t - mean t - x̂ mean(x̂ t)).

namespace fdfa {

struct ChannelMoments {
  double mean, variance;     // of x; the biased variance
  double t_mean, t_product;  // mean t, mean (x - μ) t
};

// From one channel's sums over n rows, as MomentParams has them.
FDFA_HD ChannelMoments channel_moments(const double (&sums)[4], double pivot, double n) {
  const double d = sums[0] / n, t = sums[2] / n;
  const double variance = sums[1] / n - d * d;
  // Rounding may leave less than nothing of it; NaN stays.
  return {pivot + d, variance < 0.0 ? 0.0 : variance, t, sums[3] / n - d * t};
}

// moves_statistics: μ and σ are those of this batch, rather than constants.
FDFA_HD void set_tangent_map(const NormMap& map, int64_t c, double weight, double mean,
                             double inverse_std, double t_mean, double t_product,
                             bool moves_statistics) {
  const double s = weight * inverse_std;
  const double q = moves_statistics ? -s * inverse_std * inverse_std * t_product : 0.0;
  const double p = moves_statistics ? -s * t_mean - q * mean : 0.0;
  map.scale()[c] = static_cast<float>(s);
  map.slope()[c] = static_cast<float>(q);
  map.offset()[c] = static_cast<float>(p);
}

// total: the channel's sums over all parts; any value where there are none.
FDFA_HD void normalize_channel(const NormForwardParams& p, int64_t c, const double (&total)[4]) {
  const bool training = p.sums != nullptr;
  const auto n = static_cast<double>(p.rows);
  ChannelMoments m{};
  if (training) {
    m = channel_moments(total, p.pivot[c], n);
    if (c == 0 && p.batches != nullptr) ++*p.batches;
    if (p.running_mean != nullptr) {
      const double keep = 1.0 - p.momentum, unbiased = m.variance * n / (n - 1.0);
      p.running_mean[c] = static_cast<float>(keep * p.running_mean[c] + p.momentum * m.mean);
      p.running_var[c] = static_cast<float>(keep * p.running_var[c] + p.momentum * unbiased);
    }
  } else {
    m.mean = p.running_mean[c];
    m.variance = p.running_var[c];
  }
  const double inverse = 1.0 / sqrt(m.variance + p.eps);
  const double w = p.weight != nullptr ? p.weight[c] : 1.0, b = p.bias != nullptr ? p.bias[c] : 0.0;
  p.mean[c] = static_cast<float>(m.mean);
  p.inverse_std[c] = static_cast<float>(inverse);
  p.map.bias()[c] = static_cast<float>(b - w * inverse * m.mean);
  set_tangent_map(p.map, c, w, m.mean, inverse, m.t_mean, m.t_product, training);
}

FDFA_HD void normalize_channel_backward(const NormBackwardParams& p, int64_t c,
                                        const double (&total)[4]) {
  const auto n = static_cast<double>(p.rows);
  const ChannelMoments m = channel_moments(total, p.pivot[c], n);
  const double mu = p.mean[c], inverse = p.inverse_std[c];
  // The moment's product is about the batch's own mean; μ may be a running one.
  const double product = m.t_product + (m.mean - mu) * m.t_mean;
  const double w = p.weight != nullptr ? p.weight[c] : 1.0;
  set_tangent_map(p.map, c, w, mu, inverse, m.t_mean, product, p.training);
  p.weight_grad[c] = static_cast<float>(product * inverse * n);
  p.bias_grad[c] = static_cast<float>(m.t_mean * n);
}

}  // namespace fdfa

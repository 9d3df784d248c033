#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "common/dtype.h"
#include "common/noise.h"
#include "common/params.h"

// The kernels again: one plain loop per formula, in double, with nothing of theirs but the noise (which
// noise_test checks) and the conversions of types (dtype_test).

namespace fdfa::test {

// What rounding a value of type T to store it, and f' of a rounded y, may cost, relative to 1 +
// |value|.
template <class T>
constexpr double kTolerance = 2e-5;
template <>
inline constexpr double kTolerance<bfloat16> = 1.6e-2;
template <>
inline constexpr double kTolerance<float16> = 2e-3;

inline double activate(Activation f, double a) {
  switch (f) {
    case Activation::identity:
      return a;
    case Activation::relu:
      return a > 0 ? a : 0;
    case Activation::leaky_relu:
      return a > 0 ? a : static_cast<double>(kLeakySlope) * a;
    case Activation::tanh:
      return std::tanh(a);
    case Activation::sigmoid:
      return 1 / (1 + std::exp(-a));
    case Activation::gelu:
      return a * std::erfc(-a / std::sqrt(2.0)) / 2;
    case Activation::silu:
      return a / (1 + std::exp(-a));
  }
  return NAN;
}

// f' from y, or from the pre-activation for gelu and silu.
inline double slope_at(Activation f, double saved_activation) {
  constexpr double kPi = 3.14159265358979323846;
  const double sigmoid = 1 / (1 + std::exp(-saved_activation));
  switch (f) {
    case Activation::identity:
      return 1;
    case Activation::relu:
      return saved_activation > 0 ? 1 : 0;
    case Activation::leaky_relu:
      return saved_activation > 0 ? 1 : static_cast<double>(kLeakySlope);
    case Activation::tanh:
      return 1 - saved_activation * saved_activation;
    case Activation::sigmoid:
      return saved_activation * (1 - saved_activation);
    case Activation::gelu:
      return std::erfc(-saved_activation / std::sqrt(2.0)) / 2 +
             saved_activation * std::exp(-saved_activation * saved_activation / 2) / std::sqrt(2 * kPi);
    case Activation::silu:
      return sigmoid + saved_activation * sigmoid * (1 - sigmoid);
  }
  return NAN;
}

// f' from the pre-activation.
inline double slope(Activation f, double a) {
  return slope_at(f, derivative_needs_pre_activation(f) ? a : activate(f, a));
}

// Of a feature of an image [height, width, channels], that of its patch in [rows, columns, channels].
inline int64_t patch_feature(const Patches& p, int64_t feature) {
  const int64_t channel = feature % p.channels, pixel = feature / p.channels;
  const int64_t columns = (p.width + p.size - 1) / p.size;
  return (pixel / p.width / p.size * columns + pixel % p.width / p.size) * p.channels + channel;
}

inline int64_t image_features(const Patches& p) { return int64_t{p.height} * p.width * p.channels; }

inline double noise(const NoiseParams& p, int64_t sample, int64_t feature) {
  if (p.given) return p.given[sample * p.patches.features() + patch_feature(p.patches, feature)];
  if (p.kind == Noise::none) return 0.0;
  const NoiseStream stream = noise_stream(p.state, p.block, sample);
  const uint32_t quad = static_cast<uint32_t>(feature / 4);
  float u[4];
  if (p.kind == Noise::gaussian) {
    noise4<Noise::gaussian>(stream, quad, u[0], u[1], u[2], u[3]);
  } else {
    noise4<Noise::rademacher>(stream, quad, u[0], u[1], u[2], u[3]);
  }
  return u[feature % 4];
}

template <class T>
void epilogue(const EpilogueParams<T>& p) {
  for (T* zero : p.zeros) {
    if (zero && p.samples * p.features > 0) *zero = from_float<T>(0.0f);
  }
  for (int64_t n = 0; n < p.samples; ++n) {
    for (int64_t i = 0; i < p.features; ++i) {
      const int64_t at = n * p.features + i;
      const int64_t product = p.transposed_pitch ? i * p.transposed_pitch + n : at;
      double tangent = p.tz ? to_float(p.tz[product]) : 0.0;
      if (p.z) {
        const int64_t c = i % p.channels;
        const double z = to_float(p.z[product]), scale = p.map.scale ? p.map.scale[c] : 1.0;
        const double a = scale * z + (p.bias ? double{to_float(p.bias[c])} : 0.0);
        tangent *= scale;
        if (p.map.slope) tangent += p.map.slope[c] * z + double{p.map.offset[c]};
        tangent *= slope(p.activation, a);
        p.y[at] = from_float<T>(static_cast<float>(activate(p.activation, a)));
        if (p.pre) p.pre[at] = from_float<T>(static_cast<float>(a));
      }
      if (p.ty) p.ty[at] = from_float<T>(static_cast<float>(tangent + noise(p.noise, n, i)));
    }
  }
}

// B's new value; moves the moments. A G that is not finite leaves both as they were, and so does one
// whose square is not.
template <class T>
double moved(const FeedbackParams<T>& p, int64_t at, double g) {
  const double b = p.feedback[at], gradient = double{p.decay} * b - g;
  if (p.rule == Rule::gradient) {
    p.gradient[at] = static_cast<float>(gradient);
    return b;
  }
  if (!std::isfinite(g)) return b;
  if (p.rule == Rule::ema) return b - p.lr * gradient;
  const double t = static_cast<double>(*p.updates + 1);
  const double m = p.beta1 * p.exp_avg[at] + (1 - p.beta1) * gradient;
  const double v = p.beta2 * p.exp_avg_sq[at] + (1 - p.beta2) * gradient * gradient;
  if (!std::isfinite(static_cast<float>(v))) return b;
  p.exp_avg[at] = static_cast<float>(m);
  p.exp_avg_sq[at] = static_cast<float>(v);
  const double mean = m / (1 - std::pow(p.beta1, t));
  const double square = v / (1 - std::pow(p.beta2, t));
  return b - p.lr * mean / (std::sqrt(square) + p.eps);
}

template <class T>
void feedback_step(const FeedbackParams<T>& p) {
  if (p.samples == 0) return;
  std::vector<double> s(p.samples);
  for (int64_t i = 0; i < p.features; ++i) {
    double delta_sum = 0, pixels = 1;
    if (p.patches.size > 0) {
      pixels = 0;
      for (int64_t j = 0; j < image_features(p.patches); ++j)
        pixels += patch_feature(p.patches, j) == i;
    }
    for (int64_t n = 0; n < p.samples; ++n) {
      s[n] = p.source ? to_float(p.source[n * p.features + i]) : noise(p.noise, n, i);
    }
    for (int64_t k = 0; p.rule != Rule::fixed && k < p.outputs; ++k) {
      double g = 0;
      for (int64_t n = 0; n < p.samples; ++n) g += p.factor[n * p.outputs + k] * s[n];
      const int64_t at = k * p.features + i;
      p.feedback[at] = static_cast<float>(moved(p, at, p.scale * g / pixels));
    }
    for (int64_t n = 0; n < p.samples; ++n) {
      double sum = 0;
      for (int64_t k = 0; k < p.outputs; ++k) {
        sum += double{p.error[n * p.outputs + k]} * p.feedback[k * p.features + i];
      }
      const int64_t at = n * p.features + i, to = p.transposed ? i * p.samples + n : at;
      const double f =
          p.saved_activation ? slope_at(p.activation, to_float(p.saved_activation[at])) : 1.0;
      p.delta[to] = from_float<T>(static_cast<float>(sum * f));
      delta_sum += to_float(p.delta[to]);
    }
    if (p.bias_grad) p.bias_grad[i] = static_cast<float>(delta_sum);
  }
}

template <class T>
void spread(const SpreadParams<T>& p) {
  for (int64_t n = 0; n < p.samples; ++n) {
    for (int64_t i = 0; i < image_features(p.patches); ++i) {
      const int64_t at = n * image_features(p.patches) + i;
      const double f =
          p.saved_activation ? slope_at(p.activation, to_float(p.saved_activation[at])) : 1.0;
      const double projected = p.projected[n * p.patches.features() + patch_feature(p.patches, i)];
      p.delta[at] = from_float<T>(static_cast<float>(projected * f));
    }
  }
}

inline void max_pool(const MaxPoolParams& p) {
  const PoolShape& s = p.shape;
  for (float* zero : p.zeros) {
    if (zero && s.samples * s.out_height > 0) *zero = 0.0f;
  }
  for (int64_t at = 0; at < s.samples * s.out_image(); ++at) {
    const int64_t c = at % s.channels, window = at / s.channels;
    const int64_t left = window % s.out_width * s.stride[1] - s.padding[1];
    const int64_t top = window / s.out_width % s.out_height * s.stride[0] - s.padding[0];
    const int64_t n = at / s.out_image();
    int64_t best = -1;
    for (int64_t place = 0; place < int64_t{s.kernel[0]} * s.kernel[1]; ++place) {
      const int64_t row = top + place / s.kernel[1], column = left + place % s.kernel[1];
      if (row < 0 || row >= s.height || column < 0 || column >= s.width) continue;
      const int64_t from = ((n * s.height + row) * s.width + column) * s.channels + c;
      if (best >= 0 && (std::isnan(p.x[best]) || p.x[from] <= p.x[best])) continue;
      best = from;
      if (p.winners) p.winners[at] = static_cast<uint8_t>(place);
    }
    p.y[at] = p.x[best];
    const double tangent = p.tx ? p.tx[best] : 0.0;
    if (p.ty) p.ty[at] = static_cast<float>(tangent + noise(p.noise, n, at % s.out_image()));
  }
}

inline void max_pool_backward(const MaxPoolBackwardParams& p) {
  const PoolShape& s = p.shape;
  for (int64_t i = 0; i < s.samples * s.image(); ++i) p.dx[i] = 0.0f;
  for (int64_t at = 0; at < s.samples * s.out_image(); ++at) {
    const int64_t c = at % s.channels, window = at / s.channels, place = p.winners[at];
    const int64_t column = window % s.out_width * s.stride[1] - s.padding[1] + place % s.kernel[1];
    const int64_t row =
        window / s.out_width % s.out_height * s.stride[0] - s.padding[0] + place / s.kernel[1];
    if (place >= int64_t{s.kernel[0]} * s.kernel[1]) continue;
    if (row < 0 || row >= s.height || column < 0 || column >= s.width) continue;
    p.dx[((at / s.out_image() * s.height + row) * s.width + column) * s.channels + c] += p.delta[at];
  }
}

inline void moments(const MomentParams& p, int64_t part_rows) {
  for (int64_t i = 0; i < p.parts * 4 * p.channels; ++i) p.sums[i] = 0.0;
  for (int64_t i = 0; i < p.rows * p.channels; ++i) {
    const int64_t c = i % p.channels;
    const double d = double{p.x[i]} - p.pivot[c], t = p.t ? p.t[i] : 0.0;
    const double terms[] = {d, d * d, t, d * t};
    double* sums = p.sums + i / p.channels / part_rows * 4 * p.channels + c;
    for (int64_t kind = 0; kind < 4; ++kind) sums[kind * p.channels] += terms[kind];
  }
}

// Means of d, d², t and d t, of all parts.
template <class Params>
std::vector<double> means(const Params& p, int64_t c) {
  std::vector<double> result(4, 0.0);
  for (int64_t i = 0; i < 4 * p.parts; ++i) result[i % 4] += p.sums[i * p.channels + c] / p.rows;
  return result;
}

inline void norm(const NormForwardParams& p) {
  for (int64_t c = 0; c < p.channels; ++c) {
    double mean = 0, variance = 0, t_mean = 0, product = 0;
    if (p.sums) {
      const std::vector<double> m = means(p, c);
      mean = p.pivot[c] + m[0];
      variance = m[1] - m[0] * m[0];
      t_mean = m[2];
      product = m[3] - m[0] * m[2];
      if (p.running_mean) {
        const double unbiased = variance * p.rows / (p.rows - 1);
        p.running_mean[c] += static_cast<float>(p.momentum * (mean - p.running_mean[c]));
        p.running_var[c] += static_cast<float>(p.momentum * (unbiased - p.running_var[c]));
      }
    } else {
      mean = p.running_mean[c];
      variance = p.running_var[c];
    }
    const double inverse = 1 / std::sqrt(variance + p.eps);
    const double scale = (p.weight ? p.weight[c] : 1.0) * inverse;
    p.mean[c] = static_cast<float>(mean);
    p.inverse_std[c] = static_cast<float>(inverse);
    // scale (t - mean t - (x - μ) product / σ²), sorted by what is multiplied
    const double slope = p.sums ? -scale * product * inverse * inverse : 0.0;
    p.map.scale()[c] = static_cast<float>(scale);
    p.map.bias()[c] = static_cast<float>((p.bias ? p.bias[c] : 0.0) - scale * mean);
    p.map.slope()[c] = static_cast<float>(slope);
    p.map.offset()[c] = static_cast<float>(p.sums ? -scale * t_mean - slope * mean : 0.0);
  }
  if (p.batches && p.sums) ++*p.batches;
}

inline void norm_backward(const NormBackwardParams& p) {
  for (int64_t c = 0; c < p.channels; ++c) {
    const std::vector<double> m = means(p, c);
    const double mean = p.mean[c], inverse = p.inverse_std[c];
    const double product = m[3] + (p.pivot[c] - mean) * m[2];  // mean (x - μ) t
    const double scale = (p.weight ? p.weight[c] : 1.0) * inverse;
    const double slope = p.training ? -scale * product * inverse * inverse : 0.0;
    p.map.scale()[c] = static_cast<float>(scale);
    p.map.slope()[c] = static_cast<float>(slope);
    p.map.offset()[c] = static_cast<float>(p.training ? -scale * m[2] - slope * mean : 0.0);
    p.weight_grad[c] = static_cast<float>(product * inverse * p.rows);
    p.bias_grad[c] = static_cast<float>(m[2] * p.rows);
  }
}

inline void combine(const CombineParams& p) {
  for (int64_t i = 0; i < p.rows * p.channels; ++i) {
    const int64_t c = i % p.channels;
    p.out[i] = static_cast<float>(double{p.map.scale[c]} * p.t[i] + double{p.map.slope[c]} * p.x[i] +
                                  p.map.offset[c]);
  }
}

}  // namespace fdfa::test

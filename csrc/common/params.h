#pragma once

#include <cstdint>
#include <type_traits>

#include "common/activation.h"
#include "common/macros.h"

// What the kernels take: plain pointers and sizes, so that they know nothing of torch. Every matrix is
// dense and row-major; a row is one sample. For a convolution the features of a row are ordered
// (h, w, c), the memory order of channels_last.

namespace fdfa {

enum class Noise : int { gaussian, rademacher, none };
constexpr const char* kNoiseNames[] = {"gaussian", "rademacher", "none"};
constexpr int kNoiseCount = 3;

enum class Rule : int { ema, adam, gradient, fixed };

// Images [height, width, channels] in square patches of `size` pixels a side, less at the far edges.
// What they have in common per channel is [rows, columns, channels]: its features. An image has less
// than 2^30 elements, so that 32 bits count them, with room for a patch more.
struct Patches {
  int32_t size, height, width, channels;  // size 0: none

  FDFA_HD int32_t rows() const { return (height + size - 1) / size; }
  FDFA_HD int32_t columns() const { return (width + size - 1) / size; }
  FDFA_HD int32_t features() const { return rows() * columns() * channels; }
  FDFA_HD int32_t image() const { return height * width * channels; }
  // Of a feature of the image, that of its patch.
  FDFA_HD int32_t feature_of(int32_t image_feature) const {
    const int32_t pixel = image_feature / channels;
    const int32_t row = pixel / width / size, column = pixel % width / size;
    return (row * columns() + column) * channels + image_feature % channels;
  }
  // Pixels of the patch that a feature belongs to.
  FDFA_HD int32_t pixels(int32_t feature) const {
    const int32_t patch = feature / channels;
    const int32_t below = height - patch / columns() * size, right = width - patch % columns() * size;
    return (below < size ? below : size) * (right < size ? right : size);
  }
};

// [3] in device memory: seed, step, global index of the first sample. snapshot = state, then the step
// is counted up.
struct NextNoiseParams {
  int64_t* state;
  int64_t* snapshot;
};

struct NoiseParams {
  const int64_t* state;          // [3], as NextNoiseParams has it
  int64_t block;                 // which block of the network
  Noise kind;                    // none where the noise is given, one value for each patch and channel:
  const float* given = nullptr;  // [samples, patches.features()]
  Patches patches = {};
  FDFA_HD bool is_none() const { return kind == Noise::none && given == nullptr; }
};
constexpr NoiseParams kNoNoise{nullptr, 0, Noise::none};

// What is done to channel c of a product z before the activation f, and to its tangent:
//   a = scale[c] z + bias[c],  ta = scale[c] tz + slope[c] z + offset[c]
// A batch normalisation is of this form once its statistics are known (see batch_norm.h).
struct ChannelMap {
  const float* scale;  // [channels]; null: 1
  const float* slope;  // [channels]; null, like offset: 0
  const float* offset;
};

// y = f(a),  ty = f'(a) * ta + u, with a = z + bias, ta = tz or as `map` says  (Algorithm 1, lines 11
// to 15)
// Outputs may alias the inputs of the same shape.
template <class T>
struct EpilogueParams {
  const T* z;     // [samples, features] product without bias; null: perturb only, ty = tz + u
  const T* tz;    // [samples, features] its tangent; null: zero
  const T* bias;  // [channels]; feature i is of channel i % channels; null: zero
  T* y;           // [samples, features]; null where z is
  T* ty;          // [samples, features]; null, where it would be zero: it is not wanted
  T* pre;         // [samples, features] pre-activation, if f' needs it; null: it is not wanted
  int64_t samples, features, channels;
  Activation activation;
  NoiseParams noise;
  // Not 0: z and tz are the first columns of [features, pitch] instead, not the outputs' memory, and
  // channels are features. For the CPU alone, whose libraries are faster at W xᵀ than at x Wᵀ.
  int64_t transposed_pitch;
  ChannelMap map;  // slope and offset only where there is a tangent
  // The single elements of tensors that stand for a gradient or a tangent of zeros: they become zero.
  // Null: none.
  T* zeros[2];
};

// With d = x - pivot[c], sums over the rows of x and t [rows, channels], in parts of so many rows that
// single precision is enough within one:
//   sums[part] = (Σ d, Σ d², Σ t, Σ d t), each [channels]
struct MomentParams {
  const float* x;
  const float* t;      // null: the last two sums are zero
  const float* pivot;  // [channels], somewhere among the values of each, so that no digits are lost
  double* sums;        // [parts, 4, channels]
  int64_t rows, channels;
  int64_t parts;  // as many as the device's moment_parts says
};

// The maps that a batch normalisation puts on its input and on a tangent or gradient, [4, channels] in
// one piece of memory.
struct NormMap {
  float* values;
  int64_t channels;
  FDFA_HD float* scale() const { return values; }
  FDFA_HD float* bias() const { return values + channels; }
  FDFA_HD float* slope() const { return values + 2 * channels; }
  FDFA_HD float* offset() const { return values + 3 * channels; }
  ChannelMap channel_map() const { return {scale(), slope(), offset()}; }
};

// From the sums over x and its tangent to statistics and maps, channel by channel.
struct NormForwardParams {
  const double* sums;  // as MomentParams has them; null: the running statistics are constants to use
  const float* pivot;
  int64_t parts, rows, channels;
  const float *weight, *bias;         // [channels]; null: 1 and 0
  float *running_mean, *running_var;  // [channels], moved where there are sums; null: none
  double momentum, eps;
  float *mean, *inverse_std;  // [channels] of this pass, for the backward
  NormMap map;
  int64_t* batches;  // [1] number of batches whose statistics were taken, counted up; null: none
};

// From the sums over x and the gradient at the output.
struct NormBackwardParams {
  const double* sums;
  const float* pivot;
  int64_t parts, rows, channels;
  const float *weight, *mean, *inverse_std;  // [channels]; weight null: 1
  bool training;                             // mean and inverse_std are the batch's own
  float *weight_grad, *bias_grad;            // [channels]
  NormMap map;                               // its bias is not set
};

// out = scale[c] t + slope[c] x + offset[c], all [rows, channels]
struct CombineParams {
  const float* x;
  const float* t;
  float* out;
  ChannelMap map;
  int64_t rows, channels;
};

// Images are [samples, height, width, channels]; what a window covers of the padding does not count. An
// image of x, with its padding, has less than 2^31 elements, so that 32 bits count what lies within
// one.
struct PoolShape {
  int64_t samples;
  int32_t height, width, channels, out_height, out_width;
  int32_t kernel[2], stride[2], padding[2];  // along height and width

  // Elements of an image of x and of y.
  FDFA_HD int64_t image() const { return int64_t{height} * width * channels; }
  FDFA_HD int64_t out_image() const { return int64_t{out_height} * out_width * channels; }
};

// y = the greatest of each window of x, the first of equals or a NaN; ty = the tangent of that element
// + u, whose features are those of y. The winner of a window is the place of that element among those
// of the window, counted row by row, padding included.
struct MaxPoolParams {
  const float* x;    // [samples, height, width, channels]
  const float* tx;   // the same; null: zero
  float* y;          // [samples, out_height, out_width, channels]
  float* ty;         // the same; null where it would be zero: neither tx nor noise
  uint8_t* winners;  // the same, where a window has at most 256 places; null: not wanted
  PoolShape shape;
  NoiseParams noise;
  float* zeros[2] = {};  // as EpilogueParams has them
};

// An epilogue, and the max-pool of its y and ty, which is not kept: only the pool's own tangent goes
// on.
struct PooledEpilogueParams {
  EpilogueParams<float> epilogue;  // of images, row-major; ty is unused on the CPU, else its memory
  float* pooled;                   // [samples, out_height, out_width, channels]
  float* pooled_tangent;           // the same, or null, and ty null: there are no tangents
  PoolShape shape;
};

// dx: each window's delta at its winner, summed over the windows that an element wins.
struct MaxPoolBackwardParams {
  const uint8_t* winners;  // [samples, out_height, out_width, channels] as MaxPoolParams has them
  const float* delta;      // the same
  float* dx;               // [samples, height, width, channels]
  PoolShape shape;
};

// With ∇B = decay B - G and G = scale factorᵀ s, B is moved by the rule, and delta = (error B) ⊙ f':
//   ema       B ← B - lr ∇B, then delta from the new B
//   adam      one Adam step on ∇B, delta from the new B
//   gradient  gradient ← ∇B, delta from the unchanged B
//   fixed     B stays, there is no G
// With patches a feature is one of them, whose G is divided by its pixels: the mean of theirs.
// ema and adam leave an element alone where G is not finite, or for adam its square: a batch that
// overflowed must not spoil B.
// FDFA: s = u, the factor is the output's tangent, scale 1 / samples, decay 1 (eq. 8, 10; Algorithm 1,
// lines 22, 23). Kolen-Pollack: s = y, the factor is the error, scale -1. Fixed: direct feedback
// alignment.
template <class T>
struct FeedbackParams {
  float* feedback;            // [outputs, features] B
  float* exp_avg;             // [outputs, features] Adam's moments; null for the other rules
  float* exp_avg_sq;          // [outputs, features]
  float* gradient;            // [outputs, features] ∇B, for rule gradient, else null
  const int64_t* updates;     // [1] in device memory: number of Adam steps before this one
  const float* error;         // [samples, outputs] gradient of the loss at the network's output
  const float* factor;        // [samples, outputs]; null for rule fixed
  const T* source;            // [samples, features] s where noise is none; null: s = u, or rule fixed
  const T* saved_activation;  // [samples, features] what f' is taken from; null: f' = 1
  T* delta;                   // [samples, features]; may be the same memory
  int64_t samples, features, outputs;
  Activation activation;
  NoiseParams noise;
  Rule rule;
  float scale, decay;
  double beta1, beta2;
  float lr, eps;
  bool tf32;             // the products may round their factors to tf32; for CUDA alone
  bool transposed;       // delta is [features, samples] instead, for the CPU alone
  float* bias_grad;      // [features] sum over the samples of delta as it is stored; null: not wanted
  Patches patches = {};  // whose features these are
};

// delta = projected ⊙ f', of images whose patches have the projected errors.
template <class T>
struct SpreadParams {
  const float* projected;     // [samples, patches.features()]
  const T* saved_activation;  // [samples, height, width, channels]; null: f' = 1
  T* delta;                   // the same; may be the same memory
  int64_t samples;
  Patches patches;
  Activation activation;
};

template <class F>
auto with_noise(Noise value, F&& f) {
  switch (value) {
    case Noise::rademacher:
      return f(std::integral_constant<Noise, Noise::rademacher>{});
    case Noise::none:
      return f(std::integral_constant<Noise, Noise::none>{});
    default:
      return f(std::integral_constant<Noise, Noise::gaussian>{});
  }
}

}  // namespace fdfa

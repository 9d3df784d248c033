#include <cstdint>

#include "common/activation.h"
#include "common/adam.h"
#include "common/dtype.h"
#include "common/noise.h"
#include "cuda/counters.h"
#include "cuda/kernels.h"
#include "cuda/tensor_core.h"

// The feedback step of all blocks of the network, in one launch: G = scale factorᵀ s, B moved by the
// rule, delta = (error B) ⊙ f'. B, with its moments, is read from and written to DRAM once; where s is
// noise it is made again and never stored; gate is read and delta written once.

namespace fdfa::cuda {
namespace {

// A thread block owns 32 columns of B, so it may read back what it wrote with no grid-wide barrier. Its
// threads are 32 columns by 8 groups; a warp is one group, so it reads rows of B in 128-byte lines.
constexpr int kColumns = 32;
constexpr int kGroups = 8;
constexpr int kThreads = kColumns * kGroups;

// One step over the batch: the 32 x 8 quads of s are one for each thread.
constexpr int kSamples = 32;
constexpr int kQuads = kColumns / 4;
static_assert(kSamples * kQuads == kThreads, "each thread makes one quad of s");
constexpr int kSamplesPerThread = kSamples / kGroups;

// Outputs at most, a sum of each in the registers of a thread. Output i of group g is g + 8 i, so that
// a network of ten keeps every group busy.
constexpr int kOutputs = 32;
constexpr int kOutputsPerThread = kOutputs / kGroups;

// tile [32, 32] = matrix[first_sample.., :] of matrix [samples, outputs], zero outside.
__device__ void load_tile(const float* matrix, int64_t samples, int64_t outputs, int64_t first_sample,
                          float (&tile)[kSamples][kOutputs]) {
  const int thread = threadIdx.y * kColumns + threadIdx.x;
  for (int i = thread; i < kSamples * kOutputs; i += kThreads) {
    const int64_t sample = first_sample + i / kOutputs, output = i % kOutputs;
    const bool inside = sample < samples && output < outputs;
    tile[i / kOutputs][i % kOutputs] = inside ? matrix[sample * outputs + output] : 0.0f;
  }
}

// s[sample, 4 quad..]: noise, or what `source` has. Outside the batch or the block the noise goes on,
// which is harmless, since the factor is zero there or nobody reads the column, and the source is zero.
template <Noise kNoise, class T>
__device__ void make_quad(const FeedbackParams<T>& p, int64_t sample, int64_t quad, float (&s)[4]) {
  if constexpr (kNoise != Noise::none) {
    const NoiseStream stream = noise_stream(p.noise.state, p.noise.block, sample);
    noise4<kNoise>(stream, static_cast<uint32_t>(quad), s[0], s[1], s[2], s[3]);
  } else {
    for (int i = 0; i < 4; ++i) {
      const int64_t feature = 4 * quad + i;
      const bool inside = sample < p.samples && feature < p.features;
      s[i] = inside ? to_float(p.source[sample * p.features + feature]) : 0.0f;
    }
  }
}

// tile [32, 32] = s[first_sample.., first_feature..].
template <Noise kNoise, class T>
__device__ void make_tile(const FeedbackParams<T>& p, int64_t first_sample, int64_t first_feature,
                          float (&tile)[kSamples][kColumns]) {
  const int thread = threadIdx.y * kColumns + threadIdx.x;
  const int row = thread / kQuads, quad = thread % kQuads;
  float s[4];
  make_quad<kNoise>(p, first_sample + row, first_feature / 4 + quad, s);
  for (int i = 0; i < 4; ++i) tile[row][4 * quad + i] = s[i];
}

// Moves element `index` of B by the rule, with g its element of G.
template <Rule kRule, class T>
__device__ void move_feedback(const FeedbackParams<T>& p, const AdamStep& adam, int64_t index,
                              float g) {
  const float b = p.feedback[index];
  if (kRule != Rule::gradient && !is_finite(g)) return;  // B outlives a batch that overflowed
  if constexpr (kRule == Rule::ema) {
    p.feedback[index] = b + p.lr * (g - p.decay * b);
  } else if constexpr (kRule == Rule::adam) {
    p.feedback[index] = adam_update(adam, b, p.decay * b - g, p.exp_avg[index], p.exp_avg_sq[index]);
  } else {
    p.gradient[index] = p.decay * b - g;
  }
}

// f' with the activation at run time: it is taken once per element of delta, and as a template argument
// it would make seven times the kernels.
__device__ float slope_at(Activation activation, float gate) {
  switch (activation) {
    case Activation::relu:
      return derivative<Activation::relu>(gate);
    case Activation::leaky_relu:
      return derivative<Activation::leaky_relu>(gate);
    case Activation::tanh:
      return derivative<Activation::tanh>(gate);
    case Activation::sigmoid:
      return derivative<Activation::sigmoid>(gate);
    case Activation::gelu:
      return derivative<Activation::gelu>(gate);
    case Activation::silu:
      return derivative<Activation::silu>(gate);
    default:
      return derivative<Activation::identity>(gate);
  }
}

// Blocks of the network that one launch takes, as its parameter; a thread block works on one of them.
template <class T>
struct Group {
  static constexpr int kMost = 16;
  FeedbackParams<T> members[kMost];
  unsigned ends[kMost];  // one past the last thread block of each
  int64_t* counter;      // of Adam steps, where this launch counts up; else null

  // Of the calling thread block: its member, and its place among those that work on it.
  __device__ int own_member() const {
    int member = 0;
    while (blockIdx.x >= ends[member]) ++member;
    return member;
  }
  __device__ int64_t own_tile(int member) const {
    return blockIdx.x - (member == 0 ? 0 : ends[member - 1]);
  }
};

template <class T, Noise kNoise, Rule kRule>
__global__ void __launch_bounds__(kThreads) feedback_kernel(const __grid_constant__ Group<T> blocks) {
  __shared__ float s[kSamples][kColumns];
  __shared__ float rows[kSamples][kOutputs];  // of the factor, then of the error
  __shared__ AdamStep adam;

  const int member = blocks.own_member();
  const FeedbackParams<T>& p = blocks.members[member];
  const int64_t first_feature = blocks.own_tile(member) * kColumns;
  const int column = threadIdx.x, group = threadIdx.y;
  const int64_t feature = first_feature + column;
  const bool inside = feature < p.features;  // threads outside still meet every barrier

  // One thread for all: double-precision powers are slow. The barriers of phase 1 publish the result.
  if (kRule == Rule::adam && column == 0 && group == 0) {
    adam = adam_step(p.lr, p.beta1, p.beta2, p.eps, update_number(p.updates, blocks.counter));
  }

  // Phase 1: G in registers, and B moved towards it.
  float products[kOutputsPerThread] = {};
  const int live = static_cast<int>((p.outputs - group + kGroups - 1) / kGroups);  // of the products
  for (int64_t first_sample = 0; kRule != Rule::fixed && first_sample < p.samples;
       first_sample += kSamples) {
    make_tile<kNoise>(p, first_sample, first_feature, s);
    load_tile(p.factor, p.samples, p.outputs, first_sample, rows);
    __syncthreads();
    for (int n = 0; n < kSamples; ++n) {
      const float value = s[n][column];
#pragma unroll
      for (int i = 0; i < kOutputsPerThread; ++i) {
        if (i < live) products[i] += rows[n][group + kGroups * i] * value;
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; kRule != Rule::fixed && i < kOutputsPerThread; ++i) {
    if (inside && i < live) {
      move_feedback<kRule>(p, adam, (group + kGroups * i) * p.features + feature,
                           p.scale * products[i]);
    }
  }
  // Phase 2: a thread projects 4 of 32 samples onto its column. All groups read the same rows of B,
  // which the first phase left in the caches; the first barrier below lets the whole thread block see
  // them.
  float delta_sum = 0.0f;  // of the thread's samples
  for (int64_t first_sample = 0; first_sample < p.samples; first_sample += kSamples) {
    float sums[kSamplesPerThread] = {};
    load_tile(p.error, p.samples, p.outputs, first_sample, rows);
    __syncthreads();
    for (int k = 0; inside && k < p.outputs; ++k) {
      const float b = p.feedback[k * p.features + feature];
      for (int i = 0; i < kSamplesPerThread; ++i) sums[i] += rows[group + kGroups * i][k] * b;
    }
    __syncthreads();
    for (int i = 0; i < kSamplesPerThread; ++i) {
      const int64_t sample = first_sample + group + kGroups * i;
      if (!inside || sample >= p.samples) continue;
      const int64_t index = sample * p.features + feature;
      const float slope = p.gate == nullptr ? 1.0f : slope_at(p.activation, to_float(p.gate[index]));
      const T delta = from_float<T>(sums[i] * slope);
      p.delta[index] = delta;
      delta_sum += to_float(delta);
    }
  }
  if (p.bias_grad == nullptr) return;
  s[group][column] = delta_sum;  // nobody reads the noise any more
  __syncthreads();
  if (group != 0 || !inside) return;
  for (int i = 1; i < kGroups; ++i) delta_sum += s[i][column];
  p.bias_grad[feature] = delta_sum;
}

// For networks of many outputs, where the products weigh more than the bytes: the same on tensor cores.
// A thread block owns 64 columns of B; its 8 warps each take 16 rows of a product, by 64 columns.
constexpr int kWideOutputs = kOutputs + 1;  // from which on it is taken
constexpr int kWideColumns = 64;
constexpr int kWarps = 8;
constexpr int kWideThreads = 32 * kWarps;
constexpr int kTileRows = 64;              // of a tile in shared memory
constexpr int kStride = kWideColumns + 8;  // so that the elements of b lie in 32 banks
constexpr int kProductRows = 16 * kWarps;
constexpr int kColumnTiles = kWideColumns / 8;

using WideTile = float[kTileRows][kStride];

// A warp's rows of c += a b, where b is split into two tiles. a(row, k) is zero outside its matrix.
template <class A>
__device__ void multiply_wide(float (&c)[kColumnTiles][4], const WideTile& high, const WideTile& low,
                              int depth, const A& a) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int k = 0; k < depth; k += 8) {
    uint32_t a_high[4], a_low[4];
    for (int i = 0; i < 4; ++i) {
      const Split s = split(a(g + 8 * (i % 2), k + t + 4 * (i / 2)));
      a_high[i] = s.high;
      a_low[i] = s.low;
    }
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
      uint32_t b_high[2], b_low[2];
      for (int i = 0; i < 2; ++i) {
        b_high[i] = bits_from_float(high[k + t + 4 * i][8 * n + g]);
        b_low[i] = bits_from_float(low[k + t + 4 * i][8 * n + g]);
      }
      multiply_tiles(c[n], a_low, b_high);
      multiply_tiles(c[n], a_high, b_low);
      multiply_tiles(c[n], a_high, b_high);
    }
  }
}

// Hands rows [first, first + 64) of a product of 128 to f(row, column, value), a warp's in neighbouring
// columns, by way of `tile`. All threads of the block take part.
template <class F>
__device__ void for_each_element(const float (&c)[kColumnTiles][4], int first, WideTile& tile,
                                 const F& f) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  __syncthreads();  // nobody reads the tile's old content any more
  const int row = 16 * warp + g - first;
  if (row >= 0 && row < kTileRows) {
    for (int n = 0; n < kColumnTiles; ++n) {
      for (int i = 0; i < 4; ++i) tile[row + 8 * (i / 2)][8 * n + 2 * t + i % 2] = c[n][i];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kTileRows * kWideColumns; i += kWideThreads) {
    f(first + i / kWideColumns, i % kWideColumns, tile[i / kWideColumns][i % kWideColumns]);
  }
}

__device__ void put_split(float value, int row, int column, WideTile& high, WideTile& low) {
  const Split s = split(value);
  high[row][column] = float_from_bits(s.high);
  low[row][column] = float_from_bits(s.low);
}

template <class T, Noise kNoise, Rule kRule>
__global__ void __launch_bounds__(kWideThreads)
    wide_feedback_kernel(const __grid_constant__ Group<T> blocks) {
  __shared__ WideTile high, low;
  __shared__ AdamStep adam;

  const int member = blocks.own_member();
  const FeedbackParams<T>& p = blocks.members[member];
  const int64_t first_feature = blocks.own_tile(member) * kWideColumns;
  const int64_t own_row = 16 * (threadIdx.x / 32);  // the warp's first in a product
  if (kRule == Rule::adam && threadIdx.x == 0) {
    adam = adam_step(p.lr, p.beta1, p.beta2, p.eps, update_number(p.updates, blocks.counter));
  }

  // Phase 1: G, 128 outputs at a time, and B moved towards it.
  for (int64_t first_output = 0; kRule != Rule::fixed && first_output < p.outputs;
       first_output += kProductRows) {
    float sums[kColumnTiles][4] = {};
    for (int64_t first_sample = 0; first_sample < p.samples; first_sample += kTileRows) {
      __syncthreads();
      for (int i = threadIdx.x; i < kTileRows * kWideColumns / 4; i += kWideThreads) {
        const int row = i / (kWideColumns / 4), quad = i % (kWideColumns / 4);
        float s[4];
        make_quad<kNoise>(p, first_sample + row, first_feature / 4 + quad, s);
        for (int j = 0; j < 4; ++j) put_split(s[j], row, 4 * quad + j, high, low);
      }
      __syncthreads();
      const auto factor = [&](int row, int k) {
        const int64_t output = first_output + own_row + row, sample = first_sample + k;
        const bool inside = output < p.outputs && sample < p.samples;
        return inside ? p.factor[sample * p.outputs + output] : 0.0f;
      };
      if (first_output + own_row < p.outputs) multiply_wide(sums, high, low, kTileRows, factor);
    }
    for (int half = 0; half < kProductRows; half += kTileRows) {
      for_each_element(sums, half, high, [&](int row, int column, float sum) {
        const int64_t output = first_output + row, feature = first_feature + column;
        if (output >= p.outputs || feature >= p.features) return;
        move_feedback<kRule>(p, adam, output * p.features + feature, p.scale * sum);
      });
    }
  }

  // Phase 2: 128 samples at a time projected onto the columns, through B as the first phase left it. A
  // thread meets elements of one column alone.
  static_assert(kWideThreads % kWideColumns == 0);
  float delta_sum = 0.0f;
  for (int64_t first_sample = 0; first_sample < p.samples; first_sample += kProductRows) {
    float sums[kColumnTiles][4] = {};
    for (int64_t first_output = 0; first_output < p.outputs; first_output += kTileRows) {
      __syncthreads();  // also lets all see what others wrote to B
      for (int i = threadIdx.x; i < kTileRows * kWideColumns; i += kWideThreads) {
        const int row = i / kWideColumns, column = i % kWideColumns;
        const int64_t output = first_output + row, feature = first_feature + column;
        const bool inside = output < p.outputs && feature < p.features;
        put_split(inside ? p.feedback[output * p.features + feature] : 0.0f, row, column, high, low);
      }
      __syncthreads();
      const auto error = [&](int row, int k) {
        const int64_t sample = first_sample + own_row + row, output = first_output + k;
        const bool inside = sample < p.samples && output < p.outputs;
        return inside ? p.error[sample * p.outputs + output] : 0.0f;
      };
      if (first_sample + own_row < p.samples) multiply_wide(sums, high, low, kTileRows, error);
    }
    for (int half = 0; half < kProductRows; half += kTileRows) {
      for_each_element(sums, half, high, [&](int row, int column, float sum) {
        const int64_t sample = first_sample + row, feature = first_feature + column;
        if (sample >= p.samples || feature >= p.features) return;
        const int64_t index = sample * p.features + feature;
        const float slope = p.gate == nullptr ? 1.0f : slope_at(p.activation, to_float(p.gate[index]));
        const T delta = from_float<T>(sum * slope);
        p.delta[index] = delta;
        delta_sum += to_float(delta);
      });
    }
  }
  if (p.bias_grad == nullptr) return;
  const int column = threadIdx.x % kWideColumns, part = threadIdx.x / kWideColumns;
  __syncthreads();  // nobody reads the tile any more
  high[part][column] = delta_sum;
  __syncthreads();
  if (part != 0 || first_feature + column >= p.features) return;
  for (int i = 1; i < kWideThreads / kWideColumns; ++i) delta_sum += high[i][column];
  p.bias_grad[first_feature + column] = delta_sum;
}

template <class F>
auto with_rule(Rule value, F&& f) {
  if (value == Rule::ema) return f(std::integral_constant<Rule, Rule::ema>{});
  if (value == Rule::adam) return f(std::integral_constant<Rule, Rule::adam>{});
  if (value == Rule::fixed) return f(std::integral_constant<Rule, Rule::fixed>{});
  return f(std::integral_constant<Rule, Rule::gradient>{});
}

// Of a step without thread blocks.
cudaError_t count_alone(int64_t* counter, cudaStream_t stream) {
  return counter == nullptr ? cudaSuccess : launch_count(counter, stream);
}

template <class T>
cudaError_t launch_group(const FeedbackParams<T>* blocks, int64_t count, int64_t* counter,
                         cudaStream_t stream) {
  const bool wide = blocks[0].outputs >= kWideOutputs;
  const int64_t columns = wide ? kWideColumns : kColumns;
  Group<T> group{};
  group.counter = counter;
  unsigned end = 0;
  for (int64_t i = 0; i < count; ++i) {
    group.members[i] = blocks[i];
    end += static_cast<unsigned>((blocks[i].features + columns - 1) / columns);
    group.ends[i] = end;
  }
  if (end == 0) return count_alone(counter, stream);
  return with_noise(blocks[0].noise.kind, [&](auto noise) {
    return with_rule(blocks[0].rule, [&](auto rule) {
      constexpr Noise kNoise = decltype(noise)::value;
      constexpr Rule kRule = decltype(rule)::value;
      if (wide) {
        return launch(wide_feedback_kernel<T, kNoise, kRule>, dim3(end), dim3(kWideThreads), stream,
                      group);
      }
      return launch(feedback_kernel<T, kNoise, kRule>, dim3(end), dim3(kColumns, kGroups), stream,
                    group);
    });
  });
}

}  // namespace

template <class T>
cudaError_t launch_feedback_step(const FeedbackParams<T>* blocks, int64_t count, int64_t* counter,
                                 cudaStream_t stream) {
  if (count == 0 || blocks[0].samples == 0) return count_alone(counter, stream);
  for (int64_t i = 0; i < count; ++i) {
    if (blocks[i].transposed) return cudaErrorInvalidValue;
  }
  for (int64_t first = 0; first < count; first += Group<T>::kMost) {
    const int64_t members = count - first < Group<T>::kMost ? count - first : Group<T>::kMost;
    const bool last = first + members == count;  // of the launches: the stream orders them
    const cudaError_t error = launch_group(blocks + first, members, last ? counter : nullptr, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template cudaError_t launch_feedback_step(const FeedbackParams<float>*, int64_t, int64_t*,
                                          cudaStream_t);
template cudaError_t launch_feedback_step(const FeedbackParams<bfloat16>*, int64_t, int64_t*,
                                          cudaStream_t);
template cudaError_t launch_feedback_step(const FeedbackParams<float16>*, int64_t, int64_t*,
                                          cudaStream_t);

}  // namespace fdfa::cuda

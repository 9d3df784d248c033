#include <cstdint>

#include "common/activation.h"
#include "common/adam.h"
#include "common/dtype.h"
#include "common/noise.h"
#include "cuda/kernels.h"

// The feedback step of all blocks of the network, in one launch: G = tangentᵀ u / samples, B moved by
// the rule, delta = (error B) ⊙ f'. B, with its moments, is read from and written to DRAM once; u is
// made again and never stored; gate is read and delta written once.

namespace fdfa::cuda {
namespace {

// A thread block owns 32 columns of B, so it may read back what it wrote with no grid-wide barrier. Its
// threads are 32 columns by 8 groups; a warp is one group, so it reads rows of B in 128-byte lines.
constexpr int kColumns = 32;
constexpr int kGroups = 8;
constexpr int kThreads = kColumns * kGroups;

// One step over the batch: the 32 x 8 quads of u are one for each thread.
constexpr int kSamples = 32;
constexpr int kQuads = kColumns / 4;
static_assert(kSamples * kQuads == kThreads, "each thread makes one quad of u");
constexpr int kSamplesPerThread = kSamples / kGroups;

// One step over the outputs, 8 sums in the registers of each thread. Output i of group g is g + 8 i, so
// that a network of ten outputs keeps every group busy.
constexpr int kOutputs = 64;
constexpr int kOutputsPerThread = kOutputs / kGroups;

// tile [32, 64] = matrix[first_sample.., first_output..] of matrix [samples, outputs], zero outside.
__device__ void load_tile(const float* matrix, int64_t samples, int64_t outputs, int64_t first_sample,
                          int64_t first_output, float (&tile)[kSamples][kOutputs]) {
  const int thread = threadIdx.y * kColumns + threadIdx.x;
  for (int i = thread; i < kSamples * kOutputs; i += kThreads) {
    const int64_t sample = first_sample + i / kOutputs;
    const int64_t output = first_output + i % kOutputs;
    const bool inside = sample < samples && output < outputs;
    tile[i / kOutputs][i % kOutputs] = inside ? matrix[sample * outputs + output] : 0.0f;
  }
}

// tile [32, 32] = u[first_sample.., first_feature..]. What lies outside the batch or the block is noise
// too, and harmless: the tangent is zero there, or nobody reads the column.
template <Noise kNoise>
__device__ void make_noise_tile(const NoiseParams& noise, int64_t first_sample, int64_t first_feature,
                                float (&tile)[kSamples][kColumns]) {
  const int thread = threadIdx.y * kColumns + threadIdx.x;
  const int row = thread / kQuads, quad = thread % kQuads;
  const NoiseStream stream = noise_stream(noise.state, noise.block, first_sample + row);
  float* u = &tile[row][4 * quad];
  noise4<kNoise>(stream, static_cast<uint32_t>(first_feature / 4 + quad), u[0], u[1], u[2], u[3]);
}

// Moves element `index` of B by the rule, with g its element of G.
template <Rule kRule, class T>
__device__ void move_feedback(const FeedbackParams<T>& p, const AdamStep& adam, int64_t index,
                              float g) {
  const float b = p.feedback[index];
  if (kRule != Rule::gradient && !is_finite(g)) return;  // B outlives a batch that overflowed
  if constexpr (kRule == Rule::ema) {
    p.feedback[index] = b + p.lr * (g - b);
  } else if constexpr (kRule == Rule::adam) {
    p.feedback[index] = adam_update(adam, b, b - g, p.exp_avg[index], p.exp_avg_sq[index]);
  } else {
    p.gradient[index] = b - g;
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
};

template <class T, Noise kNoise, Rule kRule>
__global__ void __launch_bounds__(kThreads) feedback_kernel(const __grid_constant__ Group<T> blocks) {
  __shared__ float u[kSamples][kColumns];
  __shared__ float rows[kSamples][kOutputs];  // of the tangent, then of the error
  __shared__ AdamStep adam;

  int member = 0;
  while (blockIdx.x >= blocks.ends[member]) ++member;
  const FeedbackParams<T>& p = blocks.members[member];
  const unsigned tile = blockIdx.x - (member == 0 ? 0 : blocks.ends[member - 1]);
  const int64_t first_feature = static_cast<int64_t>(tile) * kColumns;
  const int column = threadIdx.x, group = threadIdx.y;
  const int64_t feature = first_feature + column;
  const bool inside = feature < p.features;  // threads outside still meet every barrier

  // One thread for all: double-precision powers are slow. The barriers of phase 1 publish the result.
  if (kRule == Rule::adam && column == 0 && group == 0) {
    adam = adam_step(p.lr, p.beta1, p.beta2, p.eps, *p.updates);
  }

  // Phase 1: G in registers, 64 outputs at a time, and B moved towards it.
  for (int64_t first_output = 0; first_output < p.outputs; first_output += kOutputs) {
    float sums[kOutputsPerThread] = {};
    const int64_t live = (p.outputs - first_output - group + kGroups - 1) / kGroups;  // of the sums
    for (int64_t first_sample = 0; first_sample < p.samples; first_sample += kSamples) {
      make_noise_tile<kNoise>(p.noise, first_sample, first_feature, u);
      load_tile(p.tangent, p.samples, p.outputs, first_sample, first_output, rows);
      __syncthreads();
      for (int n = 0; n < kSamples; ++n) {
        const float noise = u[n][column];
#pragma unroll
        for (int i = 0; i < kOutputsPerThread; ++i) {
          if (i < live) sums[i] += rows[n][group + kGroups * i] * noise;
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kOutputsPerThread; ++i) {
      const int64_t output = first_output + group + kGroups * i;
      if (inside && i < live) {
        move_feedback<kRule>(p, adam, output * p.features + feature,
                             sums[i] / static_cast<float>(p.samples));
      }
    }
  }
  // Phase 2: a thread projects 4 of 32 samples onto its column. All groups read the same rows of B,
  // which the first phase left in the caches; the first barrier below lets the whole thread block see
  // them.
  for (int64_t first_sample = 0; first_sample < p.samples; first_sample += kSamples) {
    float sums[kSamplesPerThread] = {};
    for (int64_t first_output = 0; first_output < p.outputs; first_output += kOutputs) {
      load_tile(p.error, p.samples, p.outputs, first_sample, first_output, rows);
      __syncthreads();
      const int64_t left = p.outputs - first_output;
      const int count = left < kOutputs ? static_cast<int>(left) : kOutputs;
      for (int k = 0; inside && k < count; ++k) {
        const float b = p.feedback[(first_output + k) * p.features + feature];
        for (int i = 0; i < kSamplesPerThread; ++i) sums[i] += rows[group + kGroups * i][k] * b;
      }
      __syncthreads();
    }
    for (int i = 0; i < kSamplesPerThread; ++i) {
      const int64_t sample = first_sample + group + kGroups * i;
      if (!inside || sample >= p.samples) continue;
      const int64_t index = sample * p.features + feature;
      const float slope = p.gate == nullptr ? 1.0f : slope_at(p.activation, to_float(p.gate[index]));
      p.delta[index] = from_float<T>(sums[i] * slope);
    }
  }
}

template <class F>
auto with_rule(Rule value, F&& f) {
  if (value == Rule::ema) return f(std::integral_constant<Rule, Rule::ema>{});
  if (value == Rule::adam) return f(std::integral_constant<Rule, Rule::adam>{});
  return f(std::integral_constant<Rule, Rule::gradient>{});
}

template <class T>
cudaError_t launch_group(const FeedbackParams<T>* blocks, int64_t count, cudaStream_t stream) {
  Group<T> group{};
  unsigned end = 0;
  for (int64_t i = 0; i < count; ++i) {
    group.members[i] = blocks[i];
    end += static_cast<unsigned>((blocks[i].features + kColumns - 1) / kColumns);
    group.ends[i] = end;
  }
  if (end == 0) return cudaSuccess;
  return with_noise(blocks[0].noise.kind, [&](auto noise) {
    return with_rule(blocks[0].rule, [&](auto rule) {
      return launch(feedback_kernel<T, decltype(noise)::value, decltype(rule)::value>, dim3(end),
                    dim3(kColumns, kGroups), stream, group);
    });
  });
}

}  // namespace

template <class T>
cudaError_t launch_feedback_step(const FeedbackParams<T>* blocks, int64_t count, cudaStream_t stream) {
  if (count == 0 || blocks[0].samples == 0) return cudaSuccess;
  for (int64_t first = 0; first < count; first += Group<T>::kMost) {
    const int64_t members = count - first < Group<T>::kMost ? count - first : Group<T>::kMost;
    const cudaError_t error = launch_group(blocks + first, members, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template cudaError_t launch_feedback_step(const FeedbackParams<float>*, int64_t, cudaStream_t);
template cudaError_t launch_feedback_step(const FeedbackParams<bfloat16>*, int64_t, cudaStream_t);
template cudaError_t launch_feedback_step(const FeedbackParams<float16>*, int64_t, cudaStream_t);

}  // namespace fdfa::cuda

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <vector>

#include "common/activation.h"
#include "common/adam.h"
#include "common/dtype.h"
#include "common/noise.h"
#include "cuda/counters.h"
#include "cuda/device.h"
#include "cuda/kernels.h"
#include "cuda/tensor_core.h"
#include "cuda/vectors.h"

// The feedback step of all blocks of the network, in one launch, for N samples, K outputs and D
// features of a block:
//   phase 1  G = scale factorᵀ s, [K, D], and B moved towards it by the rule
//   phase 2  delta = (error B) ⊙ f', [N, D], through B as phase 1 left it
// A thread block owns a few columns of B, so that it reads back what it wrote with no barrier across
// the grid. DRAM sees B and its moments read and written once (24 K D bytes with Adam), the gate read
// and delta written once; s is noise made again, never stored. Factor and error, [N, K], stay in the
// caches.
//
// Both phases are a product [rows, depth] x [depth, columns] on tensor cores. Its right factor, the
// noise or B, lies split into tf32 in shared memory, in the order in which the threads of a warp take
// their fragments; each warp has 16 rows of the left one, which it reads and splits itself.

namespace fdfa::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
// So that some load while others multiply (reckoned). A thread has 80 registers then.
constexpr int kBlocksPerSm = 3;
constexpr int kRows = 16 * kWarps;  // of a product that a thread block makes at once
constexpr int kDepth = 128;         // of one in shared memory: 32 KiB for 32 columns
constexpr int kSteps = kDepth / 8;

// A thread block has kTiles tiles of 8 columns. Column c is column c / kTiles of tile c % kTiles: so a
// thread's results in one row, at columns 2t and 2t + 1 of every tile, are 2 kTiles neighbours.
template <int kTiles>
constexpr int kColumns = 8 * kTiles;
template <int kTiles>
constexpr int kSegment = 2 * kTiles;
constexpr int kWideTiles = 4;  // lines of 128 bytes; for layers of whole and aligned ones
// For other layers, and for nets so small that wide ones would leave multiprocessors idle.
constexpr int kNarrowTiles = 1;

// threadIdx.x, read again wherever it is used: what is derived from it would keep registers over the
// whole kernel that others need.
__device__ inline int own_thread() {
#if defined(FDFA_EMULATE_CUDA)
  return threadIdx.x;
#else
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
#endif
}

// The right factor: for each step of 8 in depth, each tile and each lane (g, t) its fragment, the
// elements of column g in rows t and t + 4.
template <int kTiles>
struct RightFactor {
  Split fragments[kSteps][kTiles][32][2];
};

// element(row, quad, values) has columns 4 quad to 4 quad + 3 of that row. All threads take part.
template <int kTiles, class Element>
__device__ void fill(RightFactor<kTiles>& right, int depth, const Element& element) {
  constexpr int kQuads = kColumns<kTiles> / 4;
  const int rows = (depth + 7) / 8 * 8;
  __syncthreads();  // nobody reads the old content any more, and what was written to B can be read
#pragma unroll 1
  for (int i = own_thread(); i < rows * kQuads; i += kThreads) {
    // So that the threads of a warp write to memory without gaps.
    const int half = i % 2, t = i / 2 % 4, quad = i / 8 % kQuads, step = i / (8 * kQuads);
    float values[4];
    element(8 * step + t + 4 * half, quad, values);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int column = 4 * quad + j;
      right.fragments[step][column % kTiles][4 * (column / kTiles) + t][half] = split(values[j]);
    }
  }
  __syncthreads();
}

// A warp's part in a product: 16 rows from `first_row` on. Where there are fewer rows than warps can
// take, several have the same rows, and each every `parts`-th step of the depth.
struct Share {
  int first_row, part, parts;
};

__device__ inline Share own_share(int rows) {
  int covered = 1;  // warps that have rows of their own, a power of two
  while (covered < kWarps && 16 * covered < rows) covered *= 2;
  const int warp = own_thread() / 32;
  return {16 * (warp % covered), warp / covered, kWarps / covered};
}

// The warp's rows of the left factor. What lies outside counts as zero. A stride spans at most 128 rows
// of kMostOutputs, which int holds.
constexpr int64_t kMostOutputs = 1 << 23;
struct LeftFactor {
  const float* first;
  int row_stride, depth_stride;
  int rows, depth;

  // Elements (g, t), (g + 8, t), (g, t + 4) and (g + 8, t + 4) of a step.
  __device__ void load(int step, float (&values)[4]) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = g + 8 * (i % 2), k = 8 * step + t + 4 * (i / 2);
      values[i] = row < rows && k < depth ? first[row * row_stride + k * depth_stride] : 0.0f;
    }
  }
};

template <int kTiles>
using Sums = float[kTiles][4];  // a warp's results, as multiply_tiles has them

// Steps whose left factor a warp has under way at once. Narrow columns go with so few warps that each
// must itself cover the latency of the caches: four steps are 16 loads (reckoned). Wide ones leave no
// registers for it.
template <int kTiles>
constexpr int kStepsAtOnce = kTiles == kNarrowTiles ? 4 : 1;

// sums += left x right, in the share's steps. Every step's product is added in float: within one a
// tensor core cuts off, which over a long sum would be a drift.
template <bool kTf32, int kTiles>
__device__ void multiply_steps(Sums<kTiles>& sums, const LeftFactor& left,
                               const RightFactor<kTiles>& right, const Share& share) {
  constexpr int kAtOnce = kStepsAtOnce<kTiles>;
  const int lane = own_thread() % 32, steps = (left.depth + 7) / 8;
  if (left.rows <= 0) return;
#pragma unroll 1
  for (int first = share.part; first < steps; first += kAtOnce * share.parts) {
    float values[kAtOnce][4];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) left.load(first + i * share.parts, values[i]);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int step = first + i * share.parts;
      if (step >= steps) break;
      uint32_t high[4], low[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const Split s = split(values[i][j]);
        high[j] = s.high;
        low[j] = s.low;
      }
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        uint32_t b[4];
        load_words(right.fragments[step][j][lane], b);
        Product product{};
        if constexpr (!kTf32) {
          product = multiply_tiles(low, b[0], b[2], product);
          product = multiply_tiles(high, b[1], b[3], product);
        }
        product = multiply_tiles(high, b[0], b[2], product);
#pragma unroll
        for (int k = 0; k < 4; ++k) sums[j][k] += product.c[k];
      }
    }
  }
}

template <int kTiles>
__device__ void multiply(Sums<kTiles>& sums, const LeftFactor& left, const RightFactor<kTiles>& right,
                         const Share& share, bool tf32) {
  tf32 ? multiply_steps<true>(sums, left, right, share)
       : multiply_steps<false>(sums, left, right, share);
}

// Of warps that have the same rows, the first gets the sum of all, in the order of their parts. The
// right factor gives its memory: rows are few enough for parts in the last product of a phase alone,
// after which nobody reads it. All threads take part.
template <int kTiles>
__device__ void add_parts(Sums<kTiles>& sums, RightFactor<kTiles>& right, const Share& share) {
  if (share.parts == 1) return;
  const int lane = own_thread() % 32, warp = own_thread() / 32;
  __syncthreads();
  if (share.part > 0) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      store_words(right.fragments[warp][j][lane],
                  {bits_from_float(sums[j][0]), bits_from_float(sums[j][1]),
                   bits_from_float(sums[j][2]), bits_from_float(sums[j][3])});
    }
  }
  __syncthreads();
  if (share.part > 0) return;
  for (int other = warp + kWarps / share.parts; other < kWarps; other += kWarps / share.parts) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      uint32_t part[4];
      load_words(right.fragments[other][j][lane], part);
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[j][i] += float_from_bits(part[i]);
    }
  }
}

// A block of the network and the thread block's columns of it.
template <class T, int kTiles>
struct Columns {
  const FeedbackParams<T>& p;
  int first;
  int count;   // that there are
  bool whole;  // all there are, and every row of every matrix is aligned for vectors
};

// Where some of a thread's results in one row of a matrix [rows, D] lie.
struct Segment {
  int64_t at;
  int count;  // columns within the matrix, from the first on; may be none
};

// Of row `row` of the thread's results from column `column` on. kWhole: as `Columns` has it, so that no
// column is missing.
template <bool kWhole, class T, int kTiles>
__device__ Segment own_segment(const Columns<T, kTiles>& columns, int first_row, int row, int column,
                               int64_t rows) {
  const int lane = own_thread() % 32;
  row = first_row + lane / 4 + 8 * row;
  column += kSegment<kTiles> * (lane % 4);
  const int count = kWhole ? kSegment<kTiles> : columns.count - column;
  return {row * columns.p.features + (columns.first + column), row < rows ? count : 0};
}

// Of a row outside nothing is loaded, and what is made of it not stored.
template <bool kWhole, class T, int n>
__device__ void load_segment(const T* matrix, const Segment& s, float (&values)[n]) {
  if constexpr (kWhole) {
    if (s.count > 0) load_vector(matrix + s.at, values);
  } else {
    load_some(matrix + s.at, s.count, values);
  }
}

template <bool kWhole, class T, int n>
__device__ void store_segment(T* matrix, const Segment& s, const float (&values)[n]) {
  if constexpr (kWhole) {
    if (s.count > 0) store_vector(matrix + s.at, values);
  } else {
    store_some(matrix + s.at, s.count, values);
  }
}

// matrix[row, 4 quad .. 4 quad + 3] of the columns, zero outside.
template <class T, int kTiles, class M>
__device__ void load_quad(const Columns<T, kTiles>& columns, const M* matrix, int row, int64_t rows,
                          int quad, float (&values)[4]) {
  matrix += row * columns.p.features + (columns.first + 4 * quad);
  if (row >= rows) {
    for (float& value : values) value = 0.0f;
  } else if (columns.whole) {
    load_vector(matrix, values);
  } else {
    load_some(matrix, columns.count - 4 * quad, values);
  }
}

// s[sample, 4 quad .. 4 quad + 3] of the columns: noise, or what `source` has. Past the last column the
// noise goes on, which nobody reads; past the last sample too, where the factor is zero.
template <Noise kNoise, class T, int kTiles>
__device__ void make_quad(const Columns<T, kTiles>& columns, int sample, int quad, float (&s)[4]) {
  const FeedbackParams<T>& p = columns.p;
  if constexpr (kNoise != Noise::none) {
    const NoiseStream stream = noise_stream(p.noise.state, p.noise.block, sample);
    const auto place = static_cast<uint32_t>(columns.first / 4 + quad);
    noise4<kNoise>(stream, place, s[0], s[1], s[2], s[3]);
  } else {
    load_quad(columns, p.source, sample, p.samples, quad, s);
  }
}

// A thread goes through its results in pieces of four elements, each with all loads under way before
// the first store: rows by neighbouring columns.
template <int kTiles>
constexpr int kPieceColumns = kSegment<kTiles> < 4 ? kSegment<kTiles> : 4;
template <int kTiles>
constexpr int kPieceRows = 4 / kPieceColumns<kTiles>;

// Calls f(row, column) for the first of each piece, counted in the thread's results: rows g and g + 8,
// and the columns of a segment.
template <int kTiles, class F>
__device__ void for_each_piece(const F& f) {
#pragma unroll
  for (int row = 0; row < 2; row += kPieceRows<kTiles>) {
#pragma unroll
    for (int column = 0; column < kSegment<kTiles>; column += kPieceColumns<kTiles>) f(row, column);
  }
}

template <int kTiles>
__device__ float result(const Sums<kTiles>& sums, int row, int column) {
  return sums[column % kTiles][2 * row + column / kTiles];
}

template <int kTiles>
__device__ bool all_finite(const Sums<kTiles>& sums) {
  bool finite = true;
#pragma unroll
  for (int i = 0; i < 4 * kTiles; ++i) finite = finite && is_finite(sums[i / 4][i % 4]);
  return finite;
}

// The thread's elements of ∇B in plain float, for where the tensor cores' results are not finite: an
// infinity splits into an infinity and a NaN.
template <Noise kNoise, class T, int kTiles>
__device__ void estimate_plainly(const Columns<T, kTiles>& columns, int first_row) {
  const FeedbackParams<T>& p = columns.p;
#pragma unroll 1
  for (int i = 0; i < 2 * kSegment<kTiles>; ++i) {
    const Segment s =
        own_segment<false>(columns, first_row, i / kSegment<kTiles>, i % kSegment<kTiles>, p.outputs);
    if (s.count <= 0) continue;
    const int output = static_cast<int>(s.at / p.features),
              feature = static_cast<int>(s.at % p.features);
    float g = 0.0f;
#pragma unroll 1
    for (int sample = 0; sample < p.samples; ++sample) {
      float values[4];
      make_quad<kNoise>(columns, sample, (feature - columns.first) / 4, values);
      const float pairs[2] = {feature % 2 == 0 ? values[0] : values[1],
                              feature % 2 == 0 ? values[2] : values[3]};
      g += p.factor[sample * p.outputs + output] * (feature % 4 < 2 ? pairs[0] : pairs[1]);
    }
    p.gradient[s.at] = p.decay * p.feedback[s.at] - p.scale * g;
  }
}

// B moved by the rule, with the products of factor and s as they lie in the thread's sums.
template <Rule kRule, bool kWhole, class T, int kTiles>
__device__ void move_by_rule(const Columns<T, kTiles>& columns, const AdamStep& adam, int first_row,
                             const Sums<kTiles>& sums) {
  constexpr int kRows = kPieceRows<kTiles>, kCount = kPieceColumns<kTiles>;
  const FeedbackParams<T>& p = columns.p;
  for_each_piece<kTiles>([&](int row, int column) {
    float b[kRows][kCount], m[kRows][kCount], v[kRows][kCount];
    Segment segments[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      segments[r] = own_segment<kWhole>(columns, first_row, row + r, column, p.outputs);
      load_segment<kWhole>(p.feedback, segments[r], b[r]);
      if constexpr (kRule == Rule::adam) {
        load_segment<kWhole>(p.exp_avg, segments[r], m[r]);
        load_segment<kWhole>(p.exp_avg_sq, segments[r], v[r]);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float g = p.scale * result(sums, row + r, column + i);
        const float gradient = p.decay * b[r][i] - g;
        if constexpr (kRule == Rule::gradient) {
          b[r][i] = gradient;
        } else if (is_finite(g)) {  // B outlives a batch that overflowed
          b[r][i] = kRule == Rule::ema ? b[r][i] - p.lr * gradient
                                       : adam_update(adam, b[r][i], gradient, m[r][i], v[r][i]);
        }
      }
      store_segment<kWhole>(kRule == Rule::gradient ? p.gradient : p.feedback, segments[r], b[r]);
      if constexpr (kRule == Rule::adam) {
        store_segment<kWhole>(p.exp_avg, segments[r], m[r]);
        store_segment<kWhole>(p.exp_avg_sq, segments[r], v[r]);
      }
    }
  });
}

template <Noise kNoise, bool kWhole, class T, int kTiles>
__device__ void move_feedback(const Columns<T, kTiles>& columns, const AdamStep& adam, int first_row,
                              const Sums<kTiles>& sums) {
  switch (columns.p.rule) {
    case Rule::adam:
      return move_by_rule<Rule::adam, kWhole>(columns, adam, first_row, sums);
    case Rule::ema:
      return move_by_rule<Rule::ema, kWhole>(columns, adam, first_row, sums);
    case Rule::gradient:
      if (!all_finite(sums)) return estimate_plainly<kNoise>(columns, first_row);
      return move_by_rule<Rule::gradient, kWhole>(columns, adam, first_row, sums);
    case Rule::fixed:
      return;
  }
}

// delta *= f'(gate), with the activation at run time: it is asked once per row, and as a template
// argument it would make seven times the kernels.
template <int n>
__device__ void multiply_by_slope(Activation activation, const float (&gate)[n], float (&delta)[n]) {
  with_activation(activation, [&](auto f) {
#pragma unroll
    for (int i = 0; i < n; ++i) delta[i] *= derivative<decltype(f)::value>(gate[i]);
  });
}

// The thread's elements of delta in plain float, likewise.
template <class T, int kTiles>
__device__ void project_plainly(const Columns<T, kTiles>& columns, int first_row) {
  const FeedbackParams<T>& p = columns.p;
#pragma unroll 1
  for (int i = 0; i < 2 * kSegment<kTiles>; ++i) {
    const int row = i / kSegment<kTiles>, column = i % kSegment<kTiles>;
    const Segment s = own_segment<false>(columns, first_row, row, column, p.samples);
    if (s.count <= 0) continue;
    const float* error = p.error + s.at / p.features * p.outputs;
    const float* b = p.feedback + s.at % p.features;
    float sum[1] = {};
#pragma unroll 1
    for (int64_t k = 0; k < p.outputs; ++k) sum[0] += error[k] * b[k * p.features];
    if (p.gate != nullptr) multiply_by_slope(p.activation, {to_float(p.gate[s.at])}, sum);
    p.delta[s.at] = from_float<T>(sum[0]);
  }
}

// delta from the projected errors as they lie in the thread's sums. It may be the gate's memory.
template <bool kWhole, class T, int kTiles>
__device__ void store_delta(const Columns<T, kTiles>& columns, int first_row,
                            const Sums<kTiles>& sums) {
  constexpr int kRows = kPieceRows<kTiles>, kCount = kPieceColumns<kTiles>;
  const FeedbackParams<T>& p = columns.p;
  if (!all_finite(sums)) return project_plainly(columns, first_row);
  for_each_piece<kTiles>([&](int row, int column) {
    float gate[kRows][kCount], delta[kRows][kCount];
    Segment segments[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      segments[r] = own_segment<kWhole>(columns, first_row, row + r, column, p.samples);
      if (p.gate != nullptr) load_segment<kWhole>(p.gate, segments[r], gate[r]);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) delta[r][i] = result(sums, row + r, column + i);
      if (p.gate != nullptr) multiply_by_slope(p.activation, gate[r], delta[r]);
      store_segment<kWhole>(p.delta, segments[r], delta[r]);
    }
  });
}

// bias_grad: delta, as it is stored, summed over the samples. The caches still hold it. All threads
// take part.
template <class T, int kTiles>
__device__ void sum_delta(const Columns<T, kTiles>& columns, float (&sums)[kThreads]) {
  const FeedbackParams<T>& p = columns.p;
  const int thread = own_thread(), column = thread % kColumns<kTiles>;
  const bool inside = column < columns.count;
  const int feature = columns.first + column;
  __syncthreads();  // delta can be read
  float sum = 0.0f;
  for (int sample = thread / kColumns<kTiles>; inside && sample < p.samples;
       sample += kThreads / kColumns<kTiles>) {
    sum += to_float(p.delta[sample * p.features + feature]);
  }
  sums[thread] = sum;
  __syncthreads();
  if (thread >= kColumns<kTiles> || !inside) return;
  for (int other = thread + kColumns<kTiles>; other < kThreads; other += kColumns<kTiles>) {
    sum += sums[other];
  }
  p.bias_grad[feature] = sum;
}

// What int counts: samples and features, with room for a tile more.
constexpr int64_t kMostCounted = 1 << 30;

// Blocks of the network that one launch takes, as its parameter; a thread block works on one of them.
template <class T>
struct Group {
  static constexpr int kMost = 16;
  FeedbackParams<T> members[kMost];
  unsigned ends[kMost];  // one past the last thread block of each
  bool aligned[kMost];
  int64_t* counter;  // of Adam steps, where this launch counts up; else null

  // Of the calling thread block: its member, and its place among those that work on it.
  __device__ int own_member() const {
    int member = 0;
    while (blockIdx.x >= ends[member]) ++member;
    return member;
  }
  __device__ int own_place(int member) const {
    return static_cast<int>(blockIdx.x - (member == 0 ? 0 : ends[member - 1]));
  }
};

template <class T, Noise kNoise, int kTiles>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    feedback_kernel(const __grid_constant__ Group<T> blocks) {
  alignas(16) __shared__ RightFactor<kTiles> right;
  __shared__ AdamStep adam;
  __shared__ float bias_sums[kThreads];

  const int member = blocks.own_member();
  const FeedbackParams<T>& p = blocks.members[member];
  const int first_column = blocks.own_place(member) * kColumns<kTiles>;
  const int n_columns = min(static_cast<int>(p.features) - first_column, kColumns<kTiles>);
  const bool whole = kTiles == kWideTiles || (blocks.aligned[member] && n_columns == kColumns<kTiles>);
  const Columns<T, kTiles> columns{p, first_column, n_columns, whole};
  // One thread for all: double-precision powers are slow. The barriers of phase 1 publish the result.
  if (p.rule == Rule::adam && threadIdx.x == 0) {
    adam = adam_step(p.lr, p.beta1, p.beta2, p.eps, update_number(p.updates, blocks.counter));
  }

  // Phase 1. `right` is s, filled once if it holds all samples.
  const int samples = static_cast<int>(p.samples), outputs = static_cast<int>(p.outputs);
  for (int first = 0; p.rule != Rule::fixed && first < outputs; first += kRows) {
    const int rows = min(outputs - first, kRows);
    const Share share = own_share(rows);
    Sums<kTiles> sums = {};
    for (int sample = 0; sample < samples; sample += kDepth) {
      const int depth = min(samples - sample, kDepth);
      if (first == 0 || samples > kDepth) {
        fill(right, depth, [&](int row, int quad, float (&s)[4]) {
          make_quad<kNoise>(columns, sample + row, quad, s);
        });
      }
      const LeftFactor left{p.factor + sample * p.outputs + first + share.first_row, 1, outputs,
                            rows - share.first_row, depth};
      multiply(sums, left, right, share, p.tf32);
    }
    add_parts(sums, right, share);
    if (share.part > 0) continue;
    if (columns.whole) {
      move_feedback<kNoise, true>(columns, adam, first + share.first_row, sums);
    } else if constexpr (kTiles == kNarrowTiles) {
      move_feedback<kNoise, false>(columns, adam, first + share.first_row, sums);
    }
  }

  // Phase 2. `right` is B, filled once if it holds all outputs.
  for (int first = 0; first < samples; first += kRows) {
    const int rows = min(samples - first, kRows);
    const Share share = own_share(rows);
    Sums<kTiles> sums = {};
    for (int output = 0; output < outputs; output += kDepth) {
      const int depth = min(outputs - output, kDepth);
      if (first == 0 || outputs > kDepth) {
        fill(right, depth, [&](int row, int quad, float (&b)[4]) {
          load_quad(columns, p.feedback, output + row, outputs, quad, b);
        });
      }
      const LeftFactor left{p.error + (first + share.first_row) * p.outputs + output, outputs, 1,
                            rows - share.first_row, depth};
      multiply(sums, left, right, share, p.tf32);
    }
    add_parts(sums, right, share);
    if (share.part > 0) continue;
    if (columns.whole) {
      store_delta<true>(columns, first + share.first_row, sums);
    } else if constexpr (kTiles == kNarrowTiles) {
      store_delta<false>(columns, first + share.first_row, sums);
    }
  }
  if (p.bias_grad != nullptr) sum_delta(columns, bias_sums);
}

// Whether every row of every matrix begins at a multiple of 16 bytes. A null pointer does: it is never
// followed.
template <class T>
bool rows_aligned(const FeedbackParams<T>& p) {
  const void* matrices[] = {p.feedback, p.exp_avg, p.exp_avg_sq, p.gradient, p.source, p.gate, p.delta};
  return p.features * sizeof(T) % 16 == 0 &&
         std::all_of(std::begin(matrices), std::end(matrices),
                     [](const void* m) { return reinterpret_cast<uintptr_t>(m) % 16 == 0; });
}

template <int kTiles, class T>
int64_t thread_blocks(const FeedbackParams<T>& p) {
  return (p.features + kColumns<kTiles> - 1) / kColumns<kTiles>;
}

// counter: as launch_feedback_step has it; the last launch counts.
template <int kTiles, class T>
cudaError_t launch_blocks(const std::vector<FeedbackParams<T>>& blocks, int64_t* counter,
                          cudaStream_t stream) {
  for (size_t first = 0; first < blocks.size(); first += Group<T>::kMost) {
    const size_t next = std::min(blocks.size(), first + Group<T>::kMost);
    Group<T> group{};
    unsigned end = 0;
    for (size_t i = first; i < next; ++i) {
      group.members[i - first] = blocks[i];
      group.aligned[i - first] = rows_aligned(blocks[i]);
      end += static_cast<unsigned>(thread_blocks<kTiles>(blocks[i]));
      group.ends[i - first] = end;
    }
    group.counter = next == blocks.size() ? counter : nullptr;
    const cudaError_t error = with_noise(blocks[0].noise.kind, [&](auto noise) {
      return launch(feedback_kernel<T, decltype(noise)::value, kTiles>, dim3(end), dim3(kThreads),
                    stream, group);
    });
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

template <class T>
cudaError_t launch_feedback_step(const FeedbackParams<T>* blocks, int64_t count, int64_t* counter,
                                 cudaStream_t stream) {
  std::vector<FeedbackParams<T>> wide, narrow;
  int64_t wide_thread_blocks = 0;
  for (int64_t i = 0; i < count; ++i) {
    const FeedbackParams<T>& p = blocks[i];
    if (p.transposed || p.features > kMostCounted || p.samples > kMostCounted ||
        p.outputs > kMostOutputs) {
      return cudaErrorInvalidValue;
    }
    if (p.samples == 0 || p.features == 0) continue;
    const bool whole = p.features % kColumns<kWideTiles> == 0 && rows_aligned(p);
    (whole ? wide : narrow).push_back(p);
    if (whole) wide_thread_blocks += thread_blocks<kWideTiles>(p);
  }
  if (wide_thread_blocks < multiprocessors()) {
    narrow.insert(narrow.end(), wide.begin(), wide.end());
    wide.clear();
  }
  if (wide.empty() && narrow.empty()) {
    return counter == nullptr ? cudaSuccess : launch_count(counter, stream);
  }
  // The stream orders the launches: all read the old count before the last one changes it.
  const cudaError_t error = launch_blocks<kWideTiles>(wide, narrow.empty() ? counter : nullptr, stream);
  return error == cudaSuccess ? launch_blocks<kNarrowTiles>(narrow, counter, stream) : error;
}

template cudaError_t launch_feedback_step(const FeedbackParams<float>*, int64_t, int64_t*,
                                          cudaStream_t);
template cudaError_t launch_feedback_step(const FeedbackParams<bfloat16>*, int64_t, int64_t*,
                                          cudaStream_t);
template cudaError_t launch_feedback_step(const FeedbackParams<float16>*, int64_t, int64_t*,
                                          cudaStream_t);

}  // namespace fdfa::cuda

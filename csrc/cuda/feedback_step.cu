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
// the grid. DRAM sees B and its moments read and written once (24 K D bytes with Adam), the
// saved activation read and delta written once; s is noise made again, never stored. Factor and error,
// [N, K], stay in the caches.
//
// Both phases are a product [rows, depth] x [depth, columns] on tensor cores. Its right factor, the
// noise or B, lies split into tf32 in shared memory, in the order in which the threads of a warp take
// their fragments; each warp has 16 rows of the left one, which it reads and splits itself. The results
// go through shared memory to the threads that work on them by four neighbours, so that these are as
// many where few outputs leave most warps without rows.

namespace fdfa::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
// So that some load while others multiply. A thread has 80 registers then.
constexpr int kBlocksPerSm = 3;
constexpr int kRows = 16 * kWarps;  // of a product that a thread block makes at once
constexpr int kDepth = 128;         // of one in shared memory: 32 KiB for 32 columns
constexpr int kSteps = kDepth / 8;

// A thread block has kTiles tiles of 8 columns. Column c is column c / kTiles of tile c % kTiles: so a
// thread's results in one row, at columns 2t and 2t + 1 of every tile, are 2 kTiles neighbours.
template <int kTiles>
constexpr int kColumns = 8 * kTiles;
constexpr int kWideTiles = 4;  // lines of 128 bytes; for layers of whole and aligned ones
// For other layers, and for nets so small that wide ones would leave multiprocessors idle.
constexpr int kNarrowTiles = 1;

// A thread works on quads, four neighbours in a row: on the one of its place, in every kRowStep-th row.
template <int kTiles>
constexpr int kQuads = kColumns<kTiles> / 4;
template <int kTiles>
constexpr int kRowStep = kThreads / kQuads<kTiles>;

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

  // Columns 4 quad to 4 quad + 3 of that row.
  __device__ void put(int row, int quad, const float (&values)[4]) {
    const int step = row / 8, half = row / 4 % 2, t = row % 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int column = 4 * quad + j;
      fragments[step][column % kTiles][4 * (column / kTiles) + t][half] = split(values[j]);
    }
  }
};

__device__ constexpr int whole_steps(int depth) { return (depth + 7) / 8; }

// element(row, quad, values) has columns 4 quad to 4 quad + 3 of that row, zeros from `depth` on. All
// threads take part.
template <int kTiles, class Element>
__device__ void fill(RightFactor<kTiles>& right, int depth, const Element& element) {
  const int count = 8 * whole_steps(depth) * kQuads<kTiles>;
  __syncthreads();  // nobody reads the old content any more, and what was written to B can be read
#pragma unroll 1
  for (int i = own_thread(); i < count; i += kThreads) {
    // So that the threads of a warp write to memory without gaps.
    const int half = i % 2, t = i / 2 % 4, quad = i / 8 % kQuads<kTiles>,
              step = i / (8 * kQuads<kTiles>);
    const int row = 8 * step + t + 4 * half;
    float values[4];
    element(row, quad, values);
    right.put(row, quad, values);
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

// A matrix [rows, depth], of which a warp has 16 rows; kTransposed: in memory it is [depth, rows]. What
// a product takes of it spans at most 128 times kMostOutputs, which int holds.
constexpr int64_t kMostOutputs = 1 << 23;
template <bool kTransposed>
struct LeftFactor {
  const float* first;
  int stride;
  int rows, depth;

  // Of the thread's row g + 8 i. Past the last row it is that row's: what is made of it nobody reads.
  __device__ const float* own_row(int first_row, int i) const {
    const int row = min(first_row + own_thread() % 32 / 4 + 8 * i, rows - 1);
    return first + row * (kTransposed ? 1 : stride);
  }
  // Where t and t + 4 of a step lie. Past the last it is that one's: the right factor is zero there.
  __device__ int own_depth(int step, int i) const {
    const int k = min(8 * step + own_thread() % 4 + 4 * i, depth - 1);
    return k * (kTransposed ? stride : 1);
  }
};

template <int kTiles>
using Sums = float[kTiles][4];  // a warp's results, as multiply_tiles has them

// Steps whose left factor a warp has under way at once. Narrow columns go with so few warps that each
// must itself cover the latency of the caches. Wide ones leave no registers for more.
template <int kTiles>
constexpr int kStepsAtOnce = kTiles == kNarrowTiles ? 4 : 1;

// sums += left x right, in the share's steps. Every step's product is added in float: within one a
// tensor core cuts off, which over a long sum would be a drift.
template <bool kTf32, bool kTransposed, int kTiles>
__device__ void multiply_steps(Sums<kTiles>& sums, const LeftFactor<kTransposed>& left,
                               const RightFactor<kTiles>& right) {
  constexpr int kAtOnce = kStepsAtOnce<kTiles>;
  const Share share = own_share(left.rows);
  if (share.first_row >= left.rows) return;
  const int lane = own_thread() % 32, steps = whole_steps(left.depth);
  const float* const rows[2] = {left.own_row(share.first_row, 0), left.own_row(share.first_row, 1)};
#pragma unroll 1
  for (int first = share.part; first < steps; first += kAtOnce * share.parts) {
    float values[kAtOnce][4];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int step = first + i * share.parts;
#pragma unroll
      for (int j = 0; j < 4; ++j) values[i][j] = rows[j % 2][left.own_depth(step, j / 2)];
    }
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

template <bool kTransposed, int kTiles>
__device__ void multiply(Sums<kTiles>& sums, const LeftFactor<kTransposed>& left,
                         const RightFactor<kTiles>& right, bool tf32) {
  tf32 ? multiply_steps<true>(sums, left, right) : multiply_steps<false>(sums, left, right);
}

// Where results go from the warps to the threads that work on them: rows of some of the warps at a
// time, so many that three thread blocks have room. The gap between rows puts them in different banks.
template <int kTiles>
struct Exchange {
  static constexpr int kWarpsAtOnce = kTiles == kWideTiles ? 4 : 8;
  static constexpr int kRowsAtOnce = 16 * kWarpsAtOnce;
  alignas(16) float rows[kRowsAtOnce][kColumns<kTiles> + 4];

  // Puts a warp's results where its rows are, or adds them to what is there.
  __device__ void put(const Sums<kTiles>& sums, bool add) {
    constexpr int kSegment = 2 * kTiles, kPiece = kSegment < 4 ? kSegment : 4;
    const int thread = own_thread(), g = thread % 32 / 4, t = thread % 4;
#pragma unroll
    for (int i = 0; i < 2 * kSegment; i += kPiece) {
      const int row = i / kSegment, column = i % kSegment;
      float* const at = &rows[16 * (thread / 32 % kWarpsAtOnce) + g + 8 * row][kSegment * t + column];
      float piece[kPiece] = {};
      if (add) load_vector(at, piece);
#pragma unroll
      for (int j = 0; j < kPiece; ++j) {
        piece[j] += sums[(column + j) % kTiles][2 * row + (column + j) / kTiles];
      }
      store_vector(at, piece);
    }
  }
};

// Calls f(row, quad, values) in one thread for each quad of a product of `rows` rows, 1 or more, with
// the sum of the warps that have the row, in an order that only the sizes decide. All threads take
// part. Rows up to a whole step are called too, whose values mean nothing.
template <int kTiles, class F>
__device__ void hand_out(const Sums<kTiles>& sums, Exchange<kTiles>& exchange, int rows, const F& f) {
  constexpr int kAtOnce = Exchange<kTiles>::kWarpsAtOnce;
  constexpr int kRowsAtOnce = Exchange<kTiles>::kRowsAtOnce;
  const int group = own_thread() / 32 / kAtOnce;  // of warps that have room at once
  int first = 0;
#pragma unroll 1
  do {
    const Share share = own_share(rows);
    const bool shared = share.parts > 1;
    __syncthreads();  // nobody reads the old content any more
    if (group == (shared ? 0 : first / kRowsAtOnce)) exchange.put(sums, /*add=*/false);
    if (kAtOnce < kWarps && shared) {
      __syncthreads();
      if (group == 1) exchange.put(sums, /*add=*/true);
    }
    __syncthreads();
    const int end = min(kRowsAtOnce, 8 * whole_steps(rows - first));
    const int quad = own_thread() % kQuads<kTiles>;
#pragma unroll 1
    for (int row = own_thread() / kQuads<kTiles>; row < end; row += kRowStep<kTiles>) {
      float values[4] = {};
#pragma unroll 1
      for (int warp = row / 16; warp < kAtOnce; warp += kWarps / share.parts) {
        float part[4];
        load_vector(&exchange.rows[16 * warp + row % 16][4 * quad], part);
#pragma unroll
        for (int j = 0; j < 4; ++j) values[j] += part[j];
      }
      f(first + row, quad, values);
    }
    first += kRowsAtOnce;
  } while (first < rows);
}

// Of each narrow column of the thread block what its noise is multiplied by: one over the pixels of its
// patch. Wide ones, which have no registers left for it, take no patches: these have few features. By a
// function, since a pointer would cost registers.
__device__ inline float* own_shares() {
  __shared__ float shares[kColumns<kNarrowTiles>];
  return shares;
}

// A block of the network and the thread block's columns of it.
template <class T, int kTiles>
struct Columns {
  const FeedbackParams<T>& p;
  int first;
  bool whole;  // all of them there, and every row of every matrix aligned for vectors

  __device__ int count() const { return min(static_cast<int>(p.features) - first, kColumns<kTiles>); }

  // Of a matrix [rows, D].
  __device__ int64_t at(int64_t row, int quad) const { return row * p.features + (first + 4 * quad); }
};

// Columns 4 quad to 4 quad + 3 of a row. kWhole: as `Columns` has it.
template <bool kWhole, class M, class T, int kTiles>
__device__ void load_quad(const Columns<T, kTiles>& columns, const M* matrix, int64_t row, int quad,
                          float (&values)[4]) {
  if constexpr (kWhole) {
    load_vector(matrix + columns.at(row, quad), values);
  } else {
    load_some(matrix + columns.at(row, quad), columns.count() - 4 * quad, values);
  }
}

template <bool kWhole, class M, class T, int kTiles>
__device__ void store_quad(const Columns<T, kTiles>& columns, M* matrix, int64_t row, int quad,
                           const float (&values)[4]) {
  if constexpr (kWhole) {
    store_vector(matrix + columns.at(row, quad), values);
  } else {
    store_some(matrix + columns.at(row, quad), columns.count() - 4 * quad, values);
  }
}

// The same, zero from row `rows` on.
template <class M, class T, int kTiles>
__device__ void load_quad_of(int64_t rows, const Columns<T, kTiles>& columns, const M* matrix,
                             int64_t row, int quad, float (&values)[4]) {
  if (row >= rows) {
    for (float& value : values) value = 0.0f;
  } else if (columns.whole) {
    load_quad<true>(columns, matrix, row, quad, values);
  } else {
    load_quad<false>(columns, matrix, row, quad, values);
  }
}

// s[sample, 4 quad .. 4 quad + 3] of the columns: noise, or what `source` has. Past the last column the
// noise goes on, which nobody reads.
template <Noise kNoise, class T, int kTiles>
__device__ void make_quad(const Columns<T, kTiles>& columns, int sample, int quad, float (&s)[4]) {
  const FeedbackParams<T>& p = columns.p;
  if constexpr (kNoise != Noise::none) {
    const NoiseStream stream = noise_stream(p.noise.state, p.noise.block, sample);
    const auto place = static_cast<uint32_t>(columns.first / 4 + quad);
    noise4<kNoise>(stream, place, s[0], s[1], s[2], s[3]);
    if (sample >= p.samples) {
      for (float& value : s) value = 0.0f;
    }
    if constexpr (kTiles == kNarrowTiles) {
      for (int j = 0; j < 4; ++j) s[j] *= own_shares()[4 * quad + j];
    }
  } else {
    load_quad_of(p.samples, columns, p.source, sample, quad, s);
  }
}

// The first rows of what the phases will read begin their way into the L2 cache while the noise is
// made: few warps fit on a multiprocessor, and they would wait for memory in each phase anew.
template <class T, int kTiles>
__device__ void prefetch(const Columns<T, kTiles>& columns) {
  const FeedbackParams<T>& p = columns.p;
  const int64_t row = own_thread();
  const bool adam = p.rule == Rule::adam;
  if (row < p.outputs) {
    prefetch_to_l2(p.feedback + columns.at(row, 0));
    if (adam) prefetch_to_l2(p.exp_avg + columns.at(row, 0));
    if (adam) prefetch_to_l2(p.exp_avg_sq + columns.at(row, 0));
  }
  if (row < p.samples && p.saved_activation != nullptr)
    prefetch_to_l2(p.saved_activation + columns.at(row, 0));
}

__device__ inline bool all_finite(const float (&values)[4]) {
  return is_finite(values[0]) && is_finite(values[1]) && is_finite(values[2]) && is_finite(values[3]);
}

// A quad of factorᵀ s in plain float, for where the tensor cores' results are not finite: an infinity
// splits into an infinity and a NaN.
template <Noise kNoise, class T, int kTiles>
__device__ void multiply_plainly(const Columns<T, kTiles>& columns, int output, int quad,
                                 float (&sums)[4]) {
  const FeedbackParams<T>& p = columns.p;
  for (float& sum : sums) sum = 0.0f;
#pragma unroll 1
  for (int sample = 0; sample < p.samples; ++sample) {
    float s[4];
    make_quad<kNoise>(columns, sample, quad, s);
    for (int j = 0; j < 4; ++j) sums[j] += p.factor[sample * p.outputs + output] * s[j];
  }
}

// A quad of error B, likewise.
template <class T, int kTiles>
__device__ void project_plainly(const Columns<T, kTiles>& columns, int64_t sample, int quad,
                                float (&sums)[4]) {
  const FeedbackParams<T>& p = columns.p;
  for (float& sum : sums) sum = 0.0f;
#pragma unroll 1
  for (int64_t k = 0; k < p.outputs; ++k) {
    float b[4];
    load_quad_of(p.outputs, columns, p.feedback, k, quad, b);
    for (int j = 0; j < 4; ++j) sums[j] += p.error[sample * p.outputs + k] * b[j];
  }
}

// A quad of row `output` of B moved by the rule, with factorᵀ s in `g`. b becomes the B that phase 2
// takes.
template <Rule kRule, Noise kNoise, bool kWhole, class T, int kTiles>
__device__ void move_by_rule(const Columns<T, kTiles>& columns, const AdamStep& adam, int output,
                             int quad, float (&g)[4], float (&b)[4]) {
  const FeedbackParams<T>& p = columns.p;
  float m[4], v[4], gradient[4];
  load_quad<kWhole>(columns, p.feedback, output, quad, b);
  if constexpr (kRule == Rule::adam) {
    load_quad<kWhole>(columns, p.exp_avg, output, quad, m);
    load_quad<kWhole>(columns, p.exp_avg_sq, output, quad, v);
  }
  if (kRule == Rule::gradient && !all_finite(g)) multiply_plainly<kNoise>(columns, output, quad, g);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float scaled = p.scale * g[j];
    gradient[j] = p.decay * b[j] - scaled;
    // B outlives a batch that overflowed, or whose square does.
    if (kRule == Rule::ema && is_finite(scaled)) b[j] -= p.lr * gradient[j];
    if constexpr (kRule == Rule::adam) {
      float first = m[j], second = v[j];
      const float moved = adam_update(adam, b[j], gradient[j], first, second);
      if (is_finite(second)) b[j] = moved, m[j] = first, v[j] = second;
    }
  }
  if constexpr (kRule == Rule::gradient) {
    store_quad<kWhole>(columns, p.gradient, output, quad, gradient);
  } else {
    store_quad<kWhole>(columns, p.feedback, output, quad, b);
  }
  if constexpr (kRule == Rule::adam) {
    store_quad<kWhole>(columns, p.exp_avg, output, quad, m);
    store_quad<kWhole>(columns, p.exp_avg_sq, output, quad, v);
  }
}

template <Noise kNoise, bool kWhole, class T, int kTiles>
__device__ void move_feedback(const Columns<T, kTiles>& columns, const AdamStep& adam, int output,
                              int quad, float (&g)[4], float (&b)[4]) {
  switch (columns.p.rule) {
    case Rule::adam:
      return move_by_rule<Rule::adam, kNoise, kWhole>(columns, adam, output, quad, g, b);
    case Rule::ema:
      return move_by_rule<Rule::ema, kNoise, kWhole>(columns, adam, output, quad, g, b);
    case Rule::gradient:
      return move_by_rule<Rule::gradient, kNoise, kWhole>(columns, adam, output, quad, g, b);
    case Rule::fixed:
      return;
  }
}

// delta *= f'(saved), with the activation at run time: it is asked once per row, and as a
// template argument it would make seven times the kernels.
template <int n>
__device__ void multiply_by_slope(Activation activation, const float (&saved)[n], float (&delta)[n]) {
  with_activation(activation, [&](auto f) {
#pragma unroll
    for (int i = 0; i < n; ++i) delta[i] *= derivative<decltype(f)::value>(saved[i]);
  });
}

// A quad of delta from the projected errors in it; it may be the saved activation's memory. Adds it, as
// it is stored, to the thread's `sums`.
template <bool kWhole, class T, int kTiles>
__device__ void store_delta(const Columns<T, kTiles>& columns, int64_t sample, int quad,
                            float (&delta)[4], float (&sums)[kThreads][4]) {
  const FeedbackParams<T>& p = columns.p;
  if (!all_finite(delta)) project_plainly(columns, sample, quad, delta);
  if (p.saved_activation != nullptr) {
    float saved[4];
    load_quad<kWhole>(columns, p.saved_activation, sample, quad, saved);
    multiply_by_slope(p.activation, saved, delta);
  }
  store_quad<kWhole>(columns, p.delta, sample, quad, delta);
  if (p.bias_grad == nullptr) return;
  float sum[4];
  load_vector(sums[own_thread()], sum);
  for (int j = 0; j < 4; ++j) sum[j] += to_float(from_float<T>(delta[j]));
  store_vector(sums[own_thread()], sum);
}

// bias_grad from what the threads have of the sums of their quads' columns. All threads take part.
template <class T, int kTiles>
__device__ void store_bias_grad(const Columns<T, kTiles>& columns, const float (&sums)[kThreads][4],
                                float (&partial)[kThreads]) {
  constexpr int kWidth = kColumns<kTiles>, kParts = kThreads / kWidth;
  const int thread = own_thread(), column = thread % kWidth;
  const float* const column_sums = sums[0] + column;  // [kRowStep, kWidth]
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int i = thread / kWidth; i < kRowStep<kTiles>; i += kParts) {
    sum += column_sums[i * kWidth];
  }
  partial[thread] = sum;
  __syncthreads();
  if (thread >= kWidth || column >= columns.count()) return;
  sum = 0.0f;
  for (int i = 0; i < kParts; ++i) sum += partial[i * kWidth + column];
  columns.p.bias_grad[columns.first + column] = sum;
}

// What int counts: samples and features, with room for a tile more.
constexpr int64_t kMostCounted = 1 << 30;

// output_bias_grad: the error summed over the samples. All threads take part.
template <class T>
__device__ void sum_error(const FeedbackParams<T>& p, float* output_bias_grad,
                          float (&partial)[kThreads]) {
  const int thread = own_thread(), lane = thread % 32;
  for (int64_t first = 0; first < p.outputs; first += 32) {
    const int64_t output = first + lane;
    float sum = 0.0f;
#pragma unroll 4
    for (int64_t sample = thread / 32; output < p.outputs && sample < p.samples; sample += kWarps) {
      sum += p.error[sample * p.outputs + output];
    }
    __syncthreads();  // nobody reads the old content any more
    partial[thread] = sum;
    __syncthreads();
    if (thread >= 32 || output >= p.outputs) continue;
    for (int warp = 1; warp < kWarps; ++warp) sum += partial[32 * warp + lane];
    output_bias_grad[output] = sum;
  }
}

// Blocks of the network that one launch takes, as its parameter; a thread block works on one of them.
template <class T>
struct Group {
  static constexpr int kMost = 16;
  FeedbackParams<T> members[kMost];
  unsigned ends[kMost];  // one past the last thread block of each
  bool aligned[kMost];
  int64_t* counter;         // of Adam steps, where this launch counts up; else null
  float* output_bias_grad;  // of [outputs]; null: not wanted. A last thread block makes it.

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
  __shared__ Exchange<kTiles> exchange;
  __shared__ AdamStep adam;
  alignas(16) __shared__ float delta_sums[kThreads][4];
  __shared__ float partial[kThreads];

  if (blocks.output_bias_grad != nullptr && blockIdx.x == gridDim.x - 1) {
    if (own_thread() == 0 && blocks.counter != nullptr) update_number(blocks.counter, blocks.counter);
    return sum_error(blocks.members[0], blocks.output_bias_grad, partial);
  }
  const int member = blocks.own_member();
  const FeedbackParams<T>& p = blocks.members[member];
  const FeedbackParams<T>& net = blocks.members[0];  // for what all members have in common
  const int first_column = blocks.own_place(member) * kColumns<kTiles>;
  const bool whole =
      kTiles == kWideTiles || (blocks.aligned[member] && first_column + kColumns<kTiles> <= p.features);
  // Ahead of the first barrier, after which it is read.
  if (kTiles == kNarrowTiles && own_thread() < kColumns<kTiles>) {
    const int column = first_column + own_thread();
    const bool in_patch = p.patches.size > 0 && column < p.features;
    own_shares()[own_thread()] = in_patch ? 1.0f / static_cast<float>(p.patches.pixels(column)) : 1.0f;
  }
  const Columns<T, kTiles> columns{p, first_column, whole};
  prefetch(columns);

  // Phase 1. `right` is s, filled once if it holds all samples; in the end B, if it holds all outputs.
  const int samples = static_cast<int>(net.samples), outputs = static_cast<int>(net.outputs);
  const auto holds_feedback = [&] { return net.rule != Rule::fixed && net.outputs <= kDepth; };
  for (int first = 0; net.rule != Rule::fixed && first < outputs; first += kRows) {
    const int rows = min(outputs - first, kRows);
    Sums<kTiles> sums = {};
    for (int sample = 0; sample < samples; sample += kDepth) {
      const int depth = min(samples - sample, kDepth);
      if (first == 0 || samples > kDepth) {
        fill(right, depth, [&](int row, int quad, float (&s)[4]) {
          make_quad<kNoise>(columns, sample + row, quad, s);
        });
      }
      const LeftFactor</*kTransposed=*/true> left{net.factor + sample * net.outputs + first, outputs,
                                                  rows, depth};
      multiply(sums, left, right, net.tf32);
    }
    // By the warp that most often has no rows. The barriers that follow publish the result.
    if (first == 0 && net.rule == Rule::adam && own_thread() == kThreads - 32) {
      adam =
          adam_step(net.lr, net.beta1, net.beta2, net.eps, update_number(net.updates, blocks.counter));
    }
    hand_out(sums, exchange, rows, [&](int row, int quad, float (&g)[4]) {
      float b[4] = {};
      if (row < rows && columns.whole) {
        move_feedback<kNoise, true>(columns, adam, first + row, quad, g, b);
      } else if (row < rows && kTiles == kNarrowTiles) {
        move_feedback<kNoise, false>(columns, adam, first + row, quad, g, b);
      }
      if (holds_feedback()) right.put(row, quad, b);
    });
  }

  // Phase 2. `right` is B, filled once if it holds all outputs.
  __syncthreads();  // what phase 1 left of it can be read
  store_vector(delta_sums[own_thread()], {0.0f, 0.0f, 0.0f, 0.0f});
  for (int first = 0; first < samples; first += kRows) {
    const int rows = min(samples - first, kRows);
    Sums<kTiles> sums = {};
    for (int output = 0; output < outputs; output += kDepth) {
      const int depth = min(outputs - output, kDepth);
      if (!holds_feedback() && (first == 0 || outputs > kDepth)) {
        fill(right, depth, [&](int row, int quad, float (&b)[4]) {
          load_quad_of(outputs, columns, p.feedback, output + row, quad, b);
        });
      }
      const LeftFactor</*kTransposed=*/false> left{net.error + first * net.outputs + output, outputs,
                                                   rows, depth};
      multiply(sums, left, right, net.tf32);
    }
    hand_out(sums, exchange, rows, [&](int row, int quad, float (&delta)[4]) {
      if (row < rows && columns.whole) {
        store_delta<true>(columns, first + row, quad, delta, delta_sums);
      } else if (row < rows && kTiles == kNarrowTiles) {
        store_delta<false>(columns, first + row, quad, delta, delta_sums);
      }
    });
  }
  if (p.bias_grad != nullptr) store_bias_grad(columns, delta_sums, partial);
}

// Whether every row of every matrix begins at a multiple of 16 bytes. A null pointer does: it is never
// followed.
template <class T>
bool rows_aligned(const FeedbackParams<T>& p) {
  const void* matrices[] = {p.feedback, p.exp_avg,          p.exp_avg_sq, p.gradient,
                            p.source,   p.saved_activation, p.delta};
  return p.features * sizeof(T) % 16 == 0 &&
         std::all_of(std::begin(matrices), std::end(matrices),
                     [](const void* m) { return reinterpret_cast<uintptr_t>(m) % 16 == 0; });
}

template <int kTiles, class T>
int64_t thread_blocks(const FeedbackParams<T>& p) {
  return (p.features + kColumns<kTiles> - 1) / kColumns<kTiles>;
}

// counter and output_bias_grad: as launch_feedback_step has them; they are the last launch's.
template <int kTiles, class T>
cudaError_t launch_blocks(const std::vector<FeedbackParams<T>>& blocks, int64_t* counter,
                          float* output_bias_grad, cudaStream_t stream) {
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
    const bool last = next == blocks.size();
    group.counter = last ? counter : nullptr;
    group.output_bias_grad = last ? output_bias_grad : nullptr;
    if (group.output_bias_grad != nullptr) ++end;
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
                                 float* output_bias_grad, cudaStream_t stream) {
  std::vector<FeedbackParams<T>> wide, narrow;
  int64_t wide_thread_blocks = 0;
  for (int64_t i = 0; i < count; ++i) {
    const FeedbackParams<T>& p = blocks[i];
    if (p.transposed || p.features > kMostCounted || p.samples > kMostCounted ||
        p.outputs > kMostOutputs) {
      return cudaErrorInvalidValue;
    }
    if (p.samples == 0 || p.features == 0) continue;
    const bool whole = p.patches.size == 0 && p.features % kColumns<kWideTiles> == 0 && rows_aligned(p);
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
  const bool last = narrow.empty();
  const cudaError_t error = launch_blocks<kWideTiles>(wide, last ? counter : nullptr,
                                                      last ? output_bias_grad : nullptr, stream);
  if (error != cudaSuccess) return error;
  return launch_blocks<kNarrowTiles>(narrow, counter, output_bias_grad, stream);
}

template cudaError_t launch_feedback_step(const FeedbackParams<float>*, int64_t, int64_t*, float*,
                                          cudaStream_t);
template cudaError_t launch_feedback_step(const FeedbackParams<bfloat16>*, int64_t, int64_t*, float*,
                                          cudaStream_t);
template cudaError_t launch_feedback_step(const FeedbackParams<float16>*, int64_t, int64_t*, float*,
                                          cudaStream_t);

}  // namespace fdfa::cuda

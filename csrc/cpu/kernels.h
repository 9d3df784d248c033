#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/params.h"

// The CPU kernels; T is float, bfloat16 or float16. Work is cut into independent units, so that the
// caller may spread [0, units) over threads as it likes.

namespace fdfa::cpu {

// A unit is a run of one sample's features.
template <class T>
int64_t epilogue_units(const EpilogueParams<T>& p);
template <class T>
void epilogue(const EpilogueParams<T>& p, int64_t begin, int64_t end);

// A unit is a tile of columns of B, with everything that belongs to them.
template <class T>
int64_t feedback_units(const FeedbackParams<T>& p);
template <class T>
void feedback_step(const FeedbackParams<T>& p, int64_t begin, int64_t end);

// A unit is a row of patches.
template <class T>
int64_t spread_units(const SpreadParams<T>& p);
template <class T>
void spread(const SpreadParams<T>& p, int64_t begin, int64_t end);

// A unit is one row of windows.
int64_t max_pool_units(const MaxPoolParams& p);
void max_pool(const MaxPoolParams& p, int64_t begin, int64_t end);

// A unit is a sample.
int64_t max_pool_backward_units(const MaxPoolBackwardParams& p);
void max_pool_backward(const MaxPoolBackwardParams& p, int64_t begin, int64_t end);

// A unit is a sample.
int64_t pooled_epilogue_units(const PooledEpilogueParams& p);
void pooled_epilogue(const PooledEpilogueParams& p, int64_t begin, int64_t end);

// A unit is a part of the rows.
int64_t moment_part_rows(int64_t channels);
int64_t moment_units(const MomentParams& p);
void moments(const MomentParams& p, int64_t begin, int64_t end);

// All channels: a few operations each.
void norm(const NormForwardParams& p);
void norm_backward(const NormBackwardParams& p);

// A unit is a run of neighbouring elements.
int64_t combine_units(const CombineParams& p);
void combine(const CombineParams& p, int64_t begin, int64_t end);

// The instruction set in use: "avx512", "avx2" or "baseline".
const char* isa();

// Takes another one, for tests. Returns false, and changes nothing, where this CPU lacks it.
bool select_isa(const char* name);

}  // namespace fdfa::cpu

// The CPU kernels, written once and compiled for each instruction set. The including file sets
// FDFA_ISA (a namespace) and FDFA_VECTOR_BYTES, and the target of the functions that follow.

// Its template of vectors must have that target, so it is not among kernels_includes.h.
#include "common/max_pool.h"

// clang-format off: each needs those before it
#include "cpu/vectors.inl"
#include "cpu/noise.inl"
#include "cpu/patches.inl"
#include "cpu/epilogue.inl"
#include "cpu/feedback_step.inl"
#include "cpu/batch_norm.inl"
#include "cpu/max_pool.inl"
// clang-format on

namespace fdfa::cpu::FDFA_ISA {
namespace {

template <class T>
constexpr KernelTable<T> table() {
  return {epilogue<T>, feedback_step<T>, spread<T>};
}

}  // namespace

extern const IsaKernels kernels;
const IsaKernels kernels = {table<float>(), table<bfloat16>(), table<float16>(),  moments,
                            combine,        max_pool,          max_pool_backward, pooled_epilogue};

}  // namespace fdfa::cpu::FDFA_ISA

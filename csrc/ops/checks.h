#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "common/params.h"

// Checks at the operator boundary, before anything is changed. Messages name the operator, the
// argument, what was expected and what came.

namespace fdfa {

Activation parse_activation(const char* op, c10::string_view name);
// "none" leaves the tangent as it is, for a block that goes on after the operator.
Noise parse_noise(const char* op, c10::string_view name, bool may_be_none = false);

// float32, bfloat16 or float16.
void check_floating(const char* op, const char* argument, const at::Tensor& t);
void check_shape(const char* op, const char* argument, const at::Tensor& t, at::IntArrayRef expected);
// The other argument's device and dtype.
void check_like(const char* op, const char* argument, const at::Tensor& t, const char* other_argument,
                const at::Tensor& other);
// x, tangent, weight and bias of a matrix product: real numbers of one dtype on one device, unless
// autocast will see to that. float64 too: torch multiplies them.
void check_product(const char* op, const at::Tensor& x, const std::optional<at::Tensor>& tangent,
                   const at::Tensor& weight, const std::optional<at::Tensor>& bias);
// A contiguous int64 vector of `size` on the device of `other`.
void check_counter(const char* op, const char* argument, const at::Tensor& t, int64_t size,
                   const at::Tensor& other);

// Features are counted in the memory order of B: row-major, or channels_last for images.
at::MemoryFormat feature_order(const char* op, const at::Tensor& feedback);

}  // namespace fdfa

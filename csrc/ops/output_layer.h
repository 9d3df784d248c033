#pragma once

#include <tuple>

#include "ops/ops.h"

namespace fdfa {

// The linear output layer's result [N, out_features] and its tangent, both without a graph.
std::tuple<Tensor, OptionalTensor> output_layer(const Tensor& x, const OptionalTensor& tangent,
                                                const Tensor& weight, const OptionalTensor& bias);

}  // namespace fdfa

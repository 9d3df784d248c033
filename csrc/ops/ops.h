#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/params.h"

// The operators behind torch.ops.fdfa, for the CPU and CUDA alike. schema.cpp says what each does.

namespace fdfa {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Names = c10::List<std::string>;
using Dual = std::tuple<Tensor, Tensor, Tensor>;  // y, its tangent, pre-activation

// The operator by its name, through the dispatcher, so that compilers and profilers see the call.
template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

Tensor next_noise(Tensor state);

Tensor mm(const Tensor& a, const Tensor& b);
// Whether `mm` would take another library than torch does.
bool mm_is_onednn(const Tensor& a, const Tensor& b);

// The same through the dispatcher.
Tensor call_mm(const Tensor& a, const Tensor& b);
// x Wᵀ + b of matrices without autograd, by the library that `mm` would take.
Tensor plain_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias);

// A pair: two tensors one behind the other in memory, so that one product takes both, which costs
// little more than one of them as long as rows are few. They have storages of their own in that memory,
// since results of an operator must share none; it is free once both are.
std::tuple<Tensor, Tensor> empty_pair(at::IntArrayRef sizes, const at::TensorOptions& options);
// The matrices [rows, features] of a pair as one, [2 * rows, features]; undefined where they are none.
Tensor joined(const Tensor& first, const Tensor& second);
// The products x Wᵀ and tangent Wᵀ of x [*, D], as a pair, from one product where x and its tangent are
// one; without a tangent the second is memory for one.
std::tuple<Tensor, Tensor> paired_products(const Tensor& x, const OptionalTensor& tangent,
                                           const Tensor& weight);
// The products W xᵀ and W tangentᵀ, from one product where x and its tangent are a pair; the second is
// undefined without a tangent.
std::tuple<Tensor, Tensor> transposed_products(const Tensor& x, const OptionalTensor& tangent,
                                               const Tensor& weight);
// Whether these pay, turned over by a pass that is needed anyway. Both libraries are faster at them.
// The product alone, cold, on two cores, by oneDNN on AMD: 0.8 of the time of x Wᵀ for [64, 800] by
// [800, 800], 0.9 for [256, 800], 1.0 for [512, 800].
bool transposed_product_pays(const Tensor& x, const Tensor& weight);
// Whether pairs of so many rows pay. More rows fill the device by themselves, and the memory of a
// tangent would be held as long as its primal's.
inline bool pairs_pay(int64_t rows, const at::Device& device) {
  return rows <= (device.is_cpu() ? 128 : 512);
}

// `pre` where it only carries a gradient: zeros in the shape of y, in a single element of memory, which
// the kernel that has it in `zeros` writes.
Tensor empty_placeholder(const Tensor& y);

Dual linear(const Tensor& x, const OptionalTensor& tangent, const Tensor& weight,
            const OptionalTensor& bias, const Tensor& noise_state, int64_t block,
            c10::string_view activation, c10::string_view noise);

std::tuple<Tensor, Tensor> dual_activation(const Tensor& x, const Tensor& tangent,
                                           c10::string_view activation);

// The patches of a block's images of these sizes, [N, C, H, W]; none for other blocks, and for 1.
Patches check_patch(const char* op, at::IntArrayRef sizes, int64_t patch);

// The noise of a block's result of these sizes, and the memory of what is made of it beforehand.
struct BlockNoise {
  NoiseParams params;
  Tensor given;
};
BlockNoise block_noise(const char* op, at::IntArrayRef sizes, const Tensor& noise_state, int64_t block,
                       Noise kind, int64_t patch);

// y, tangent of what goes on, pre-activation, the pool of y.
using Convolved = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Convolved conv2d(const Tensor& x, const OptionalTensor& tangent, const Tensor& weight,
                 const OptionalTensor& bias, at::IntArrayRef stride, at::IntArrayRef padding,
                 at::IntArrayRef dilation, int64_t groups, const Tensor& noise_state, int64_t block,
                 c10::string_view activation, c10::string_view noise, at::OptionalIntArrayRef pool,
                 int64_t patch);

Tensor perturb(const Tensor& y, const OptionalTensor& tangent, const Tensor& noise_state, int64_t block,
               c10::string_view noise, int64_t patch);

std::tuple<Tensor, Tensor> max_pool2d(const Tensor& x, const Tensor& tangent, at::IntArrayRef kernel,
                                      at::IntArrayRef stride, at::IntArrayRef padding);

using PoolEnd = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // y, its tangent, pre-activation, winners

PoolEnd max_pool2d_end(const Tensor& x, const OptionalTensor& tangent, const Tensor& anchor,
                       at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                       const Tensor& noise_state, int64_t block, c10::string_view noise, int64_t patch);

// The sizes of a pool of images x [N, C, H, W], float32, once they are found to make sense.
PoolShape check_pool(const char* op, const Tensor& x, at::IntArrayRef kernel, at::IntArrayRef stride,
                     at::IntArrayRef padding);
// The same of one that an operator may do at its end: kernel, stride and padding.
PoolShape check_pool(const char* op, const Tensor& x, at::IntArrayRef pool);
// An epilogue of images like y, and a pool after it: (pooled, its tangent). Where the epilogue's own ty
// needs memory it takes `donated`, of y's size and order, if that is defined.
std::tuple<Tensor, Tensor> run_pooled(EpilogueParams<float> epilogue, const Tensor& y,
                                      const PoolShape& shape, const Tensor& donated);

Tensor max_pool2d_backward(const Tensor& delta, const Tensor& winners, at::IntArrayRef input_size,
                           at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding);

// y, pre-activation, mean, 1 / σ, the pool of y and its tangent.
using Normalized = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Normalized batch_norm(const Tensor& x, const OptionalTensor& tangent, const OptionalTensor& ty,
                      const OptionalTensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& running_mean, const OptionalTensor& running_var,
                      const OptionalTensor& num_batches_tracked, bool training, double momentum,
                      double eps, const Tensor& noise_state, int64_t block, c10::string_view activation,
                      c10::string_view noise, at::OptionalIntArrayRef pool, int64_t patch);

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(const Tensor& delta, const Tensor& x,
                                                       const OptionalTensor& weight, const Tensor& mean,
                                                       const Tensor& inverse_std, bool training);

// What a feedback step needs of the network; lists have one entry a block, outputs may have none.
struct Network {
  const char* op;
  const Tensor& error;
  const OptionalTensor &tangent, &noise_state;
  at::TensorList feedback, saved_activations, outputs;
  at::IntArrayRef blocks;
  const Names& activations;
  c10::string_view noise;
  int64_t patch;
};
void check_network(const Network& net);

// Memory for a block's δ.
Tensor empty_delta(const Tensor& saved_activation, const Tensor& feedback, int64_t patch);

void feedback_step(at::TensorList feedback, at::TensorList exp_avg, at::TensorList exp_avg_sq,
                   const OptionalTensor& updates, const Tensor& error, const OptionalTensor& tangent,
                   at::TensorList saved_activations, at::TensorList outputs,
                   const OptionalTensor& noise_state, at::IntArrayRef blocks, const Names& activations,
                   c10::string_view noise, double decay, const Tensor& lr, double beta1, double beta2,
                   double eps, at::TensorList deltas, at::TensorList bias_grads,
                   const OptionalTensor& output_bias_grad, int64_t patch);

std::tuple<std::vector<Tensor>, std::vector<Tensor>> feedback_gradient(
    at::TensorList feedback, const Tensor& error, const OptionalTensor& tangent,
    at::TensorList saved_activations, at::TensorList outputs, const OptionalTensor& noise_state,
    at::IntArrayRef blocks, const Names& activations, c10::string_view noise, double decay,
    int64_t patch);

}  // namespace fdfa

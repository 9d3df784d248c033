#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/leaky_relu_backward.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/sigmoid_backward.h>
#include <ATen/ops/silu_backward.h>
#include <ATen/ops/tanh_backward.h>
#include <ATen/ops/threshold_backward.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "common/activation.h"
#include "ops/checks.h"
#include "ops/convolution.h"
#include "ops/ops.h"

// The local gradient of a block: from δ at its pre-activation to its weight and bias (Algorithm 1, line
// 23). y and ty are marked as not differentiable, so that no gradient can pass from block to block.

namespace fdfa {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Linear : torch::autograd::Function<Linear> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& tangent,
                               const Tensor& weight, const OptionalTensor& bias,
                               const Tensor& noise_state, int64_t block, c10::string_view activation,
                               c10::string_view noise) {
    static const auto op = find<decltype(fdfa::linear)>("fdfa::linear");
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, ty, pre] = op.call(x, tangent, weight, bias, noise_state, block, activation, noise);
    ctx->save_for_backward({x});
    ctx->saved_data["wants_weight"] = weight.requires_grad();
    ctx->saved_data["wants_bias"] = bias && bias->requires_grad();
    ctx->mark_non_differentiable({y, ty});
    ctx->set_materialize_grads(false);
    return {y, ty, pre};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    Tensor weight_grad, bias_grad;
    if (const Tensor& delta = grads[2]; delta.defined()) {
      const Tensor x = ctx->get_saved_variables()[0];
      const Tensor rows = delta.flatten(0, -2);
      if (ctx->saved_data["wants_weight"].toBool()) weight_grad = call_mm(rows.t(), x.flatten(0, -2));
      if (ctx->saved_data["wants_bias"].toBool()) bias_grad = rows.sum(0);
    }
    return {Tensor(), Tensor(), weight_grad, bias_grad, Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

struct Conv2d : torch::autograd::Function<Conv2d> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& tangent,
                               const Tensor& weight, const OptionalTensor& bias, at::IntArrayRef stride,
                               at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                               const Tensor& noise_state, int64_t block, c10::string_view activation,
                               c10::string_view noise, at::OptionalIntArrayRef pool, int64_t patch) {
    static const auto op = find<decltype(fdfa::conv2d)>("fdfa::conv2d");
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, ty, pre, pooled] = op.call(x, tangent, weight, bias, stride, padding, dilation, groups,
                                        noise_state, block, activation, noise, pool, patch);
    ctx->save_for_backward({x, weight});
    ctx->saved_data["wants_weight"] = weight.requires_grad();
    ctx->saved_data["wants_bias"] = bias && bias->requires_grad();
    ctx->saved_data["stride"] = stride.vec();
    ctx->saved_data["padding"] = padding.vec();
    ctx->saved_data["dilation"] = dilation.vec();
    ctx->saved_data["groups"] = groups;
    ctx->mark_non_differentiable({y, ty, pooled});
    ctx->set_materialize_grads(false);
    return {y, ty, pre, pooled};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(14);
    const Tensor& delta = grads[2];
    if (!delta.defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const Tensor& weight = saved[1];
    const std::vector<int64_t> padding = ctx->saved_data["padding"].toIntVector();
    const auto [x, stride] =
        read_pixels(saved[0], weight, ctx->saved_data["stride"].toIntVector(), padding);
    const bool wants_bias = ctx->saved_data["wants_bias"].toBool();
    const std::array<int64_t, 1> bias_sizes{weight.size(0)};
    auto [unused, weight_grad, bias_grad] = at::convolution_backward(
        delta, x, weight, wants_bias ? at::OptionalIntArrayRef(bias_sizes) : std::nullopt, stride,
        padding, ctx->saved_data["dilation"].toIntVector(), /*transposed=*/false,
        /*output_padding=*/{0, 0}, ctx->saved_data["groups"].toInt(),
        {false, ctx->saved_data["wants_weight"].toBool(), wants_bias});
    result[2] = weight_grad;
    result[3] = bias_grad;
    return result;
  }
};

struct BatchNorm : torch::autograd::Function<BatchNorm> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& tangent,
                               const OptionalTensor& ty, const OptionalTensor& weight,
                               const OptionalTensor& bias, const OptionalTensor& running_mean,
                               const OptionalTensor& running_var,
                               const OptionalTensor& num_batches_tracked, bool training,
                               double momentum, double eps, const Tensor& noise_state, int64_t block,
                               c10::string_view activation, c10::string_view noise,
                               at::OptionalIntArrayRef pool, int64_t patch) {
    static const auto op = find<decltype(fdfa::batch_norm)>("fdfa::batch_norm");
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, pre, mean, inverse_std, pooled, pooled_tangent] =
        op.call(x, tangent, ty, weight, bias, running_mean, running_var, num_batches_tracked, training,
                momentum, eps, noise_state, block, activation, noise, pool, patch);
    save(ctx, x, weight, bias, mean, inverse_std, training);
    ctx->mark_non_differentiable({y, mean, inverse_std, pooled, pooled_tangent});
    ctx->set_materialize_grads(false);
    return {y, pre, mean, inverse_std, pooled, pooled_tangent};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(17);
    if (grads[1].defined()) std::tie(result[0], result[3], result[4]) = gradients(ctx, grads[1]);
    return result;
  }

  static void save(AutogradContext* ctx, const Tensor& x, const OptionalTensor& weight,
                   const OptionalTensor& bias, const Tensor& mean, const Tensor& inverse_std,
                   bool training) {
    ctx->save_for_backward({x, weight.value_or(Tensor()), mean, inverse_std});
    ctx->saved_data["training"] = training;
    ctx->saved_data["has_bias"] = bias.has_value();
  }

  // Of x, weight and bias, for delta at the normalised values. A second derivative would be zero.
  static std::tuple<Tensor, Tensor, Tensor> gradients(AutogradContext* ctx, const Tensor& delta) {
    static const auto op = find<decltype(fdfa::batch_norm_backward)>("fdfa::batch_norm_backward");
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "FDFA: batch-norm in a training step has no second derivative, so "
                "create_graph=True is not possible");
    const variable_list saved = ctx->get_saved_variables();
    const OptionalTensor weight = saved[1].defined() ? OptionalTensor(saved[1]) : std::nullopt;
    auto [dx, dweight, dbias] =
        op.call(delta, saved[0], weight, saved[2], saved[3], ctx->saved_data["training"].toBool());
    return {dx, weight ? dweight : Tensor(), ctx->saved_data["has_bias"].toBool() ? dbias : Tensor()};
  }
};

// The same between points: y carries the gradient, and nothing is perturbed.
struct DualBatchNorm : torch::autograd::Function<DualBatchNorm> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& tangent,
                               const OptionalTensor& weight, const OptionalTensor& bias,
                               const OptionalTensor& running_mean, const OptionalTensor& running_var,
                               bool training, double momentum, double eps) {
    static const auto op = find<decltype(fdfa::batch_norm)>("fdfa::batch_norm");
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor ty = at::empty_like(x);
    const Tensor no_noise = at::empty({3}, x.options().dtype(at::kLong));
    auto [y, pre, mean, inverse_std, pooled, pooled_tangent] =
        op.call(x, tangent, ty, weight, bias, running_mean, running_var, std::nullopt, training,
                momentum, eps, no_noise, /*block=*/0, "identity", "none", std::nullopt, /*patch=*/1);
    BatchNorm::save(ctx, x, weight, bias, mean, inverse_std, training);
    ctx->mark_non_differentiable({ty});
    ctx->set_materialize_grads(false);
    return {y, ty};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(9);
    if (grads[0].defined())
      std::tie(result[0], result[2], result[3]) = BatchNorm::gradients(ctx, grads[0]);
    return result;
  }
};

// at::silu_backward, which has no derivative.
Tensor silu_gradient(const Tensor& grad, const Tensor& x) {
  const Tensor s = at::sigmoid(x);
  return grad * (s * (1 + x * (1 - s)));
}

// An activation between points: y carries the gradient.
struct DualActivation : torch::autograd::Function<DualActivation> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& tangent,
                               c10::string_view name) {
    static const auto op = find<decltype(fdfa::dual_activation)>("fdfa::dual_activation");
    const Activation activation = parse_activation("dual_activation", name);
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, ty] = op.call(x, tangent, name);
    ctx->save_for_backward({derivative_needs_pre_activation(activation) ? x : y});
    ctx->saved_data["activation"] = static_cast<int64_t>(activation);
    ctx->mark_non_differentiable({ty});
    ctx->set_materialize_grads(false);
    return {y, ty};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor& grad = grads[0];
    if (!grad.defined()) return {Tensor(), Tensor(), Tensor()};
    const Tensor saved = ctx->get_saved_variables()[0];
    const auto gradient = [&]() -> Tensor {
      switch (static_cast<Activation>(ctx->saved_data["activation"].toInt())) {
        case Activation::relu:
          return at::threshold_backward(grad, saved, 0);
        case Activation::leaky_relu:
          return at::leaky_relu_backward(grad, saved, kLeakySlope, /*self_is_result=*/true);
        case Activation::tanh:
          return at::tanh_backward(grad, saved);
        case Activation::sigmoid:
          return at::sigmoid_backward(grad, saved);
        case Activation::gelu:
          return at::gelu_backward(grad, saved);
        case Activation::silu:
          return at::GradMode::is_enabled() ? silu_gradient(grad, saved)
                                            : at::silu_backward(grad, saved);
        default:
          return grad;
      }
    };
    return {gradient(), Tensor(), Tensor()};
  }
};

struct MaxPoolEnd : torch::autograd::Function<MaxPoolEnd> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& tangent,
                               const Tensor& anchor, at::IntArrayRef kernel, at::IntArrayRef stride,
                               at::IntArrayRef padding, const Tensor& noise_state, int64_t block,
                               c10::string_view noise, int64_t patch) {
    static const auto op = find<decltype(fdfa::max_pool2d_end)>("fdfa::max_pool2d_end");
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, ty, pre, winners] =
        op.call(x, tangent, anchor, kernel, stride, padding, noise_state, block, noise, patch);
    ctx->save_for_backward({winners});
    ctx->saved_data["input_size"] = x.sym_sizes().slice(2);
    ctx->saved_data["kernel"] = kernel.vec();
    ctx->saved_data["stride"] = stride.vec();
    ctx->saved_data["padding"] = padding.vec();
    ctx->mark_non_differentiable({y, ty, winners});
    ctx->set_materialize_grads(false);
    return {y, ty, pre, winners};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    using Op = Tensor(const Tensor&, const Tensor&, c10::SymIntArrayRef, at::IntArrayRef,
                      at::IntArrayRef, at::IntArrayRef);  // a compiler's sizes may be symbols
    static const auto op = find<Op>("fdfa::max_pool2d_backward");
    variable_list result(10);
    if (const Tensor& delta = grads[2]; delta.defined()) {
      result[2] =
          op.call(delta, ctx->get_saved_variables()[0], ctx->saved_data["input_size"].toSymIntVector(),
                  ctx->saved_data["kernel"].toIntVector(), ctx->saved_data["stride"].toIntVector(),
                  ctx->saved_data["padding"].toIntVector());
    }
    return result;
  }
};

PoolEnd max_pool2d_end_autograd(const Tensor& x, const OptionalTensor& tangent, const Tensor& anchor,
                                at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                                const Tensor& noise_state, int64_t block, c10::string_view noise,
                                int64_t patch) {
  const auto out =
      MaxPoolEnd::apply(x, tangent, anchor, kernel, stride, padding, noise_state, block, noise, patch);
  return {out[0], out[1], out[2], out[3]};
}

// Of torch's forward mode, which has one.
constexpr int64_t kLevel = 0;

// It would be lost without a word.
void check_no_dual(const char* op, const Tensor& x) {
  TORCH_CHECK(!x._fw_grad(kLevel).defined(), "fdfa::", op,
              ": x must be no dual tensor; give its tangent as an argument");
}

Normalized batch_norm_autograd(const Tensor& x, const OptionalTensor& tangent, const OptionalTensor& ty,
                               const OptionalTensor& weight, const OptionalTensor& bias,
                               const OptionalTensor& running_mean, const OptionalTensor& running_var,
                               const OptionalTensor& num_batches_tracked, bool training,
                               double momentum, double eps, const Tensor& noise_state, int64_t block,
                               c10::string_view activation, c10::string_view noise,
                               at::OptionalIntArrayRef pool, int64_t patch) {
  check_no_dual("batch_norm", x);
  const auto out =
      BatchNorm::apply(x, tangent, ty, weight, bias, running_mean, running_var, num_batches_tracked,
                       training, momentum, eps, noise_state, block, activation, noise, pool, patch);
  return {out[0], out[1], out[2], out[3], out[4], out[5]};
}

Dual linear_autograd(const Tensor& x, const OptionalTensor& tangent, const Tensor& weight,
                     const OptionalTensor& bias, const Tensor& noise_state, int64_t block,
                     c10::string_view activation, c10::string_view noise) {
  check_no_dual("linear", x);
  const auto out = Linear::apply(x, tangent, weight, bias, noise_state, block, activation, noise);
  return {out[0], out[1], out[2]};
}

Convolved conv2d_autograd(const Tensor& x, const OptionalTensor& tangent, const Tensor& weight,
                          const OptionalTensor& bias, at::IntArrayRef stride, at::IntArrayRef padding,
                          at::IntArrayRef dilation, int64_t groups, const Tensor& noise_state,
                          int64_t block, c10::string_view activation, c10::string_view noise,
                          at::OptionalIntArrayRef pool, int64_t patch) {
  check_no_dual("conv2d", x);
  const auto out = Conv2d::apply(x, tangent, weight, bias, stride, padding, dilation, groups,
                                 noise_state, block, activation, noise, pool, patch);
  return {out[0], out[1], out[2], out[3]};
}

std::tuple<Tensor, Tensor> dual_activation_autograd(const Tensor& x, const Tensor& tangent,
                                                    c10::string_view activation) {
  check_no_dual("dual_activation", x);
  const auto out = DualActivation::apply(x, tangent, activation);
  return {out[0], out[1]};
}

// x Wᵀ + b of an x without gradient, by the faster library.
struct Product : torch::autograd::Function<Product> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                        const OptionalTensor& bias) {
    ctx->save_for_backward({x});
    ctx->saved_data["has_bias"] = bias.has_value();
    return plain_linear(x, weight, bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor x = ctx->get_saved_variables()[0];
    const bool has_bias = ctx->saved_data["has_bias"].toBool();
    return {Tensor(), call_mm(grads[0].t(), x), has_bias ? grads[0].sum(0) : Tensor()};
  }
};

Tensor product(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  check_product("product", x, std::nullopt, weight, bias);
  const bool faster = x.dim() == 2 && !x.requires_grad() &&
                      !at::autocast::is_autocast_enabled(x.device().type()) &&
                      mm_is_onednn(x, weight.t());
  return faster ? Product::apply(x, weight, bias) : at::linear(x, weight, bias);
}

// torch's forward mode would also multiply the missing tangents of weight and bias, and add these zeros
// by a detour through Python.
std::tuple<Tensor, Tensor> dual_linear(const Tensor& x, const Tensor& tangent, const Tensor& weight,
                                       const OptionalTensor& bias) {
  TORCH_CHECK(tangent.sym_sizes() == x.sym_sizes(), "fdfa::dual_linear: tangent must have shape ",
              x.sym_sizes(), "; got ", tangent.sym_sizes());
  check_product("dual_linear", x, tangent, weight, bias);
  Tensor y = product(x, weight, bias);
  if (x.dim() != 2 || at::autocast::is_autocast_enabled(x.device().type())) {
    const at::NoGradGuard guard;
    return {std::move(y), at::linear(tangent, weight)};
  }
  const at::AutoDispatchBelowAutograd guard;
  return {std::move(y), call_mm(tangent, weight.t())};
}

std::tuple<Tensor, Tensor> dual_batch_norm(const Tensor& x, const Tensor& tangent,
                                           const OptionalTensor& weight, const OptionalTensor& bias,
                                           const OptionalTensor& running_mean,
                                           const OptionalTensor& running_var, bool training,
                                           double momentum, double eps) {
  const auto out = DualBatchNorm::apply(x, tangent, weight, bias, running_mean, running_var, training,
                                        momentum, eps);
  return {out[0], out[1]};
}

}  // namespace
}  // namespace fdfa

TORCH_LIBRARY_IMPL(fdfa, Autograd, m) {
  m.impl("linear", fdfa::linear_autograd);
  m.impl("dual_activation", fdfa::dual_activation_autograd);
  m.impl("conv2d", fdfa::conv2d_autograd);
  m.impl("batch_norm", fdfa::batch_norm_autograd);
  m.impl("max_pool2d_end", fdfa::max_pool2d_end_autograd);
}

TORCH_LIBRARY_IMPL(fdfa, CompositeImplicitAutograd, m) {
  m.impl("product", fdfa::product);
  m.impl("dual_linear", fdfa::dual_linear);
  m.impl("dual_batch_norm", fdfa::dual_batch_norm);
}

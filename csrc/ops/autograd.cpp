#include <ATen/core/grad_mode.h>
#include <ATen/ops/_unpack_dual.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/linear.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/library.h>

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
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("fdfa::linear", "")
                               .typed<decltype(fdfa::linear)>();
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
      if (ctx->saved_data["wants_weight"].toBool()) {
        static const auto mm = c10::Dispatcher::singleton()
                                   .findSchemaOrThrow("fdfa::mm", "")
                                   .typed<decltype(fdfa::mm)>();
        weight_grad = mm.call(rows.t(), x.flatten(0, -2));
      }
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
                               c10::string_view noise) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("fdfa::conv2d", "")
                               .typed<decltype(fdfa::conv2d)>();
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, ty, pre] = op.call(x, tangent, weight, bias, stride, padding, dilation, groups,
                                noise_state, block, activation, noise);
    ctx->save_for_backward({x, weight});
    ctx->saved_data["wants_weight"] = weight.requires_grad();
    ctx->saved_data["wants_bias"] = bias && bias->requires_grad();
    ctx->saved_data["stride"] = stride.vec();
    ctx->saved_data["padding"] = padding.vec();
    ctx->saved_data["dilation"] = dilation.vec();
    ctx->saved_data["groups"] = groups;
    ctx->mark_non_differentiable({y, ty});
    ctx->set_materialize_grads(false);
    return {y, ty, pre};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(13);
    if (const Tensor& delta = grads[2]; delta.defined()) {
      const variable_list saved = ctx->get_saved_variables();
      const Tensor &x = saved[0], &weight = saved[1];
      const bool wants_bias = ctx->saved_data["wants_bias"].toBool();
      const std::array<int64_t, 1> bias_sizes{weight.size(0)};
      auto [unused, weight_grad, bias_grad] = at::convolution_backward(
          delta, x, weight, wants_bias ? at::OptionalIntArrayRef(bias_sizes) : std::nullopt,
          ctx->saved_data["stride"].toIntVector(), ctx->saved_data["padding"].toIntVector(),
          ctx->saved_data["dilation"].toIntVector(), /*transposed=*/false, /*output_padding=*/{0, 0},
          ctx->saved_data["groups"].toInt(),
          {false, ctx->saved_data["wants_weight"].toBool(), wants_bias});
      result[2] = weight_grad;
      result[3] = bias_grad;
    }
    return result;
  }
};

struct BatchNorm : torch::autograd::Function<BatchNorm> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& tangent,
                               const Tensor& ty, const OptionalTensor& weight,
                               const OptionalTensor& bias, const OptionalTensor& running_mean,
                               const OptionalTensor& running_var, bool training, double momentum,
                               double eps, const Tensor& noise_state, int64_t block,
                               c10::string_view activation, c10::string_view noise) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("fdfa::batch_norm", "")
                               .typed<decltype(fdfa::batch_norm)>();
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, pre, mean, inverse_std] =
        op.call(x, tangent, ty, weight, bias, running_mean, running_var, training, momentum, eps,
                noise_state, block, activation, noise);
    ctx->save_for_backward({x, weight.value_or(Tensor()), mean, inverse_std});
    ctx->saved_data["training"] = training;
    ctx->saved_data["has_bias"] = bias.has_value();
    ctx->mark_non_differentiable({y, mean, inverse_std});
    ctx->set_materialize_grads(false);
    return {y, pre, mean, inverse_std};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("fdfa::batch_norm_backward", "")
                               .typed<decltype(fdfa::batch_norm_backward)>();
    variable_list result(14);
    if (const Tensor& delta = grads[1]; delta.defined()) {
      const variable_list saved = ctx->get_saved_variables();
      const OptionalTensor weight = saved[1].defined() ? OptionalTensor(saved[1]) : std::nullopt;
      auto [dx, dweight, dbias] =
          op.call(delta, saved[0], weight, saved[2], saved[3], ctx->saved_data["training"].toBool());
      result[0] = dx;
      if (weight) result[3] = dweight;
      if (ctx->saved_data["has_bias"].toBool()) result[4] = dbias;
    }
    return result;
  }
};

Normalized batch_norm_autograd(const Tensor& x, const OptionalTensor& tangent, const Tensor& ty,
                               const OptionalTensor& weight, const OptionalTensor& bias,
                               const OptionalTensor& running_mean, const OptionalTensor& running_var,
                               bool training, double momentum, double eps, const Tensor& noise_state,
                               int64_t block, c10::string_view activation, c10::string_view noise) {
  const auto out = BatchNorm::apply(x, tangent, ty, weight, bias, running_mean, running_var, training,
                                    momentum, eps, noise_state, block, activation, noise);
  return {out[0], out[1], out[2], out[3]};
}

// Within a level of torch's forward mode, of which it has one, x may be a dual tensor in place of x and
// a tangent, and y is one unless a tangent was given. C++ functions of autograd do not take duals, so x
// is taken apart before.
constexpr int64_t kLevel = 0;

struct Operand {
  Operand(const Tensor& x, const OptionalTensor& given)
      : primal(x),
        tangent(given),
        is_dual(!given && torch::autograd::ForwardADLevel::try_get_by_idx(kLevel) != nullptr) {
    if (const Tensor& own = x._fw_grad(kLevel); own.defined()) {
      TORCH_CHECK(!given, "fdfa: x has a tangent of its own; got another one");
      primal = x.detach();
      tangent = own.detach();
    }
  }
  Dual result(const variable_list& out) const {
    if (is_dual) out[0]._set_fw_grad(out[1], kLevel, /*is_inplace_op=*/false);
    return {out[0], out[1], out[2]};
  }

  Tensor primal;
  OptionalTensor tangent;
  bool is_dual;
};

Dual linear_autograd(const Tensor& x, const OptionalTensor& tangent, const Tensor& weight,
                     const OptionalTensor& bias, const Tensor& noise_state, int64_t block,
                     c10::string_view activation, c10::string_view noise) {
  const Operand in(x, tangent);
  return in.result(
      Linear::apply(in.primal, in.tangent, weight, bias, noise_state, block, activation, noise));
}

Dual conv2d_autograd(const Tensor& x, const OptionalTensor& tangent, const Tensor& weight,
                     const OptionalTensor& bias, at::IntArrayRef stride, at::IntArrayRef padding,
                     at::IntArrayRef dilation, int64_t groups, const Tensor& noise_state, int64_t block,
                     c10::string_view activation, c10::string_view noise) {
  const Operand in(x, tangent);
  return in.result(Conv2d::apply(in.primal, in.tangent, weight, bias, stride, padding, dilation, groups,
                                 noise_state, block, activation, noise));
}

// One product for the tangent: torch's forward mode also multiplies the missing tangents of weight and
// bias, and adds these zeros by a detour through Python.
Tensor dual_linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  const bool constant =
      !weight._fw_grad(kLevel).defined() && !(bias && bias->_fw_grad(kLevel).defined());
  if (!constant || !input._fw_grad(kLevel).defined()) return at::linear(input, weight, bias);
  const auto [primal, tangent] = at::_unpack_dual(input, kLevel);
  const Tensor y = at::linear(primal, weight, bias);
  const at::NoGradGuard guard;
  y._set_fw_grad(at::linear(tangent, weight), kLevel, /*is_inplace_op=*/false);
  return y;
}

}  // namespace
}  // namespace fdfa

TORCH_LIBRARY_IMPL(fdfa, Autograd, m) {
  m.impl("linear", fdfa::linear_autograd);
  m.impl("conv2d", fdfa::conv2d_autograd);
  m.impl("batch_norm", fdfa::batch_norm_autograd);
}

TORCH_LIBRARY_IMPL(fdfa, CompositeImplicitAutograd, m) { m.impl("dual_linear", fdfa::dual_linear); }

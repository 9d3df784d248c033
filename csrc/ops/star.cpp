#include <ATen/ops/clone.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/ops.h"

// The one autograd node between the loss and all blocks (Algorithm 1, lines 18 to 24). No path leads
// from one block to another.

namespace fdfa {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// What the backward needs besides tensors that autograd keeps.
struct Options {
  const Tensor &tangent, &noise_state;
  at::TensorList gates, exp_avg, exp_avg_sq;
  const Tensor& updates;
  at::IntArrayRef blocks;
  const Names& activations;
  c10::string_view noise, rule;
  double lr, beta1, beta2, eps;
};

struct Star : torch::autograd::Function<Star> {
  static Tensor forward(AutogradContext* ctx, const Tensor& output, at::TensorList handles,
                        at::TensorList feedback, const Options& o) {
    static const auto next_noise = find<decltype(fdfa::next_noise)>("fdfa::next_noise");
    variable_list saved{o.tangent, next_noise.call(o.noise_state)};
    saved.insert(saved.end(), o.gates.begin(), o.gates.end());
    ctx->save_for_backward(std::move(saved));
    // B and its moments move in place from step to step, so autograd must not watch their versions.
    auto& data = ctx->saved_data;
    data.reserve(12);
    data["feedback"] = feedback.vec();
    data["exp_avg"] = o.exp_avg.vec();
    data["exp_avg_sq"] = o.exp_avg_sq.vec();
    data["updates"] = o.updates;
    data["blocks"] = o.blocks.vec();
    data["activations"] = o.activations;
    data["noise"] = std::string(o.noise);
    data["rule"] = std::string(o.rule);
    data["lr"] = o.lr;
    data["beta1"] = o.beta1;
    data["beta2"] = o.beta2;
    data["eps"] = o.eps;
    return output.clone();
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto feedback_step = find<decltype(fdfa::feedback_step)>("fdfa::feedback_step");
    static const auto feedback_gradient =
        find<decltype(fdfa::feedback_gradient)>("fdfa::feedback_gradient");
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &error = grads[0], &tangent = saved[0], &noise_state = saved[1];
    const at::TensorList gates = at::TensorList(saved).slice(2);
    auto& data = ctx->saved_data;
    const auto feedback = data["feedback"].toTensorVector();
    const auto blocks = data["blocks"].toIntVector();
    const auto activations = data["activations"].to<Names>();
    const std::string &noise = data["noise"].toStringRef(), &rule = data["rule"].toStringRef();

    variable_list deltas, gradients(feedback.size());
    if (rule == "grad") {
      std::tie(deltas, gradients) = feedback_gradient.call(feedback, error, tangent, gates, noise_state,
                                                           blocks, activations, noise);
    } else {
      OptionalTensor updates;
      if (rule == "adam") updates = data["updates"].toTensor();
      for (size_t i = 0; i < feedback.size(); ++i) {
        deltas.push_back(empty_delta(gates[i], feedback[i]));
      }
      feedback_step.call(
          feedback, data["exp_avg"].toTensorVector(), data["exp_avg_sq"].toTensorVector(), updates,
          error, tangent, gates, noise_state, blocks, activations, noise, data["lr"].toDouble(),
          data["beta1"].toDouble(), data["beta2"].toDouble(), data["eps"].toDouble(), deltas);
    }
    variable_list result{error};
    result.insert(result.end(), deltas.begin(), deltas.end());
    result.insert(result.end(), gradients.begin(), gradients.end());
    result.emplace_back();  // of the options
    return result;
  }
};

Tensor star(const Tensor& output, const Tensor& tangent, const Tensor& noise_state,
            at::TensorList handles, at::TensorList gates, at::TensorList feedback,
            at::TensorList exp_avg, at::TensorList exp_avg_sq, const Tensor& updates,
            at::IntArrayRef blocks, const Names& activations, c10::string_view noise,
            c10::string_view rule, double lr, double beta1, double beta2, double eps) {
  return Star::apply(output, handles, feedback,
                     Options{tangent, noise_state, gates, exp_avg, exp_avg_sq, updates, blocks,
                             activations, noise, rule, lr, beta1, beta2, eps});
}

}  // namespace
}  // namespace fdfa

TORCH_LIBRARY_IMPL(fdfa, CompositeImplicitAutograd, m) { m.impl("star", fdfa::star); }

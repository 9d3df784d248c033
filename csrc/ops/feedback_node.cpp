#include <ATen/core/grad_mode.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include "ops/checks.h"
#include "ops/ops.h"
#include "ops/output_layer.h"

// The one autograd node between the loss and all blocks (Algorithm 1, lines 18 to 24), with the linear
// output layer in it where there is one. No path leads from one block to another.

namespace fdfa {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What the backward needs besides the tensors that autograd keeps. B and its moments move in place from
// step to step, so autograd must not watch their versions.
struct Options : torch::CustomClassHolder {
  std::vector<Tensor> feedback, exp_avg, exp_avg_sq;
  Tensor updates, lr;
  std::vector<int64_t> blocks, biased;
  c10::List<bool> donated;
  Names activations;
  std::string noise, rule;
  int64_t patch;
  double decay, beta1, beta2, eps;
  bool wants_weight = false, wants_bias = false;
};

struct FeedbackNode : torch::autograd::Function<FeedbackNode> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& tangent,
                        const OptionalTensor& weight, const OptionalTensor& bias,
                        at::TensorList anchors, at::TensorList biases, at::TensorList feedback,
                        const Tensor& noise_state, at::TensorList saved_activations,
                        at::TensorList outputs, const OptionalTensor& input,
                        c10::intrusive_ptr<Options> options) {
    static const auto next_noise = find<decltype(fdfa::next_noise)>("fdfa::next_noise");
    auto [output, output_tangent] = weight && !input
                                        ? output_layer(x, tangent, *weight, bias)
                                        : std::tuple<Tensor, OptionalTensor>(x.clone(), tangent);
    check_network({"feedback_node", output, output_tangent, noise_state, feedback, saved_activations,
                   outputs, options->blocks, options->activations, options->noise, options->patch});
    check_count("anchors", anchors.size(), saved_activations);
    check_count("donated", options->donated.size(), saved_activations);
    for (size_t i = 0; i < saved_activations.size(); ++i)
      check_order(feedback[i], saved_activations[i]);
    check_biases(biases, options->biased, saved_activations);
    options->wants_weight = weight && weight->requires_grad();
    options->wants_bias = bias && bias->requires_grad();
    variable_list saved{output_tangent.value_or(Tensor()),
                        tangent ? next_noise.call(noise_state) : Tensor(),
                        weight ? input.value_or(x) : Tensor()};
    saved.insert(saved.end(), saved_activations.begin(), saved_activations.end());
    saved.insert(saved.end(), outputs.begin(), outputs.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["options"] = c10::IValue::make_capsule(std::move(options));
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto feedback_step = find<decltype(fdfa::feedback_step)>("fdfa::feedback_step");
    static const auto feedback_gradient =
        find<decltype(fdfa::feedback_gradient)>("fdfa::feedback_gradient");
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "FDFA: the feedback step has no derivative, so create_graph=True is not possible");
    const variable_list saved = ctx->get_saved_variables();
    const auto kept = ctx->saved_data["options"].toCapsule();
    const Options& o = static_cast<const Options&>(*kept);
    const auto optional = [](const Tensor& t) {
      return t.defined() ? OptionalTensor(t) : std::nullopt;
    };
    const Tensor &error = grads[0], &x = saved[2];
    const OptionalTensor tangent = optional(saved[0]), noise_state = optional(saved[1]);
    const size_t n = o.blocks.size();
    const auto saved_activations = at::TensorList(saved).slice(3, n),
               outputs = at::TensorList(saved).slice(3 + n);

    variable_list deltas, bias_grads, gradients(o.feedback.size());
    Tensor output_bias_grad;
    if (o.rule == "grad") {
      std::tie(deltas, gradients) =
          feedback_gradient.call(o.feedback, error, tangent, saved_activations, outputs, noise_state,
                                 o.blocks, o.activations, o.noise, o.decay, o.patch);
      for (const int64_t i : o.biased) bias_grads.push_back(deltas[i].sum(0));
      if (o.wants_bias) output_bias_grad = error.sum(0);
    } else {
      const bool once = !torch::autograd::get_current_graph_task_keep_graph();
      for (size_t i = 0; i < o.feedback.size(); ++i) {
        const bool donated = once && o.donated.get(i);
        deltas.push_back(donated ? saved_activations[i]
                                 : empty_delta(saved_activations[i], o.feedback[i], o.patch));
      }
      variable_list sums;
      if (!o.biased.empty()) sums.assign(n, at::empty({0}, error.options()));
      for (const int64_t i : o.biased) {
        sums[i] = at::empty({saved_activations[i].size(1)}, error.options().dtype(at::kFloat));
        bias_grads.push_back(sums[i]);
      }
      if (o.wants_bias)
        output_bias_grad = at::empty({error.size(1)}, error.options().dtype(at::kFloat));
      const auto updates = o.rule == "adam" ? OptionalTensor(o.updates) : std::nullopt;
      feedback_step.call(o.feedback, o.exp_avg, o.exp_avg_sq, updates, error, tangent,
                         saved_activations, outputs, noise_state, o.blocks, o.activations, o.noise,
                         o.decay, o.lr, o.beta1, o.beta2, o.eps, deltas, sums,
                         optional(output_bias_grad), o.patch);
    }
    variable_list result{x.defined() ? Tensor() : error, Tensor(),
                         o.wants_weight ? call_mm(error.t(), x) : Tensor(), output_bias_grad};
    result.insert(result.end(), deltas.begin(), deltas.end());
    result.insert(result.end(), bias_grads.begin(), bias_grads.end());
    result.insert(result.end(), gradients.begin(), gradients.end());
    result.resize(result.size() + 3 + saved_activations.size() +
                  outputs.size());  // of what has no gradient
    return result;
  }

  static void check_count(const char* argument, size_t count, at::TensorList saved_activations) {
    TORCH_CHECK(count == saved_activations.size(), "fdfa::feedback_node: ", argument,
                " must have one entry for each of ", saved_activations.size(), " blocks; got ", count);
  }

  static void check_biases(at::TensorList biases, at::IntArrayRef biased,
                           at::TensorList saved_activations) {
    TORCH_CHECK(biases.size() == biased.size(),
                "fdfa::feedback_node: biased must have one entry for each of ", biases.size(),
                " biases; got ", biased.size());
    for (size_t i = 0; i < biases.size(); ++i) {
      const int64_t block = biased[i];
      TORCH_CHECK(block >= 0 && block < static_cast<int64_t>(saved_activations.size()) &&
                      saved_activations[block].dim() == 2 &&
                      biases[i].sizes() == saved_activations[block].sizes().slice(1),
                  "fdfa::feedback_node: biased must name a block of [N, D] for a bias of [D] = ",
                  biases[i].sizes(), "; got ", block);
    }
  }

  // The order in which the forward pass counted the features when it perturbed them.
  static void check_order(const Tensor& feedback, const Tensor& saved_activation) {
    const auto order =
        saved_activation.dim() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
    TORCH_CHECK(feedback.is_contiguous(order), "fdfa::feedback_node: feedback must lie in ", order,
                " for a saved_activation of ", saved_activation.sizes(), "; got strides ",
                feedback.strides());
  }
};

Tensor feedback_node(const Tensor& x, const OptionalTensor& tangent, const OptionalTensor& weight,
                     const OptionalTensor& bias, const Tensor& noise_state, at::TensorList anchors,
                     at::TensorList biases, at::IntArrayRef biased, at::TensorList saved_activations,
                     const c10::List<bool>& donated, at::TensorList outputs, at::TensorList feedback,
                     at::TensorList exp_avg, at::TensorList exp_avg_sq, const Tensor& updates,
                     at::IntArrayRef blocks, const Names& activations, c10::string_view noise,
                     c10::string_view rule, double decay, const Tensor& lr, double beta1, double beta2,
                     double eps, const OptionalTensor& input, int64_t patch) {
  TORCH_CHECK_VALUE(rule == "ema" || rule == "adam" || rule == "grad" || rule == "fixed",
                    "fdfa::feedback_node: rule must be one of ema, adam, grad, fixed; got '", rule,
                    "'");
  TORCH_CHECK(!weight || !input.value_or(x).requires_grad(),
              "fdfa::feedback_node: ", input ? "input" : "x",
              " must need no gradient where weight is given");
  TORCH_CHECK(!input || weight,
              "fdfa::feedback_node: input is that of an output layer, whose weight is missing");
  if (weight && !input) check_product("feedback_node", x, tangent, *weight, bias);
  if (input) {
    TORCH_CHECK(x.dim() == 2 && weight->dim() == 2,
                "fdfa::feedback_node: x and weight must be matrices; got ", x.sizes(), " and ",
                weight->sizes());
    check_shape("feedback_node", "input", *input, {x.size(0), weight->size(1)});
    check_shape("feedback_node", "weight", *weight, {x.size(1), input->size(1)});
  }
  auto options = c10::make_intrusive<Options>();
  options->feedback = feedback.vec();
  options->exp_avg = exp_avg.vec();
  options->exp_avg_sq = exp_avg_sq.vec();
  options->updates = updates;
  options->blocks = blocks.vec();
  options->biased = biased.vec();
  options->donated = donated;
  options->activations = activations;
  options->noise = noise;
  options->rule = rule;
  options->patch = patch;
  options->decay = decay;
  options->lr = lr;
  options->beta1 = beta1;
  options->beta2 = beta2;
  options->eps = eps;
  return FeedbackNode::apply(x, tangent, weight, bias, anchors, biases, feedback, noise_state,
                             saved_activations, outputs, input, std::move(options));
}

}  // namespace
}  // namespace fdfa

TORCH_LIBRARY_IMPL(fdfa, CompositeImplicitAutograd, m) { m.impl("feedback_node", fdfa::feedback_node); }

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>

#include "ops/checks.h"
#include "ops/launch.h"
#include "ops/ops.h"

namespace fdfa {
namespace {

void check_matrix(const char* op, const char* argument, const Tensor& t, const Tensor& error,
                  const Tensor& gate) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat, "fdfa::", op, ": ", argument,
                   " must be float32; got ", t.scalar_type());
  std::vector<int64_t> expected = gate.sizes().vec();
  expected[0] = error.size(1);
  check_shape(op, argument, t, expected);
  TORCH_CHECK(t.device() == gate.device(), "fdfa::", op, ": ", argument, " must be on ", gate.device(),
              "; got ", t.device());
}

void check_inputs(const char* op, const Tensor& feedback, const Tensor& error, const Tensor& tangent,
                  const Tensor& gate, const Tensor& noise_state) {
  TORCH_CHECK(gate.dim() >= 2, "fdfa::", op, ": gate must be [N, *features]; got ", gate.sizes());
  check_floating(op, "gate", gate);
  TORCH_CHECK(error.dim() == 2 && error.size(0) == gate.size(0), "fdfa::", op,
              ": error must be [N, K] = [", gate.size(0), ", K]; got ", error.sizes());
  check_floating(op, "error", error);
  check_shape(op, "tangent", tangent, error.sizes());
  check_floating(op, "tangent", tangent);
  for (const Tensor& t : {error, tangent}) {
    TORCH_CHECK(t.device() == gate.device(), "fdfa::", op, ": error and tangent must be on ",
                gate.device(), "; got ", t.device());
  }
  TORCH_CHECK(error.size(1) > 0, "fdfa::", op, ": error must be [N, K] with K > 0; got ",
              error.sizes());
  check_matrix(op, "feedback", feedback, error, gate);
  check_counter(op, "noise_state", noise_state, 3, gate);
}

// Runs the kernel for a rule whose matrices are set in `rule_params`; returns δ.
Tensor run(const char* op, Rule rule, const Tensor& feedback, const OptionalTensor& exp_avg,
           const OptionalTensor& exp_avg_sq, const OptionalTensor& updates,
           const OptionalTensor& gradient, const Tensor& error, const Tensor& tangent,
           const Tensor& gate, const Tensor& noise_state, int64_t block, c10::string_view activation,
           c10::string_view noise, double lr, double beta1, double beta2, double eps) {
  const Activation f = parse_activation(op, activation);
  const Noise kind = parse_noise(op, noise);
  // [N, K] is small beside [N, D] and [K, D]: the kernels take it in float32.
  const Tensor e = error.to(at::kFloat).contiguous();
  const Tensor d = tangent.to(at::kFloat).contiguous();
  const at::MemoryFormat order = feature_order(op, feedback);
  const Tensor gate_dense = f == Activation::identity ? gate : gate.contiguous(order);
  Tensor delta = at::empty(gate.sizes(), gate.options(), order);
  with_storage(gate.scalar_type(), [&](auto storage) {
    using T = decltype(storage);
    FeedbackParams<T> p{};
    p.feedback = pointer<float>(feedback);
    p.exp_avg = exp_avg ? pointer<float>(*exp_avg) : nullptr;
    p.exp_avg_sq = exp_avg_sq ? pointer<float>(*exp_avg_sq) : nullptr;
    p.gradient = gradient ? pointer<float>(*gradient) : nullptr;
    p.updates = updates ? updates->const_data_ptr<int64_t>() : nullptr;
    p.error = pointer<float>(e);
    p.tangent = pointer<float>(d);
    p.gate = f == Activation::identity ? nullptr : pointer<T>(gate_dense);
    p.delta = pointer<T>(delta);
    p.samples = gate.size(0);
    p.features = feedback.numel() / feedback.size(0);
    p.outputs = error.size(1);
    p.activation = f;
    p.noise = NoiseParams{noise_state.const_data_ptr<int64_t>(), block, kind};
    p.rule = rule;
    p.lr = static_cast<float>(lr);
    p.beta1 = static_cast<float>(beta1);
    p.beta2 = static_cast<float>(beta2);
    p.eps = static_cast<float>(eps);
    launch(p, gate.device());
  });
  return delta;
}

}  // namespace

Tensor feedback_step(Tensor feedback, const OptionalTensor& exp_avg, const OptionalTensor& exp_avg_sq,
                     const OptionalTensor& updates, const Tensor& error, const Tensor& tangent,
                     const Tensor& gate, const Tensor& noise_state, int64_t block,
                     c10::string_view activation, c10::string_view noise, double lr, double beta1,
                     double beta2, double eps) {
  const char* op = "feedback_step";
  check_inputs(op, feedback, error, tangent, gate, noise_state);
  const bool adam = exp_avg.has_value();
  TORCH_CHECK(
      adam == exp_avg_sq.has_value() && adam == updates.has_value(),
      "fdfa::feedback_step: Adam needs exp_avg, exp_avg_sq and updates; eq. 8 needs none of them");
  if (adam) {
    check_matrix(op, "exp_avg", *exp_avg, error, gate);
    check_matrix(op, "exp_avg_sq", *exp_avg_sq, error, gate);
    TORCH_CHECK(exp_avg->strides() == feedback.strides() && exp_avg_sq->strides() == feedback.strides(),
                "fdfa::feedback_step: exp_avg and exp_avg_sq must have feedback's strides ",
                feedback.strides(), "; got ", exp_avg->strides(), " and ", exp_avg_sq->strides());
    check_counter(op, "updates", *updates, 1, gate);
  }
  return run(op, adam ? Rule::adam : Rule::ema, feedback, exp_avg, exp_avg_sq, updates, std::nullopt,
             error, tangent, gate, noise_state, block, activation, noise, lr, beta1, beta2, eps);
}

std::tuple<Tensor, Tensor> feedback_gradient(const Tensor& feedback, const Tensor& error,
                                             const Tensor& tangent, const Tensor& gate,
                                             const Tensor& noise_state, int64_t block,
                                             c10::string_view activation, c10::string_view noise) {
  const char* op = "feedback_gradient";
  check_inputs(op, feedback, error, tangent, gate, noise_state);
  Tensor gradient = at::zeros_like(feedback);  // an empty batch teaches nothing
  Tensor delta = run(op, Rule::gradient, feedback, std::nullopt, std::nullopt, std::nullopt, gradient,
                     error, tangent, gate, noise_state, block, activation, noise, 0, 0, 0, 0);
  return {delta, gradient};
}

}  // namespace fdfa

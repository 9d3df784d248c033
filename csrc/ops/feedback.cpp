#include <ATen/Context.h>
#include <ATen/ops/avg_pool2d.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>

#include "ops/checks.h"
#include "ops/launch.h"
#include "ops/ops.h"

namespace fdfa {
namespace {

// How B moves; what a rule does not need is empty.
struct Motion {
  Rule rule;
  at::TensorList exp_avg, exp_avg_sq, gradients;
  OptionalTensor updates;
  double decay, lr = 0, beta1 = 0, beta2 = 0, eps = 0;
};

template <class List>
void check_count(const Network& net, const char* argument, const List& list) {
  TORCH_CHECK(list.size() == net.feedback.size(), "fdfa::", net.op, ": ", argument,
              " must have one entry for each of ", net.feedback.size(), " blocks; got ", list.size());
}

void check_matrix(const Network& net, const char* argument, const Tensor& t, size_t block) {
  const Tensor& saved_activation = net.saved_activations[block];
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat, "fdfa::", net.op, ": ", argument,
                   " must be float32; got ", t.scalar_type());
  std::vector<int64_t> expected = saved_activation.sizes().vec();
  expected[0] = net.error.size(1);
  if (const Patches patches = check_patch(net.op, saved_activation.sizes(), net.patch);
      patches.size > 0) {
    expected[2] = patches.rows();
    expected[3] = patches.columns();
  }
  check_shape(net.op, argument, t, expected);
  TORCH_CHECK(t.device() == saved_activation.device(), "fdfa::", net.op, ": ", argument, " must be on ",
              saved_activation.device(), "; got ", t.device());
}

// In which a block's features are counted: B's, which images in patches must have in channels_last,
// whatever else describes the same memory.
at::MemoryFormat block_order(const char* op, const Tensor& feedback, const Tensor& saved_activation,
                             int64_t patch) {
  if (check_patch(op, saved_activation.sizes(), patch).size == 0) return feature_order(op, feedback);
  constexpr auto kOrder = at::MemoryFormat::ChannelsLast;
  TORCH_CHECK(feedback.is_contiguous(kOrder), "fdfa::", op,
              ": feedback of images in patches must be channels_last; got strides ",
              feedback.strides());
  return kOrder;
}
at::MemoryFormat block_order(const Network& net, size_t block) {
  return block_order(net.op, net.feedback[block], net.saved_activations[block], net.patch);
}

void check_moments(const Network& net, const Motion& motion) {
  const bool adam = motion.updates.has_value();
  TORCH_CHECK(!adam || motion.rule != Rule::fixed, "fdfa::", net.op,
              ": updates without tangent or outputs: the feedback has nothing to follow");
  TORCH_CHECK(adam != motion.exp_avg.empty() && adam != motion.exp_avg_sq.empty(), "fdfa::", net.op,
              ": Adam needs exp_avg, exp_avg_sq and updates; eq. 8 needs none of them");
  if (!adam) return;
  check_counter(net.op, "updates", *motion.updates, 1, net.error);
  check_count(net, "exp_avg", motion.exp_avg);
  check_count(net, "exp_avg_sq", motion.exp_avg_sq);
  for (size_t i = 0; i < net.feedback.size(); ++i) {
    const Tensor &feedback = net.feedback[i], &m = motion.exp_avg[i], &v = motion.exp_avg_sq[i];
    check_matrix(net, "exp_avg", m, i);
    check_matrix(net, "exp_avg_sq", v, i);
    TORCH_CHECK(m.strides() == feedback.strides() && v.strides() == feedback.strides(),
                "fdfa::", net.op, ": exp_avg and exp_avg_sq must have feedback's strides ",
                feedback.strides(), "; got ", m.strides(), " and ", v.strides());
  }
}

double check_lr(const Tensor& lr) {
  TORCH_CHECK(lr.is_cpu() && lr.dim() == 0 && lr.scalar_type() == at::kDouble,
              "fdfa::feedback_step: lr must be a float64 scalar on the CPU; got ", lr.scalar_type(),
              " ", lr.sizes(), " on ", lr.device());
  return *lr.const_data_ptr<double>();
}

bool is_turned(const Tensor& delta) {
  return delta.is_cpu() && delta.dim() == 2 && !delta.is_contiguous() && delta.t().is_contiguous();
}

void check_deltas(const Network& net, at::TensorList deltas) {
  check_count(net, "deltas", deltas);
  for (size_t i = 0; i < deltas.size(); ++i) {
    check_like(net.op, "delta", deltas[i], "saved_activation", net.saved_activations[i]);
    check_shape(net.op, "delta", deltas[i], net.saved_activations[i].sizes());
    TORCH_CHECK(deltas[i].is_contiguous(block_order(net, i)) || is_turned(deltas[i]), "fdfa::", net.op,
                ": delta must have the memory order of feedback, or for [N, D] on the CPU that of its "
                "transpose; got strides ",
                deltas[i].strides());
  }
}

void check_bias_grads(const Network& net, at::TensorList bias_grads) {
  if (bias_grads.empty()) return;
  check_count(net, "bias_grads", bias_grads);
  for (size_t i = 0; i < bias_grads.size(); ++i) {
    const Tensor &t = bias_grads[i], &saved_activation = net.saved_activations[i];
    if (t.numel() == 0) continue;
    TORCH_CHECK(saved_activation.dim() == 2, "fdfa::", net.op,
                ": bias_grads are for saved_activations of [N, D]; got one of ",
                saved_activation.sizes());
    TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat, "fdfa::", net.op,
                     ": bias_grads must be float32; got ", t.scalar_type());
    check_shape(net.op, "bias_grads", t, {saved_activation.size(1)});
    TORCH_CHECK(t.is_contiguous() && t.device() == saved_activation.device(), "fdfa::", net.op,
                ": bias_grads must be contiguous, on ", saved_activation.device(), "; got strides ",
                t.strides(), " on ", t.device());
  }
}

void check_output_bias_grad(const Network& net, const OptionalTensor& t) {
  if (!t) return;
  TORCH_CHECK_TYPE(t->scalar_type() == at::kFloat, "fdfa::", net.op,
                   ": output_bias_grad must be float32; got ", t->scalar_type());
  check_shape(net.op, "output_bias_grad", *t, {net.error.size(1)});
  TORCH_CHECK(t->is_contiguous() && t->device() == net.error.device(), "fdfa::", net.op,
              ": output_bias_grad must be contiguous, on ", net.error.device(), "; got strides ",
              t->strides(), " on ", t->device());
}

// Where the results go, in the lists one entry for each block; bias_grads may have none.
struct Results {
  at::TensorList deltas, bias_grads;
  OptionalTensor output_bias_grad;
};

// As cuBLAS asks, by the setting that torch.backends.cuda.matmul has however it was set.
// `allowTF32CuBLAS` would refuse settings made by `fp32_precision`.
bool allows_tf32() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
         at::Float32Precision::TF32;
}

// The mean over each patch's pixels of images [N, C, H, W]: [N, C, rows, columns] in channels_last.
Tensor patch_means(const Tensor& images, const Patches& patches) {
  const std::vector<int64_t> size(2, patches.size);
  return at::avg_pool2d(images.to(at::kFloat).contiguous(at::MemoryFormat::ChannelsLast), size, size,
                        /*padding=*/0, /*ceil_mode=*/true, /*count_include_pad=*/false);
}

// The errors of patches on their way to their pixels.
struct Spreading {
  size_t block;
  Patches patches;
  Tensor projected;  // [N, patches.features()]
};

// That of the saved activations, or float for blocks in patches, which have few features.
at::ScalarType kernel_dtype(const Network& net, size_t block) {
  const Tensor& saved_activation = net.saved_activations[block];
  return check_patch(net.op, saved_activation.sizes(), net.patch).size > 0
             ? at::kFloat
             : saved_activation.scalar_type();
}

void spread(const Network& net, const Spreading& spreading, at::TensorList deltas) {
  const size_t i = spreading.block;
  const Activation f = parse_activation(net.op, net.activations.get(i));
  const Tensor saved_activation = net.saved_activations[i].contiguous(at::MemoryFormat::ChannelsLast);
  with_storage(saved_activation.scalar_type(), [&](auto storage) {
    using T = decltype(storage);
    launch(SpreadParams<T>{pointer<float>(spreading.projected),
                           f == Activation::identity ? nullptr : pointer<T>(saved_activation),
                           pointer<T>(deltas[i]), saved_activation.size(0), spreading.patches, f},
           saved_activation.device());
  });
}

// The blocks that run in this dtype, in one launch. counter and output_bias_grad: as `launch` has them.
void step_blocks(at::ScalarType dtype, const Network& net, const Motion& motion, const Tensor& error,
                 const OptionalTensor& tangent, const Results& results, int64_t* counter,
                 float* output_bias_grad) {
  const auto matrix = [](at::TensorList list, size_t i) {
    return list.empty() ? nullptr : pointer<float>(list[i]);
  };
  const bool tf32 = error.is_cuda() && allows_tf32();
  std::vector<Tensor> kept;  // until the launch
  std::vector<Spreading> spreadings;
  with_storage(dtype, [&](auto storage) {
    using T = decltype(storage);
    std::vector<FeedbackParams<T>> launched;
    const auto features = [&](const Tensor& t, size_t i) {
      kept.push_back(t.contiguous(block_order(net, i)));
      return pointer<T>(kept.back());
    };
    for (size_t i = 0; i < net.feedback.size(); ++i) {
      const Tensor &feedback = net.feedback[i], &saved_activation = net.saved_activations[i];
      if (kernel_dtype(net, i) != dtype) continue;
      const Patches patches = check_patch(net.op, saved_activation.sizes(), net.patch);
      const bool in_patches = patches.size > 0;
      const Activation f = parse_activation(net.op, net.activations.get(i));
      FeedbackParams<T> p{};
      p.feedback = pointer<float>(feedback);
      p.exp_avg = matrix(motion.exp_avg, i);
      p.exp_avg_sq = matrix(motion.exp_avg_sq, i);
      p.gradient = matrix(motion.gradients, i);
      p.updates = motion.updates ? motion.updates->const_data_ptr<int64_t>() : nullptr;
      p.error = pointer<float>(error);
      if (tangent) {
        p.factor = pointer<float>(*tangent);
        p.scale = 1.0f / static_cast<float>(saved_activation.size(0));
      } else if (!net.outputs.empty()) {
        p.factor = p.error;
        p.source = features(in_patches ? patch_means(net.outputs[i], patches) : net.outputs[i], i);
        p.scale = -1.0f;
      }
      if (in_patches) {
        spreadings.push_back(
            {i, patches, at::empty({saved_activation.size(0), patches.features()}, error.options())});
        p.delta = pointer<T>(spreadings.back().projected);
        if (tangent) p.patches = patches;
      } else {
        if (f != Activation::identity) p.saved_activation = features(saved_activation, i);
        p.delta = pointer<T>(results.deltas[i]);
      }
      p.transposed = is_turned(results.deltas[i]);
      const bool wants_bias = !results.bias_grads.empty() && results.bias_grads[i].numel() > 0;
      p.bias_grad = wants_bias ? pointer<float>(results.bias_grads[i]) : nullptr;
      p.samples = saved_activation.size(0);
      p.features = feedback.numel() / feedback.size(0);
      p.outputs = error.size(1);
      p.activation = f;
      p.noise = NoiseParams{tangent ? net.noise_state->const_data_ptr<int64_t>() : nullptr,
                            net.blocks[i], tangent ? parse_noise(net.op, net.noise) : Noise::none};
      p.rule = motion.rule;
      p.decay = static_cast<float>(motion.decay);
      p.lr = static_cast<float>(motion.lr);
      p.beta1 = motion.beta1;
      p.beta2 = motion.beta2;
      p.eps = static_cast<float>(motion.eps);
      p.tf32 = tf32;
      launched.push_back(p);
    }
    launch(launched, counter, output_bias_grad, error.device());
  });
  for (const Spreading& spreading : spreadings) spread(net, spreading, results.deltas);
}

void step(const Network& net, const Motion& motion, const Results& results) {
  // [N, K] is small beside [N, D] and [K, D]: the kernels take it in float32.
  const Tensor error = net.error.to(at::kFloat).contiguous();
  const auto tangent =
      net.tangent ? OptionalTensor(net.tangent->to(at::kFloat).contiguous()) : std::nullopt;
  std::vector<at::ScalarType> dtypes;  // that the blocks run in, each once
  for (size_t i = 0; i < net.feedback.size(); ++i) {
    const at::ScalarType dtype = kernel_dtype(net, i);
    if (std::find(dtypes.begin(), dtypes.end(), dtype) == dtypes.end()) dtypes.push_back(dtype);
  }
  // A kernel is launched for blocks that have elements.
  const bool sums_error = results.output_bias_grad && error.is_cuda() &&
                          !net.saved_activations.empty() &&
                          std::all_of(net.saved_activations.begin(), net.saved_activations.end(),
                                      [](const Tensor& t) { return t.numel() > 0; });
  if (results.output_bias_grad && !sums_error) {
    Tensor sums = *results.output_bias_grad;
    at::sum_out(sums, error, /*dim=*/0);
  }
  for (const auto dtype : dtypes) {
    const bool last = dtype == dtypes.back();
    // All launches read the old count: the last one changes it.
    step_blocks(dtype, net, motion, error, tangent, results,
                last && motion.updates ? motion.updates->data_ptr<int64_t>() : nullptr,
                last && sums_error ? pointer<float>(*results.output_bias_grad) : nullptr);
  }
}

}  // namespace

void check_network(const Network& net) {
  const char* op = net.op;
  const Tensor& error = net.error;
  check_count(net, "saved_activations", net.saved_activations);
  check_count(net, "blocks", net.blocks);
  check_count(net, "activations", net.activations);
  TORCH_CHECK(error.dim() == 2 && error.size(1) > 0, "fdfa::", op,
              ": error must be [N, K] with K > 0; got ", error.sizes());
  check_floating(op, "error", error);
  if (net.tangent) {
    check_floating(op, "tangent", *net.tangent);
    check_shape(op, "tangent", *net.tangent, error.sizes());
    TORCH_CHECK(net.tangent->device() == error.device(), "fdfa::", op, ": tangent must be on ",
                error.device(), "; got ", net.tangent->device());
    TORCH_CHECK(net.noise_state, "fdfa::", op, ": a tangent needs the noise_state that it comes from");
    check_counter(op, "noise_state", *net.noise_state, 3, error);
    TORCH_CHECK(net.outputs.empty(), "fdfa::", op,
                ": the feedback follows the tangent or the outputs, not both; give one of them");
  } else if (!net.outputs.empty()) {
    check_count(net, "outputs", net.outputs);
  }
  for (size_t i = 0; i < net.feedback.size(); ++i) {
    const Tensor& saved_activation = net.saved_activations[i];
    check_floating(op, "saved_activation", saved_activation);
    TORCH_CHECK(saved_activation.dim() >= 2 && saved_activation.size(0) == error.size(0), "fdfa::", op,
                ": saved_activation must be [", error.size(0), ", *features]; got ",
                saved_activation.sizes());
    TORCH_CHECK(saved_activation.device() == error.device(), "fdfa::", op,
                ": saved_activation must be on ", error.device(), "; got ", saved_activation.device());
    if (!net.outputs.empty()) {
      check_like(op, "output", net.outputs[i], "saved_activation", saved_activation);
      check_shape(op, "output", net.outputs[i], saved_activation.sizes());
    }
    check_matrix(net, "feedback", net.feedback[i], i);
    block_order(net, i);
    parse_activation(op, net.activations.get(i));
  }
  parse_noise(op, net.noise, !net.tangent);
}

Tensor empty_delta(const Tensor& saved_activation, const Tensor& feedback, int64_t patch) {
  const auto order = block_order("feedback_step", feedback, saved_activation, patch);
  // As oneDNN wants it for the weight gradient δᵀx. Its own copy took a seventh of that for [64, 800].
  if (saved_activation.is_cpu() && saved_activation.dim() == 2 &&
      saved_activation.scalar_type() == at::kFloat && saved_activation.numel() >= 1 << 14) {
    return at::empty({saved_activation.size(1), saved_activation.size(0)}, saved_activation.options())
        .t();
  }
  return at::empty(saved_activation.sizes(), saved_activation.options(), order);
}

void feedback_step(at::TensorList feedback, at::TensorList exp_avg, at::TensorList exp_avg_sq,
                   const OptionalTensor& updates, const Tensor& error, const OptionalTensor& tangent,
                   at::TensorList saved_activations, at::TensorList outputs,
                   const OptionalTensor& noise_state, at::IntArrayRef blocks, const Names& activations,
                   c10::string_view noise, double decay, const Tensor& lr, double beta1, double beta2,
                   double eps, at::TensorList deltas, at::TensorList bias_grads,
                   const OptionalTensor& output_bias_grad, int64_t patch) {
  const Network net{"feedback_step", error,  tangent,     noise_state, feedback, saved_activations,
                    outputs,         blocks, activations, noise,       patch};
  const bool learns = tangent || !outputs.empty();
  const Rule rule = !learns ? Rule::fixed : updates ? Rule::adam : Rule::ema;
  const Motion motion{rule, exp_avg, exp_avg_sq, {}, updates, decay, check_lr(lr), beta1, beta2, eps};
  check_network(net);
  check_moments(net, motion);
  check_deltas(net, deltas);
  check_bias_grads(net, bias_grads);
  check_output_bias_grad(net, output_bias_grad);
  if (error.size(0) == 0) {  // which reaches no kernel
    for (const Tensor& t : bias_grads) t.zero_();
  }
  step(net, motion, {deltas, bias_grads, output_bias_grad});
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> feedback_gradient(
    at::TensorList feedback, const Tensor& error, const OptionalTensor& tangent,
    at::TensorList saved_activations, at::TensorList outputs, const OptionalTensor& noise_state,
    at::IntArrayRef blocks, const Names& activations, c10::string_view noise, double decay,
    int64_t patch) {
  const Network net{
      "feedback_gradient", error, tangent, noise_state, feedback, saved_activations, outputs, blocks,
      activations,         noise, patch};
  check_network(net);
  TORCH_CHECK(tangent || !outputs.empty(),
              "fdfa::feedback_gradient: give the tangent or the outputs that the feedback follows");
  std::vector<Tensor> deltas, gradients;
  for (size_t i = 0; i < feedback.size(); ++i) {
    deltas.push_back(empty_delta(saved_activations[i], feedback[i], patch));
    // An empty batch teaches nothing, and reaches no kernel.
    gradients.push_back(saved_activations[i].size(0) == 0 ? at::zeros_like(feedback[i])
                                                          : at::empty_like(feedback[i]));
  }
  step(net, {Rule::gradient, {}, {}, gradients, std::nullopt, decay}, {deltas, {}, {}});
  return {deltas, gradients};
}

}  // namespace fdfa

#include <torch/library.h>

#include "ops/ops.h"

// Every operator's schema. Shapes: N samples, K network outputs, D features of a block (for images
// [C, H, W] in channels_last memory, so counted in (h, w, c) order).

TORCH_LIBRARY(fdfa, m) {
  // Returns a copy of state, int64 [3] = (seed, step, index of the batch's first sample), and advances
  // the step. One operator, so that no compiler can read the state after it has moved.
  m.def("next_noise(Tensor(a!) state) -> Tensor");

  // a b, of matrices in any memory order: torch's mm, or oneDNN where that is the faster library. On
  // two cores of an AMD processor with AVX-512, where MKL keeps to AVX2, 1.6 to 2.3 times as fast for
  // the products of a [64 or 256, 800] layer; without AVX-512, 0.9 to 1.2 times.
  m.def("mm(Tensor a, Tensor b) -> Tensor");

  // a = x Wᵀ + b, y = f(a), ty = (tangent Wᵀ) ⊙ f'(a) + u       (Algorithm 1, lines 10 to 15)
  // x, tangent [N, *, in_features]; weight [out_features, in_features]; bias [out_features].
  // Returns (y, ty, pre), each [N, *, out_features]. Gradients flow through `pre` alone, which stands
  // for the pre-activation: its gradient is δ, and from it come those of weight and bias. It has memory
  // of its own only where f' needs its values (gelu, silu). x gets no gradient: blocks are local. With
  // noise "none" there is no u, for a block that goes on with `batch_norm` or `max_pool2d_end`.
  m.def(
      "linear(Tensor x, Tensor? tangent, Tensor weight, Tensor? bias, Tensor noise_state, int block, "
      "str activation, str noise) -> (Tensor y, Tensor ty, Tensor pre)");

  // The same for a convolution: x, tangent [N, C, H, W]; weight [out_channels, C / groups, kh, kw].
  // Results are in channels_last. With a pool, (kernel, stride, padding) with two numbers each, a
  // max-pool follows the block and is no part of it: y is what it is without, for f', and what goes on
  // are pooled = max_pool2d(y) and in ty the tangents of its winners, u included. float32. The
  // unpooled tangent is never written to memory on the CPU. Without a pool, pooled is empty. u has one
  // value for each channel of a patch of patch x patch pixels, counted in features of such patches.
  m.def(
      "conv2d(Tensor x, Tensor? tangent, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups, Tensor noise_state, int block, str activation, str noise, "
      "int[]? pool=None, int patch=1) -> (Tensor y, Tensor ty, Tensor pre, Tensor pooled)");

  // The end of a block: a = BatchNorm(x), then as `linear` goes on from its a. x [N, C], or [N, C, H,
  // W] in channels_last; float32. The tangent passes the batch's statistics too. In training
  // they come from x, and move running_mean and running_var, both [C], by `momentum`. ty is written to
  // memory of the caller's, which may be tangent itself; none where it would be zero, or a pool
  // follows. Returns also mean and 1 / σ, [C], for the backward. num_batches_tracked, one int64, is
  // counted up where the statistics come from x. A pool and patches as in `conv2d`; without a pool,
  // pooled and pooled_tangent are empty.
  m.def(
      "batch_norm(Tensor x, Tensor? tangent, Tensor(a!)? ty, Tensor? weight, Tensor? bias, "
      "Tensor(b!)? running_mean, Tensor(c!)? running_var, Tensor(d!)? num_batches_tracked, "
      "bool training, float momentum, float eps, Tensor noise_state, int block, str activation, "
      "str noise, int[]? pool=None, int patch=1) -> "
      "(Tensor y, Tensor pre, Tensor mean, Tensor inverse_std, Tensor pooled, Tensor pooled_tangent)");

  // From δ at its output a to the gradients of x, weight and bias.
  m.def(
      "batch_norm_backward(Tensor delta, Tensor x, Tensor? weight, Tensor mean, Tensor inverse_std, "
      "bool training) -> (Tensor dx, Tensor dweight, Tensor dbias)");

  // `batch_norm` without activation and noise, whose y has the gradient: between points.
  m.def(
      "dual_batch_norm(Tensor x, Tensor tangent, Tensor? weight, Tensor? bias, "
      "Tensor(a!)? running_mean, Tensor(b!)? running_var, bool training, float momentum, float eps) "
      "-> (Tensor y, Tensor ty)");

  // torch's linear, with its own autograd; by `mm` where no gradient of x is asked for.
  m.def("product(Tensor x, Tensor weight, Tensor? bias) -> Tensor");

  // The same, and the tangent of its result, which has none.
  m.def(
      "dual_linear(Tensor x, Tensor tangent, Tensor weight, Tensor? bias=None) -> (Tensor y, Tensor "
      "ty)");

  // An activation y = f(x) with torch's gradient, and ty = f'(x) tangent, which has none, in one pass.
  m.def("dual_activation(Tensor x, Tensor tangent, str activation) -> (Tensor y, Tensor ty)");

  // (y, ty): torch's max_pool2d of x [N, C, H, W] without autograd, and the tangent of the element that
  // won in each window; float32, in channels_last.
  m.def(
      "max_pool2d(Tensor x, Tensor tangent, int[2] kernel_size, int[2] stride, int[2] padding) -> "
      "(Tensor y, Tensor ty)");

  // The same at the end of a block whose x came from `linear`, `conv2d` or `batch_norm` with noise
  // "none" and whose `anchor` is the pre of that: ty = tangent of the winner + u, and δ at pre goes on
  // to anchor. With noise "none" too there is no u. winners, uint8 in y's shape: the place of each
  // window's winner within it, counted row by row with the padding, for which a window may have 256.
  m.def(
      "max_pool2d_end(Tensor x, Tensor? tangent, Tensor anchor, int[2] kernel_size, int[2] stride, "
      "int[2] padding, Tensor noise_state, int block, str noise, int patch=1) -> "
      "(Tensor y, Tensor ty, Tensor pre, Tensor winners)");

  // From δ at the windows [N, C, H', W'] to their winners in images of input_size (H, W).
  m.def(
      "max_pool2d_backward(Tensor delta, Tensor winners, SymInt[2] input_size, int[2] kernel_size, "
      "int[2] stride, int[2] padding) -> Tensor");

  // ty = tangent + u for a block's output y [N, *features], in y's shape; images in channels_last, and
  // with patches as in `conv2d`.
  m.def(
      "perturb(Tensor y, Tensor? tangent, Tensor noise_state, int block, str noise, int patch=1) -> "
      "Tensor");

  // For each block of the network: moves feedback B [K, *features] along ∇B = decay B - G, with
  //   G = tangentᵀ u / N      where tangent [N, K] is given, FDFA with decay 1, or
  //   G = -errorᵀ outputs     where outputs, each y [N, *features], are: Kolen-Pollack.
  // B moves by lr ∇B (no exp_avg, no updates; eq. 8) or by a step of Adam, where G is finite;
  // `updates`, int64 [1], counts these steps; lr is a float64 scalar on the CPU, a tensor so that a
  // compiled program follows a schedule. With neither tangent nor outputs B stays. Then δ =
  // (error B) ⊙ f'(saved), `saved_activations`, each in the shape of δ [N, *features]: y, or the
  // pre-activation for gelu and silu; error [N, K]. Each δ is written to `deltas`, in B's memory order
  // (dense ones on the CPU may be turned over, [D, N]), and not returned, because torch.compile wants
  // no lists from operators that change their arguments. So is each block's sum of δ over the samples
  // to `bias_grads`, [D] in float32, for blocks of [N, D]: the gradient of a bias. Without entries
  // there are none; an empty one is not wanted. `output_bias_grad`, [K] in float32, gets the sum of
  // error, as the gradient of the output layer's bias. With patches B of images is [K, C, rows,
  // columns] of them, in channels_last, and so is all that has its shape; u is theirs, G the mean over
  // a patch's pixels, tangentᵀ u / (N pixels) or -errorᵀ of the outputs' mean, and each pixel gets its
  // patch's error B.
  m.def(
      "feedback_step(Tensor(a!)[] feedback, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, "
      "Tensor(d!)? updates, Tensor error, Tensor? tangent, Tensor[] saved_activations, "
      "Tensor[] outputs, Tensor? noise_state, int[] blocks, str[] activations, str noise, float decay, "
      "Tensor lr, "
      "float beta1, float beta2, float eps, Tensor(e!)[] deltas, Tensor(f!)[] bias_grads, "
      "Tensor(g!)? output_bias_grad=None, int patch=1) -> ()");

  // (δ from the feedback as it is, ∇B) for each block, for a torch optimizer to move B (eq. 10).
  m.def(
      "feedback_gradient(Tensor[] feedback, Tensor error, Tensor? tangent, Tensor[] saved_activations, "
      "Tensor[] outputs, Tensor? noise_state, int[] blocks, str[] activations, str noise, "
      "float decay, int patch=1) -> (Tensor[] deltas, Tensor[] gradients)");

  // The network's output [N, K], tied to its blocks: the backward of the result hands each anchor its δ
  // by a feedback step (rule "ema", "adam" or, with neither tangent nor outputs, "fixed") or by
  // feedback_gradient ("grad"), and passes the error on to what made the output. The output is x, with
  // its tangent; or with weight [K, D] and bias [K] it is x Wᵀ + b of x [N, D], and they get their
  // exact gradients here: a node, two calls and a copy less. With `input` too x is what that layer has
  // made of it, and its tangent. With a tangent it advances noise_state, of
  // which the backward uses the value before. A saved activation that is donated, since nobody else
  // reads it, gives its memory to δ, unless the graph is retained. `biases`, each [D] of the block of
  // [N, D] in that place of `biased`, get their gradients here too, which the feedback step has at no
  // cost.
  m.def(
      "feedback_node(Tensor x, Tensor? tangent, Tensor? weight, Tensor? bias, Tensor(a!) noise_state, "
      "Tensor[] anchors, Tensor[] biases, int[] biased, Tensor[] saved_activations, bool[] donated, "
      "Tensor[] outputs, Tensor[] feedback, Tensor[] exp_avg, Tensor[] exp_avg_sq, Tensor updates, "
      "int[] blocks, str[] activations, "
      "str noise, str rule, float decay, Tensor lr, float beta1, float beta2, float eps, "
      "Tensor? input=None, int patch=1) -> Tensor");
}

#define FDFA_IMPLEMENT(key)                                   \
  TORCH_LIBRARY_IMPL(fdfa, key, m) {                          \
    m.impl("next_noise", fdfa::next_noise);                   \
    m.impl("mm", fdfa::mm);                                   \
    m.impl("linear", fdfa::linear);                           \
    m.impl("dual_activation", fdfa::dual_activation);         \
    m.impl("conv2d", fdfa::conv2d);                           \
    m.impl("perturb", fdfa::perturb);                         \
    m.impl("feedback_step", fdfa::feedback_step);             \
    m.impl("feedback_gradient", fdfa::feedback_gradient);     \
    m.impl("max_pool2d", fdfa::max_pool2d);                   \
    m.impl("max_pool2d_end", fdfa::max_pool2d_end);           \
    m.impl("max_pool2d_backward", fdfa::max_pool2d_backward); \
    m.impl("batch_norm", fdfa::batch_norm);                   \
    m.impl("batch_norm_backward", fdfa::batch_norm_backward); \
  }

FDFA_IMPLEMENT(CPU)
#if defined(FDFA_WITH_CUDA)
FDFA_IMPLEMENT(CUDA)
#endif

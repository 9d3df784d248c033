"""Every operator with kernels in plain torch: its definition, and the path to compare it with.

Same names, arguments and results as the fused operators (csrc/ops/schema.cpp), except that batch_norm
leaves out its statistics; on any device torch has and in any floating dtype.
`FDFA(..., backend="reference")` runs a whole model on it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fdfa_ext._ops import fused
from fdfa_ext.patches import patch_means, patch_pixels, patch_shape, spread

_WORD = 0xFFFFFFFF
_CONV2D = F.conv2d  # as torch has it, whatever a user puts in its place


def _identity(a: Tensor) -> Tensor:
    return a


def _gelu_derivative(a: Tensor) -> Tensor:
    cdf = 0.5 * (1 + torch.erf(a / math.sqrt(2)))
    return cdf + a * torch.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)


def _silu_derivative(a: Tensor) -> Tensor:
    s = torch.sigmoid(a)
    return s * (1 + a * (1 - s))


# f, and f' as a function of y (of the pre-activation for gelu and silu).
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "identity": (_identity, torch.ones_like),
    "relu": (F.relu, lambda y: (y > 0).to(y.dtype)),
    "leaky_relu": (F.leaky_relu, lambda y: torch.where(y > 0, 1.0, 0.01).to(y.dtype)),
    "tanh": (torch.tanh, lambda y: 1 - y * y),
    "sigmoid": (torch.sigmoid, lambda y: y * (1 - y)),
    "gelu": (F.gelu, _gelu_derivative),
    "silu": (F.silu, _silu_derivative),
}


# Those whose derivative is a function of the pre-activation, and of y for the others.
NEEDS_PRE_ACTIVATION = ("gelu", "silu")


def derivative(activation: str, saved: Tensor) -> Tensor:
    """f' as a function of y, or of the pre-activation for gelu and silu."""
    return ACTIVATIONS[activation][1](saved)


def through_activation(activation: str, saved: Tensor, delta: Tensor) -> Tensor:
    """δ ⊙ f', in the dtype of what f' is taken from."""
    if activation == "relu":  # one pass, where a product would first make f' as a tensor
        delta = torch.ops.aten.threshold_backward(delta, saved.to(delta.dtype), 0)
    elif activation != "identity":
        delta = delta * derivative(activation, saved.to(delta.dtype))
    return delta.to(saved.dtype)


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32 bit product, in int64 arithmetic."""
    low = constant * (word & 0xFFFF)
    high = (constant * (word >> 16) + (low >> 16)) >> 16
    return high & _WORD, (constant * word) & _WORD


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """Philox4x32-10: four words from a counter of four and a key of two, all int64 and below 2³²."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, x0)
        high1, low1 = _multiply(0xCD9E8D57, x2)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return [x0, x1, x2, x3]


def _normal_pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Box-Muller: the radius from 24 bits of a; b is the angle from one of four half axes.

    Its two lowest bits, far below the angle's last digit in float32, choose the half axis.
    """
    radius = torch.sqrt(-2 * torch.log(((a >> 8) + 1).double() / 2**24))
    angle = (b - ((b >> 31) << 32)).double() * (math.pi / 4 / 2**31)
    along = radius * torch.cos(angle) * (1 - 2 * (b & 1))
    across = radius * torch.sin(angle)
    second_axis = (b & 2) > 0
    return torch.where(second_axis, across, along), torch.where(second_axis, along, across)


def perturbation(
    noise_state: Tensor, block: int, noise: str, shape: Sequence[int], channels_last: bool = False
) -> Tensor:
    """u [N, *features] in float32: a function of (seed, step, block, sample, feature) alone.

    noise_state: int64 [3], seed, step and index of the batch's first sample. Features are counted in
    row-major order, or as (h, w, c) with channels_last. Zero for noise "none".
    """
    if noise == "none":
        return torch.zeros(*shape, device=noise_state.device)
    samples = shape[0]
    features = math.prod(shape[1:])
    seed, step, first_sample = noise_state.unbind()
    device = noise_state.device
    quads = torch.arange((features + 3) // 4, device=device)[None, :]
    sample = (first_sample + torch.arange(samples, device=device))[:, None] & _WORD
    grid = torch.zeros_like(quads + sample)
    words = philox(
        (quads + grid, sample + grid, (step & _WORD) + grid, torch.full_like(grid, block)),
        (seed & _WORD, (seed >> 32) & _WORD),
    )
    if noise == "gaussian":
        u = torch.stack([*_normal_pair(words[0], words[1]), *_normal_pair(words[2], words[3])], dim=-1)
    else:
        u = 1.0 - 2.0 * (torch.stack(words, dim=-1) >> 31)
    u = u.float().flatten(1)[:, :features]
    if channels_last:
        n, c, h, w = shape
        return u.reshape(n, h, w, c).permute(0, 3, 1, 2)
    return u.reshape(list(shape))


def next_noise(state: Tensor) -> Tensor:
    snapshot = state.clone()
    state[1] += 1
    return snapshot


def _perturbation_like(
    y: Tensor, noise_state: Tensor, block: int, noise: str, patch: int, channels_last: bool
) -> Tensor:
    """u in the shape of y; of images one value a channel for the pixels of a patch."""
    if y.dim() < 2:  # a sample without its batch would count as a batch without features
        raise RuntimeError(f"fdfa::perturb: y must be [N, *features]; got {list(y.shape)}")
    shape = patch_shape(y.shape, patch)
    return spread(perturbation(noise_state, block, noise, shape, channels_last), y.shape, patch)


def _dual(
    pre: Tensor,
    tangent: Tensor | None,
    noise_state: Tensor,
    block: int,
    activation: str,
    noise: str,
    patch: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """(f(a), f'(a) ⊙ tangent + u, a); only a keeps its autograd graph."""
    function, derivative = ACTIVATIONS[activation]
    a = pre.detach()
    y = function(a)
    images = y.dim() == 4 and not (y.is_contiguous() and patch == 1)
    u = _perturbation_like(y, noise_state, block, noise, patch, channels_last=images)
    if tangent is None:
        return y, u.to(y.dtype), pre
    saved = a if activation in NEEDS_PRE_ACTIVATION else y
    return y, (derivative(saved) * tangent + u).to(y.dtype), pre


def mm(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b)


def linear(
    x: Tensor,
    tangent: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    noise_state: Tensor,
    block: int,
    activation: str,
    noise: str,
) -> tuple[Tensor, Tensor, Tensor]:
    pre = F.linear(x, weight, bias)
    tz = None if tangent is None else F.linear(tangent, weight.detach())
    return _dual(pre, tz, noise_state, block, activation, noise)


def convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """F.conv2d; an unpadded 1×1 kernel is given the pixels alone that it reads, on the CPU.

    There oneDNN's gradient of its weight writes beyond its buffer for a stride above 1, fewer than 16
    channels and channels_last (torch 2.13).
    """
    if skips_pixels(input, weight, stride, padding):
        rows, columns = (stride, stride) if isinstance(stride, int) else (stride[0], stride[-1])
        input, stride = input[..., ::rows, ::columns], 1
    return _CONV2D(input, weight, bias, stride, padding, dilation, groups)


def skips_pixels(x: Tensor, weight: Tensor, stride: Any, padding: Any) -> bool:
    """Whether an unpadded 1×1 kernel leaves out pixels of x [N, C, H, W], on the CPU."""

    def is_all(value: Any, number: int) -> bool:
        return all(v == number for v in ([value] if isinstance(value, int) else value))

    return (
        x.device.type == "cpu"
        and weight.shape[-2:] == (1, 1)
        and not is_all(stride, 1)
        and (isinstance(padding, str) or is_all(padding, 0))
    )


def conv2d(
    x: Tensor,
    tangent: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    noise_state: Tensor,
    block: int,
    activation: str,
    noise: str,
    pool: Sequence[int] | None = None,
    patch: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    geometry = (tuple(stride), tuple(padding), tuple(dilation), groups)
    order = torch.channels_last
    pre = convolve(x.contiguous(memory_format=order), weight, bias, *geometry).contiguous(
        memory_format=order
    )
    tz = None
    if tangent is not None:
        tz = convolve(tangent.contiguous(memory_format=order), weight.detach(), None, *geometry)
    y, ty, pre = _dual(pre, tz, noise_state, block, activation, noise, patch)
    if pool is None:
        return y, ty, pre, y.new_empty(0)
    pooled, ty = max_pool2d(y, ty, pool[:2], pool[2:4], pool[4:])
    return y, ty, pre, pooled


def batch_norm_tangent(
    x: Tensor, tangent: Tensor, weight: Tensor | None, running_var: Tensor | None, eps: float
) -> Tensor:
    """γ/σ (t - mean t - x̂ mean(x̂ t)) over batch and positions; γ/σ t for a given running_var."""
    channels = [1, -1, *[1] * (x.dim() - 2)]
    scale = 1.0 if weight is None else weight.detach().view(channels)
    if running_var is not None:
        return tangent * scale * (running_var + eps).rsqrt().view(channels)
    dims = [0, *range(2, x.dim())]
    var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    inverse_std = (var + eps).rsqrt()
    normalized = (x - mean) * inverse_std
    mean_along = (normalized * tangent).mean(dims, keepdim=True)
    return scale * inverse_std * (tangent - tangent.mean(dims, keepdim=True) - normalized * mean_along)


def batch_norm(
    x: Tensor,
    tangent: Tensor | None,
    ty: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    noise_state: Tensor,
    block: int,
    activation: str,
    noise: str,
    pool: Sequence[int] | None = None,
    patch: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, pre, pooled, pooled_tangent); the fused operator also returns the statistics."""
    if num_batches_tracked is not None and training:
        num_batches_tracked.add_(1)
    tz = None
    if tangent is not None:
        fixed = None if training else running_var
        tz = batch_norm_tangent(x.detach(), tangent, weight, fixed, eps)
    pre = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    y, tangent, pre = _dual(pre, tz, noise_state, block, activation, noise, patch)
    if pool is not None:
        return y, pre, *max_pool2d(y, tangent, pool[:2], pool[2:4], pool[4:])
    if ty is not None:
        ty.copy_(tangent)
    return y, pre, y.new_empty(0), y.new_empty(0)


def batch_norm_backward(
    delta: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    inverse_std: Tensor,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    channels = [1, -1, *[1] * (x.dim() - 2)]
    dims = [0, *range(2, x.dim())]
    normalized = (x - mean.view(channels)) * inverse_std.view(channels)
    dweight, dbias = (delta * normalized).sum(dims), delta.sum(dims)
    scale = inverse_std if weight is None else weight * inverse_std
    dx = delta
    if training:
        rows = x.numel() / x.shape[1]
        dx = delta - (dbias.view(channels) + normalized * dweight.view(channels)) / rows
    return scale.view(channels) * dx, dweight, dbias


def max_pool2d(
    x: Tensor,
    tangent: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> tuple[Tensor, Tensor]:
    y, winners = F.max_pool2d(x, tuple(kernel_size), tuple(stride), tuple(padding), return_indices=True)
    return y, gather_winners(tangent, winners)


def gather_winners(tangent: Tensor, winners: Tensor) -> Tensor:
    """The tangent [N, C, H, W] at the indices [N, C, H', W'] that torch's max_pool2d returns."""
    return tangent.flatten(-2).gather(-1, winners.flatten(-2)).view_as(winners)


def max_pool2d_end(
    x: Tensor,
    tangent: Tensor | None,
    anchor: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    noise_state: Tensor,
    block: int,
    noise: str,
    patch: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """anchor is only looked at for its winners' places; autograd goes on from pre to it."""
    y, indices = F.max_pool2d(x, tuple(kernel_size), tuple(stride), tuple(padding), return_indices=True)
    ty = None if tangent is None else gather_winners(tangent, indices)
    first_row, first_column = _window_corners(y, stride, padding)
    row, column = indices // x.shape[3] - first_row, indices % x.shape[3] - first_column
    winners = (row * kernel_size[1] + column).to(torch.uint8)
    ty = perturb(y, ty, noise_state, block, noise, patch)
    return y, ty, gather_winners(anchor, indices), winners


def _window_corners(y: Tensor, stride: Sequence[int], padding: Sequence[int]) -> tuple[Tensor, Tensor]:
    """First row [H', 1] and column [W'] of the windows of y [N, C, H', W']; in the padding negative."""
    first = [torch.arange(y.shape[i + 2], device=y.device) * stride[i] - padding[i] for i in range(2)]
    return first[0][:, None], first[1]


def max_pool2d_backward(
    delta: Tensor,
    winners: Tensor,
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    """δ at the windows [N, C, H', W'] put at their winners in images of input_size (H, W)."""
    first_row, first_column = _window_corners(delta, stride, padding)
    places = winners.long()
    row, column = first_row + places // kernel_size[1], first_column + places % kernel_size[1]
    dx = delta.new_zeros([*delta.shape[:2], *input_size]).flatten(2)
    indices = (row * input_size[1] + column).flatten(2)
    return dx.scatter_add_(2, indices, delta.flatten(2)).unflatten(2, tuple(input_size))


def dual_activation(x: Tensor, tangent: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    function, derivative = ACTIVATIONS[activation]
    y = function(x)
    saved = x if activation in NEEDS_PRE_ACTIVATION else y
    return y, derivative(saved.detach()) * tangent


def perturb(
    y: Tensor,
    tangent: Tensor | None,
    noise_state: Tensor,
    block: int,
    noise: str,
    patch: int = 1,
) -> Tensor:
    u = _perturbation_like(y, noise_state, block, noise, patch, channels_last=y.dim() == 4)
    return (u if tangent is None else tangent + u).to(y.dtype)


def _targets(
    feedback: list[Tensor],
    error: Tensor,
    tangent: Tensor | None,
    saved_activations: list[Tensor],
    outputs: list[Tensor],
    noise_state: Tensor | None,
    blocks: list[int],
    noise: str,
    patch: int,
) -> list[Tensor | None]:
    """G of each block, in feedback's shape; None for an empty batch, or where B stays.

    dᵀu / N, an estimate of the mean of ∂output/∂y over the batch; or, by the outputs, -eᵀy. In patches
    the mean over their pixels.
    """
    targets: list[Tensor | None] = [None] * len(feedback)
    for i, (matrix, saved) in enumerate(zip(feedback, saved_activations, strict=True)):
        if len(saved) == 0:
            continue
        if tangent is not None:
            assert noise_state is not None
            shape = patch_shape(saved.shape, patch)
            last = not matrix.is_contiguous() or (patch > 1 and saved.dim() == 4)
            u = perturbation(noise_state, blocks[i], noise, shape, channels_last=last)
            target = (tangent.float().t() @ u.flatten(1) / len(saved)).view_as(matrix)
            if patch > 1 and saved.dim() == 4:
                target = target / patch_pixels(saved.shape, patch, target.device)
            targets[i] = target
        elif outputs:
            means = patch_means(outputs[i].float(), patch)
            targets[i] = -(error.float().t() @ means.flatten(1)).view_as(matrix)
    return targets


def _project(feedback: Tensor, error: Tensor, saved: Tensor, activation: str, patch: int) -> Tensor:
    """δ = (e B) ⊙ f', the same e B for the pixels of a patch."""
    projected = (error.float() @ feedback.flatten(1)).view(len(saved), *feedback.shape[1:])
    projected = spread(projected, saved.shape, patch).view_as(saved)
    return (projected * ACTIVATIONS[activation][1](saved.float())).to(saved.dtype)


def feedback_step(
    feedback: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    updates: Tensor | None,
    error: Tensor,
    tangent: Tensor | None,
    saved_activations: list[Tensor],
    outputs: list[Tensor],
    noise_state: Tensor | None,
    blocks: list[int],
    activations: list[str],
    noise: str,
    decay: float,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    deltas: list[Tensor],
    bias_grads: list[Tensor],
    output_bias_grad: Tensor | None = None,
    patch: int = 1,
) -> None:
    if updates is not None:
        updates.add_(1)
    targets = _targets(
        feedback, error, tangent, saved_activations, outputs, noise_state, blocks, noise, patch
    )
    for i, (matrix, saved, target) in enumerate(zip(feedback, saved_activations, targets, strict=True)):
        if target is not None:
            gradient = decay * matrix - target
            # Nothing moves where the target is not finite, or what Adam makes of it: one batch that
            # overflowed must not spoil B.
            finite = (target if updates is None else gradient * gradient).isfinite()
            step = lr * gradient
            if updates is not None:
                m, v = exp_avg[i], exp_avg_sq[i]
                m.lerp_(torch.where(finite, gradient, m), 1 - beta1)
                v.lerp_(torch.where(finite, gradient * gradient, v), 1 - beta2)
                t = updates.double()
                step_size = (lr / (1 - beta1**t)).float()
                correction = (1 - beta2**t).sqrt().float()
                step = step_size * m / (v.sqrt() / correction + eps)
            matrix -= torch.where(finite, step, 0)
        deltas[i].copy_(_project(matrix, error, saved, activations[i], patch))
        if bias_grads and bias_grads[i].numel() > 0:
            bias_grads[i].copy_(deltas[i].float().sum(0))
    if output_bias_grad is not None:
        output_bias_grad.copy_(error.float().sum(0))


def feedback_gradient(
    feedback: list[Tensor],
    error: Tensor,
    tangent: Tensor | None,
    saved_activations: list[Tensor],
    outputs: list[Tensor],
    noise_state: Tensor | None,
    blocks: list[int],
    activations: list[str],
    noise: str,
    decay: float,
    patch: int = 1,
) -> tuple[list[Tensor], list[Tensor]]:
    targets = _targets(
        feedback, error, tangent, saved_activations, outputs, noise_state, blocks, noise, patch
    )
    gradients = [
        torch.zeros_like(matrix) if target is None else decay * matrix - target
        for matrix, target in zip(feedback, targets, strict=True)
    ]
    deltas = [
        _project(matrix, error, saved, activation, patch)
        for matrix, saved, activation in zip(feedback, saved_activations, activations, strict=True)
    ]
    return deltas, gradients


def refuse_second_derivative() -> None:
    """In the backward of a node that hands δ to blocks."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "FDFA: the feedback step has no derivative, so create_graph=True is not possible"
        )


class _FeedbackNode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        tangent: Tensor | None,
        noise_state: Tensor | None,
        rule: tuple[str, float, Tensor, float, float, float],
        noise: str,
        updates: Tensor,
        blocks: list[int],
        activations: list[str],
        biased: list[int],
        n_outputs: int,
        patch: int,
        *tensors: Tensor,
    ) -> Tensor:
        """tensors: each block's anchor, the biases, saved activations, outputs if any, B, and for Adam
        their moments."""
        n = len(blocks)
        first = n + len(biased)
        ctx.save_for_backward(tangent, noise_state, *tensors[first : first + n + n_outputs])
        # B and its moments move in place from step to step, so autograd must not watch their versions.
        ctx.matrices = list(tensors[first + n + n_outputs :])
        ctx.options = rule, noise, updates, blocks, activations, biased, patch
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        refuse_second_derivative()
        (error,) = grads
        tangent, noise_state, *saved = ctx.saved_tensors
        options, noise, updates, blocks, activations, biased, patch = ctx.options
        rule, decay, lr, beta1, beta2, eps = options
        n = len(blocks)
        saved_activations, outputs = saved[:n], saved[n:]
        feedback, exp_avg, exp_avg_sq = (ctx.matrices[i * n : (i + 1) * n] for i in range(3))
        common = (error, tangent, saved_activations, outputs, noise_state, blocks, activations, noise)
        gradients: list[Tensor | None] = [None] * n
        if rule == "grad":
            deltas, gradients[:] = feedback_gradient(feedback, *common, decay, patch)
        else:
            steps = updates if rule == "adam" else None
            deltas = [torch.empty_like(saved_activation) for saved_activation in saved_activations]
            rest: Any = (*common, decay, lr, beta1, beta2, eps, deltas, [], None, patch)
            feedback_step(feedback, exp_avg, exp_avg_sq, steps, *rest)
        nothing = [None] * len(saved)
        moments = [None] * (len(ctx.matrices) - n)
        bias_grads = [deltas[i].sum(0) for i in biased]
        return (error, *[None] * 10, *deltas, *bias_grads, *nothing, *gradients, *moments)


def feedback_node(
    x: Tensor,
    tangent: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    noise_state: Tensor,
    anchors: list[Tensor],
    biases: list[Tensor],
    biased: list[int],
    saved_activations: list[Tensor],
    donated: list[bool],
    outputs: list[Tensor],
    feedback: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    updates: Tensor,
    blocks: list[int],
    activations: list[str],
    noise: str,
    rule: str,
    decay: float,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    input: Tensor | None = None,
    patch: int = 1,
) -> Tensor:
    if weight is not None:
        x = F.linear(x if input is None else input, weight, bias)
        if tangent is not None and input is None:
            tangent = F.linear(tangent, weight.detach())
    # The operator: a compiler may put off a clone in plain torch until the state has moved.
    used = None if tangent is None else fused.next_noise(noise_state)
    tensors = (*anchors, *biases, *saved_activations, *outputs, *feedback, *exp_avg, *exp_avg_sq)
    options = (rule, decay, lr, beta1, beta2, eps)
    common = options, noise, updates, blocks, activations, biased, len(outputs), patch
    result: Tensor = _FeedbackNode.apply(x, tangent, used, *common, *tensors)
    return result

"""Shapes and memory orders of what the fused operators return, for compilers and torch.export."""

from typing import Any

import torch
from torch import Tensor

from fdfa_ext._ops import fused
from fdfa_ext.patches import patch_shape
from fdfa_ext.reference import NEEDS_PRE_ACTIVATION


def _placeholder(y: Tensor) -> Tensor:
    return y.new_empty_strided(y.shape, [0] * y.dim())


def _dual_outputs(
    y: Tensor, activation: str, zero_tangent: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    keeps_pre = activation in NEEDS_PRE_ACTIVATION
    ty = _placeholder(y) if zero_tangent else torch.empty_like(y)
    return y, ty, torch.empty_like(y) if keeps_pre else _placeholder(y)


def _pooled(
    y: Tensor, pool: list[int] | None, tangent: Tensor | None, noise: str
) -> tuple[Tensor, Tensor]:
    """The pool of y and its tangent; both empty without one."""
    if pool is None:
        return y.new_empty([0]), y.new_empty([0])
    pooled, pooled_tangent = fused.max_pool2d(y, y, pool[:2], pool[2:4], pool[4:])
    return pooled, _placeholder(pooled) if tangent is None and noise == "none" else pooled_tangent


def _images(like: Tensor, size: list[int]) -> Tensor:
    """As many of them, with as many channels, in channels_last."""
    return torch.empty(
        [*like.shape[:2], *size],
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last,
    )


@torch.library.register_fake("fdfa::next_noise")
def _(state: Tensor) -> Tensor:
    torch._check(state.shape == (3,), lambda: f"fdfa::next_noise: state must be [3], got {state.shape}")
    return torch.empty_like(state)


@torch.library.register_fake("fdfa::mm")
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty([a.shape[0], b.shape[1]])


@torch.library.register_fake("fdfa::dual_activation")
def _(x: Tensor, tangent: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.register_fake("fdfa::linear")
def _(
    x: Tensor,
    tangent: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    noise_state: Tensor,
    block: int,
    activation: str,
    noise: str,
) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(
        x.shape[-1] == weight.shape[1],
        lambda: f"fdfa::linear: x must be [N, *, {weight.shape[1]}], got {x.shape}",
    )
    y = x.new_empty([*x.shape[:-1], weight.shape[0]])
    return _dual_outputs(y, activation, tangent is None and noise == "none")


@torch.library.register_fake("fdfa::conv2d")
def _(
    x: Tensor,
    tangent: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    noise_state: Tensor,
    block: int,
    activation: str,
    noise: str,
    pool: list[int] | None = None,
    patch: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size = [
        (x.shape[i + 2] + 2 * padding[i] - dilation[i] * (weight.shape[i + 2] - 1) - 1) // stride[i] + 1
        for i in range(2)
    ]
    y = torch.empty(
        [x.shape[0], weight.shape[0], *size],
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    y, ty, pre = _dual_outputs(y, activation, tangent is None and noise == "none")
    pooled, pooled_tangent = _pooled(y, pool, tangent, noise)
    return y, ty if pool is None else pooled_tangent, pre, pooled


@torch.library.register_fake("fdfa::batch_norm")
def _(
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
    pool: list[int] | None = None,
    patch: int = 1,
) -> tuple[Tensor, ...]:
    mean = x.new_empty([x.shape[1]])
    y, _, pre = _dual_outputs(torch.empty_like(x), activation)
    return y, pre, mean, torch.empty_like(mean), *_pooled(y, pool, tangent, noise)


@torch.library.register_fake("fdfa::batch_norm_backward")
def _(
    delta: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    inverse_std: Tensor,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean)


@torch.library.register_fake("fdfa::max_pool2d")
def _(
    x: Tensor, tangent: Tensor, kernel_size: list[int], stride: list[int], padding: list[int]
) -> tuple[Tensor, Tensor]:
    size = [(x.shape[i + 2] + 2 * padding[i] - kernel_size[i]) // stride[i] + 1 for i in range(2)]
    y = _images(x, size)
    return y, torch.empty_like(y)


@torch.library.register_fake("fdfa::max_pool2d_end")
def _(
    x: Tensor,
    tangent: Tensor | None,
    anchor: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    noise_state: Tensor,
    block: int,
    noise: str,
    patch: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size = [(x.shape[i + 2] + 2 * padding[i] - kernel_size[i]) // stride[i] + 1 for i in range(2)]
    y, ty, pre = _dual_outputs(_images(x, size), "identity", tangent is None and noise == "none")
    return y, ty, pre, torch.empty_like(y, dtype=torch.uint8)


@torch.library.register_fake("fdfa::max_pool2d_backward")
def _(
    delta: Tensor,
    winners: Tensor,
    input_size: list[int],
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
) -> Tensor:
    return _images(delta, input_size)


@torch.library.register_fake("fdfa::perturb")
def _(
    y: Tensor, tangent: Tensor | None, noise_state: Tensor, block: int, noise: str, patch: int = 1
) -> Tensor:
    order = torch.channels_last if y.dim() == 4 else torch.contiguous_format
    return torch.empty(y.shape, dtype=y.dtype, device=y.device, memory_format=order)


def _turns_delta(saved: Tensor) -> bool:
    """As `empty_delta` in csrc/ops/feedback.cpp: δ of a large dense block lies as [D, N] on the CPU."""
    return (
        saved.device.type == "cpu"
        and saved.dim() == 2
        and saved.dtype == torch.float32
        and saved.numel() >= 1 << 14
    )


def _delta(op: str, feedback: Tensor, error: Tensor, saved: Tensor, patch: int) -> Tensor:
    expected = [error.shape[1], *patch_shape(saved.shape, patch)[1:]]
    torch._check(
        list(feedback.shape) == expected,
        lambda: f"fdfa::{op}: feedback must be [K, *features] = {expected}, got {list(feedback.shape)}",
    )
    if _turns_delta(saved):
        return saved.new_empty(saved.shape[::-1]).t()
    in_patches = patch > 1 and saved.dim() == 4
    row_major = feedback.is_contiguous() and not in_patches
    order = torch.contiguous_format if row_major else torch.channels_last
    return torch.empty(
        saved.shape,
        dtype=saved.dtype,
        device=saved.device,
        memory_format=order,
    )


@torch.library.register_fake("fdfa::feedback_step")
def _(*_: Any) -> None:
    """Everything is written to the arguments."""


@torch.library.register_fake("fdfa::feedback_gradient")
def _(
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
    deltas = [
        _delta("feedback_gradient", matrix, error, saved, patch)
        for matrix, saved in zip(feedback, saved_activations, strict=True)
    ]
    return deltas, [torch.empty_like(matrix) for matrix in feedback]

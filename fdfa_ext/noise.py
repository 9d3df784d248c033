"""Noise: its kinds, its state, and the memory order in which it counts the features."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

NOISES = ("gaussian", "rademacher")


def new_state(device: torch.device) -> Tensor:
    """int64 [3]: a seed from torch's generator, the step, and the global index of the first sample."""
    seed = int(torch.randint(2**63 - 1, (), device="cpu"))
    return torch.tensor([seed, 0, 0], device=device)


def perturbation(
    operators: Any, like: Tensor, state: Tensor, block: int, kind: str, patch: int = 1
) -> Tensor:
    """u [N, *features] in the shape of `like`; float32 whatever its dtype. Of images the pixels of a
    patch have one value a channel."""
    # The operator reads no more than a shape.
    like = like if like.dtype == torch.float32 else like.float()
    u: Tensor = operators.perturb(like, None, state, block, kind, patch)
    return u


def memory_format_of(n_dimensions: int) -> torch.memory_format:
    """The memory order of blocks [N, *features] and of B [K, *features]: images in channels_last."""
    return torch.channels_last if n_dimensions == 4 else torch.contiguous_format


def flatten_features(t: Tensor) -> Tensor:
    """[N, *features] → [N, D] in memory order, without a copy of images in channels_last."""
    return t.permute(0, 2, 3, 1).flatten(1) if t.dim() == 4 else t.flatten(1)


def unflatten_features(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """[N, D] → [N, *features], images in channels_last."""
    matrix = matrix.contiguous()
    if len(shape) != 4:
        return matrix.view(*shape)
    n, c, h, w = shape
    return matrix.view(n, h, w, c).permute(0, 3, 1, 2)


def in_memory_format(matrix: Tensor) -> Tensor:
    """B or a moment of it, [K, *features], in float32 and in the memory order of the noise."""
    # Not `contiguous`, which leaves strides as they are where a size of 1 gives the choice.
    like = torch.empty(matrix.shape, device="meta", memory_format=memory_format_of(matrix.dim()))
    if matrix.dtype == torch.float32 and matrix.stride() == like.stride() and not matrix.is_inference():
        return matrix.detach()
    with torch.inference_mode(False):
        ordered = torch.empty_like(like, dtype=torch.float32, device=matrix.device)
        return ordered.copy_(matrix.detach())


def channels_last(x: Tensor) -> Tensor:
    """x [N, C, H, W] dense in channels_last, by strides that say so on CUDA.

    With one channel or one pixel row-major strides describe the same memory, and torch keeps them.
    cuDNN goes by the strides, and would compute in row-major order.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    _, c, h, w = x.shape
    strides = (h * w * c, 1, w * c, c)
    return x if x.stride() == strides or not x.is_cuda else x.as_strided(x.shape, strides)

"""An FDFABlock's chain of modules: its calls, and the tails that have fused operators.

(Conv2d or Linear) → activation → max-pool, and BatchNorm → activation → max-pool, where activation and
pool may be missing. Other chains end with a perturbation of their own; the results are the same.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fdfa_ext.jvp import (
    ACTIVATION_NAMES,
    BATCH_NORMS,
    Call,
    forward_mode_call,
    has_fused_pool,
    makes_tangent,
    plain_type,
    pool_geometry,
    rule_call,
    single_precision,
)
from fdfa_ext.reference import NEEDS_PRE_ACTIVATION

# Torch modules that tell where the features of a sequence are that they return.
_CHANNELS_FIRST = (
    *(nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, nn.InstanceNorm1d, nn.GroupNorm),
    *(nn.LazyBatchNorm1d, nn.LazyInstanceNorm1d),
    *(nn.MaxPool1d, nn.AvgPool1d, nn.LPPool1d, nn.AdaptiveMaxPool1d, nn.AdaptiveAvgPool1d, nn.Unfold),
)
_FEATURES_LAST = (
    *(nn.Linear, nn.Bilinear, nn.LayerNorm, nn.RMSNorm, nn.Embedding),
    *(nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.MultiheadAttention, nn.RNNBase),
)

# Of the inputs that the operators take; a norm has no other in common with them.
_NORM_DIMENSIONS = {nn.BatchNorm1d: 2, nn.BatchNorm2d: 4}


@dataclass(slots=True)
class FusedTail:
    """The last modules of a chain, from `start` on."""

    start: int
    first: nn.Module  # a layer, or a batch normalisation
    normalizes: bool
    activation: str  # the operators' name of it
    pool: nn.MaxPool2d | None

    def takes(self, x: Tensor) -> bool:
        """Whether the operators take x [N, *] and the modules' parameters as they are."""
        if not single_precision(x) and (self.normalizes or self.pool is not None):
            return False
        module: Any = self.first
        if self.normalizes:
            return (
                x.device.type in ("cpu", "cuda")
                and x.dim() == _NORM_DIMENSIONS.get(type(module))
                and (module.weight is None or module.weight.dtype == torch.float32)
                and (module.running_mean is None or module.running_mean.dtype == torch.float32)
                and module.momentum is not None
                # Otherwise torch has the words for it.
                and (x.numel() > x.shape[1] == module.num_features)
            )
        # A layer's operators give their input no gradient.
        return not x.requires_grad and x.dim() == (2 if isinstance(module, nn.Linear) else 4)


@dataclass(slots=True)
class Chain:
    """The calls of a block that perturbs what they return, with autograd within."""

    calls: Sequence[Call]  # each is given what the one before returned
    names: Sequence[str]  # of the modules that they call, for errors
    tail: FusedTail | None = None
    makes_tangent: bool = False  # whether the tangent that the tail is given is nobody else's
    channels_first: bool | None = None  # of what it returns, as `channels_first` has it
    from_point: bool = False  # whether it takes its input as it is, autograd's graph included

    @classmethod
    def of(
        cls, modules: Sequence[nn.Module], channels_first: bool | None, from_point: bool = False
    ) -> "Chain":
        """The shortest way through modules one after the other, as long as none of them changes."""
        tail = find_tail(modules) if modules else None
        before = [] if tail is None else modules[: tail.start]
        return cls(
            [rule_call(module) or forward_mode_call(module) for module in modules],
            [type(module).__name__ for module in modules],
            tail,
            bool(before) and makes_tangent(before[-1]),
            channels_first,
            from_point,
        )


def channels_first(modules: Sequence[nn.Module]) -> bool | None:
    """Whether a chain returns a sequence as [N, C, L], not [N, T, D], by its last module that tells;
    None where none does, or a module of the user's own comes after it."""
    for module in reversed(list(_flattened(modules))):
        if isinstance(module, _CHANNELS_FIRST):
            return True
        if isinstance(module, nn.Flatten):
            if module.start_dim > 1:  # an image's pixels
                return True
        elif not type(module).__module__.startswith("torch.nn."):
            return None
        elif isinstance(module, _FEATURES_LAST):
            return False
    return None


def channels_of(module: nn.Module) -> int | None:
    """Those of its last layer or norm that returns a sequence as [N, C, L], if it has one."""
    names = ("out_channels", "num_features", "num_channels")
    found = [
        getattr(inner, name)
        for inner in module.modules()
        if isinstance(inner, _CHANNELS_FIRST)
        for name in names
        if hasattr(inner, name)
    ]
    return found[-1] if found else None


def _flattened(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    for module in modules:
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            yield from _flattened(module)
        else:
            yield module


def find_tail(modules: Sequence[nn.Module]) -> FusedTail | None:
    """The longest fused tail of a chain, if it has one."""
    position = len(modules) - 1
    pool: Any = modules[position] if plain_type(modules[position]) is nn.MaxPool2d else None
    if pool is not None:
        position -= 1
    activation = None if position < 0 else _activation(modules[position])
    if activation is not None:
        position -= 1
    if position < 0 or (pool is not None and not _suits(pool, activation)):
        return None
    first = modules[position]
    kind = plain_type(first)
    normalizes = kind in BATCH_NORMS
    if not normalizes and (_has_parameters(modules[:position]) or not _is_layer(first)):
        return None
    return FusedTail(position, first, normalizes, activation or "identity", pool)


def _has_parameters(modules: Iterable[nn.Module]) -> bool:
    return any(True for module in modules for _ in module.parameters())


def _suits(pool: Any, activation: str | None) -> bool:
    """f' must be that of the winner's output, since its pre-activation is gone; its place is a byte."""
    places = math.prod(pool_geometry(pool)[0])
    if isinstance(pool.kernel_size, list):  # may change in place, which no plan sees
        return False
    return activation not in NEEDS_PRE_ACTIVATION and has_fused_pool(pool) and places <= 256


def _is_layer(module: Any) -> bool:
    kind = plain_type(module)
    return kind is nn.Linear or (
        kind is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    )


def _activation(module: Any) -> str | None:
    """The operators' name of it; None for any other module."""
    kind = plain_type(module)
    if (kind is nn.LeakyReLU and module.negative_slope != 0.01) or (
        kind is nn.GELU and module.approximate != "none"
    ):
        return None
    return ACTIVATION_NAMES.get(kind)


def norm_arguments(module: Any) -> dict[str, Any]:
    """What its operator takes of a batch normalisation."""
    # One told to stop tracking keeps its statistics for evaluation.
    tracks = module.track_running_stats or not module.training
    counts = module.training and module.track_running_stats
    return {
        "weight": module.weight,
        "bias": module.bias,
        "running_mean": module.running_mean if tracks else None,
        "running_var": module.running_var if tracks else None,
        "num_batches_tracked": module.num_batches_tracked if counts else None,
        "training": module.training or module.running_mean is None,
        "momentum": module.momentum,
        "eps": module.eps,
    }

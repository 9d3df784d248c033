"""The dual pass of a training step: what its blocks do, and what they leave for the backward.

A block takes primal and tangent apart, since an operator of torch.library that is given a dual tensor
drops its tangent in silence. Between blocks the two travel side by side where every module's way with a
tangent is known, and else on torch's forward-mode dual tensors, so that any torch module may stand there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdfa_ext import reference
from fdfa_ext._ops import fused
from fdfa_ext.tangents import (
    BATCH_NORMS,
    Pair,
    forward_dual,
    make_dual,
    makes_tangent,
    plain_type,
    unpack_dual,
    without_rules,
)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda a: a,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "silu": F.silu,
}
NEEDS_PRE_ACTIVATION = ("gelu", "silu")
_ACTIVATION_MODULES: dict[Any, str] = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
}
NOISES = ("gaussian", "rademacher")
BACKENDS: dict[str, Any] = {"fused": fused, "reference": reference}


@dataclass(slots=True)
class BlockRecord:
    """What the feedback step needs of one block once the output's error is known."""

    name: str
    index: int
    output: Tensor  # [N, *features]: y
    handle: Tensor  # [N, *features]: δ is handed to it, and autograd goes on to the block's parameters
    gate: Tensor  # [N, *features]: what f' is taken from
    activation: str  # f, or "identity" where the block's own autograd holds f'
    order: torch.memory_format  # in which its features are counted: row-major, or (h, w, c)
    version: int  # of gate: counts changes in place


@dataclass(slots=True)
class DualPass:
    """One forward pass of primal and tangent: noise, operators, and the blocks met so far."""

    noise_state: Tensor  # int64 [3]: seed, step, index of the batch's first sample
    noise: str
    backend: Any
    compiling: bool  # by torch.compile
    tangents: str = "network"  # or "block": they end at the next block; or "none", and no noise
    records: list[BlockRecord] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)  # the blocks of the records


@dataclass(slots=True)
class BlockPass:
    """A block's own name and place in the noise, and the dual pass while one runs."""

    name: str
    index: int
    dual: DualPass | None = None

    @property
    def perturbs(self) -> bool:
        return self.dual is not None and self.dual.tangents != "none"

    def plain(self, x: Tensor, module: Callable[[Tensor], Tensor]) -> Tensor:
        """x [N, *] → module(x), cut off from what made x; the module's own autograd holds f'."""
        dual = self._enter(x)
        x = x.detach()
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        y = module(x)
        order = torch.channels_last if y.dim() == 4 else torch.contiguous_format
        output = y.detach()
        self._record(dual, output, y, "identity", order)
        return output

    def through_duals(self, x: Tensor, block: Callable[[Tensor, Tensor | None], Pair]) -> Tensor:
        """A dual tensor through a block that takes primal and tangent apart; the result is one again."""
        with without_rules():
            return make_dual(*block(*unpack_dual(x)))

    def linear(
        self, x: Tensor, tangent: Tensor | None, weight: Tensor, bias: Tensor | None, activation: str
    ) -> Pair:
        """x [N, *, in_features] → y and its tangent [N, *, out_features]. Algorithm 1, lines 10 to 16."""
        dual = self._enter(x)
        if dual.tangents == "block":
            tangent = None
        y, ty, pre = dual.backend.linear(
            x, tangent, weight, bias, dual.noise_state, self.index, activation, dual.noise
        )
        self._record(dual, y, pre, activation, torch.contiguous_format)
        return y, ty

    def conv2d(
        self,
        x: Tensor,
        tangent: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        activation: str,
    ) -> Pair:
        """x [N, C, H, W] → y and its tangent [N, C', H', W'], in channels_last."""
        dual = self._enter(x)
        if dual.tangents == "block":
            tangent = None
        y, ty, pre = dual.backend.conv2d(
            x,
            tangent,
            weight,
            bias,
            stride,
            padding,
            dilation,
            groups,
            dual.noise_state,
            self.index,
            activation,
            dual.noise,
        )
        self._record(dual, y, pre, activation, torch.channels_last)
        return y, ty

    def chain(self, x: Tensor, tangent: Tensor | None, modules: Sequence[nn.Module]) -> Pair:
        """Any torch modules, one after the other, perturbed at the end of the last."""
        dual = self._enter(x)
        x = x.detach()
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        if tangent is not None:
            tangent = None if dual.tangents == "block" else tangent.detach()
        y, ty = x, tangent
        end = _normalized_end(modules)
        for position, module in enumerate(modules):
            if end is not None and position == end[0] and _has_fused_norm(dual, module, y):
                # The tangent that a layer just made is nobody else's: it may be overwritten.
                spare = ty if position > 0 and makes_tangent(modules[position - 1]) else None
                return self._batch_norm(dual, module, y, ty, spare, end[1])
            y, ty = forward_dual(module, y, ty)
            if tangent is not None and ty is None:
                raise RuntimeError(
                    f"FDFA: block '{self.name}': its module {position} ({type(module).__name__}) "
                    "dropped the tangent; it is not differentiable in torch's forward mode"
                )
        gate = y.detach()
        ty = dual.backend.perturb(gate, ty, dual.noise_state, self.index, dual.noise)
        order = torch.channels_last if y.dim() == 4 else torch.contiguous_format
        self._record(dual, gate, y, "identity", order)
        return gate, ty

    def _batch_norm(
        self,
        dual: DualPass,
        module: Any,
        x: Tensor,
        tangent: Tensor | None,
        spare: Tensor | None,
        activation: str,
    ) -> Pair:
        """spare: memory for the tangent of the result, if it has the right order."""
        order = torch.channels_last if x.dim() == 4 else torch.contiguous_format
        if module.training and module.num_batches_tracked is not None:
            module.num_batches_tracked.add_(1)
        if spare is None or not spare.is_contiguous(memory_format=order):
            spare = torch.empty_like(x, memory_format=order)
        y, pre = dual.backend.batch_norm(
            x.contiguous(memory_format=order),
            tangent,
            spare,
            module.weight,
            module.bias,
            module.running_mean,
            module.running_var,
            module.training or module.running_mean is None,
            module.momentum,
            module.eps,
            dual.noise_state,
            self.index,
            activation,
            dual.noise,
        )[:2]
        self._record(dual, y, pre, activation, order)
        return y, spare

    def _enter(self, x: Tensor) -> DualPass:
        """The pass that runs, once it is clear that it may go through this block."""
        dual = self.dual
        assert dual is not None
        if self.index in dual.seen:
            raise RuntimeError(
                f"FDFA: block '{self.name}' was used twice in one forward pass; its feedback matrix "
                "belongs to one place in the network, so use two blocks (they may share a weight)"
            )
        if x.grad_fn is not None:
            raise RuntimeError(
                f"FDFA: the input of block '{self.name}' depends on parameters of a module before it "
                "that is no block: they would get no gradient. Put that module into an FDFABlock"
            )
        return dual

    def _record(
        self,
        dual: DualPass,
        output: Tensor,
        handle: Tensor,
        activation: str,
        order: torch.memory_format,
    ) -> None:
        gate = handle.detach() if activation in NEEDS_PRE_ACTIVATION else output
        # A compiler cannot trace versions; the probe before it has looked at them.
        version = 0 if dual.compiling else gate._version
        dual.seen.add(self.index)
        dual.records.append(
            BlockRecord(self.name, self.index, output, handle, gate, activation, order, version)
        )


def _normalized_end(modules: Sequence[nn.Module]) -> tuple[int, str] | None:
    """Where a chain's last two modules, BatchNorm and activation, or its last one, BatchNorm, begin."""
    activation = _activation(modules[-1])
    position = len(modules) - (1 if activation is None else 2)
    if position < 0 or plain_type(modules[position]) not in BATCH_NORMS:
        return None
    return position, activation or "identity"


def _activation(module: nn.Module) -> str | None:
    """The operators' name of it; None for any other module."""
    kind = plain_type(module)
    if (kind is nn.LeakyReLU and module.negative_slope != 0.01) or (
        kind is nn.GELU and module.approximate != "none"
    ):
        return None
    return _ACTIVATION_MODULES.get(kind)


def _has_fused_norm(dual: DualPass, module: Any, x: Tensor) -> bool:
    return (
        dual.backend is fused
        and not dual.compiling
        and x.is_cpu
        and x.dim() in (2, 4)
        and x.dtype == torch.float32
        and (module.weight is None or module.weight.dtype == torch.float32)
        and (module.running_mean is None or module.running_mean.dtype == torch.float32)
        and module.momentum is not None
        # Otherwise torch has the words for it.
        and (x.numel() > x.shape[1] == module.num_features)
    )


def rows(t: Tensor) -> Tensor:
    """[N, *features] → [N, D] in memory order, without a copy of images in channels_last."""
    return t.permute(0, 2, 3, 1).flatten(1) if t.dim() == 4 else t.flatten(1)


def unrows(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """[N, D] → [N, *features], images in channels_last."""
    if len(shape) < 4:
        return matrix.view(*shape)
    n, c, h, w = shape
    return matrix.view(n, h, w, c).permute(0, 3, 1, 2)

"""Blocks: the parts of a network that are perturbed and get their error straight from the output.

Inside FDFA's training step a block takes part in the dual pass. Anywhere else it is its torch
counterpart followed by the activation, with ordinary autograd.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fdfa_ext import reference
from fdfa_ext.functional import ACTIVATIONS, BlockPass
from fdfa_ext.tangents import (
    GLOBAL_HOOKS,
    MaybePair,
    has_fused_pool,
    has_own_forward,
    hooks_of,
    known_way,
)

Step = Callable[[Tensor, Tensor | None], MaybePair]


def _check_activation(layer: str, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{layer}: activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}"
        )


NOT_SCRIPTABLE = (
    "FDFA: torch.jit.script cannot compile a model that FDFA trains; use "
    "torch.jit.trace(model.eval(), example_input) or torch.export"
)


class Block:
    """What FDFA looks for, and gives a `block_pass`."""

    block_pass: BlockPass | None = None

    def dual(self, x: Tensor, tangent: Tensor | None) -> MaybePair:
        """The block's output and its tangent, perturbed, for an input with a tangent or none.

        While FDFA makes a training step. None in one that perturbs nothing.
        """
        raise NotImplementedError

    def __prepare_scriptable__(self) -> "Block":
        raise RuntimeError(NOT_SCRIPTABLE)

    def own_pass(self) -> BlockPass:
        if self.block_pass is None:
            raise RuntimeError("FDFA: a block was put in after wrapping; wrap the module again")
        return self.block_pass

    @property
    def running_pass(self) -> BlockPass | None:
        """The block's pass while FDFA makes a training step, else None."""
        block_pass = self.block_pass
        return None if block_pass is None or block_pass.dual is None else block_pass


class FDFALinear(nn.Linear, Block):
    """y = activation(x Wᵀ + b), x [N, *, in_features] → y [N, *, out_features].

    Several dimensions between count as one: B is [K, out_features] or [K, rows, out_features].

    Arguments are those of torch.nn.Linear, and activation: "identity", "relu", "leaky_relu", "tanh",
    "sigmoid", "gelu" or "silu". The state_dict has torch.nn.Linear's keys.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *args: Any,
        activation: str = "identity",
        **kwargs: Any,
    ) -> None:
        _check_activation("FDFALinear", activation)
        super().__init__(in_features, out_features, *args, **kwargs)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        if (running := self.running_pass) is None:
            return self._plain(x)
        return running.through_duals(x, self.dual)

    def dual(self, x: Tensor, tangent: Tensor | None) -> MaybePair:
        return self.own_pass().linear(x, tangent, self.weight, self.bias, self.activation)

    def _plain(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](super().forward(x))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


class FDFAConv2d(nn.Conv2d, Block):
    """y = activation(conv(x, W) + b), x [N, C, H, W] → y [N, C', H', W'], channels_last when trained.

    Arguments are those of torch.nn.Conv2d, and activation as for FDFALinear. The state_dict has
    torch.nn.Conv2d's keys.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *args: Any,
        activation: str = "identity",
        **kwargs: Any,
    ) -> None:
        _check_activation("FDFAConv2d", activation)
        super().__init__(in_channels, out_channels, kernel_size, *args, **kwargs)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        if (running := self.running_pass) is None:
            return self._plain(x)
        return running.through_duals(x, self.dual)

    def dual(self, x: Tensor, tangent: Tensor | None, pool: nn.MaxPool2d | None = None) -> MaybePair:
        """pool: one that comes after the block, to be done with it."""
        padding = self.padding
        if isinstance(padding, str) or self.padding_mode != "zeros":
            # Padding of its own kind is a linear map before the convolution.
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            sides = self._reversed_padding_repeated_twice
            x = F.pad(x, sides, mode=mode)
            tangent = None if tangent is None else F.pad(tangent, sides, mode=mode)
            padding = (0, 0)
        return self.own_pass().conv2d(
            x,
            tangent,
            self.weight,
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            self.activation,
            pool,
        )

    def _plain(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](super().forward(x))

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not reference.skips_pixels(input, weight, self.stride, self.padding):
            return super()._conv_forward(input, weight, bias)
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return reference.convolve(input, weight, bias, *geometry)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


class FDFABlock(nn.Sequential, Block):
    """A chain of torch modules as one block, perturbed at its output, with autograd inside it.

    For Conv → BatchNorm → ReLU → MaxPool, a residual branch, attention: anything that torch can
    differentiate in forward mode and whose output is [N, *features]. Buffers, such as running
    statistics, move once a step, from the primal alone. Images are computed in channels_last.
    """

    def __init__(self, *modules: nn.Module) -> None:
        if not modules:
            raise ValueError("FDFABlock: needs at least one module")
        super().__init__(*modules)

    def forward(self, x: Tensor) -> Tensor:
        if (running := self.running_pass) is None:
            return super().forward(x)
        return running.through_duals(x, self.dual)

    def dual(self, x: Tensor, tangent: Tensor | None, pool: nn.MaxPool2d | None = None) -> MaybePair:
        """pool: one that comes after the block, to be done with it."""
        return self.own_pass().chain(x, tangent, list(self), pool)


class SideBySide:
    """A net of blocks and known modules in sequence, as calls that take primal and tangent side by
    side, without dual tensors, while FDFA makes a training step."""

    output_layer: nn.Linear | None  # the last step, if it is one: `steps` does not have it

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._plan()

    def steps(self) -> list[Step] | None:
        """The calls, each to be given what the one before returned.

        None where the net needs dual tensors: for a hook or another forward put on a module, which may
        do anything, or for a module between blocks whose way with a tangent is not known.
        """
        for sequence, members in self._sequences:
            if list(sequence._modules.values()) != members:  # someone exchanged a module
                self._plan()
                break
        changed = any(GLOBAL_HOOKS) or any(self._hooks) or any(map(has_own_forward, self._members))
        return None if changed else self._steps

    def _plan(self) -> None:
        self._sequences: list[tuple[nn.Module, list[Any]]] = []
        self._members = list(self._module.modules())
        # The dictionaries themselves, since each step looks into all of them.
        self._hooks = [hooks for member in self._members for hooks in hooks_of(member)]
        self._steps = self._steps_of(self._module)
        outermost = self._sequences[0][1] if self._sequences else []
        self.output_layer = None
        if self._steps and type(outermost[-1]) is nn.Linear:
            self.output_layer = outermost[-1]
            self._steps.pop()

    def _steps_of(self, module: Any) -> list[Step] | None:
        kind = type(module)
        if kind is FDFALinear or kind is FDFAConv2d:
            return [module.dual]
        if kind is not nn.Sequential and kind is not FDFABlock:
            way = known_way(module)
            return None if way is None else [way]
        members = list(module._modules.values())
        self._sequences.append((module, members))
        if kind is FDFABlock:  # which asks itself how each of its modules takes a tangent
            return [module.dual]
        steps: list[Step] = []
        for before, inner in pairwise([None, *members]):
            if _pools(before, inner):
                steps[-1] = partial(before.dual, pool=inner)
                continue
            inner_steps = self._steps_of(inner)
            if inner_steps is None:
                return None
            steps += inner_steps
        return steps


def _pools(before: Any, module: Any) -> bool:
    """Whether it is a max-pool that the block before it can do."""
    is_block = type(before) is FDFAConv2d or type(before) is FDFABlock
    return is_block and type(module) is nn.MaxPool2d and has_fused_pool(module)

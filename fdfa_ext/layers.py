"""Blocks: the parts of a network that are perturbed and get their error straight from the output.

Inside FDFA's training step a block takes part in the dual pass. Anywhere else it is its torch
counterpart followed by the activation, with ordinary autograd.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdfa_ext import reference
from fdfa_ext.chains import Chain
from fdfa_ext.functional import ACTIVATIONS, BlockPass
from fdfa_ext.jvp import PrimalTangent, forward_dual, forward_mode_step, is_patched


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
    """What FDFA looks for, and gives a `block_pass`. Its forward calls `dual` while a pass runs."""

    torch_type: type[nn.Module]  # whose forward the block's own has in it
    block_pass: BlockPass | None = None

    def plain(self, x: Tensor) -> Tensor:
        """What the block computes outside FDFA's training step."""
        raise NotImplementedError

    def dual(self, x: Tensor, tangent: Tensor | None) -> PrimalTangent:
        """The block's output and its tangent, perturbed, for an input with a tangent or none.

        While FDFA makes a training step. None in one that perturbs nothing.
        """
        raise NotImplementedError

    def __prepare_scriptable__(self) -> "Block":
        raise RuntimeError(NOT_SCRIPTABLE)

    def plan(self) -> Chain | None:
        """The block's calls as it stands; None where it is one fused operator."""
        return None if self._is_torchs() else self._by_forward_mode()

    def _is_torchs(self) -> bool:
        """Whether the torch module in it computes what that does in torch."""
        own = "_conv_forward" in vars(self) or (
            getattr(type(self), "_conv_forward", None)
            is not getattr(self.torch_type, "_conv_forward", None)
        )
        return not own and not is_patched(self.torch_type)

    def _by_forward_mode(self) -> Chain:
        return Chain([forward_mode_step(self.plain)], [type(self).__name__])


class FDFALinear(nn.Linear, Block):
    """y = activation(x Wᵀ + b), x [N, *, in_features] → y [N, *, out_features].

    Several dimensions between count as one: B is [K, out_features] or [K, rows, out_features].

    Arguments are those of torch.nn.Linear, and activation: "identity", "relu", "leaky_relu", "tanh",
    "sigmoid", "gelu" or "silu". The state_dict has torch.nn.Linear's keys.
    """

    torch_type = nn.Linear

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
        own = self.block_pass
        if own is None or own.dual is None:
            return self.plain(x)
        return own.on_dual_tensor(x, self.dual)

    def dual(self, x: Tensor, tangent: Tensor | None) -> PrimalTangent:
        own = self.block_pass
        assert own is not None, "a plan gives each block a pass"
        if own.planned is not None:
            return own.chain(x, tangent, own.planned)
        return own.linear(x, tangent, self.weight, self.bias, self.activation)

    def plain(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](super().forward(x))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


class FDFAConv2d(nn.Conv2d, Block):
    """y = activation(conv(x, W) + b), x [N, C, H, W] → y [N, C', H', W'], channels_last when trained.

    Arguments are those of torch.nn.Conv2d, and activation as for FDFALinear. The state_dict has
    torch.nn.Conv2d's keys.
    """

    torch_type = nn.Conv2d

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
        own = self.block_pass
        if own is None or own.dual is None:
            return self.plain(x)
        return own.on_dual_tensor(x, self.dual)

    def dual(
        self, x: Tensor, tangent: Tensor | None, pool: nn.MaxPool2d | None = None
    ) -> PrimalTangent:
        """pool: one that comes after the block, to be done with it."""
        own = self.block_pass
        assert own is not None, "a plan gives each block a pass"
        if own.planned is not None:
            return own.chain(x, tangent, own.planned, pool)
        padding = self.padding
        if isinstance(padding, str) or self.padding_mode != "zeros":
            # Padding of its own kind is a linear map before the convolution.
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            sides = self._reversed_padding_repeated_twice
            x = F.pad(x, sides, mode=mode)
            tangent = None if tangent is None else F.pad(tangent, sides, mode=mode)
            padding = (0, 0)
        return own.conv2d(
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

    def plain(self, x: Tensor) -> Tensor:
        if reference.skips_pixels(x, self.weight, self.stride, self.padding) and self._is_torchs():
            geometry = (self.stride, self.padding, self.dilation, self.groups)
            pre = reference.convolve(x, self.weight, self.bias, *geometry)
        else:
            pre = super().forward(x)
        return ACTIVATIONS[self.activation](pre)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


class FDFABlock(nn.Sequential, Block):
    """A chain of torch modules as one block, perturbed at its output, with autograd inside it.

    For Conv → BatchNorm → ReLU → MaxPool, a residual branch, attention: anything that torch can
    differentiate in forward mode and whose output is [N, *features]. Buffers, such as running
    statistics, move once a step, from the primal alone. Images are computed in channels_last.
    """

    torch_type = nn.Sequential

    def __init__(self, *modules: nn.Module) -> None:
        if not modules:
            raise ValueError("FDFABlock: needs at least one module")
        super().__init__(*modules)

    def forward(self, x: Tensor) -> Tensor:
        own = self.block_pass
        if own is None or own.dual is None:
            return self.plain(x)
        return own.on_dual_tensor(x, self.dual)

    def plain(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def plan(self) -> Chain:
        return Chain.of(list(self)) if self._is_torchs() else self._by_forward_mode()

    def dual(
        self, x: Tensor, tangent: Tensor | None, pool: nn.MaxPool2d | None = None
    ) -> PrimalTangent:
        """pool: one that comes after the block, to be done with it."""
        own = self.block_pass
        assert own is not None, "a plan gives each block a pass"
        chain = own.planned
        if chain is None or torch.compiler.is_compiling():
            # A compiler sees for itself when a module changes.
            chain = Chain(
                [partial(forward_dual, module) for module in self],
                [type(module).__name__ for module in self],
            )
        return own.chain(x, tangent, chain, pool)

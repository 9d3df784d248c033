"""Blocks: the parts of a network that are perturbed and get their error straight from the output.

Inside FDFA's training step a block takes part in the dual pass. Anywhere else it is its torch
counterpart followed by the activation, with ordinary autograd.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn

from fdfa_ext import reference
from fdfa_ext.dual_pass import BlockPass
from fdfa_ext.fusion import Chain, channels_first
from fdfa_ext.jvp import FORWARD_NAMES, Call, forward_dual, forward_mode_call, is_patched

ACTIVATIONS = {name: function for name, (function, _) in reference.ACTIVATIONS.items()}


def _check_activation(layer: str, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{layer}: activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}"
        )


NOT_SCRIPTABLE = (
    "FDFA: torch.jit.script cannot compile a model that FDFA trains; use "
    "torch.jit.trace(model.eval(), example_input) or torch.export"
)


# The functions by which an instance or a subclass of a block may compute something else.
OVERRIDABLE = (*FORWARD_NAMES, "plain")


class Block:
    """What FDFA looks for, and gives a `block_pass`, by which its forward runs while a pass does."""

    torch_type: type[nn.Module]  # whose forward the block's own has in it
    block_pass: BlockPass | None = None

    def forward(self, x: Tensor) -> Tensor:
        own = self.block_pass
        dual = None if own is None else own.dual_here()
        if own is None or dual is None:
            return self.plain(x)
        return own.on_dual_tensor(dual, x, self.traced_call(own) if dual.compiling else own.call)

    def returns_channels_first(self) -> bool | None:
        """As fusion has it, of what the block returns."""
        return None

    def plain(self, x: Tensor) -> Tensor:
        """What the block computes outside FDFA's training step."""
        raise NotImplementedError

    def plan(self, own: BlockPass) -> Call:
        """The block's call in a pass, as the block stands.

        It takes an input and its tangent, None in a pass that perturbs nothing, and gives the block's
        output and its tangent, perturbed. That of images takes a pool which comes after the block.
        """
        return self._fused_call(own) if self._is_torchs() else partial(own.chain, self._whole())

    def traced_call(self, own: BlockPass) -> Call:
        """The same for a compiler, which sees for itself when a module changes."""
        return self.plan(own)

    def __prepare_scriptable__(self) -> "Block":
        raise RuntimeError(NOT_SCRIPTABLE)

    def _fused_call(self, own: BlockPass) -> Call:
        raise NotImplementedError

    def _is_torchs(self) -> bool:
        """Whether it computes what its class and the torch module in it do."""
        kind = type(self)
        own = any([name in vars(self) for name in ("_conv_forward", "plain")])
        convolution = getattr(kind, "_conv_forward", None)
        own = own or convolution is not getattr(self.torch_type, "_conv_forward", None)
        return not own and kind.plain.__module__ == __name__ and not is_patched(self.torch_type)

    def _whole(self) -> Chain:
        """The block as one call, in forward mode."""
        return Chain([forward_mode_call(self.plain)], [type(self).__name__])


class FDFALinear(Block, nn.Linear):
    """y = activation(x Wᵀ + b), x [N, *, in_features] → y [N, *, out_features].

    Several dimensions between count as one: B is [K, out_features] or [K, rows, out_features], and in
    patches [K, out_features, 1, ⌈rows / patch⌉].

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

    def _fused_call(self, own: BlockPass) -> Call:
        return partial(own.linear, self)

    def returns_channels_first(self) -> bool:
        return False

    def plain(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](nn.Linear.forward(self, x))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


class FDFAConv2d(Block, nn.Conv2d):
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

    def _fused_call(self, own: BlockPass) -> Call:
        return partial(own.conv2d, self)

    def plain(self, x: Tensor) -> Tensor:
        if not self._is_torchs():
            return ACTIVATIONS[self.activation](nn.Conv2d.forward(self, x))
        weight = self.weight  # once: a parametrization computes it, and may count how often
        if reference.skips_pixels(x, weight, self.stride, self.padding):
            geometry = (self.stride, self.padding, self.dilation, self.groups)
            pre = reference.convolve(x, weight, self.bias, *geometry)
        else:
            pre = self._conv_forward(x, weight, self.bias)
        return ACTIVATIONS[self.activation](pre)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


class FDFABlock(Block, nn.Sequential):
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

    def returns_channels_first(self) -> bool | None:
        return channels_first(list(self)) if self._is_torchs() else None

    def plain(self, x: Tensor) -> Tensor:
        return nn.Sequential.forward(self, x)

    def traced_call(self, own: BlockPass) -> Call:
        if not self._is_torchs():
            return partial(own.chain, self._whole())
        calls = [partial(forward_dual, module) for module in self]
        names = [type(module).__name__ for module in self]
        return partial(own.chain, Chain(calls, names, channels_first=self.returns_channels_first()))

    def _fused_call(self, own: BlockPass) -> Call:
        return partial(own.chain, Chain.of(list(self), self.returns_channels_first()))


def joins_positions(module: nn.Module) -> bool:
    """Whether several dimensions between samples and features count as one."""
    return isinstance(module, FDFALinear) and module._is_torchs()

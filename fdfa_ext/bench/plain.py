"""FDFA as one writes it in plain torch, without this package's operators: what they are timed against.

Both forms compute what FDFA(net, feedback="grad") does, with torch's own random numbers. `net` is a
chain of modules [N, ...] → [N, K], blocks among them; `example` is an input for it. The feedback
matrices are parameters, and their gradient is B - dᵀu / N.
"""

from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from fdfa_ext.jvp import forward_dual
from fdfa_ext.layers import Block, FDFABlock, FDFAConv2d, FDFALinear
from fdfa_ext.model import FDFA
from fdfa_ext.noise import flatten_features, unflatten_features

_ACTIVATIONS = {"identity": nn.Identity, "relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


def _feedback(net: nn.Sequential, example: Tensor, order: torch.memory_format) -> nn.ParameterList:
    zeros = FDFA(net, feedback="ema", example_input=example).feedback.values()
    return nn.ParameterList(b.contiguous(memory_format=order) if b.dim() == 4 else b for b in zeros)


class PublishedFDFA(nn.Module):
    """In the manner of the code that the paper's authors published.

    Forward mode and autograd run through the whole network at once, as backpropagation's would; each
    block replaces the gradient that reaches it by the projected error, and d ⊗ u is formed for every
    sample, [N, K, D].
    """

    def __init__(self, net: nn.Sequential, example: Tensor) -> None:
        super().__init__()
        self.net = net
        self.feedback = _feedback(net, example, torch.contiguous_format)

    def forward(self, x: Tensor) -> Tensor:
        output: dict[str, Tensor] = {}  # its tangent and error, for the backward of all blocks
        feedback = iter(self.feedback)
        with forward_ad.dual_level():
            y = forward_ad.make_dual(x, torch.zeros_like(x))
            for module in self.net:
                y = module(y)
                if isinstance(module, Block):
                    primal, tangent = forward_ad.unpack_dual(y)
                    u = torch.randn_like(primal)
                    primal = _PublishedBlock.apply(primal, next(feedback), u, output)
                    y = forward_ad.make_dual(primal, tangent + u)
            primal, output["tangent"] = forward_ad.unpack_dual(y)
            return _PublishedOutput.apply(primal, output)


class _PublishedBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, feedback: Tensor, u: Tensor, output: dict[str, Tensor]) -> Tensor:
        ctx.save_for_backward(feedback, u)
        ctx.output = output
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        feedback, u = ctx.saved_tensors
        matrix = feedback.flatten(1)
        estimates = ctx.output["tangent"].unsqueeze(2) * u.flatten(1).unsqueeze(1)  # [N, K, D]
        gradient = matrix - estimates.mean(0)
        delta = ctx.output["error"].mm(matrix)
        return delta.view_as(grads[0]), gradient.view_as(feedback), None, None


class _PublishedOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, output: dict[str, Tensor]) -> Tensor:
        ctx.output = output
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.output["error"] = grads[0]
        return grads[0], None


class PlainFDFA(nn.Module):
    """As well as plain torch can: blocks cut off from each other, tangents by the library's own kernels
    without a graph, G = dᵀu / N within one matrix product, and images channels_last throughout.
    """

    def __init__(self, net: nn.Sequential, example: Tensor) -> None:
        super().__init__()
        self.feedback = _feedback(net, example, torch.channels_last)
        self.net = nn.Sequential(*[_chain(m) if isinstance(m, Block) else m for m in net])

    def forward(self, x: Tensor) -> Tensor:
        y, tangent = x, None
        anchors, perturbations = [], []
        with forward_ad.dual_level():
            for module in self.net:
                if not isinstance(module, _Chain):
                    y, tangent = forward_dual(module, y, tangent)
                    continue
                for part in module:
                    y, tangent = forward_dual(part, y, tangent)
                u = torch.randn_like(y)
                tangent = u if tangent is None else tangent + u
                anchors.append(y)
                perturbations.append(u)
                y = y.detach()
        return _PlainNode.apply(y, tangent, *self.feedback, *perturbations, *anchors)


class _Chain(nn.Sequential):
    """A block's modules, each of plain torch."""


def _chain(block: nn.Module) -> _Chain:
    if isinstance(block, FDFABlock):
        return _Chain(*block)
    layer: nn.Module
    if isinstance(block, FDFALinear):
        layer = nn.Linear(block.in_features, block.out_features, device="meta")
    elif isinstance(block, FDFAConv2d):
        size, geometry = block.kernel_size, (block.stride, block.padding, block.dilation, block.groups)
        layer = nn.Conv2d(block.in_channels, block.out_channels, size, *geometry, device="meta")  # type: ignore[arg-type]
    else:
        raise TypeError(f"PlainFDFA: no plain form of {type(block).__name__}")
    layer.weight, layer.bias = block.weight, block.bias
    return _Chain(layer, _ACTIVATIONS[block.activation]())


class _PlainNode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, tangent: Tensor, *tensors: Tensor) -> Tensor:
        """tensors: the feedback of each block, then each perturbation, then each block's output."""
        n = len(tensors) // 3
        ctx.save_for_backward(tangent, *tensors[: 2 * n])
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (error,) = grads
        tangent, *tensors = ctx.saved_tensors
        n = len(tensors) // 2
        gradients, deltas = [], []
        for feedback, u in zip(tensors[:n], tensors[n:], strict=True):
            matrix = flatten_features(feedback)
            gradient = torch.addmm(matrix, tangent.t(), flatten_features(u), alpha=-1 / len(error))
            gradients.append(unflatten_features(gradient, feedback.shape))
            deltas.append(unflatten_features(error.mm(matrix), u.shape))
        return error, None, *gradients, *[None] * n, *deltas

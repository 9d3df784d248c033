"""What a training pass sees of user code: a forward, a module of unknown kind, a hook.

It calls functions, which have JVP rules. Its last may be the output layer, which the method can take.
And it may keep hidden activations for a loss of its own, whose gradient has to reach the block that
they come from, added to δ.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fdfa_ext._ops import extension
from fdfa_ext._torch_internals import backward_node_of
from fdfa_ext.jvp import FunctionRules, torchs_own
from fdfa_ext.reference import refuse_second_derivative, through_activation

# Of nn.Module itself, but for buffers, which user code assigns as it does attributes.
_NO_ATTRIBUTES = vars(nn.Module()).keys() - {"_buffers"}


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What user code may have kept there: a tensor, or a list of values."""
    attributes = module.__dict__
    for name in attributes.keys() - _NO_ATTRIBUTES:
        value = attributes[name]
        if isinstance(value, dict):
            yield name, [*value.values()]
        elif isinstance(value, (Tensor, list, tuple)):
            yield name, value


def kept_activation(modules: Iterable[nn.Module]) -> str | None:
    """An attribute of one of these modules that holds a tensor with a tangent, in words."""
    for module in modules:
        for name, value in _attributes(module):
            if any(isinstance(t, Tensor) and extension.has_tangent(t) for t in tree_leaves(value)):
                return f"'{name}' of a {type(module).__name__}"
    return None


@dataclass(slots=True)
class OutputLayer:
    """A linear output layer that is left to the method."""

    weight: Tensor
    bias: Tensor | None
    input: Tensor | None = None  # [N, in_features], where its result is computed already


class OwnCodeRules(FunctionRules):
    """FunctionRules that remember what the code of one pass made.

    A linear output layer is F.linear where it is the last function of a forward, its result is what
    the forward returns, and nobody else has it. Once found, by its weight, the next pass computes it
    without a graph. Where that pass does otherwise, it `strayed`, and is void.
    """

    def __init__(self, weight: Tensor | None, perturbs: bool, exposes: bool) -> None:
        self.weight = weight  # of the output layer in the pass before
        self.perturbs = perturbs
        self.exposes = exposes
        self.last: tuple[Tensor, Tensor] | None = None  # result and weight of F.linear, called last
        self.layer: OutputLayer | None = None
        self.strayed = False
        self.within_block = False  # whose functions are its own business
        self.made: list[weakref.ref[Tensor]] = []  # tensors with a tangent that the code was given

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if type(func) is FunctionType:
            func = torchs_own(func)
        if self.within_block:
            return func(*args, **(kwargs or {}))
        if self.layer is not None:
            self.strayed = True
        if func is not F.linear or kwargs or len(args) != 3:
            self.last = None
            result = super().__torch_function__(func, types, args, kwargs)
            if func is not Tensor.detach and torch.is_grad_enabled():
                self.watch(result)
            return result
        x, weight, bias = args
        if weight is self.weight and weight is not None:
            if self.exposes and x.requires_grad and not leaves_behind(x):
                x = x.detach()
            found = extension.dual_output_layer(x, weight, bias, self.perturbs)
            if found is not None:
                result, x = found
                self.layer = OutputLayer(weight, bias, x)
                self.last = result, weight
                return result
        result = super().__torch_function__(func, types, args)
        self.last = None if weight is None else (result, weight)
        self.watch(result)
        return result

    def watch(self, result: Any) -> None:
        """Adds a tensor, or several, to what the code was given."""
        if isinstance(result, Tensor):
            if extension.has_tangent(result):  # else it comes from no block
                self.made.append(weakref.ref(result))
        elif isinstance(result, (tuple, list)):
            for item in result:
                self.watch(item)

    def forget(self, result: Any) -> None:
        """Leaves out a tensor that the code hands on, and autograd may keep for what is made of it."""
        self.made = [made for made in self.made if made() is not result]

    def watch_attributes(self, modules: Iterable[nn.Module]) -> None:
        """Adds what these modules hold, which functions that no mode sees may have made."""
        for module in modules:
            for _, value in _attributes(module):
                self.watch(value)

    def keeps_activations(self, output: Any) -> bool:
        """Whether the code has let live any tensor with a tangent but its output.

        To be asked at its end. Autograd may keep one too, where a function without a rule reads it
        behind the blocks; it costs time alone to take that for the code.
        """
        return any([made() is not None and made() is not output for made in self.made])


# Where activations are kept, blocks hand them out with a graph that leads to the blocks' own parameters
# and ends there: each block cuts its input off from it, and so does the output part.


class OutputWalk:
    """Whether the output's gradient is on its way to the parameters behind the blocks. One that a block
    has too would lead it on into that block."""

    __slots__ = ("runs",)

    def __init__(self) -> None:
        self.runs = False


def expose(
    output: Tensor, anchor: Tensor, saved_activation: Tensor, activation: str, walk: OutputWalk
) -> Tensor:
    """A block's output y [N, *features], from which gradients go to the block's anchor, as δ does.

    walk: that of the pass, which ends here.
    """
    exposed: Tensor = _Exposed.apply(output, anchor, saved_activation, activation, walk)
    return exposed


class _Exposed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        anchor: Tensor,
        saved_activation: Tensor,
        activation: str,
        walk: OutputWalk,
    ) -> Tensor:
        ctx.save_for_backward(saved_activation)
        ctx.activation, ctx.walk = activation, walk
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        if ctx.walk.runs:
            return None, None, None, None, None
        (saved_activation,) = ctx.saved_tensors
        delta = through_activation(ctx.activation, saved_activation, grads[0])
        return None, delta, None, None, None


_EXPOSED_NODE = backward_node_of(_Exposed)


def leaves_behind(x: Tensor) -> list[Tensor]:
    """The leaves that the graph of x leads to, without those behind what blocks expose.

    x requires a gradient: one without a graph is a leaf itself.
    """
    if x.grad_fn is None:
        return [x]
    return [node.variable for node in nodes_behind(x) if hasattr(node, "variable")]


def nodes_behind(*tensors: Tensor) -> set[Any]:
    """The nodes of their graph, up to those that blocks expose."""
    seen: set[Any] = set()
    nodes: list[Any] = [t.grad_fn for t in tensors]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen and not isinstance(node, _EXPOSED_NODE):
            seen.add(node)
            nodes += [after for after, _ in node.next_functions]
    return seen


def cut_from_blocks(output: Tensor, exposed: Sequence[Tensor], walk: OutputWalk) -> Tensor:
    """The output, whose gradient reaches the parameters behind the blocks, and no block."""
    if not output.requires_grad:
        return output
    leaves = leaves_behind(output)
    if not leaves:
        return output.detach()
    cut: Tensor = _OutputPart.apply((output,), exposed, walk, *leaves)
    return cut


class _OutputPart(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        graph: Sequence[Tensor],
        exposed: Sequence[Tensor],
        walk: OutputWalk,
        *leaves: Tensor,
    ) -> Tensor:
        """graph: the output, in a tuple for autograd not to see it."""
        ctx.graph, ctx.walk, ctx.inputs = graph, walk, (*leaves, *exposed)
        return graph[0].detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Those of what blocks expose are for backward hooks on the way, which wait for them. Losses on
        # activations may walk the same graph after this.
        ctx.walk.runs = True
        try:
            found = torch.autograd.grad(
                ctx.graph, ctx.inputs, grads, retain_graph=True, allow_unused=True
            )
        finally:
            ctx.walk.runs = False
        return None, None, None, *found[: len(ctx.needs_input_grad) - 3]

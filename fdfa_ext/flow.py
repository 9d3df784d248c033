"""Which layers and norms of a traced forward read what others return."""

from collections.abc import Iterable, Iterator, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize

from fdfa_ext.duals import first_tensor
from fdfa_ext.own_code import nodes_behind
from fdfa_ext.trace import ModuleCall, Trace

# Over positions or samples, as norms of images are.
WIDE_NORMS = (nn.GroupNorm, _BatchNorm, _InstanceNorm)

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
# Functions by the names of their nodes in autograd: those that multiply features by features, that may
# multiply parts of the same, that add, and that move nothing but the shape.
_PRODUCTS = {"Mul", "Div", "Addcmul", "Lerp", "Mm", "Bmm", "Addmm", "Baddbmm", "ScaledDotProduct"}
_GATES = {"Glu", "Prod"}
_SUMS = {"Add", "Sub"}
_VIEWS = {
    "View",
    "UnsafeView",
    "ReshapeAlias",
    "Alias",
    "Squeeze",
    "Unsqueeze",
    "Transpose",
    "Permute",
    "T",
}
# That keep the order of positions and features: by numbers, where they have one operand, and of a part.
_SCALED = {"Mul", "Div", "Slice", "View", "UnsafeView", "ReshapeAlias", "Alias"}


class Readers:
    """Which layers and norms read what a call returns, through modules and functions of other kinds."""

    def __init__(self, traced: Trace) -> None:
        calls = [call for call in traced.calls if call.results]
        self.norms = {c for c in calls if isinstance(c.module, WIDE_NORMS) or _normalises(c)}
        # In the order of the calls.
        self.all = [c for c in calls if c in self.norms or has_matrices(c.module)]
        self._nodes = {node for call in self.all for node in call.results}
        self._behind = {call: self._reached(_nodes_of(call.read)) for call in self.all}

    def reads(self, reader: ModuleCall, call: ModuleCall) -> bool:
        return call.node in self._behind.get(reader, ())

    def of(self, made: Set[Any]) -> list[ModuleCall]:
        """Those that read what these nodes of autograd made."""
        others = [call for call in self.all if made.isdisjoint(call.results)]
        return [call for call in others if not made.isdisjoint(self._behind[call])]

    def reads_first(self, reader: ModuleCall, made: Set[Any]) -> bool:
        """Whether what these nodes made comes to a reader in its first argument."""
        return not made.isdisjoint(self._reached(_nodes_of(reader.read[:1]), made))

    def multiplies(self, reader: ModuleCall, made: Set[Any]) -> bool:
        """Whether what these nodes made is multiplied by other features, or by a part of the same,
        before it comes to a reader."""
        joined = self._between(reader, made)
        return any(name in _GATES or (alike and name in _PRODUCTS) for name, alike in joined)

    def adds(self, reader: ModuleCall, made: Set[Any]) -> bool:
        """Whether other features are added to what these nodes made before it comes to a reader."""
        return any(alike and name in _SUMS for name, alike in self._between(reader, made))

    def changes(self, reader: ModuleCall, made: Set[Any]) -> bool:
        """Whether functions make more than a view of what these nodes made before it comes to a
        reader."""
        return any(name not in _VIEWS for name, _ in self._between(reader, made))

    def way_from(self, reader: ModuleCall, call: ModuleCall) -> set[Any]:
        """The nodes from what a call returns to a reader that reads it alone, as a whole, in part or
        times a number; none where it reads something else."""
        (node,) = _nodes_of(reader.read[:1]) or (None,)
        way: set[Any] = set()
        while node is not None and node is not call.node:
            way.add(node)
            operands = [after for after, _ in node.next_functions if after is not None]
            is_scaled = node.name().partition("Backward")[0] in _SCALED and len(operands) == 1
            node = operands[0] if is_scaled else None
        return set() if node is None else way | {node}

    def recurs(self, made: Set[Any]) -> bool:
        """Whether a layer made one of these of another."""
        own = [call for call in self.all if not made.isdisjoint(call.results)]
        return any(not made.isdisjoint(self._behind[call]) for call in own)

    def _between(self, reader: ModuleCall, made: Set[Any]) -> Iterator[tuple[str, bool]]:
        """The functions between these nodes and a reader, by name, and whether several operands of each
        are features."""
        ends = self._nodes | made
        for node in self._reached(_nodes_of(reader.read), made) - ends:
            operands = [self._reached([after], made) for after, _ in node.next_functions]
            features = [found for found in operands if not ends.isdisjoint(found)]
            if any(not made.isdisjoint(found) for found in features):
                name = node.name().partition("Backward")[0]
                is_attention = name.startswith("ScaledDotProduct")
                yield "ScaledDotProduct" if is_attention else name, len(features) > 1

    def norms_of(self, layer: ModuleCall, end: ModuleCall) -> list[ModuleCall]:
        """The norms that read what this layer's group returns, if nothing else does and the group has
        none itself."""
        if end.node is None or layer.node is None:
            return []
        group = self._reached([end.node]) - {layer.node}
        if any(norm.node in group for norm in self.norms):
            return []
        readers = self.of({end.node})
        return readers if all(call in self.norms for call in readers) else []

    def ends(self, last: ModuleCall, call: ModuleCall) -> bool:
        """Whether this call returns what the last one makes, with no layer or norm in between."""
        return last.node in self._reached([call.node])

    def skips(self, call: ModuleCall) -> bool:
        """Whether it returns its input, or a part of it, beside what its layers make."""
        read = {edge.node for edge in call.read if edge is not None}
        return not read.isdisjoint(self._reached([call.node]))

    def begins(self, norm: ModuleCall, call: ModuleCall) -> bool:
        """Whether the norm reads the input of this call that it is in."""
        if any(t is read for t in norm.inputs for read in call.inputs):
            return True
        return any(e.node in self._behind.get(norm, ()) for e in call.read if e is not None)

    def _reached(self, nodes: Iterable[Any], ends: Set[Any] = frozenset()) -> set[Any]:
        """These nodes and those behind them, up to those of layers, norms and other ends."""
        seen: set[Any] = set()
        nodes = [*nodes]
        while nodes:
            node = nodes.pop()
            if node is not None and node not in seen:
                seen.add(node)
                if node not in self._nodes and node not in ends:
                    nodes += [after for after, _ in node.next_functions]
        return seen


def _nodes_of(edges: Iterable[GradientEdge | None]) -> list[Any]:
    return [edge.node for edge in edges if edge is not None]


def ends(layers: Sequence[ModuleCall]) -> set[nn.Module]:
    """Those of these calls that never lead to another of them."""
    before = nodes_behind(*(t for call in layers for t in call.inputs))
    leading = {call.module for call in layers if not before.isdisjoint(call.results)}
    return {call.module for call in layers} - leading


def is_layer(module: nn.Module) -> bool:
    """Whether it is called as a whole. A module with others in it may hold bare parameters, such as
    positions."""
    inner = [name for name, _ in module.named_children() if name != "parametrizations"]
    made_of = isinstance(module, (parametrize.ParametrizationList, nn.MultiheadAttention))
    return not inner if not made_of else isinstance(module, nn.MultiheadAttention)


def own_parameters(module: nn.Module) -> list[Tensor]:
    own: list[Any] = [*module._parameters.values()]
    if parametrize.is_parametrized(module):
        parametrized: Any = module.parametrizations
        own += [getattr(module, name) for name in parametrized]
    return [p for p in own if p is not None]


def has_matrices(module: nn.Module) -> bool:
    """Whether it is a layer with weights of its own that map features, as no norm has."""
    if isinstance(module, _EMBEDDINGS) or not is_layer(module):
        return False
    return any(p.dim() >= 2 for p in own_parameters(module))


def has_bare_matrices(module: nn.Module) -> bool:
    """Whether it has weights of its own that map features, but is called by parts."""
    matrices = [p for p in own_parameters(module) if sum(size > 1 for size in p.shape) > 1]
    return bool(matrices) and not is_layer(module)


def learns(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


@torch.no_grad()
def _normalises(call: ModuleCall) -> bool:
    """Whether the module is a norm of each token's features by themselves: it makes the same of twice
    the features, and of one token what it makes of it among others."""
    if isinstance(call.module, (nn.LayerNorm, nn.RMSNorm)):
        return True
    if type(call.module).__module__.startswith("torch.nn."):
        return False
    x, y = call.inputs[0] if len(call.inputs) == 1 else None, call.output
    if x is None or y is None or not call.makes_features or x.shape != y.shape or not x.any():
        return False
    if any(has_matrices(inner) for inner in call.module.modules()):
        return False
    last = (slice(None), *[slice(-1, None)] * (x.dim() - 2))  # token or pixel
    x = x * (8 / x.abs().max())  # far above what norms add to a variance
    try:
        once, twice = first_tensor(call.module(x)), first_tensor(call.module(2 * x[last]))
    except Exception:  # of code of the user's, for inputs that it was not given
        return False
    if once is None or twice is None or once.shape != x.shape or twice.shape != x[last].shape:
        return False
    return bool((once[last] - twice).abs().max() <= 1e-2 * once[last].abs().max())


def keeps_positions(norm: ModuleCall, later: Sequence[ModuleCall], composite: ModuleCall) -> bool:
    """Whether what the norm's output [N, *positions, D] leads to, up to the next norm or the end of the
    composite, depends at each position on that position alone, as it does not behind attention."""
    output, result = norm.output, composite.output
    if norm.made is None or output is None or result is None:
        return False  # nothing before it learns
    ends = [end for call in later for end in zip(call.read, call.inputs, strict=True)]
    for edge, t in [*ends, (composite.made, result)]:
        if edge is not None and t.shape == output.shape:
            spreads = _spreads(norm.made, edge, t)
            if spreads is not None:
                return not spreads
    return False


def _spreads(source: GradientEdge, end: GradientEdge, like: Tensor) -> bool | None:
    """Whether a position of the end, a tensor like this [N, *positions, D], depends on others of the
    source; None where the end depends on none."""
    rows = like.unsqueeze(1).flatten(1, -2).shape[1]
    for place in {0, rows // 2, rows - 1} if rows else ():
        # NaN goes through weights that are zero at the start, as of a residual branch.
        error = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
        error.unsqueeze(1).flatten(1, -2)[:, place] = torch.nan
        with torch.autograd.set_detect_anomaly(False):
            (found,) = torch.autograd.grad(
                [end], [source], [error], retain_graph=True, allow_unused=True
            )
        if found is None:
            return None
        others = [other for other in range(rows) if other != place]
        if found.unsqueeze(1).flatten(1, -2)[:, others].isnan().any():
            return True
    return False

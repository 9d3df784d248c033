"""Points that are found in the trace of one forward, by the tensors that go in and out of modules."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from fdfa_ext.duals import first_tensor
from fdfa_ext.fusion import channels_first
from fdfa_ext.layers import Block
from fdfa_ext.own_code import nodes_behind
from fdfa_ext.points import channels_first_at
from fdfa_ext.positions import Positions
from fdfa_ext.trace import ModuleCall, Trace
from fdfa_ext.warning import warn

GRANULARITIES = ("block", "layer")

_TRANSFORMER_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
# Over positions or samples, as norms of images are.
_WIDE_NORMS = (nn.GroupNorm, _BatchNorm, _InstanceNorm)
# They change no value, so that a point before them has the shape that patches want.
_VIEWS = (nn.Flatten, nn.Unflatten, nn.Identity)


def default_output(traced: Trace) -> str | None:
    """Name of the module whose result is the network's output: the layer that returns the model's
    result, or the last behind that of its tensors which most layers are behind. None where the output
    is what the model makes of one."""
    names = traced.names()
    times = Counter(call.module for call in traced.calls)
    layers = [call for call in traced.calls if _is_layer(call.module) and _own_parameters(call.module)]
    if isinstance(traced.result, Tensor) and traced.result.dim() > 0:
        # In training mode the model may return more.
        ends = [call for call in layers if call.output is traced.result and times[call.module] == 1]
        return names[ends[-1].module] if ends and ends[-1].module is not traced.module else None
    layers = [call for call in layers if call.makes_features]
    behind: list[ModuleCall] = []
    for t in tree_leaves(traced.result):
        if isinstance(t, Tensor) and t.numel() > 1:  # else a loss
            nodes = nodes_behind(t)
            behind = max(behind, [call for call in layers if call.node in nodes], key=len)
    found = behind or layers
    if not found or times[found[-1].module] > 1:
        return None
    end = found[-1]
    before = nodes_behind(end.output) if end.output is not None else set()
    beside = [call for call in found if call.node not in before]
    if beside:
        warn(
            f"FDFA: the output is taken to be that of {names[end.module]!r}, but the model's result "
            f"depends on layer {names[beside[-1].module]!r} beside it, through which points get no "
            "error; name the module that returns the output by output=",
        )
    return names[end.module]


def auto_points(
    traced: Trace, granularity: str, output: str | None, rows: int | None = None
) -> list[str]:
    """Names for `at`. output: name of the module that returns the network's, None for the model itself.
    rows: number of parts that samples have, such as the nodes of graphs.

    A point stands after each layer with the norm, activation, pool and dropout that alone read its
    output, and none after one that leads to no other layer, as the output's. Where a class of the
    model's repeats, each of several layers, a point stands after each of these instead, unless
    granularity is "layer". If these are transformer layers that normalise their input first, nothing
    cuts the skip connections, and points stand after their norms and the norm that reads the last one's
    output. A norm has none whose features go to other positions within the layer, as attention's
    keys do: B is that of a position by itself. Residual and dense blocks of images that normalise
    first, and residual ones that have no norm after their last layer, have one point each, after the
    first norm with its activation. So has a layer whose output norms alone read, through sums or
    concatenations: a point before a norm drives the features up, since the norm cancels the error along
    them. A layer that the output does not depend on has none, nor have features that the model returns
    beside the output, if others are left: a loss on them reaches what made them.

    Raises:
        ValueError: no place is left for a point.
    """
    names = traced.names()
    calls, others, behind = _calls_to_output(traced, output, names, rows)
    times = Counter(call.module for call in traced.calls)
    blocks = [member for member in names if isinstance(member, Block)]
    # Where no point may stand: blocks have their own, and the output layer its exact gradient.
    without = {inner for block in blocks for inner in block.modules()} | behind
    layers = [call for call in calls if _has_matrices(call.module)]
    # A layer that leads to no other has its exact gradient, as the output's own.
    ends = _ends([call for call in traced.calls if _has_matrices(call.module)])
    behind |= ends
    without |= ends
    points: list[nn.Module] = []
    start = 0  # of the calls that nothing may be cut before
    readers = None if granularity == "layer" else _Readers(traced)
    if readers is not None:
        composites = _repeated(calls, times, without, behind, names, readers)
        without |= {inner for composite in composites for inner in composite.modules()}
        points, start = _points_of(composites, calls, traced, times, readers)
    for call in layers:
        place = calls.index(call)
        if call.module not in without and place >= start and _learns(call.module):
            uses = [i for i, other in enumerate(calls) if other.module is call.module]
            groups = [_end_of_group(traced, calls, use, times, without) for use in uses]
            end = groups[0].module if len({group.module for group in groups}) == 1 else call.module
            norms = [] if readers is None else readers.norms_of(call, groups[0])
            if norms and all(norm in calls and norm.module not in without for norm in norms):
                starts = [calls.index(norm) for norm in norms]
                points += [_end_of_group(traced, calls, i, times, without).module for i in starts]
            else:
                points.append(end)
    returned = _returned(traced, output, names)
    points = [point for point in points if point not in returned] or points
    left = [names[c.module] for c in others if _has_matrices(c.module) and c.module not in without]
    if left and points:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        warn(
            f'FDFA: at="auto" puts no point after layer {left[0]!r}{more}, whose features have other '
            "samples than the output; what has no point learns by those after it",
        )
    if not points and not blocks:
        raise ValueError(_no_point(traced, output, names))
    return list(dict.fromkeys(names[point] for point in points))


class _Readers:
    """Which layers and norms read what a call returns, through modules and functions of other kinds."""

    def __init__(self, traced: Trace) -> None:
        calls = [call for call in traced.calls if call.node is not None]
        self.norms = {c for c in calls if isinstance(c.module, _WIDE_NORMS) or _normalises(c)}
        # In the order of the calls.
        self.all = [c for c in calls if c in self.norms or _has_matrices(c.module)]
        self._nodes = {call.node for call in self.all}
        self._behind = {call: self._reached(call.read) for call in self.all}

    def reads(self, reader: ModuleCall, call: ModuleCall) -> bool:
        return call.node in self._behind.get(reader, ())

    def norms_of(self, layer: ModuleCall, end: ModuleCall) -> list[ModuleCall]:
        """The norms that read what this layer's group returns, if nothing else does and the group has
        none itself."""
        if end.node is None or layer.node is None:
            return []
        group = self._reached([end.made]) - {layer.node}
        if any(norm.node in group for norm in self.norms):
            return []
        readers = [call for call in self.all if call.node != end.node and self.reads(call, end)]
        return readers if all(call in self.norms for call in readers) else []

    def ends(self, last: ModuleCall, call: ModuleCall) -> bool:
        """Whether this call returns what the last one makes, with no layer or norm in between."""
        return last.node in self._reached([call.made])

    def skips(self, call: ModuleCall) -> bool:
        """Whether it returns its input, or a part of it, beside what its layers make."""
        read = {edge.node for edge in call.read if edge is not None}
        return not read.isdisjoint(self._reached([call.made]))

    def begins(self, norm: ModuleCall, call: ModuleCall) -> bool:
        """Whether the norm reads the input of this call that it is in."""
        if any(t is read for t in norm.inputs for read in call.inputs):
            return True
        return any(e.node in self._behind.get(norm, ()) for e in call.read if e is not None)

    def _reached(self, edges: Iterable[GradientEdge | None]) -> set[Any]:
        """Nodes behind these, up to those of layers and norms."""
        seen: set[Any] = set()
        nodes: list[Any] = [edge.node for edge in edges if edge is not None]
        while nodes:
            node = nodes.pop()
            if node is not None and node not in seen:
                seen.add(node)
                if node not in self._nodes:
                    nodes += [after for after, _ in node.next_functions]
        return seen


def _output_of(traced: Trace, output: str | None, names: dict[nn.Module, str]) -> Any:
    """What the module of this name returned, or the model itself."""
    if output is None:
        return traced.result
    return next((c.output for c in reversed(traced.calls) if names[c.module] == output), traced.result)


def _returned(traced: Trace, output: str | None, names: dict[nn.Module, str]) -> set[nn.Module]:
    """The modules whose features the model returns beside the network's output, as they are or with no
    layer in between: a loss on them would train nothing behind a point."""
    end = _output_of(traced, output, names)
    found: set[nn.Module] = set()
    for t in tree_leaves(traced.result):
        if isinstance(t, Tensor) and t is not end:
            nodes = nodes_behind(t)
            leading = [call for call in traced.calls if call.node in nodes]
            layers = [call for call in leading if _has_matrices(call.module)]
            passed = nodes_behind(*(x for call in layers for x in call.inputs))
            found |= {call.module for call in leading if call.node not in passed}
    return found


def _no_point(traced: Trace, output: str | None, names: dict[nn.Module, str]) -> str:
    result = _output_of(traced, output, names)
    shape = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
    hidden = [call for call in traced.calls if call.makes_features and _has_matrices(call.module)]
    found = "no layer returns features"
    if len(hidden) == 1 and hidden[0].output is result:
        return (
            f'FDFA: at="auto" finds no hidden layer in {type(traced.module).__name__}: its only layer '
            f"{names[hidden[0].module]!r} is the output layer, which learns by its exact gradient. "
            "Train the model as it is, or add a hidden layer"
        )
    if hidden:
        features: Any = hidden[0].output
        found = f"layer {names[hidden[0].module]!r} returns {list(features.shape)}"
    return (
        f'FDFA: at="auto" finds no hidden layer in {type(traced.module).__name__} that returns '
        f"features of the output's samples, tokens or pixels: the output is {shape}, and {found}. "
        "Where the model permutes a layer's result, name that layer in output=; where rows are parts "
        "of a sample, as a graph's nodes, give sample_index=; where the model returns all tokens with "
        "targets alone, give these in example_input; else return [N, K], or name modules in at="
    )


def _calls_to_output(
    traced: Trace, output: str | None, names: dict[nn.Module, str], rows: int | None
) -> tuple[list[ModuleCall], list[ModuleCall], set[nn.Module]]:
    """The calls that return features of the output's samples, tokens or pixels, on which it depends;
    those that return other features; and the modules of the output itself."""
    end = _output_of(traced, output, names)
    behind = set() if output is None else {traced.module.get_submodule(output)}
    if not isinstance(end, Tensor):
        return [], [], behind
    if end.dim() == 0:
        raise ValueError(
            f"FDFA: the output of {type(traced.module).__name__} is a single number; name the module "
            "that returns the outputs [N, K] by output="
        )
    nodes = nodes_behind(end)
    own = None
    if end.dim() > 2:
        first = channels_first([traced.module])
        if output is not None:
            first = channels_first_at(traced.module, output)
        own = Positions.of(end.shape, end.dim() - 2, first)

    def leads_there(call: ModuleCall) -> bool:
        return call.makes_features and (call.node is None or not nodes or call.node in nodes)

    def has_samples(call: ModuleCall) -> bool:
        features: Any = call.output
        if own is None:
            return features.shape[0] in (end.shape[0], rows)
        first = channels_first_at(traced.module, names[call.module])
        found = Positions.of(features.shape, len(own.grid), first)
        return found is not None and found.fits(own)

    leading = [*filter(leads_there, traced.calls)]
    return [*filter(has_samples, leading)], [call for call in leading if not has_samples(call)], behind


def _ends(layers: Sequence[ModuleCall]) -> set[nn.Module]:
    """Those of these calls that never lead to another of them."""
    before = nodes_behind(*(t for call in layers for t in call.inputs))
    leading = {call.module for call in layers if call.node in before}
    return {call.module for call in layers} - leading


def _is_layer(module: nn.Module) -> bool:
    """Whether it is called as a whole. A module with others in it may hold bare parameters, such as
    positions."""
    inner = [name for name, _ in module.named_children() if name != "parametrizations"]
    made_of = isinstance(module, (parametrize.ParametrizationList, nn.MultiheadAttention))
    return not inner if not made_of else isinstance(module, nn.MultiheadAttention)


def _own_parameters(module: nn.Module) -> list[Tensor]:
    own: list[Any] = [*module._parameters.values()]
    if parametrize.is_parametrized(module):
        parametrized: Any = module.parametrizations
        own += [getattr(module, name) for name in parametrized]
    return [p for p in own if p is not None]


def _has_matrices(module: nn.Module) -> bool:
    """Whether it is a layer with weights of its own that map features, as no norm has."""
    if isinstance(module, _EMBEDDINGS) or not _is_layer(module):
        return False
    return any(p.dim() >= 2 for p in _own_parameters(module))


def _has_bare_matrices(module: nn.Module) -> bool:
    """Whether it has weights of its own that map features, but is called by parts."""
    matrices = [p for p in _own_parameters(module) if sum(size > 1 for size in p.shape) > 1]
    return bool(matrices) and not _is_layer(module)


def _learns(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _repeated(
    calls: Sequence[ModuleCall],
    times: Counter[nn.Module],
    without: set[nn.Module],
    behind: set[nn.Module],
    names: dict[nn.Module, str],
    readers: _Readers,
) -> list[nn.Module]:
    """The outermost modules of classes that repeat, such as residual blocks and transformer layers, or
    that read themselves what they return; and single ones that normalise their input first."""
    called = {call.module for call in calls}

    def fits(member: nn.Module) -> bool:
        kind = type(member)
        own = not kind.__module__.startswith("torch.nn.") or isinstance(member, _TRANSFORMER_LAYERS)
        if not own or member not in called or member in without:
            return False
        inner = {*member.modules()}
        layers = sum(_has_matrices(m) and times[m] > 0 for m in inner)
        return not inner & behind and (layers > 1 or any(map(_has_bare_matrices, inner)))

    fitting = [member for member in names if fits(member)]
    kinds = Counter(type(member) for member in fitting)

    def repeats(member: nn.Module) -> bool:
        own = [call for call in calls if call.module is member]
        again = any(t is before.output for call in own for t in call.inputs for before in own)
        return kinds[type(member)] > 1 or again

    def stands_alone(member: nn.Module) -> bool:
        own = [call for call in calls if call.module is member]
        within = any(inner in fitting and repeats(inner) for inner in member.modules())
        return not within and bool(_first_norms(own[-1], calls, readers))

    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for member in fitting:
        if member not in inside and (repeats(member) or stands_alone(member)):
            if _learns(member):
                found.append(member)
            inside.update(member.modules())
    return found


def _points_of(
    composites: Sequence[nn.Module],
    calls: Sequence[ModuleCall],
    traced: Trace,
    times: Counter[nn.Module],
    readers: _Readers,
) -> tuple[list[nn.Module], int]:
    """The points of repeated modules, and the place of the last call that a skip passes uncut."""
    norms = {c.module: _first_norms(c, calls, readers) for c in calls if c.module in composites}
    single = _single_norms([m for m in composites if not norms.get(m)], calls, readers)
    # Those whose features the next norm reads.
    stream = [c for c in calls if norms.get(c.module) or c.module in single]
    inside = {inner for composite in composites for inner in composite.modules()}

    def ends_stream(call: ModuleCall) -> bool:
        reads = any(readers.reads(call, before) for before in stream)
        return reads and call.module not in inside and call in readers.norms

    def end_of(norm: ModuleCall) -> nn.Module:
        if not isinstance(norm.module, _WIDE_NORMS):
            return norm.module
        return _end_of_group(traced, calls, calls.index(norm), times, set()).module

    ends = [call for call in calls if ends_stream(call)]
    within = [norm for call in stream for norm in norms.get(call.module, ())]
    in_order = sorted([*within, *ends], key=calls.index)
    wanted: set[ModuleCall] = set()
    try:
        for call in stream:
            for norm in norms[call.module]:
                if _keeps_positions(norm, in_order[in_order.index(norm) + 1 :], call):
                    wanted.add(norm)
    except Exception as error:  # of code of the user's
        wanted.clear()
        warn(
            'FDFA: at="auto" puts points after all norms of transformer layers; a backward in eval '
            "mode, which tells those that lead to other tokens, raises "
            f"{type(error).__name__}: {error}",
        )
    points: list[nn.Module] = []
    for call in calls:
        if norms.get(call.module):
            # Where all mix positions, B of single ones has to do.
            points += [norm.module for norm in norms[call.module] if norm in wanted or not wanted]
        elif call.module in single:
            points.append(end_of(single[call.module]))
        elif call.module in composites:
            points.append(call.module)
        elif call in ends:
            points.append(end_of(call))
    return points, calls.index(stream[-1]) if stream else 0


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
    if any(_has_matrices(inner) for inner in call.module.modules()):
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


def _first_norms(
    composite: ModuleCall, calls: Sequence[ModuleCall], readers: _Readers
) -> list[ModuleCall]:
    """The norms of the features within it, if one reads its input; else none."""
    inner = {*composite.module.modules()}
    output: Any = composite.output
    norms = [
        call
        for call in calls
        if call.module in inner
        and call in readers.norms
        and not isinstance(call.module, _WIDE_NORMS)
        and _shape(call.output) == output.shape
    ]
    found = {norm.module for norm in norms}
    norms = [n for n in norms if not found & ({*n.module.modules()} - {n.module})]
    first = any(t is read for call in norms for t in call.inputs for read in composite.inputs)
    return norms if first else []


def _single_norms(
    composites: Sequence[nn.Module], calls: Sequence[ModuleCall], readers: _Readers
) -> dict[nn.Module, ModuleCall]:
    """The first norm of each of these composites whose features a skip passes to the norms of later
    ones: it begins with a norm over positions or samples, or has none after its last layer."""
    inside = {inner for composite in composites for inner in composite.modules()}
    first: dict[nn.Module, ModuleCall] = {}
    skips: set[type[nn.Module]] = set()
    for call in calls:
        own = not type(call.module).__module__.startswith("torch.nn.") and call.module in inside
        inner = {*call.module.modules()} if own else set()
        within = [reader for reader in readers.all if reader.module in inner]
        norms = [reader for reader in within if reader in readers.norms and reader in calls]
        if not norms or len(norms) == len(within):
            continue
        norm = norms[0]
        if isinstance(norm.module, _WIDE_NORMS) and readers.begins(norm, call):
            skips |= {type(call.module)} if _shape(call.output) == _shape(norm.inputs[0]) else set()
        elif any(readers.ends(norm, call) for norm in norms):
            continue
        first.setdefault(call.module, norm)
        skips |= {type(call.module)} if readers.skips(call) else set()
    passed = {norm for module, norm in first.items() if type(module) in skips}
    return {m: first[m] for m in composites if m in first and first[m] in passed}


def _shape(t: Tensor | None) -> torch.Size | None:
    return None if t is None else t.shape


def _keeps_positions(norm: ModuleCall, later: Sequence[ModuleCall], composite: ModuleCall) -> bool:
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


def _end_of_group(
    traced: Trace,
    calls: Sequence[ModuleCall],
    start: int,
    times: Counter[nn.Module],
    without: set[nn.Module],
) -> ModuleCall:
    """The last of the calls, from this layer's on, of modules that each alone read what the one before
    returns, and tell of a sequence whether its channels come first."""
    end = calls[start]
    names = traced.names()

    def has_channels_first(call: ModuleCall) -> bool:
        is_sequence = call.output is not None and call.output.dim() == 3
        return is_sequence and bool(channels_first_at(traced.module, names[call.module]))

    while True:
        readers = [
            (i, call)
            for i, call in enumerate(calls)
            if i > start and _is_layer(call.module) and any(t is end.output for t in call.inputs)
        ]
        if not readers:
            return end
        start, reader = readers[0]
        changes_in_place = reader.output is end.output  # later readers are its own
        is_alone = (len(readers) == 1 or changes_in_place) and len(reader.inputs) == 1
        joins = not _has_matrices(reader.module) and not isinstance(reader.module, _VIEWS)
        joins = joins and has_channels_first(reader) == has_channels_first(end)
        as_often = times[reader.module] == times[end.module]
        if not (is_alone and joins and as_often) or reader.module in without:
            return end
        end = reader

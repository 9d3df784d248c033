"""Points that are found in the trace of one forward, by the tensors that go in and out of modules."""

from collections import Counter
from collections.abc import Callable, Sequence, Set
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fdfa_ext.flow import (
    WIDE_NORMS,
    Readers,
    ends,
    has_bare_matrices,
    has_matrices,
    is_layer,
    keeps_positions,
    learns,
    own_parameters,
)
from fdfa_ext.fusion import channels_first
from fdfa_ext.layers import Block
from fdfa_ext.own_code import nodes_behind
from fdfa_ext.points import channels_first_at, point_at_input
from fdfa_ext.positions import Positions
from fdfa_ext.trace import ModuleCall, Trace
from fdfa_ext.warning import warn

GRANULARITIES = ("block", "layer")

_WIDE = 4  # outputs of the output layer for each of its features, above which B is of the features

_TRANSFORMER_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
# The functions of shares, or of one in two, at the end of a network; and a view as [N].
_SHARES = ("LogSoftmaxBackward", "SoftmaxBackward", "SigmoidBackward", "SqueezeBackward")
# They change no value, so that a point before them has the shape that patches want.
_VIEWS = (nn.Flatten, nn.Unflatten, nn.Identity)


def default_output(traced: Trace) -> str | None:
    """Name of the module whose result is the network's output: the layer that returns the model's
    result, or what it takes the shares of, since the mean Jacobian has not the slope of softmax. Or the
    last behind that of its tensors which most layers are behind. None where the output is what the
    model makes of one."""
    names = traced.names()
    times = Counter(call.module for call in traced.calls)
    layers = [call for call in traced.calls if is_layer(call.module) and own_parameters(call.module)]
    if isinstance(traced.result, Tensor) and traced.result.dim() > 0:
        # In training mode the model may return more.
        made = _before_shares(traced.result)
        ends = [call for call in layers if call.node is made or call.output is traced.result]
        ends = [call for call in ends if times[call.module] == 1]
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


def before_wide_layer(traced: Trace, points: Sequence[str], output: str) -> tuple[Sequence[str], str]:
    """Points and output where the features [N, T, D] that the output layer reads, token by token, are
    the network's output in its place, or else these. So they are if the layer is dense and far wider,
    as one of a vocabulary is, and a norm made them. With their error, exact through that layer, B is
    [D, D] and not [K, D]: for each point a K of 4 D costs a ninth of what backpropagation takes for a
    transformer layer."""
    names = traced.names()
    layer = next(call for call in reversed(traced.calls) if names[call.module] == output)
    made, read = layer.output, layer.first
    if not isinstance(layer.module, nn.Linear) or made is None or read is None or made.dim() < 3:
        return points, output
    if made.shape[-1] <= _WIDE * read.shape[-1]:
        return points, output
    readers = Readers(traced)
    found = [(norm, way) for norm in readers.norms if (way := readers.way_from(layer, norm))]
    if not found:
        return points, output
    norm, way = found[0]
    times = sum(call.module is norm.module for call in traced.calls)
    at_end = {f"{output}.input", *(names[call.module] for call in traced.calls if call.node in way)}
    left = [point for point in points if point not in at_end]
    if not left or times > 1 or _shape(norm.output) != read.shape:
        return points, output
    return left, names[norm.module]


def _before_shares(result: Tensor) -> Any:
    """The node of autograd that made what the result is the shares of, or the result itself."""
    node: Any = result.grad_fn
    while node is not None and node.name().startswith(_SHARES):
        node = node.next_functions[0][0]
    return node if node is not None else object()


def auto_points(
    traced: Trace, granularity: str, output: str | None, rows: int | None = None, patch: int = 1
) -> list[str]:
    """Names for `at`. output: name of the module that returns the network's, None for the model itself.
    rows: number of parts that samples have, such as the nodes of graphs.

    A point stands after each layer with the norm, activation, pool and dropout that alone read its
    output, and none after one that leads to no other layer, as the output's. Where a class of the
    model's repeats, each of several layers, a point stands after each of these instead, unless
    granularity is "layer". If these are transformer layers that normalise their input first, nothing
    cuts the skip connections, and points stand after their norms and the norm that reads the last one's
    output, unless the output layer alone reads that one. A norm has none whose features go to other
    positions within the layer, as attention's keys do: B is that of a position by itself. Residual and
    dense blocks of images that normalise first, and residual ones that have no norm after their last
    layer, have one point each, after the first norm with its activation. So has a layer whose output
    norms alone read, through sums or concatenations: a point before a norm drives the features up,
    since the norm cancels the error along them.

    Where functions stand between a layer and the only one that reads it, the point stands at the input
    of that, as behind modules that do the same; an image that is read as one row has no patches there.
    So it does at the inputs of all that read what functions pool, or multiply by other features, as a
    gate does: the mean Jacobian before it is the gate's mean. And where a layer returns its features
    beside another tensor, as a recurrent one its last state, or those of other samples than the
    output's. A layer that reads a gate and whose features are added to others has none: it learns by
    the points of those that read the sum.

    A layer that the output does not depend on has none, nor have features that the model returns beside
    the output, if others are left: a loss on them reaches what made them.

    Raises:
        ValueError: no place is left for a point.
    """
    return _Search(traced, output, rows, patch != 1).points(granularity)


class _Search:
    """Where points may stand in a trace.

    Attributes:
        calls: those that return features of the output's samples, tokens or pixels, on which it
            depends, in their order.
        without: the modules after which no point may stand.
        inside: those within blocks of the model's, which have points of their own.
    """

    def __init__(self, traced: Trace, output: str | None, rows: int | None, patched: bool) -> None:
        self.traced = traced
        self.patched = patched
        self.output = output
        self.rows = rows
        self.names = traced.names()
        self.times = Counter(call.module for call in traced.calls)
        self.end = _output_of(traced, output, self.names)
        if isinstance(self.end, Tensor) and self.end.dim() == 0:
            raise ValueError(
                f"FDFA: the output of {type(traced.module).__name__} is a single number; name the "
                "module that returns the outputs [N, K] by output="
            )
        self._nodes = nodes_behind(self.end) if isinstance(self.end, Tensor) else set()
        leading = [call for call in traced.calls if self._leads_to_output(call)]
        self.calls = [
            call for call in leading if self._has_samples(call.output, self.names[call.module])
        ]
        self._others = [
            call
            for call in traced.calls
            if call not in self.calls and not self._nodes.isdisjoint(call.results)
        ]
        # The output layer, and one that leads to no other, have their exact gradients.
        self._exact = ends([call for call in traced.calls if has_matrices(call.module)])
        if output is not None:
            self._exact.add(traced.module.get_submodule(output))
        self._blocks = [member for member in self.names if isinstance(member, Block)]
        self.without = {inner for block in self._blocks for inner in block.modules()} | self._exact
        self.inside: set[nn.Module] = set()
        self.readers = Readers(traced)
        self._gates: set[str] = set()  # the points behind them

    def points(self, granularity: str) -> list[str]:
        names = self.names
        points: list[str] = []
        start = 0  # of the calls that nothing may be cut before
        if granularity == "block":
            composites = self._repeated()
            self.inside = {inner for composite in composites for inner in composite.modules()}
            self.without |= self.inside
            found, start = self._points_of(composites)
            points = [names[module] for module in found]
        uncut = {*self.calls[:start]}
        cut: set[nn.Module] = set()
        for call in self.traced.calls:
            module = call.module
            may_stand = module not in self.without and call not in uncut
            if has_matrices(module) and learns(module) and may_stand:
                own = self._points_of_layer(call, granularity == "block")
                points += own
                cut |= {module} if own else set()
        at_end = {names[call.module] for call in self.traced.calls if call.output is self.end}
        points = [point for point in points if point not in at_end]
        returned = {names[module] for module in self._returned()}
        points = [point for point in points if point not in returned] or points
        left = [
            names[c.module]
            for c in self._others
            if has_matrices(c.module) and c.module not in self.without and c.module not in cut
        ]
        if left and points:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            warn(
                f'FDFA: at="auto" puts no point after layer {left[0]!r}{more}, whose features have '
                "other samples than the output, or go into no layer first; what has no point learns by "
                "those after it",
            )
        if not points and not self._blocks:
            raise ValueError(self._no_point())
        return list(dict.fromkeys(points))

    def _points_of_layer(self, call: ModuleCall, by_block: bool) -> list[str]:
        if call not in self.calls:
            return self._points_of_readers(self._nodes.intersection(call.results))
        readers = self.readers
        uses = [i for i, other in enumerate(self.calls) if other.module is call.module]
        groups = [self._end_of_group(use) for use in uses]
        made = {group.node for group in groups}
        end = groups[0].module if len({group.module for group in groups}) == 1 else call.module
        found: list[str] = []
        if by_block:
            norms = readers.norms_of(call, groups[0])
            if norms and all(n in self.calls and n.module not in self.without for n in norms):
                return [self._name_of_group(norm) for norm in norms]
            found = self._gated(made)
            self._gates.update(found)
            reads_gate = point_at_input(self.names[call.module], call.module) in self._gates
            if not found and reads_gate and all(readers.adds(r, made) for r in readers.of(made)):
                return []  # it learns by the points of those that read the sum
            found = found or self._behind_functions(groups[0], made)
        return found or [self.names[end]]

    def _behind_functions(self, group: ModuleCall, made: Set[Any]) -> list[str]:
        """Points where the only layer or norm reads what functions made of these nodes, the results of
        this group in all its uses, or where all read it pooled."""
        readers = self.readers
        features: Any = group.output
        alone = len(readers.of(made)) == 1 and not readers.recurs(made)

        def may(reader: ModuleCall) -> bool:
            if _is_pool_of(features, reader.first):
                return True
            is_row = reader.first is not None and reader.first.dim() < features.dim()
            return alone and readers.changes(reader, made) and not (self.patched and is_row)

        return self._points_of_readers(made, may)

    def _gated(self, made: Set[Any]) -> list[str]:
        """Points where layers and norms read what these nodes made, if all read a product of it."""
        return self._points_of_readers(made, lambda reader: self.readers.multiplies(reader, made))

    def _points_of_readers(
        self, made: Set[Any], may: Callable[[ModuleCall], bool] = lambda reader: True
    ) -> list[str]:
        """Points where layers and norms read what these nodes made, if each may have one."""
        points: list[str] = []
        for reader in self.readers.of(made):
            if self._nodes.isdisjoint(reader.results):
                continue
            point = self._point_of_reader(reader, made) if may(reader) else None
            if point is None:
                return []
            points.append(point)
        return points

    def _point_of_reader(self, reader: ModuleCall, made: Set[Any]) -> str | None:
        """Where a layer or norm reads what these nodes made, if it may stand there."""
        module = reader.module
        if module in self.inside or any(module in block.modules() for block in self._blocks):
            return None
        if reader in self.readers.norms and reader in self.calls and module not in self.without:
            return self._name_of_group(reader)
        point = point_at_input(self.names[module], module)
        if point is None or not self.readers.reads_first(reader, made):
            return None
        return point if self._has_samples(reader.first, point) else None

    def _leads_to_output(self, call: ModuleCall) -> bool:
        leads = call.node is None or not self._nodes or call.node in self._nodes
        return isinstance(self.end, Tensor) and call.makes_features and leads

    def _has_samples(self, features: Tensor | None, name: str) -> bool:
        """Whether these, at the point or module of this name, are of the output's samples, tokens or
        pixels."""
        if features is None or features.dim() < 2 or not features.is_floating_point():
            return False
        own = self._positions
        if own is None:
            return features.shape[0] in (self.end.shape[0], self.rows)
        first = channels_first_at(self.traced.module, name)
        found = Positions.of(features.shape, len(own.grid), first)
        return found is not None and found.fits(own)

    @cached_property
    def _positions(self) -> Positions | None:
        """Of the output, if it has any."""
        if self.end.dim() <= 2:
            return None
        module = self.traced.module
        first = channels_first([module])
        if self.output is not None:
            first = channels_first_at(module, self.output)
        return Positions.of(self.end.shape, self.end.dim() - 2, first)

    def _returned(self) -> set[nn.Module]:
        """The modules whose features the model returns beside the network's output, as they are or with
        no layer in between: a loss on them would train nothing behind a point."""
        found: set[nn.Module] = set()
        for t in tree_leaves(self.traced.result):
            if isinstance(t, Tensor) and t is not self.end:
                nodes = nodes_behind(t)
                leading = [call for call in self.traced.calls if call.node in nodes]
                layers = [call for call in leading if has_matrices(call.module)]
                passed = nodes_behind(*(x for call in layers for x in call.inputs))
                found |= {call.module for call in leading if call.node not in passed}
        return found

    def _no_point(self) -> str:
        traced, result, names = self.traced, self.end, self.names
        shape = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
        hidden = [call for call in traced.calls if call.makes_features and has_matrices(call.module)]
        found = "no layer returns features"
        if len(hidden) == 1 and hidden[0].output is result:
            return (
                f'FDFA: at="auto" finds no hidden layer in {type(traced.module).__name__}: its only '
                f"layer {names[hidden[0].module]!r} is the output layer, which learns by its exact "
                "gradient. Train the model as it is, or add a hidden layer"
            )
        if hidden:
            features: Any = hidden[0].output
            found = f"layer {names[hidden[0].module]!r} returns {list(features.shape)}"
        return (
            f'FDFA: at="auto" finds no hidden layer in {type(traced.module).__name__} that returns '
            f"features of the output's samples, tokens or pixels: the output is {shape}, and {found}. "
            "Where the model permutes a layer's result, name that layer in output=; where rows are "
            "parts of a sample, as a graph's nodes, give sample_index=; where the model returns all "
            "tokens with targets alone, give these in example_input; else return [N, K], or name "
            "modules in at="
        )

    def _repeated(self) -> list[nn.Module]:
        """The outermost modules of classes that repeat, such as residual blocks and transformer layers,
        or that read themselves what they return; and single ones that normalise their input first."""
        calls, names = self.calls, self.names
        called = {call.module for call in calls}

        def fits(member: nn.Module) -> bool:
            kind = type(member)
            own = not kind.__module__.startswith("torch.nn.") or isinstance(member, _TRANSFORMER_LAYERS)
            if not own or member not in called or member in self.without:
                return False
            inner = {*member.modules()}
            layers = sum(has_matrices(m) and self.times[m] > 0 for m in inner)
            return not inner & self._exact and (layers > 1 or any(map(has_bare_matrices, inner)))

        fitting = [member for member in names if fits(member)]
        kinds = Counter(type(member) for member in fitting)

        def repeats(member: nn.Module) -> bool:
            own = [call for call in calls if call.module is member]
            again = any(t is before.output for call in own for t in call.inputs for before in own)
            return kinds[type(member)] > 1 or again

        def stands_alone(member: nn.Module) -> bool:
            own = [call for call in calls if call.module is member]
            within = any(inner in fitting and repeats(inner) for inner in member.modules())
            return not within and bool(self._first_norms(own[-1]))

        found: list[nn.Module] = []
        inside: set[nn.Module] = set()
        for member in fitting:
            if member not in inside and (repeats(member) or stands_alone(member)):
                if learns(member):
                    found.append(member)
                inside.update(member.modules())
        return found

    def _points_of(self, composites: Sequence[nn.Module]) -> tuple[list[nn.Module], int]:
        """The points of repeated modules, and the place of the last call that a skip passes uncut."""
        calls, readers = self.calls, self.readers
        norms = {c.module: self._first_norms(c) for c in calls if c.module in composites}
        single = self._single_norms([m for m in composites if not norms.get(m)])
        # Those whose features the next norm reads.
        stream = [c for c in calls if norms.get(c.module) or c.module in single]

        def ends_stream(call: ModuleCall) -> bool:
            if call.module in self.inside or call not in readers.norms:
                return False
            before = [c for c in stream if readers.reads(call, c)]
            # Of tokens, all learn late if B has to learn first what the output layer tells exactly.
            after = readers.of({call.node}) if all(norms.get(c.module) for c in before) else []
            is_last = bool(after) and all(reader.module in self._exact for reader in after)
            return bool(before) and not is_last

        def end_of(norm: ModuleCall) -> nn.Module:
            if not isinstance(norm.module, WIDE_NORMS):
                return norm.module
            return self._end_of_group(calls.index(norm), set()).module

        ends = [call for call in calls if ends_stream(call)]
        within = [norm for call in stream for norm in norms.get(call.module, ())]
        in_order = sorted([*within, *ends], key=calls.index)
        wanted: set[ModuleCall] = set()
        try:
            for call in stream:
                for norm in norms[call.module]:
                    if keeps_positions(norm, in_order[in_order.index(norm) + 1 :], call):
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

    def _first_norms(self, composite: ModuleCall) -> list[ModuleCall]:
        """The norms of the features within it, if one reads its input; else none."""
        inner = {*composite.module.modules()}
        output: Any = composite.output
        norms = [
            call
            for call in self.calls
            if call.module in inner
            and call in self.readers.norms
            and not isinstance(call.module, WIDE_NORMS)
            and _shape(call.output) == output.shape
        ]
        found = {norm.module for norm in norms}
        norms = [n for n in norms if not found & ({*n.module.modules()} - {n.module})]
        first = any(t is read for call in norms for t in call.inputs for read in composite.inputs)
        return norms if first else []

    def _single_norms(self, composites: Sequence[nn.Module]) -> dict[nn.Module, ModuleCall]:
        """The first norm of each of these composites whose features a skip passes to the norms of later
        ones: it begins with a norm over positions or samples, or has none after its last layer."""
        calls, readers = self.calls, self.readers
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
            if isinstance(norm.module, WIDE_NORMS) and readers.begins(norm, call):
                skips |= {type(call.module)} if _shape(call.output) == _shape(norm.inputs[0]) else set()
            elif any(readers.ends(norm, call) for norm in norms):
                continue
            first.setdefault(call.module, norm)
            skips |= {type(call.module)} if readers.skips(call) else set()
        passed = {norm for module, norm in first.items() if type(module) in skips}
        return {m: first[m] for m in composites if m in first and first[m] in passed}

    def _name_of_group(self, call: ModuleCall) -> str:
        return self.names[self._end_of_group(self.calls.index(call)).module]

    def _end_of_group(self, start: int, without: Set[nn.Module] | None = None) -> ModuleCall:
        """The last of the calls, from this layer's on, of modules that each alone read what the one
        before returns, and tell of a sequence whether its channels come first."""
        calls = self.calls
        without = self.without if without is None else without
        end = calls[start]

        def has_channels_first(call: ModuleCall) -> bool:
            is_sequence = call.output is not None and call.output.dim() == 3
            return is_sequence and bool(channels_first_at(self.traced.module, self.names[call.module]))

        while True:
            readers = [
                (i, call)
                for i, call in enumerate(calls)
                if i > start and is_layer(call.module) and any(t is end.output for t in call.inputs)
            ]
            if not readers:
                return end
            start, reader = readers[0]
            changes_in_place = reader.output is end.output  # later readers are its own
            is_alone = (len(readers) == 1 or changes_in_place) and len(reader.inputs) == 1
            joins = not has_matrices(reader.module) and not isinstance(reader.module, _VIEWS)
            joins = joins and has_channels_first(reader) == has_channels_first(end)
            as_often = self.times[reader.module] == self.times[end.module]
            if not (is_alone and joins and as_often) or reader.module in without:
                return end
            end = reader


def _output_of(traced: Trace, output: str | None, names: dict[nn.Module, str]) -> Any:
    """What the module of this name returned, or the model itself."""
    if output is None:
        return traced.result
    return next((c.output for c in reversed(traced.calls) if names[c.module] == output), traced.result)


def _is_pool_of(features: Tensor | None, read: Tensor | None) -> bool:
    """Whether a layer read as many channels of fewer positions, to go by the shapes. A view of an image
    as one row has no patches."""
    if features is None or read is None or read.dim() < 2 or read.numel() >= features.numel():
        return False
    return read.shape[1] == features.shape[1] or read.shape[-1] == features.shape[-1]


def _shape(t: Tensor | None) -> torch.Size | None:
    return None if t is None else t.shape

"""The dual pass of a training step: what its blocks do, and what they leave for the backward.

A block takes primal and tangent apart, since an operator of torch.library that is given a dual tensor
drops its tangent in silence. Between blocks the two travel apart too where every module's JVP rule is
known, and else on torch's forward-mode dual tensors, so that any torch module may stand there.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from threading import get_ident
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdfa_ext import reference
from fdfa_ext._ops import fused
from fdfa_ext._torch_internals import is_in_checkpoint, traced_make_dual, traced_unpack_dual
from fdfa_ext.data_parallel import Ranks
from fdfa_ext.duals import first_tensor, make_dual, refuse_unknown, unpack_dual, with_first
from fdfa_ext.fusion import Chain, FusedTail, norm_arguments
from fdfa_ext.jvp import (
    Call,
    PrimalTangent,
    forward_dual,
    has_fused_pool,
    pool_geometry,
    single_precision,
    without_rules,
)
from fdfa_ext.noise import channels_last, memory_format_of
from fdfa_ext.own_code import OutputLayer, OutputWalk, OwnCodeRules, expose, leaves_behind
from fdfa_ext.patches import as_image, as_sequence
from fdfa_ext.positions import Cells, Members, Positions, Same, Source
from fdfa_ext.reference import NEEDS_PRE_ACTIVATION

BACKENDS: dict[str, Any] = {"fused": fused, "reference": reference}


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """What a dense layer at the end of a block's graph has computed with."""

    x: Tensor  # [N, *, in_features], as it was at this version
    version: int
    weight: Tensor
    bias: Tensor | None


@dataclass(slots=True)
class BlockRecord:
    """What the feedback step needs of one block once the output's error is known."""

    name: str
    index: int
    output: Tensor  # [N, *features]: y
    anchor: Tensor  # [N, *features]: gets δ, and autograd goes on to the block's parameters
    saved_activation: Tensor  # [N, *features]: what f' is taken from, y or the pre-activation
    activation: str  # f, or "identity" where the block's own autograd holds f'
    memory_format: torch.memory_format  # in which its features are counted: row-major, or (h, w, c)
    version: int  # of output: counts changes in place
    donated: bool  # nobody else reads the saved activation: δ may take its memory
    channels_first: bool | None  # of a sequence that is recorded as an image; None: no such
    positions: Positions | None  # whose rows the tensors are; None: of samples
    layer: (
        DenseLayer | None
    )  # in a micro-batch, if the anchor is a dense layer's result and nothing else

    def of_user(self, t: Tensor) -> Tensor:
        """A tensor of the output's shape as the block returns it, but that FDFALinear takes several
        dimensions as one."""
        if self.channels_first is not None:
            t = as_sequence(t, self.channels_first)
        return t if self.positions is None else self.positions.of_rows(t)

    @property
    def shape(self) -> torch.Size:
        return self.of_user(self.output).shape

    def kept_output(self, compiling: bool) -> Tensor:
        """y for a node of autograd, beside the saved activation: a compiler wants each tensor once."""
        return self.output.detach() if compiling else self.output


class BlockLists:
    """What the records of a pass hold, block after block."""

    __slots__ = (
        "activations",
        "anchors",
        "changed",
        "donated",
        "indices",
        "names",
        "outputs",
        "saved_activations",
    )

    def __init__(self) -> None:
        self.names: list[str] = []
        self.indices: list[int] = []
        self.anchors: list[Tensor] = []
        self.saved_activations: list[Tensor] = []
        self.donated: list[bool] = []
        self.activations: list[str] = []
        self.outputs: list[Tensor] = []
        self.changed = False  # whether any output was, in place


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Which samples of a batch a pass has, where several passes have a batch together."""

    first: int
    samples: int

    def noise_state(self, of_batch: Tensor, rows: int) -> Tensor:
        """That of a block with so many rows in this pass.

        Raises:
            ValueError: a row is none of a sample, so that nobody knows how many other passes have.
        """
        if rows % max(self.samples, 1):
            raise ValueError(
                "FDFA: a block or point in a Pipeline must have as many rows for each sample; got "
                f"{rows} for {self.samples} samples"
            )
        state = of_batch.clone()
        state[2] += self.first * (rows // max(self.samples, 1))
        return state


@dataclass(slots=True)
class NetworkEnd:
    """What becomes of the output, where a module within the model returns it."""

    finish: Callable[[Tensor, Tensor | None], Tensor]  # of output and tangent; its result goes on
    channels_first: bool | None = None  # of the output, as that module tells
    reached: bool = False
    output: Tensor | None = None  # that result
    returned: Any = None  # what the model makes of it, in a dry run


@dataclass(slots=True)
class DualPass:
    """One forward pass of primal and tangent: noise, operators, and the blocks met so far."""

    noise_state: Tensor  # int64 [3]: seed, step, index of the batch's first sample
    noise: str  # or "none", where nothing is perturbed and there are no tangents
    patch: int  # side of an image's patches that have noise and feedback in common
    backend: Any
    compiling: bool  # by torch.compile
    tangents: str  # "network", "block": they end at the next block, or "none"
    perturbs: bool
    dimensions: int  # of the output
    ranks: Ranks | None = None  # the processes that share the batch; None: this one has all of it
    micro_batch: MicroBatch | None = None  # None: all samples of this process's batch
    input_tangent: Tensor | None = None  # of a stage's input; none enters a whole model
    sample_index: Tensor | None = None  # int64 [rows]: the sample that each row of features is of
    output_positions: Positions | None = None  # once it is there, if it has any
    source: Source | None = None  # where rows have their errors from, in a part; None: the output's own
    records: list[BlockRecord] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)  # the blocks of the records
    unforeseen: Counter[str] | None = None  # uses of blocks beyond those that are known, if counted
    takes_output_layer: bool = False  # whether the method can run a linear output layer itself
    output_layer: OutputLayer | None = None  # one that was left to it
    takes_biases: bool = False  # whether the method gives biases of dense blocks their gradients itself
    biases: list[Tensor] = field(default_factory=list)  # those that were left to it
    biased: list[int] = field(default_factory=list)  # their blocks' places in records
    rules: OwnCodeRules | None = None  # where user code runs
    in_checkpoint: bool = False  # whether all of it is
    in_chain: bool = False  # whether chains perturb where modules have points
    walk: OutputWalk | None = None  # where blocks hand out activations with a graph
    exposed: list[Tensor] = field(default_factory=list)  # those
    end: NetworkEnd | None = None  # where the network ends within the model
    thread: int = 0  # that runs it

    def run(self, calls: Sequence[Call], layer: nn.Linear | None, x: Tensor) -> PrimalTangent:
        """Makes the calls one after the other, each with primal and tangent of what the one before
        returned. The output layer after them is left to the method where it can take that."""
        tangent = self.input_tangent
        for call in calls:
            x, tangent = call(x, tangent)
        if layer is None:
            return x, tangent
        weight, bias = _weight_and_bias(layer)
        if (
            self.takes_output_layer
            and (tangent is not None or not self.perturbs)
            and x.dim() == 2
            and not x.requires_grad
            and weight.requires_grad
            and not torch.is_autocast_enabled(x.device.type)
        ):
            self.output_layer = OutputLayer(weight, bias)
            return x, tangent
        return forward_dual(layer, x, tangent)

    def gather(self, reads_output: bool) -> BlockLists:
        """reads_output: whether the method does."""
        lists = BlockLists()
        for r in self.records:
            lists.names.append(r.name)
            lists.indices.append(r.index)
            lists.anchors.append(r.anchor)
            lists.saved_activations.append(r.saved_activation)
            lists.donated.append(r.donated)
            lists.activations.append(r.activation)
            if reads_output:
                lists.outputs.append(r.kept_output(self.compiling))
            lists.changed = lists.changed or (not self.compiling and r.output._version != r.version)
        return lists

    def end_at(self, name: str, result: Any, channels_first: bool | None) -> Any:
        """What goes on from the module of this name, whose result is the network's output."""
        end = self.end
        if end is None:  # a pass that asks for something else
            return result
        if not isinstance(result, Tensor):
            raise TypeError(
                f"FDFA: output module '{name}' must return one tensor; got {type(result).__name__}"
            )
        if end.reached:
            raise RuntimeError(f"FDFA: output module '{name}' was used twice in one forward pass")
        if not self.compiling:
            self.refuse_checkpoint("output module", name)
        end.reached, end.channels_first = True, channels_first
        with self.apart():
            output, tangent = self.unpack(result)
            end.output = end.finish(output, None if tangent is None else tangent.detach())
            return end.output

    def refuse_checkpoint(self, what: str, name: str) -> None:
        if is_in_checkpoint() and not self.in_checkpoint:
            raise RuntimeError(
                f"FDFA: {what} '{name}' is called within torch.utils.checkpoint, which would compute "
                "it again outside the step; put the checkpoint into an FDFABlock or around the whole "
                "model, or points and output outside it"
            )

    def apart(self) -> AbstractContextManager[Any]:
        """Within it primal and tangent are computed with apart, and no rule is asked."""
        return nullcontext() if self.compiling else without_rules()

    def unpack(self, t: Tensor) -> PrimalTangent:
        """Primal and tangent of a tensor of user code."""
        return traced_unpack_dual(t) if self.compiling else unpack_dual(t)

    def make_dual(self, primal: Tensor, tangent: Tensor) -> Tensor:
        """A tensor for user code."""
        if self.compiling:
            return traced_make_dual(primal, tangent)
        dual: Tensor = make_dual(primal, tangent)
        return dual

    @property
    def exposes(self) -> bool:
        return self.walk is not None

    @property
    def has_positions(self) -> bool:
        """Whether a token or pixel counts as a sample."""
        return self.dimensions > 2

    def positions_of(self, what: str, t: Tensor, channels_first: bool | None) -> Positions:
        """Those of a tensor, which is `what`."""
        found = Positions.of(t.shape, self.dimensions - 2, channels_first)
        if found is None:
            kind = "token" if self.dimensions == 3 else "pixel"
            raise ValueError(
                f"FDFA: the output has K values for each {kind}, so {what} must have features of each; "
                f"got {list(t.shape)}"
            )
        return found

    def rows(
        self, output: Tensor, tangent: Tensor | None, channels_first: bool | None
    ) -> PrimalTangent:
        """The output and its tangent with a row [K] for each sample, token or pixel."""
        if self.dimensions == 1:
            return output.unsqueeze(1), None if tangent is None else tangent.unsqueeze(1)
        if not self.has_positions:
            return output, tangent
        own = self.output_positions = self.positions_of("the output", output, channels_first)
        for r in self.records:
            assert r.positions is not None, "all have them"
            if not r.positions.fits(own):
                raise ValueError(
                    f"FDFA: the output is {list(output.shape)}, of {own}, so block or point '{r.name}' "
                    f"must have features of each; got {list(r.shape)}, of {r.positions}"
                )
        return own.rows(output), None if tangent is None else own.rows(tangent)

    def of_rows(self, output: Tensor) -> Tensor:
        """What rows of outputs are for the user."""
        if self.dimensions == 1:
            return output.squeeze(1)
        return output if self.output_positions is None else self.output_positions.of_rows(output)

    def parts(self, samples: int, shares: bool = False) -> "list[DualPass]":
        """The pass of the blocks whose rows are the output's, and of others by where their rows have
        their errors from.

        samples: rows of the output. shares: whether all processes must have the same parts, in the same
        order, though rows may be as many as the output's in one of them alone.
        """
        if self.output_positions is None and self.sample_index is None:
            return [self]
        sources = [self._source_of(record, samples) for record in self.records]
        shared = self._rows_of_ranks() if shares else [()] * len(sources)
        if not any(sources) and len(set(shared)) == 1:
            return [self]
        found: dict[Any, DualPass] = {}
        for place, (record, source, rows) in enumerate(zip(self.records, sources, shared, strict=True)):
            key = rows, Members if isinstance(source, Members) else source
            if key not in found:
                own = Same(samples) if shares and source is None else source
                found[key] = replace(self, source=own, records=[], biases=[], biased=[])
            part = found[key]
            if place in self.biased:
                part.biases.append(self.biases[self.biased.index(place)])
                part.biased.append(len(part.records))
            part.records.append(record)
        if shares:
            return [*found.values()]
        return sorted(found.values(), key=lambda part: part.source is not None)

    def _source_of(self, record: BlockRecord, samples: int) -> Source | None:
        own, index = self.output_positions, self.sample_index
        if record.positions is not None and own is not None:
            return None if record.positions.grid == own.grid else Cells(own, record.positions.grid)
        rows = record.output.shape[0]
        if index is None or rows != len(index):
            return None
        is_own = torch.arange(rows, device=index.device)
        if rows == samples and (self.compiling or not torch.equal(index, is_own)):
            raise ValueError(
                f"FDFA: block or point '{record.name}' has {rows} rows, and these may be the {samples} "
                "samples or what sample_index has samples of; give a batch whose numbers differ"
            )
        return None if rows == samples else Members(index)

    def noise_of(self, block: int, rows: int) -> Tensor:
        """The noise state of a block of so many rows, by its place in the noise."""
        if not self.perturbs:
            return self.noise_state
        if self.micro_batch is not None:
            return self.micro_batch.noise_state(self.noise_state, rows)
        if self.ranks is None:
            return self.noise_state
        return self.ranks.noise_state(self.noise_state, self._kind(block), rows)

    def weighted(self, tangent: Tensor | None, rule: str) -> Tensor | None:
        """d for a rule of B in a part: the mean of G over the processes is that over all rows, however
        many each has."""
        if self.ranks is None or tangent is None or rule == "fixed":
            return tangent
        kind = self._kind(self.records[0].index)
        wide = tangent.to(torch.promote_types(tangent.dtype, torch.float32))
        return wide * self.ranks.weight(self.noise_state, kind, len(tangent))

    def rows_of_ranks(self, rows: int) -> list[int]:
        """How many rows each process has in a part of which this one has so many."""
        assert self.ranks is not None
        return self.ranks.rows(self.noise_state, {self._kind(self.records[0].index): rows})[0]

    def _rows_of_ranks(self) -> list[tuple[int, ...]]:
        """The same for each block."""
        assert self.ranks is not None
        rows = {self._kind(r.index): r.output.shape[0] for r in self.records}
        return [*map(tuple, self.ranks.rows(self.noise_state, rows))]

    def _kind(self, block: int) -> int:
        """Blocks of samples are all of one kind."""
        return block if self.has_positions or self.sample_index is not None else 0

    def use_noise(self) -> Tensor:
        """The noise state of this pass, for its backward; that of the model moves on."""
        if self.compiling:  # it has
            return self.noise_state
        used: Tensor = fused.next_noise(self.noise_state)
        return used


class BlockPass:
    """A block's own name, place in the noise and planned call, and the dual pass while one runs.

    A block that is used several times in a forward has one of these for each use: the first hands over
    to the `later` ones.
    """

    __slots__ = ("call", "dual", "index", "later", "module", "name")

    def __init__(self, name: str, index: int, module: str) -> None:
        self.name = name
        self.index = index
        self.module = module  # the name of the block or point in the model
        self.call: Call  # as Block.plan has it
        self.dual: DualPass | None = None
        self.later: BlockPass | None = None  # of the next use

    def __getstate__(self) -> tuple[None, dict[str, Any]]:
        """Without the call, which copies plan for their own block; a rule in it cannot be pickled."""
        state = {name: getattr(self, name) for name in ("name", "index", "module", "later")}
        return None, state | {"dual": None}

    def dual_here(self) -> DualPass | None:
        """The pass that this thread runs: others use the module as it is meanwhile."""
        dual = self.dual
        if dual is None or dual.compiling or dual.thread == get_ident():
            return dual
        return None

    def on_dual_tensor(self, dual: DualPass, x: Tensor, call: Call) -> Tensor:
        """The dual tensor of a block's output, by its call, which takes primal and tangent apart.

        Without a tangent both are plain tensors.
        """
        if dual.compiling:
            if not dual.perturbs:
                return call(x, None)[0]
            y, ty = call(*dual.unpack(x))
            assert ty is not None
            return dual.make_dual(y, ty)
        with without_rules():
            dual.refuse_checkpoint("block or point", self.name)
            tangent = None
            if dual.perturbs:
                x, tangent = unpack_dual(x)
            if dual.exposes and x.requires_grad and not leaves_behind(x):
                x = x.detach()
            rules = dual.rules
            if rules is None:
                y, ty = call(x, tangent)
            else:
                rules.within_block = True
                try:
                    y, ty = call(x, tangent)
                finally:
                    rules.within_block = False
            if dual.walk is not None:
                r = dual.records[-1]
                given = (r.output, r.anchor, r.saved_activation, r.activation)
                dual.exposed.append(expose(*given, dual.walk))
                y = r.of_user(dual.exposed[-1]).view(y.shape)
            result: Tensor = y if ty is None else make_dual(y, ty)
            if rules is not None and ty is not None:
                rules.made.append(weakref.ref(result))
            return result

    def point(self, channels_first: bool | None, forward: Any, /, *args: Any, **kwargs: Any) -> Any:
        """What this forward of a module of any kind returns, perturbed: the tensor, or the first of a
        tuple. Autograd goes on from its gradient δ to all that made it behind the points before."""
        dual = self.dual_here()
        if dual is None or dual.in_chain:
            return forward(*args, **kwargs)
        self._running_pass().refuse_checkpoint("block or point", self.name)
        return self.perturb_result(channels_first, forward(*args, **kwargs))

    def point_at_input(
        self, channels_first: bool | None, forward: Any, /, *args: Any, **kwargs: Any
    ) -> Any:
        """What this forward of a module returns for its first argument perturbed."""
        dual = self.dual_here()
        if dual is None or dual.in_chain:
            return forward(*args, **kwargs)
        self._running_pass().refuse_checkpoint("block or point", self.name)
        args, kwargs = self.perturb_input(channels_first, args, kwargs)
        first = next(iter((*args, *kwargs.values())))
        version = first._version
        result = forward(*args, **kwargs)
        if first._version != version:  # others that read it would see neither perturbation nor cut
            raise RuntimeError(
                f"FDFA: point '{self.name}' is at the input of a module that changes it in place; put "
                "the point on the module that returns it, or leave out inplace=True"
            )
        return result

    def perturb_result(self, channels_first: bool | None, result: Any) -> Any:
        """What goes on from a point whose module returned this."""
        own = self._use()
        if own is None:
            return result
        first = first_tensor(result)
        if not _is_features(first):
            raise self._no_features(result if first is None else first)
        return with_first(result, own._perturbed_features(first, channels_first))

    def perturb_input(
        self, channels_first: bool | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What goes on to a module with a point at its input that was given these arguments."""
        own = self._use()
        if own is None:
            return args, kwargs
        first = next(iter((*args, *kwargs.values())), None)
        if not _is_features(first):
            raise TypeError(
                f"FDFA: point '{self.name}' is at the input of a module, whose first argument must be "
                f"features [N, *features]; got {_told(first)}"
            )
        perturbed = own._perturbed_features(first, channels_first)
        if args:
            return (perturbed, *args[1:]), kwargs
        return args, kwargs | {next(iter(kwargs)): perturbed}

    def _no_features(self, got: Any) -> TypeError:
        return TypeError(
            f"FDFA: module '{self.name}' has a point, so it must return features [N, *features], "
            f"alone or first in a tuple; got {_told(got)}"
        )

    def _use(self) -> "BlockPass | None":
        """The pass of this use of a point: this one or that of a later use, also one that began within
        this one. None where it has none, and learns by the points after it."""
        dual = self._running_pass()  # the network's end may be within the module
        own: BlockPass | None = self
        while own is not None and own.index in dual.seen:
            own = own.later
        if own is None and dual.unforeseen is not None:
            own = self
            dual.unforeseen[self.module] += 1
        return own

    def _perturbed_features(self, x: Tensor, channels_first: bool | None) -> Tensor:
        dual = self._running_pass()
        with dual.apart():
            y, ty = dual.unpack(x) if dual.perturbs else (x, None)
            if dual.tangents == "block":
                ty = None
            tangent = None if ty is None else ty.detach()
            output, ty = self._end(dual, y, tangent, channels_first)
            return output if ty is None else dual.make_dual(output, ty)

    def linear(self, layer: Any, x: Tensor, tangent: Tensor | None) -> PrimalTangent:
        """An FDFALinear: x [N, *, in_features] → y, ty [N, *, out_features]. Algorithm 1, lines 10 to
        16."""
        dual = self._enter(x)
        if dual is None:
            return self._of_next_use().linear(layer, x, tangent)
        if dual.tangents == "block":
            tangent = None
        positions = None
        if dual.has_positions:
            positions = dual.positions_of(f"block '{self.name}'", x, channels_first=False)
            x, tangent = positions.rows(x), None if tangent is None else positions.rows(tangent)
        between = x.shape[1:-1]
        if len(between) > 1:  # noise and feedback would take four dimensions for images
            x = x.flatten(1, -2)
            tangent = None if tangent is None else tangent.flatten(1, -2)
        weight, bias, taken = self._parameters_of(dual, layer, x)
        in_patches = dual.patch > 1 and x.dim() == 3
        options = self._options(dual, layer.activation, len(x), perturbs=not in_patches)
        y, ty, pre = dual.backend.linear(x, tangent, weight, bias, **options)
        if in_patches:
            ty = None if tangent is None else ty
            ty = self._end_sequence(dual, y, ty, pre, layer.activation, False, positions)
        else:
            self._record(
                dual,
                y,
                pre,
                layer.activation,
                torch.contiguous_format,
                taken_bias=taken,
                positions=positions,
                layer=self._layer(dual, x, weight, bias),
            )
        if not dual.perturbs:
            ty = None
        if len(between) > 1:
            y, ty = y.unflatten(1, between), None if ty is None else ty.unflatten(1, between)
        return _of_rows(positions, y, ty)

    def conv2d(
        self, layer: Any, x: Tensor, tangent: Tensor | None, pool: nn.MaxPool2d | None = None
    ) -> PrimalTangent:
        """An FDFAConv2d: x [N, C, H, W] → y and its tangent [N, C', H', W'], in channels_last.

        With a pool these go through it, but it is no part of the block.
        """
        dual = self._enter(x)
        if dual is None:
            return self._of_next_use().conv2d(layer, x, tangent, pool)
        if dual.tangents == "block":
            tangent = None
        padding = layer.padding
        if isinstance(padding, str) or layer.padding_mode != "zeros":
            # Padding of its own kind is a linear map before the convolution.
            mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            sides = layer._reversed_padding_repeated_twice
            x = F.pad(x, sides, mode=mode)
            tangent = None if tangent is None else F.pad(tangent, sides, mode=mode)
            padding = (0, 0)
        activation = layer.activation
        has_positions = dual.has_positions
        fused_pool = None if has_positions else _fused_pool(dual, pool, x)
        y, ty, pre, pooled = dual.backend.conv2d(
            x,
            tangent,
            layer.weight,
            layer.bias,
            layer.stride,
            padding,
            layer.dilation,
            layer.groups,
            **self._options(dual, activation, len(x), perturbs=not has_positions),
            pool=fused_pool,
            patch=dual.patch,
        )
        if has_positions:
            ty = None if tangent is None else ty
            return _behind(pool, None, *self._end(dual, y, ty, None, pre, activation))
        own_output = fused_pool is not None
        self._record(dual, y, pre, activation, torch.channels_last, own_output)
        return _behind(pool, None if fused_pool is None else pooled, y, ty if dual.perturbs else None)

    def chain(
        self, chain: Chain, x: Tensor, tangent: Tensor | None, pool: nn.MaxPool2d | None = None
    ) -> PrimalTangent:
        """Calls one after the other, perturbed at the end of the last; pool as in conv2d."""
        dual = self._enter(x, may_have_graph=chain.from_point)
        if dual is None:
            return self._of_next_use().chain(chain, x, tangent, pool)
        if not chain.from_point:
            x = x.detach()
            if x.dim() == 4:
                x = channels_last(x)
        if tangent is not None:
            tangent = None if dual.tangents == "block" else tangent.detach()
        y, ty = x, tangent
        tail = chain.tail if dual.backend is fused else None
        for position, call in enumerate(chain.calls):
            if tail is not None and position == tail.start and tail.takes(y):
                # The tangent that a layer just made is nobody else's: it may be overwritten.
                donated = ty if chain.makes_tangent else None
                return self._fused_tail(dual, tail, y, ty, donated, pool)
            which = f"block or point '{self.name}': its module {position} ({chain.names[position]})"
            try:
                y, ty = call(y, ty)
            except NotImplementedError as error:
                refuse_unknown(which, error)
                raise
            if not isinstance(y, Tensor):
                raise TypeError(
                    f"FDFA: {which} returned a {type(y).__name__}, but a block's modules must return "
                    "one tensor each; put it into a module of your own that returns the tensor you want"
                )
            if tangent is not None and ty is None:
                raise RuntimeError(
                    f"FDFA: {which} dropped the tangent; it is not differentiable in torch's forward "
                    "mode"
                )
        if chain.from_point and not _is_features(y):
            raise self._no_features(y)
        if y.dim() == 0 or y.is_meta != dual.noise_state.is_meta:
            got = "a single number" if y.dim() == 0 else f"a tensor on {y.device}"
            raise TypeError(
                f"FDFA: block '{self.name}' must return features [N, *features] on its own device; got "
                f"{got}"
            )
        return _behind(pool, None, *self._end(dual, y, ty, chain.channels_first))

    def _end(
        self,
        dual: DualPass,
        y: Tensor,
        ty: Tensor | None,
        channels_first: bool | None,
        anchor: Tensor | None = None,
        activation: str = "identity",
    ) -> PrimalTangent:
        """Perturbs y [N, *features] and records it. What goes on has no graph.

        anchor: y by default, whose graph then has the activation.
        """
        positions = None
        if dual.has_positions:
            positions = dual.positions_of(f"block or point '{self.name}'", y, channels_first)
            y, anchor = positions.rows(y), None if anchor is None else positions.rows(anchor)
            ty = None if ty is None else positions.rows(ty)
            channels_first = False
        if 0 in y.stride():  # expanded: its elements must be apart to be perturbed
            y = y.contiguous()
        output, anchor = y.detach(), y if anchor is None else anchor
        if dual.patch > 1 and y.dim() == 3:
            first = bool(channels_first)
            ty = self._end_sequence(dual, output, ty, anchor, activation, first, positions)
        else:
            if dual.perturbs:
                ty = self._perturbed(dual, output, ty)
            self._record(
                dual, output, anchor, activation, memory_format_of(y.dim()), positions=positions
            )
        return _of_rows(positions, output, ty)

    def uses_left(self, dual: DualPass) -> int:
        """How many more may come in this pass."""
        later = 0 if self.later is None else self.later.uses_left(dual)
        return later + (self.index not in dual.seen)

    def _end_sequence(
        self,
        dual: DualPass,
        y: Tensor,
        ty: Tensor | None,
        anchor: Tensor,
        activation: str,
        channels_first: bool,
        positions: Positions | None,
    ) -> Tensor | None:
        """Perturbs a sequence in patches and records it, both as an image; returns its tangent."""
        image = as_image(y, channels_first)
        if dual.perturbs:
            ty = self._perturbed(dual, image, None if ty is None else as_image(ty, channels_first))
            ty = as_sequence(ty, channels_first)
        self._record(
            dual,
            image,
            as_image(anchor, channels_first),
            activation,
            torch.channels_last,
            channels_first=channels_first,
            positions=positions,
        )
        return ty

    def _perturbed(self, dual: DualPass, y: Tensor, ty: Tensor | None) -> Tensor:
        noise = dual.noise_of(self.index, len(y)), self.index, dual.noise, dual.patch
        perturbed: Tensor = dual.backend.perturb(y, ty, *noise)
        return perturbed

    def _fused_tail(
        self,
        dual: DualPass,
        tail: FusedTail,
        x: Tensor,
        tangent: Tensor | None,
        donated: Tensor | None,
        pool: nn.MaxPool2d | None,
    ) -> PrimalTangent:
        """donated: memory for the tangent of the result, if it has the right order."""
        module: Any = tail.first
        taken: Tensor | None = None
        layer: DenseLayer | None = None
        pooled: Tensor | None = None
        has_positions = dual.has_positions
        fused_pool = None if tail.pool is not None or has_positions else _fused_pool(dual, pool, x)
        # Where a pool follows within the block, it is that which perturbs.
        perturbs = tail.pool is None and not has_positions
        options = self._options(dual, tail.activation, len(x), perturbs)
        memory_format = memory_format_of(x.dim())
        ty: Tensor | None
        if tail.normalizes:
            if fused_pool is not None or (tangent is None and options["noise"] == "none"):
                donated = None
            elif donated is None or not donated.is_contiguous(memory_format=memory_format):
                donated = torch.empty_like(x, memory_format=memory_format)
            x = x.contiguous(memory_format=memory_format)
            y, pre, _, _, pooled, pooled_tangent = fused.batch_norm(
                x,
                tangent,
                donated,
                **norm_arguments(module),
                **options,
                pool=fused_pool,
                patch=dual.patch,
            )
            ty = donated if fused_pool is None else pooled_tangent
        elif isinstance(module, nn.Linear):
            weight, bias, taken = self._parameters_of(dual, module, x)
            y, ty, pre = fused.linear(x, tangent, weight, bias, **options)
            layer = self._layer(dual, x, weight, bias) if tail.pool is None else None
        else:
            y, ty, pre, pooled = fused.conv2d(
                x,
                tangent,
                module.weight,
                module.bias,
                module.stride,
                module.padding,
                module.dilation,
                module.groups,
                **options,
                pool=fused_pool,
                patch=dual.patch,
            )
        if tail.pool is not None:
            y, ty, pre, _ = fused.max_pool2d_end(
                y,
                None if tangent is None else ty,
                pre,
                *pool_geometry(tail.pool),
                dual.noise_state if has_positions else dual.noise_of(self.index, len(x)),
                self.index,
                "none" if has_positions else dual.noise,
                dual.patch,
            )
        if has_positions:
            ty = None if tangent is None else ty
            return _behind(pool, None, *self._end(dual, y, ty, None, pre, tail.activation))
        own_output = fused_pool is not None
        self._record(
            dual, y, pre, tail.activation, memory_format, own_output, taken_bias=taken, layer=layer
        )
        return _behind(pool, pooled if own_output else None, y, ty if dual.perturbs else None)

    def _options(
        self, dual: DualPass, activation: str, rows: int, perturbs: bool = True
    ) -> dict[str, Any]:
        """What all operators of blocks take. rows: of the block's output."""
        return {
            "noise_state": dual.noise_of(self.index, rows) if perturbs else dual.noise_state,
            "block": self.index,
            "activation": activation,
            "noise": dual.noise if perturbs else "none",
        }

    @staticmethod
    def _parameters_of(
        dual: DualPass, layer: Any, x: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Weight and bias to compute with, and a bias whose gradient is left to the method, if any."""
        weight, bias = _weight_and_bias(layer)
        takes = dual.takes_biases and x.dim() == 2 and torch.is_grad_enabled()
        if takes and bias is not None and bias.requires_grad:
            return weight, bias.detach(), bias
        return weight, bias, None

    @staticmethod
    def _layer(dual: DualPass, x: Tensor, weight: Tensor, bias: Tensor | None) -> DenseLayer | None:
        if dual.micro_batch is None or x.requires_grad or x.dtype != weight.dtype:
            return None
        if torch.is_autocast_enabled(x.device.type):
            return None
        return DenseLayer(x, x._version, weight, bias)

    def _running_pass(self) -> DualPass:
        dual = self.dual
        assert dual is not None, "a pass runs"
        if dual.end is not None and dual.end.reached:
            raise RuntimeError(
                f"FDFA: '{self.name}' was used after the output module, where nothing is perturbed; "
                "let `at` leave it out, or name another output"
            )
        return dual

    def _of_next_use(self) -> "BlockPass":
        assert self.later is not None, "as _enter has it"
        return self.later

    def _enter(self, x: Tensor, may_have_graph: bool = False) -> DualPass | None:
        """The pass that runs, once it is clear that it may go through this block; None where that of a
        later use is meant."""
        dual = self._running_pass()
        if self.index in dual.seen:
            if self.later is not None:
                return None
            if dual.unforeseen is None:
                raise RuntimeError(
                    f"FDFA: block '{self.module}' was used more often in this forward pass than in "
                    "the dry run, and each use has a feedback matrix of its own; wrap the module again "
                    "with an example_input that uses it most, or use a plain torch module by at="
                )
            dual.unforeseen[self.module] += 1
        if not isinstance(x, Tensor) or x.dim() == 0:
            got = "a single number" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"FDFA: block '{self.name}' takes a tensor of samples [N, *]; got {got}")
        if x.is_meta and not dual.noise_state.is_meta:
            raise RuntimeError(
                f"FDFA: the input of block '{self.name}' is on the meta device, without values, and "
                f"the model on {dual.noise_state.device}; give it an input there"
            )
        if x.requires_grad and not may_have_graph:
            raise RuntimeError(
                f"FDFA: the input of block '{self.name}' depends on parameters of a module before it "
                "that is no block: they would get no gradient. Put that module, or one that computes "
                "with a bare parameter, into an FDFABlock, or name it in at=, and detach an input that "
                "wants a gradient"
            )
        return dual

    def _record(
        self,
        dual: DualPass,
        output: Tensor,
        anchor: Tensor,
        activation: str,
        memory_format: torch.memory_format,
        own_output: bool = False,
        taken_bias: Tensor | None = None,
        channels_first: bool | None = None,
        positions: Positions | None = None,
        layer: DenseLayer | None = None,
    ) -> None:
        """own_output: no module after the block sees it. taken_bias: one that is left to the method.
        channels_first: of a sequence as an image. positions: whose rows the tensors are."""
        has_pre = activation in NEEDS_PRE_ACTIVATION
        if dual.compiling:
            # A compiler cannot trace versions. It leaves the copy out if no module changes the output.
            output = output.clone()
        # For images alone: a dense block's δ has a memory order of its own.
        donated = (own_output or has_pre) and output.dim() == 4
        if taken_bias is not None:
            dual.biases.append(taken_bias)
            dual.biased.append(len(dual.records))
        dual.seen.add(self.index)
        dual.records.append(
            BlockRecord(
                self.name,
                self.index,
                output,
                anchor,
                anchor.detach() if has_pre else output,
                activation,
                memory_format,
                0 if dual.compiling else output._version,
                donated and not (dual.compiling or dual.exposes),
                channels_first,
                positions,
                layer,
            )
        )


def _of_rows(positions: Positions | None, y: Tensor, ty: Tensor | None) -> PrimalTangent:
    """What these rows are the rows of."""
    if positions is None:
        return y, ty
    return positions.of_rows(y), None if ty is None else positions.of_rows(ty)


def _is_features(value: Any) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2


def _told(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _weight_and_bias(layer: Any) -> tuple[Tensor, Tensor | None]:
    try:  # spares nn.Module's __getattr__, in Python
        return layer._parameters["weight"], layer._parameters["bias"]
    except KeyError:  # as where they are parametrized
        return layer.weight, layer.bias


def _fused_pool(dual: DualPass, pool: nn.MaxPool2d | None, x: Tensor) -> list[int] | None:
    """Kernel, stride and padding of a pool after a block, where the block's operator does it."""
    if pool is None or dual.backend is not fused or x.dim() != 4:
        return None
    if not (single_precision(x) and has_fused_pool(pool)):
        return None
    return [size for pair in pool_geometry(pool) for size in pair]


def _behind(
    pool: nn.MaxPool2d | None, pooled: Tensor | None, y: Tensor, ty: Tensor | None
) -> PrimalTangent:
    """What goes on from a block: y and ty, or these through the pool after it."""
    if pooled is not None:
        return pooled, ty
    return (y, ty) if pool is None else forward_dual(pool, y, ty)

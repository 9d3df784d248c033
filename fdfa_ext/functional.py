"""The dual pass of a training step: what its blocks do, and what they leave for the backward.

A block takes primal and tangent apart, since an operator of torch.library that is given a dual tensor
drops its tangent in silence. Between blocks the two travel apart too where every module's JVP rule is
known, and else on torch's forward-mode dual tensors, so that any torch module may stand there.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fdfa_ext import reference
from fdfa_ext._ops import fused
from fdfa_ext._torch_internals import traced_make_dual, traced_unpack_dual
from fdfa_ext.chains import NEEDS_PRE_ACTIVATION, Chain, ChainEnd, counter_of, norm_arguments
from fdfa_ext.duals import make_dual, refuse_unknown, unpack_dual
from fdfa_ext.jvp import (
    PrimalTangent,
    forward_dual,
    has_fused_pool,
    pool_geometry,
    single_precision,
    without_rules,
)
from fdfa_ext.own_code import OutputLayer, OwnCodeRules, expose, leaves_behind

ACTIVATIONS = {name: function for name, (function, _) in reference.ACTIVATIONS.items()}
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
    version: int  # of output: counts changes in place
    spare_gate: bool  # no one else reads it: δ may take its memory


class BlockLists:
    """What the records of a pass hold, block after block."""

    __slots__ = (
        "activations",
        "changed",
        "gates",
        "handles",
        "indices",
        "names",
        "outputs",
        "spare_gates",
    )

    def __init__(self) -> None:
        self.names: list[str] = []
        self.indices: list[int] = []
        self.handles: list[Tensor] = []
        self.gates: list[Tensor] = []
        self.spare_gates: list[bool] = []
        self.activations: list[str] = []
        self.outputs: list[Tensor] = []
        self.changed = False  # whether any output was, in place


@dataclass(slots=True)
class DualPass:
    """One forward pass of primal and tangent: noise, operators, and the blocks met so far."""

    noise_state: Tensor  # int64 [3]: seed, step, index of the batch's first sample
    noise: str  # or "none", where nothing is perturbed and there are no tangents
    backend: Any
    compiling: bool  # by torch.compile
    tangents: str  # "network", "block": they end at the next block, or "none"
    perturbs: bool
    records: list[BlockRecord] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)  # the blocks of the records
    takes_output_layer: bool = False  # whether the method can run a linear output layer itself
    output_layer: OutputLayer | None = None  # one that was left to it
    takes_biases: bool = False  # whether the method gives biases of dense blocks their gradients itself
    biases: list[Tensor] = field(default_factory=list)  # those that were left to it
    biased: list[int] = field(default_factory=list)  # their blocks' places in records
    rules: OwnCodeRules | None = None  # where code of the user's runs
    exposes: bool = False  # whether blocks hand out activations with a graph
    exposed: list[Tensor] = field(default_factory=list)  # those

    def gather(self, reads_output: bool) -> "BlockLists":
        """reads_output: whether the method does."""
        lists = BlockLists()
        for r in self.records:
            lists.names.append(r.name)
            lists.indices.append(r.index)
            lists.handles.append(r.handle)
            lists.gates.append(r.gate)
            lists.spare_gates.append(r.spare_gate)
            lists.activations.append(r.activation)
            if reads_output:
                lists.outputs.append(r.output)
            lists.changed = lists.changed or (not self.compiling and r.output._version != r.version)
        return lists

    def use_noise(self) -> Tensor:
        """The noise state of this pass, for its backward; that of the model moves on."""
        if self.compiling:  # it has
            return self.noise_state
        used: Tensor = fused.next_noise(self.noise_state)
        return used

    def can_take_bias(self, x: Tensor, bias: Tensor | None) -> bool:
        """Whether the layer of a block may run without its bias's graph, since the method takes it."""
        return self.takes_biases and bias is not None and x.dim() == 2 and bias.requires_grad


@dataclass(slots=True, eq=False)
class BlockPass:
    """A block's own name, place in the noise and planned calls, and the dual pass while one runs."""

    name: str
    index: int
    planned: Chain | None = None  # None for a block that is one fused operator
    dual: DualPass | None = None

    def on_dual_tensor(
        self, x: Tensor, block: Callable[[Tensor, Tensor | None], PrimalTangent]
    ) -> Tensor:
        """The dual tensor of a block's output, by a function that takes primal and tangent apart.

        Without a tangent both are plain tensors.
        """
        dual = self.dual
        assert dual is not None
        with without_rules():
            if dual.compiling:
                return self._while_compiling(dual, x, block)
            tangent = None
            if dual.perturbs:
                x, tangent = unpack_dual(x)
            if dual.exposes and x.requires_grad and not leaves_behind(x):
                x = x.detach()
            rules = dual.rules
            if rules is None:
                y, ty = block(x, tangent)
            else:
                rules.within_block = True
                try:
                    y, ty = block(x, tangent)
                finally:
                    rules.within_block = False
            if dual.exposes:
                r = dual.records[-1]
                dual.exposed.append(expose(r.output, r.handle, r.gate, r.activation))
                y = dual.exposed[-1].view(y.shape)
            result: Tensor = y if ty is None else make_dual(y, ty)
            if rules is not None and ty is not None:
                rules.made.append(weakref.ref(result))
            return result

    @staticmethod
    def _while_compiling(
        dual: DualPass, x: Tensor, block: Callable[[Tensor, Tensor | None], PrimalTangent]
    ) -> Tensor:
        if not dual.perturbs:
            return block(x, None)[0]
        y, ty = block(*traced_unpack_dual(x))
        assert ty is not None
        return traced_make_dual(y, ty)

    def linear(
        self, x: Tensor, tangent: Tensor | None, weight: Tensor, bias: Tensor | None, activation: str
    ) -> PrimalTangent:
        """x [N, *, in_features] → y, ty [N, *, out_features]. Algorithm 1, lines 10 to 16."""
        dual = self._enter(x)
        if dual.tangents == "block":
            tangent = None
        between = x.shape[1:-1]
        if len(between) > 1:  # noise and feedback would take four dimensions for images
            x = x.flatten(1, -2)
            tangent = None if tangent is None else tangent.flatten(1, -2)
        taken = bias if dual.can_take_bias(x, bias) else None
        if taken is not None:
            bias = taken.detach()
        y, ty, pre = dual.backend.linear(
            x, tangent, weight, bias, dual.noise_state, self.index, activation, dual.noise
        )
        self._record(dual, y, pre, activation, torch.contiguous_format, taken_bias=taken)
        if len(between) > 1:
            y, ty = y.unflatten(1, between), ty.unflatten(1, between)
        return y, ty if dual.perturbs else None

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
        pool: nn.MaxPool2d | None = None,
    ) -> PrimalTangent:
        """x [N, C, H, W] → y and its tangent [N, C', H', W'], in channels_last.

        With a pool, one that has_fused_pool, these go through it, but it is no part of the block.
        """
        dual = self._enter(x)
        if dual.tangents == "block":
            tangent = None
        geometry = (stride, padding, dilation, groups)
        rest = (dual.noise_state, self.index, activation, dual.noise)
        if pool is not None and dual.backend is fused and single_precision(x) and has_fused_pool(pool):
            y, pre, *pooled = fused.conv2d_max_pool2d(
                x, tangent, weight, bias, *geometry, *rest, *pool_geometry(pool)
            )
            self._record(dual, y, pre, activation, torch.channels_last, own_output=True)
            return pooled[0], pooled[1] if dual.perturbs else None
        y, ty, pre = dual.backend.conv2d(x, tangent, weight, bias, *geometry, *rest)
        self._record(dual, y, pre, activation, torch.channels_last)
        return _through_pool(pool, y, ty if dual.perturbs else None)

    def chain(
        self,
        x: Tensor,
        tangent: Tensor | None,
        chain: Chain,
        pool: nn.MaxPool2d | None = None,
    ) -> PrimalTangent:
        """Calls one after the other, perturbed at the end of the last; pool as in conv2d."""
        dual = self._enter(x)
        x = x.detach()
        if x.dim() == 4:
            x = channels_last(x)
        if tangent is not None:
            tangent = None if dual.tangents == "block" else tangent.detach()
        y, ty = x, tangent
        end = chain.end if dual.backend is fused else None
        for position, step in enumerate(chain.steps):
            if end is not None and position == end.start and end.takes(y):
                # The tangent that a layer just made is nobody else's: it may be overwritten.
                spare = ty if chain.makes_tangent else None
                return self._fused_end(dual, end, y, ty, spare, pool)
            which = f"block '{self.name}': its module {position} ({chain.names[position]})"
            try:
                y, ty = step(y, ty)
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
        if 0 in y.stride():  # expanded: its elements must be apart to be perturbed
            y = y.contiguous()
        gate = y.detach()
        if dual.perturbs:
            ty = dual.backend.perturb(gate, ty, dual.noise_state, self.index, dual.noise)
        order = torch.channels_last if y.dim() == 4 else torch.contiguous_format
        self._record(dual, gate, y, "identity", order)
        return _through_pool(pool, gate, ty)

    def _fused_end(
        self,
        dual: DualPass,
        end: ChainEnd,
        x: Tensor,
        tangent: Tensor | None,
        spare: Tensor | None,
        pool: nn.MaxPool2d | None,
    ) -> PrimalTangent:
        """spare: memory for the tangent of the result, if it has the right order."""
        module: Any = end.first
        taken: Tensor | None = None
        images = x.dim() == 4 and single_precision(x)
        if pool is not None and has_fused_pool(pool) and end.pool is None and images:
            return self._pooled_end(dual, end, x, tangent, pool)
        # Where a pool follows within the block, it is that which perturbs.
        noise = dual.noise if end.pool is None else "none"
        rest = (dual.noise_state, self.index, end.activation, noise)
        order = torch.channels_last if x.dim() == 4 else torch.contiguous_format
        ty: Tensor | None
        if end.normalizes:
            if tangent is None and noise == "none":
                spare = None
            elif spare is None or not spare.is_contiguous(memory_format=order):
                spare = torch.empty_like(x, memory_format=order)
            x = x.contiguous(memory_format=order)
            y, pre = fused.batch_norm(
                x,
                tangent,
                spare,
                *norm_arguments(module),
                *rest,
                num_batches_tracked=counter_of(module),
            )[:2]
            ty = spare
        elif isinstance(module, nn.Linear):
            bias: Tensor | None = module.bias
            taken = bias if dual.can_take_bias(x, bias) else None
            bias = bias if taken is None else taken.detach()
            y, ty, pre = fused.linear(x, tangent, module.weight, bias, *rest)
        else:
            geometry = _geometry(module)
            y, ty, pre = fused.conv2d(x, tangent, module.weight, module.bias, *geometry, *rest)
        if end.pool is not None:
            y, ty, pre, _ = fused.max_pool2d_end(
                y,
                None if tangent is None else ty,
                pre,
                *pool_geometry(end.pool),
                dual.noise_state,
                self.index,
                dual.noise,
            )
        self._record(dual, y, pre, end.activation, order, taken_bias=taken)
        return _through_pool(pool, y, ty if dual.perturbs else None)

    def _pooled_end(
        self, dual: DualPass, end: ChainEnd, x: Tensor, tangent: Tensor | None, pool: nn.MaxPool2d
    ) -> PrimalTangent:
        """The end of a block of images and the pool after the block."""
        module: Any = end.first
        rest = (dual.noise_state, self.index, end.activation, dual.noise, *pool_geometry(pool))
        if end.normalizes:
            x = x.contiguous(memory_format=torch.channels_last)
            y, pre, _, _, *pooled = fused.batch_norm_max_pool2d(
                x, tangent, *norm_arguments(module), *rest, num_batches_tracked=counter_of(module)
            )
        else:
            y, pre, *pooled = fused.conv2d_max_pool2d(
                x, tangent, module.weight, module.bias, *_geometry(module), *rest
            )
        self._record(dual, y, pre, end.activation, torch.channels_last, own_output=True)
        return pooled[0], pooled[1] if dual.perturbs else None

    def _enter(self, x: Tensor) -> DualPass:
        """The pass that runs, once it is clear that it may go through this block."""
        dual = self.dual
        assert dual is not None
        if self.index in dual.seen:
            raise RuntimeError(
                f"FDFA: block '{self.name}' was used twice in one forward pass; its feedback matrix "
                "belongs to one place in the network, so use two blocks (they may share a weight)"
            )
        if x.requires_grad:
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
        own_output: bool = False,
        taken_bias: Tensor | None = None,
    ) -> None:
        """own_output: no module after the block sees it. taken_bias: one that is left to the method."""
        has_pre = activation in NEEDS_PRE_ACTIVATION
        if dual.compiling:
            # A compiler cannot trace versions. It leaves the copy out if no module changes the output.
            output = output.clone()
        gate = handle.detach() if has_pre else output
        # For images alone: a dense block's δ has a memory order of its own.
        spare_gate = (own_output or has_pre) and output.dim() == 4
        spare_gate = spare_gate and not (dual.compiling or dual.exposes)
        version = 0 if dual.compiling else output._version
        if taken_bias is not None:
            dual.biases.append(taken_bias)
            dual.biased.append(len(dual.records))
        dual.seen.add(self.index)
        dual.records.append(
            BlockRecord(
                self.name, self.index, output, handle, gate, activation, order, version, spare_gate
            )
        )


def channels_last(x: Tensor) -> Tensor:
    """x [N, C, H, W] dense in channels_last, by strides that say so on CUDA.

    With one channel or one pixel row-major strides describe the same memory, and torch keeps them.
    cuDNN goes by the strides, and would compute in row-major order.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    _, c, h, w = x.shape
    strides = (h * w * c, 1, w * c, c)
    return x if x.stride() == strides or not x.is_cuda else x.as_strided(x.shape, strides)


def _geometry(convolution: Any) -> tuple[Any, ...]:
    return (convolution.stride, convolution.padding, convolution.dilation, convolution.groups)


def _through_pool(pool: nn.MaxPool2d | None, y: Tensor, ty: Tensor | None) -> PrimalTangent:
    return (y, ty) if pool is None else forward_dual(pool, y, ty)


def rows(t: Tensor) -> Tensor:
    """[N, *features] → [N, D] in memory order, without a copy of images in channels_last."""
    return t.permute(0, 2, 3, 1).flatten(1) if t.dim() == 4 else t.flatten(1)


def unrows(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """[N, D] → [N, *features], images in channels_last."""
    matrix = matrix.contiguous()
    if len(shape) != 4:
        return matrix.view(*shape)
    n, c, h, w = shape
    return matrix.view(n, h, w, c).permute(0, 3, 1, 2)

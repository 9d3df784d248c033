"""The autograd nodes that stand between the loss and what a method trains. No path leads from block to
block."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from fdfa_ext._ops import fused
from fdfa_ext.dual_pass import BlockRecord, DualPass
from fdfa_ext.feedback import FeedbackBank, FeedbackStep
from fdfa_ext.noise import flatten_features, memory_format_of, perturbation, unflatten_features
from fdfa_ext.patches import patch_means, patch_pixels, patch_shape, spread
from fdfa_ext.positions import Source
from fdfa_ext.reference import refuse_second_derivative, through_activation

_Given = TypeVar("_Given")


@dataclass
class BlockStep:
    """A block in the backward of one step. D features, in the memory order of the block's output.

    N counts samples, or the tokens or pixels that count as such. Where features have other positions
    than the output, N counts theirs: an error is the sum over the output's positions in one, a tangent
    their mean.

    Of images and sequences in patches these are their patches, channel by channel: an error is every
    pixel's of its patch, and an output the pixels' mean.
    """

    name: str
    """Of the block within the model's module."""
    error: Tensor
    """e [N, K]: gradient of the loss at the output."""
    _tangent: Tensor | None
    _feedback: Tensor | None
    _output: Tensor | None
    _make_perturbation: Callable[[], Tensor] | None
    _make_pixels: Callable[[], Tensor]

    @property
    def tangent(self) -> Tensor:
        """d [N, K]: tangent of the output."""
        return self._given(self._tangent, "tangent", 'tangents = "network"')

    @property
    def feedback(self) -> Tensor:
        """B [K, D]."""
        return self._given(self._feedback, "feedback", 'feedback = "learned" or "fixed"')

    @property
    def output(self) -> Tensor:
        """y [N, D], for methods with reads_output."""
        return self._given(self._output, "output", "reads_output = True")

    @property
    def perturbation(self) -> Tensor:
        """u [N, D], made again from the noise state at each access: yours to change. That of a patch is
        divided by its pixels, so that dᵀu / N estimates the mean of their Jacobians."""
        return self._given(self._make_perturbation, "perturbation", 'tangents = "network"')()

    @property
    def pixels(self) -> Tensor:
        """The pixels of each feature's patch, [D], float32; [1], of 1, for a block without patches."""
        return self._make_pixels()

    def _given(self, value: _Given | None, what: str, attribute: str) -> _Given:
        if value is None:
            raise RuntimeError(
                f"FDFA: block '{self.name}' has no {what} in this step; the method's class needs "
                f"{attribute}"
            )
        return value


class BlockRule(Protocol):
    """What the nodes ask of a method."""

    feedback: str
    reads_output: bool

    @property
    def keeps_output(self) -> bool: ...
    def deltas(self, blocks: Sequence[BlockStep]) -> Sequence[Tensor]: ...
    def feedback_gradients(self, blocks: Sequence[BlockStep]) -> Sequence[Tensor]: ...


def attach(
    rule: BlockRule,
    dual: DualPass,
    records: Sequence[BlockRecord],
    output: Tensor,
    tangent: Tensor | None,
    noise_state: Tensor | None,
    feedback: FeedbackStep,
) -> Tensor:
    """The output, whose backward gives each of these blocks its δ by the rule's equations."""
    backward = _BlockBackward(rule, feedback, dual, records)
    return _attach(backward, dual, records, output, tangent, noise_state)


def attach_shared(
    rule: BlockRule,
    dual: DualPass,
    output: Tensor,
    tangent: Tensor | None,
    noise_state: Tensor | None,
    feedback: FeedbackStep,
    decay: float,
) -> Tensor:
    """What attach_fused does, for B that all processes learn."""
    features = sum(r.output.shape[1:].numel() for r in dual.records)
    rows: list[int] = []
    if tangent is not None and tangent.is_cpu:  # where the sizes are known without waiting
        rows = dual.rows_of_ranks(len(tangent))
    gathers = bool(rows) and feedback.rule != "grad" and sum(rows) * features <= _MOST_GATHERED
    if not gathers:
        tangent = dual.weighted(tangent, feedback.rule)
    backward = _SharedBackward(rule, feedback, dual, dual.records, decay, rows, gathers)
    return _attach(backward, dual, dual.records, output, tangent, noise_state)


def _attach(
    backward: "_BlockBackward",
    dual: DualPass,
    records: Sequence[BlockRecord],
    output: Tensor,
    tangent: Tensor | None,
    noise_state: Tensor | None,
) -> Tensor:
    rule, feedback = backward.rule, backward.feedback
    matrices = [] if rule.feedback == "none" else feedback.select(backward.names)[0]
    result: Tensor = _BlockNode.apply(
        backward,
        output,
        tangent,
        noise_state,
        *[r.anchor for r in records],
        *matrices,
        *[r.saved_activation for r in records],
        *([r.kept_output(dual.compiling) for r in records] if rule.reads_output else []),
    )
    return result


class _BlockBackward:
    """What the backward of some blocks needs beside tensors."""

    def __init__(
        self,
        rule: BlockRule,
        feedback: FeedbackStep,
        dual: DualPass,
        records: Sequence[BlockRecord],
    ) -> None:
        self.rule, self.feedback = rule, feedback
        self.operators, self.noise, self.patch = dual.backend, dual.noise, dual.patch
        self.names = [r.name for r in records]
        self.indices = [r.index for r in records]
        self.activations = [r.activation for r in records]

    def step(
        self,
        error: Tensor,
        tangent: Tensor | None,
        noise_state: Tensor | None,
        matrices: Sequence[Tensor],
        saved_activations: Sequence[Tensor],
        outputs: Sequence[Tensor],
    ) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
        """Moves B; returns δ of each block, and ∇B of those whose B is a parameter."""
        blocks = [
            BlockStep(
                name,
                error,
                tangent,
                flatten_features(matrices[i].detach()) if matrices else None,
                flatten_features(patch_means(outputs[i].float(), self.patch)) if outputs else None,
                None
                if noise_state is None
                else partial(self._perturbation, saved_activations[i], noise_state, self.indices[i]),
                partial(self._pixels, saved_activations[i]),
            )
            for i, name in enumerate(self.names)
        ]
        gradients: list[Tensor | None] = [None] * len(matrices)
        # A process without samples still takes part in what all learn from.
        if self.feedback.rule != "fixed" and (len(error) > 0 or self.feedback.ranks is not None):
            gradient = self.rule.feedback_gradients(blocks)
            found = self._checked("feedback_gradient", gradient, [m.shape for m in matrices])
            if self.feedback.rule == "grad":
                gradients[:] = found
                self.feedback.keep_averaged(self.names)
            else:
                self.feedback.move(self.names, found, len(error))
        shapes = [patch_shape(saved.shape, self.patch) for saved in saved_activations]
        errors = self._checked("delta", self.rule.deltas(blocks), shapes)
        deltas = [
            through_activation(activation, like, spread(delta, like.shape, self.patch))
            for activation, like, delta in zip(self.activations, saved_activations, errors, strict=True)
        ]
        return deltas, gradients

    def _checked(
        self, function: str, found: Sequence[Tensor], shapes: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """What a function of the rule has returned, [N, D] or [K, D] each, in these shapes."""
        method = type(self.rule).__name__
        if len(found) != len(shapes):
            raise ValueError(
                f"FDFA: {function}s of {method} must return one tensor a block; expected "
                f"{len(shapes)}, got {len(found)}"
            )
        for name, matrix, (rows, *features) in zip(self.names, found, shapes, strict=True):
            shape = [rows, math.prod(features)]
            if not isinstance(matrix, Tensor) or list(matrix.shape) != shape:
                got = list(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
                raise ValueError(
                    f"FDFA: {function} of {method} must return {shape} for block '{name}'; got {got}"
                )
        return [unflatten_features(m, shape) for m, shape in zip(found, shapes, strict=True)]

    def _perturbation(self, like: Tensor, noise_state: Tensor, index: int) -> Tensor:
        if not self._has_patches(like):
            return flatten_features(perturbation(self.operators, like, noise_state, index, self.noise))
        patches = like.new_empty(patch_shape(like.shape, self.patch))
        u = flatten_features(perturbation(self.operators, patches, noise_state, index, self.noise))
        return u / self._pixels(like)

    def _pixels(self, like: Tensor) -> Tensor:
        if not self._has_patches(like):
            return torch.ones(1, device=like.device)
        pixels = patch_pixels(like.shape, self.patch, like.device)
        return pixels.flatten().repeat_interleave(like.shape[1]).float()

    def _has_patches(self, like: Tensor) -> bool:
        return self.patch > 1 and like.dim() == 4


# Rows times features up to which each process makes G of all rows by itself, from their d, in place of
# the mean of its own with the others'. A million take 2 ms on a core of an EPYC, and a mean by gloo 3.
_MOST_GATHERED = 2**20


class _SharedBackward(_BlockBackward):
    """By δ = e B and ∇B = decay B - G, in operators for all blocks."""

    def __init__(
        self,
        rule: BlockRule,
        feedback: FeedbackStep,
        dual: DualPass,
        records: Sequence[BlockRecord],
        decay: float,
        rows: list[int],
        gathers: bool,
    ) -> None:
        """rows: of each process, where they are known. gathers: whether all gather d, or average ∇B."""
        super().__init__(rule, feedback, dual, records)
        self.decay = decay
        self.rows = rows
        self.gathers = gathers

    def step(
        self,
        error: Tensor,
        tangent: Tensor | None,
        noise_state: Tensor | None,
        matrices: Sequence[Tensor],
        saved_activations: Sequence[Tensor],
        outputs: Sequence[Tensor],
    ) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
        feedback, saved = self.feedback, list(saved_activations)
        if self.gathers or len(error) == 0:
            deltas = [_empty_delta(t) for t in saved]
            # No rows in any process teach nothing.
            decay = 0.0 if self.rows and sum(self.rows) == 0 else self.decay
            gradients = [decay * matrix for matrix in matrices]
            if self.gathers:
                gradients = self._gradients_of_all(tangent, noise_state, matrices, saved)
        else:
            deltas, gradients = self._gradients(
                error, tangent, noise_state, matrices, saved, list(outputs), self.activations
            )
        if feedback.rule == "grad":
            feedback.keep_averaged(self.names)
            return deltas, gradients
        rows = sum(self.rows) if self.gathers else len(error)
        feedback.move(self.names, gradients, rows, are_common=self.gathers)
        self.operators.feedback_step(
            feedback=list(matrices),
            exp_avg=[],
            exp_avg_sq=[],
            updates=None,
            error=error,
            tangent=None,
            saved_activations=saved,
            outputs=[],
            noise_state=None,
            blocks=self.indices,
            activations=self.activations,
            noise="none",
            decay=self.decay,
            lr=feedback.learning_rate,
            beta1=feedback.betas[0],
            beta2=feedback.betas[1],
            eps=feedback.eps,
            deltas=deltas,
            bias_grads=[],
            patch=self.patch,
        )
        return deltas, [None] * len(matrices)

    def _gradients_of_all(
        self,
        tangent: Any,
        noise_state: Any,
        matrices: Sequence[Tensor],
        saved_activations: Sequence[Tensor],
    ) -> list[Tensor]:
        """∇B by the rows of all processes."""
        ranks: Any = self.feedback.ranks
        d = ranks.gather(tangent, self.rows, self.names)
        state = noise_state.clone()
        state[2] -= sum(self.rows[: ranks.rank])
        # Of the right shape, and never read.
        like = [t.new_empty(1).expand(len(d), *t.shape[1:]) for t in saved_activations]
        none = ["identity"] * len(like)
        return self._gradients(torch.zeros_like(d), d, state, matrices, like, [], none)[1]

    def _gradients(
        self,
        error: Tensor,
        tangent: Tensor | None,
        noise_state: Tensor | None,
        matrices: Sequence[Tensor],
        saved_activations: list[Tensor],
        outputs: list[Tensor],
        activations: list[str],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """δ and ∇B."""
        found: tuple[list[Tensor], list[Tensor]] = self.operators.feedback_gradient(
            list(matrices),
            error,
            tangent,
            saved_activations,
            outputs,
            noise_state,
            self.indices,
            activations,
            self.noise,
            self.decay,
            self.patch,
        )
        return found


def _empty_delta(like: Tensor) -> Tensor:
    """In the order of the noise, or for [N, D] that of the transpose, which oneDNN wants."""
    if like.dim() == 2:
        return torch.empty_like(like.t(), memory_format=torch.contiguous_format).t()
    return torch.empty_like(like, memory_format=memory_format_of(like.dim()))


class _BlockNode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backward: _BlockBackward,
        output: Tensor,
        tangent: Tensor | None,
        noise_state: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        """tensors: each block's anchor, its B if it has one, its saved activation, and its output if
        that is read."""
        n = len(backward.names)
        saved = 2 * n if backward.rule.feedback != "none" else n  # the first tensor to be
        ctx.what = backward
        # B moves in place from step to step, so autograd must not watch its version.
        ctx.matrices = tensors[n:saved]
        ctx.save_for_backward(tangent, noise_state, *tensors[saved:])
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        refuse_second_derivative()
        what: _BlockBackward = ctx.what
        tangent, noise_state, *saved = ctx.saved_tensors
        matrices: Sequence[Tensor] = ctx.matrices
        n = len(what.names)
        saved_activations, outputs = saved[:n], saved[n:]
        error = grads[0].to(torch.float32, copy=True)  # a rule may change it
        deltas, gradients = what.step(
            error,
            None if tangent is None else tangent.float(),
            noise_state,
            matrices,
            saved_activations,
            outputs,
        )
        return (None, grads[0], None, None, *deltas, *gradients, *[None] * len(saved))


def attach_fused(
    rule: BlockRule,
    dual: DualPass,
    output: Tensor,
    tangent: Tensor | None,
    feedback: FeedbackStep,
    decay: float,
) -> Tensor:
    """The same for all blocks of the pass by δ = e B and ∇B = decay B - G, in one operator, with the
    output layer where the pass has left that to it."""
    layer = dual.output_layer
    weight, bias = (None, None) if layer is None else (layer.weight, layer.bias)
    blocks = dual.gather(rule.reads_output and feedback.rule != "fixed")
    shape = output.shape[0], output.shape[1] if weight is None else weight.shape[0]
    checks = dual.backend is fused and not dual.compiling  # the operator does
    if not checks or blocks.changed:
        check_blocks(rule, dual, feedback.matrices, *shape)
    try:
        matrices, exp_avg, exp_avg_sq = feedback.select(blocks.names)
        result: Tensor = dual.backend.feedback_node(
            output,
            tangent,
            weight,
            bias,
            noise_state=dual.noise_state,
            anchors=blocks.anchors,
            biases=dual.biases,
            biased=dual.biased,
            saved_activations=blocks.saved_activations,
            donated=blocks.donated,
            outputs=blocks.outputs,
            feedback=matrices,
            exp_avg=exp_avg,
            exp_avg_sq=exp_avg_sq,
            updates=feedback.updates,
            blocks=blocks.indices,
            activations=blocks.activations,
            noise=dual.noise,
            rule=feedback.rule,
            decay=decay,
            lr=feedback.learning_rate,
            beta1=feedback.betas[0],
            beta2=feedback.betas[1],
            eps=feedback.eps,
            input=None if layer is None else layer.input,
            patch=dual.patch,
        )
    except (RuntimeError, TypeError, ValueError):
        check_blocks(rule, dual, feedback.matrices, *shape)  # it calls blocks by their names
        raise
    return result


def check_blocks(rule: BlockRule, dual: DualPass, matrices: FeedbackBank, n: int, outputs: int) -> None:
    """Raises unless the blocks of a pass of n samples have what the backward needs, and fit their B."""
    for record in dual.records:
        if not dual.compiling:
            check_unchanged(rule, record)
        shape = record.output.shape
        if shape[0] != n:
            raise ValueError(
                f"FDFA: block or point '{record.name}' must keep the batch first: expected [{n}, "
                f'*features] as the output has, got {list(record.shape)}; if "auto" found it, give an '
                "example_input of more samples"
            )
        if rule.feedback == "none":
            continue
        matrix = matrices[record.name]
        if list(matrix.shape) != [outputs, *patch_shape(shape, dual.patch)[1:]]:
            patches = f" in patches of {dual.patch}" if dual.patch > 1 and len(shape) == 4 else ""
            raise ValueError(
                f"FDFA: block '{record.name}': its feedback has shape {list(matrix.shape)}, but "
                f"{outputs} outputs and features {list(record.shape[1:])}{patches} came; both are "
                "fixed, so wrap the module again after changing them (where images or sequences vary, "
                "a patch no smaller than any of them leaves one column for each channel)"
            )
        if not matrix.is_contiguous(memory_format=record.memory_format):
            raise ValueError(
                f"FDFA: block '{record.name}': its feedback must lie in {record.memory_format}, the "
                f"order of the noise; got strides {matrix.stride()}"
            )


def check_unchanged(rule: BlockRule, record: BlockRecord) -> None:
    """Raises if a module changed the output of a block that the backward needs."""
    reads_output = record.activation != "identity" and record.saved_activation is record.output
    if (reads_output or rule.keeps_output) and record.output._version != record.version:
        raise RuntimeError(
            f"FDFA: the output of block '{record.name}' was changed in place by a module "
            "after it, but is needed later; use the module without inplace"
        )


Finish = Callable[[DualPass, Tensor, Tensor | None, FeedbackStep], Tensor]


def attach_parts(
    finish: Finish, dual: DualPass, output: Tensor, tangent: Tensor | None, feedback: FeedbackStep
) -> Tensor:
    """The output [N, K] by finish(dual, output, tangent, feedback), once for each part of the pass."""
    # Those of rule "grad" are averaged by their names, and "fixed" ones by nobody.
    shares = dual.ranks is not None and feedback.rule not in ("fixed", "grad")
    parts = dual.parts(len(output), shares)
    if parts[0] is dual and dual.ranks is None:
        return finish(dual, output, tangent, feedback)
    # All parts take the noise and Adam's counter as they are before; one moves the counter on.
    counts = [feedback.updates, *(feedback.updates.clone() for _ in parts[1:])]
    rows = [len(output) if part.source is None else part.source.rows for part in parts]
    states = [
        part.noise_of(part.records[0].index, n).clone() for part, n in zip(parts, rows, strict=True)
    ]
    if dual.perturbs and not dual.compiling:  # there it is moved
        fused.next_noise(dual.noise_state)
    ends: list[Tensor] = []
    sources: list[Source] = []
    for part, n, state, updates in zip(parts, rows, states, counts, strict=True):
        source, step = part.source, replace(feedback, updates=updates)
        part.noise_state = state
        d = tangent if source is None or tangent is None else source.tangents(tangent)
        if source is None:
            output = finish(part, output, d, step)
            continue
        ends.append(finish(part, output.new_zeros(n, output.shape[1]), d, step))
        sources.append(source)
    if not sources:
        return output
    result: Tensor = _Branches.apply(sources, counts, output, *ends)
    return result


class _Branches(torch.autograd.Function):
    """The output, whose error goes to the ends of other parts too."""

    @staticmethod
    def forward(
        ctx: Any, sources: Sequence[Source], counts: Sequence[Tensor], output: Tensor, *ends: Tensor
    ) -> Tensor:
        ctx.sources, ctx.counts = sources, counts
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        refuse_second_derivative()
        (error,) = grads
        count, *copies = ctx.counts
        for copy in copies:  # of the time of the backward, before any part of it
            copy.copy_(count)
        return None, None, error, *[source.errors(error) for source in ctx.sources]


Direction = Callable[[Tensor, int, Tensor], Tensor]


def attach_weights(
    output: Tensor,
    tangent: Tensor,
    noise_state: Tensor,
    direction: Direction,
    parameters: Sequence[Tensor],
) -> Tensor:
    """The output, whose backward gives each parameter (e · d) V, V = direction(noise_state, index,
    parameter)."""
    result: Tensor = _WeightNode.apply(output, tangent, noise_state, direction, *parameters)
    return result


class _WeightNode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        tangent: Tensor,
        noise_state: Tensor,
        direction: Direction,
        *parameters: Tensor,
    ) -> Tensor:
        # The state with the tangent, so that a checkpoint makes both again or neither.
        ctx.save_for_backward(tangent, noise_state, *parameters)
        ctx.direction = direction
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        (error,) = grads
        tangent, noise_state, *parameters = ctx.saved_tensors
        slope = (error * tangent).sum()
        directions = (ctx.direction(noise_state, index, p) for index, p in enumerate(parameters))
        return None, None, None, None, *[v.mul_(slope) for v in directions]

"""Several passes that have a batch together, as one pass."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fdfa_ext.autograd import BlockRule, check_blocks, check_unchanged
from fdfa_ext.dual_pass import BlockRecord, DenseLayer, DualPass, MicroBatch
from fdfa_ext.feedback import FeedbackBank
from fdfa_ext.reference import refuse_second_derivative


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples that go through a model in micro-batches."""

    samples: int
    count: int  # of micro-batches; as many as samples, where these are fewer
    is_training: bool
    fingerprint: int

    LENGTH = 4

    @classmethod
    def read(cls, numbers: Sequence[int]) -> "Batch":
        samples, count, is_training, of_x = numbers
        return cls(samples, count, bool(is_training), of_x)

    def numbers(self) -> list[int]:
        return [self.samples, self.count, int(self.is_training), self.fingerprint]

    def parts(self) -> list[MicroBatch]:
        """Their sizes differ by one at most."""
        count = max(1, min(self.count, self.samples))
        bounds = [self.samples * i // count for i in range(count + 1)]
        return [MicroBatch(a, b - a) for a, b in pairwise(bounds)]


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(x: Any) -> int:
    """A whole number by which two batches are known as different ones, or in another order."""
    if not isinstance(x, Tensor) or x.numel() == 0:
        return 0
    # Sums of integers are the same in any order in which a device takes them.
    kind = _INTEGERS.get(x.element_size(), torch.uint8)
    of_samples = x.detach().contiguous().view(kind).flatten().view(len(x), -1).sum(1)
    return int((of_samples * torch.arange(1, len(x) + 1, device=x.device)).sum())


def check_pass(rule: BlockRule, dual: DualPass, first: DualPass, feedback: FeedbackBank) -> None:
    """Raises unless a micro-batch's pass can be joined to the first one's, and its blocks fit B."""
    names, others = ([r.name for r in records] for records in (first.records, dual.records))
    if names != others:
        raise RuntimeError(
            f"FDFA: the micro-batches of a step used different blocks or points, {names} and {others}, "
            "but learn the feedback of each together"
        )
    if not names:
        raise RuntimeError("FDFA: no block or point of a stage was used in this step")
    for record, own in zip(first.records, dual.records, strict=True):
        rows = [
            len(r.output) / max(d.micro_batch.samples if d.micro_batch else 1, 1)
            for r, d in ((record, first), (own, dual))
        ]
        if rows[0] != rows[1]:
            raise RuntimeError(
                f"FDFA: '{own.name}' must have as many rows for each sample in all micro-batches of a "
                f"batch; got {rows[0]:g} and {rows[1]:g}"
            )
        outputs = 0 if rule.feedback == "none" else len(feedback[own.name])
        check_blocks(rule, replace(dual, records=[own]), feedback, len(own.output), outputs)


def joined(rule: BlockRule, passes: Sequence[DualPass]) -> DualPass:
    """The pass of the whole batch. Its anchors hand each micro-batch the rows of δ that are its own."""
    blocks = zip(*(dual.records for dual in passes), strict=True)
    records = [_joined_records(rule, passes[0], records) for records in blocks]
    return replace(passes[0], micro_batch=None, input_tangent=None, end=None, records=records)


def _joined_records(rule: BlockRule, dual: DualPass, parts: Sequence[BlockRecord]) -> BlockRecord:
    first = parts[0]
    for part in parts:
        check_unchanged(rule, part)
    rows = [len(part.output) for part in parts]
    # Of the right shape, for what is never read.
    output = saved = first.output.new_empty(1).expand(sum(rows), *first.output.shape[1:])
    if first.activation != "identity":
        saved = _cat([part.saved_activation for part in parts], first)
    if rule.reads_output:
        output = _cat([part.output for part in parts], first)
    if first.saved_activation is first.output and first.activation != "identity":
        output = saved
    anchor: Tensor
    layers = [part.layer for part in parts if part.layer is not None and _can_join(part.layer, first)]
    if len(parts) > 1 and len(layers) == len(parts):
        x = torch.cat([layer.x for layer in layers])
        anchor = _Dense.apply(dual.backend, first.anchor, x, layers[0].weight, layers[0].bias)
    else:
        anchor = _Joined.apply(rows, *(part.anchor for part in parts))
    positions = [part.positions for part in parts if part.positions is not None]
    return replace(
        first,
        output=output,
        anchor=anchor,
        saved_activation=saved,
        version=output._version,
        donated=False,
        positions=replace(positions[0], n=sum(p.n for p in positions)) if positions else None,
        layer=None,
    )


def _can_join(layer: DenseLayer, first: BlockRecord) -> bool:
    """Whether the batch's gradients follow from all inputs at once, as one process takes them."""
    own = first.layer
    is_same = own is not None and layer.weight is own.weight and layer.bias is own.bias
    return is_same and layer.x._version == layer.version  # or torch says that it has changed


def _cat(parts: list[Tensor], record: BlockRecord) -> Tensor:
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole.detach().contiguous(memory_format=record.memory_format)


class _Joined(torch.autograd.Function):
    """Rows of several tensors, whose values nobody reads."""

    @staticmethod
    def forward(ctx: Any, rows: list[int], *parts: Tensor) -> Tensor:
        ctx.rows = rows
        return parts[0].new_empty(1).expand(sum(rows), *parts[0].shape[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        refuse_second_derivative()
        return None, *grads[0].split(ctx.rows)


class _Dense(torch.autograd.Function):
    """A dense layer's result for inputs [N, *, in_features], whose values nobody reads."""

    @staticmethod
    def forward(
        ctx: Any, operators: Any, like: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.operators = operators
        ctx.save_for_backward(x)
        return like.new_empty(1).expand(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        refuse_second_derivative()
        (x,) = ctx.saved_tensors
        delta = grads[0].flatten(0, -2)
        of_weight = of_bias = None
        if ctx.needs_input_grad[3]:
            of_weight = ctx.operators.mm(delta.t(), x.flatten(0, -2))
        if ctx.needs_input_grad[4]:
            of_bias = delta.sum(0)
        return None, None, None, of_weight, of_bias

"""What the stages of a Pipeline send each other.

Who receives a message must know its size. So it expects what came in the step before, and has memory
ready while the sender still computes. A sender of something else fills that memory, says so in the
message's header, and sends the rest behind it.
"""

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fdfa_ext.dual_pass import MicroBatch
from fdfa_ext.micro_batches import Batch, fingerprint

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_MOST_DIMENSIONS = 8
_CHANNELS_FIRST = (None, False, True)


@dataclass(frozen=True, slots=True)
class _Layout:
    """dtype, memory order and sizes of a tensor."""

    dtype: torch.dtype
    is_channels_last: bool
    shape: tuple[int, ...]

    LENGTH = 3 + _MOST_DIMENSIONS

    @classmethod
    def of(cls, t: Tensor) -> "_Layout":
        last = t.dim() == 4 and not t.is_contiguous()
        last = last and t.is_contiguous(memory_format=torch.channels_last)
        return cls(t.dtype, last, tuple(t.shape))

    @classmethod
    def read(cls, numbers: Sequence[int]) -> "_Layout":
        dtype, last, dimensions, *sizes = numbers
        return cls(_DTYPES[dtype], bool(last), tuple(sizes[:dimensions]))

    def numbers(self) -> list[int]:
        rest = [0] * (_MOST_DIMENSIONS - len(self.shape))
        kind = [_DTYPES.index(self.dtype), int(self.is_channels_last)]
        return [*kind, len(self.shape), *self.shape, *rest]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def empty(self, samples: int, device: torch.device) -> Tensor:
        """Memory for so many samples."""
        order = torch.channels_last if self.is_channels_last else torch.contiguous_format
        shape = samples, *self.shape[1:]
        return torch.empty(shape, dtype=self.dtype, device=device, memory_format=order)

    def message(self, t: Tensor) -> Tensor:
        """A tensor that has this layout, but for its samples, row-major; no copy where it lies so."""
        return (t.permute(0, 2, 3, 1) if self.is_channels_last else t).contiguous()


@dataclass(slots=True)
class Ending:
    """What all stages learn by: of the whole batch."""

    loss: float
    error: Tensor  # e, in the shape of the network's output
    tangent: Tensor | None  # d
    channels_first: bool | None  # of the output, if it is a sequence


class Messages:
    """Those of one process, whose stage has its rank in the group."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank: int = dist.get_rank(group)
        self.size: int = dist.get_world_size(group)
        self._under_way: list[tuple[Any, Tensor]] = []  # with their memory
        self._sent: tuple[_Layout, bool] | None = None
        self._received: tuple[_Layout, bool] | None = None
        self._ending: tuple[_Layout, bool] | None = None

    def send(
        self, part: MicroBatch, batch: Batch, noise_state: Tensor, y: Tensor, ty: Tensor | None
    ) -> None:
        """To the next stage: what it has for its input in a micro-batch."""
        if part.first == 0:
            _check(y)
            layout, old = (_Layout.of(y), ty is not None), self._sent
            numbers = [*noise_state.tolist(), *batch.numbers()]
            self._send(_packed([*numbers, int(layout[1]), *layout[0].numbers()], y.device))
            if old is not None and old != layout:
                for _ in range(1 + old[1]):
                    self._send(old[0].message(old[0].empty(old[0].shape[0], y.device)))
            self._sent = layout
        assert self._sent is not None, "by the first one"
        expected = self._sent[0]
        if y.dtype != expected.dtype or y.shape != (part.samples, *expected.shape[1:]):
            raise ValueError(
                f"FDFA: a stage must return {[part.samples, *expected.shape[1:]]} {expected.dtype} for "
                f"each micro-batch of a batch, as for the first one; got {[*y.shape]} {y.dtype}"
            )
        for t in [y] if ty is None else [y, ty]:
            self._send(expected.message(t))

    def receive(
        self, noise_state: Tensor, x: Any, is_training: bool
    ) -> Iterator[tuple[MicroBatch, Batch, Tensor, Tensor | None]]:
        """From the stage before: the micro-batches, with primal and tangent of each. Sets the noise.
        The next one comes while the stage works on one.

        x: the batch, if this process has it too.
        """
        device = noise_state.device
        header = torch.empty(4 + Batch.LENGTH + _Layout.LENGTH, dtype=torch.int64, device=device)
        coming, old = self._receive(header), self._received
        first = [] if old is None else self._receive_pair(old, old[0].shape[0], device)
        coming.wait()
        batch = Batch.read(header[3 : 3 + Batch.LENGTH].tolist())
        if batch.is_training != is_training:
            does = "trains" if batch.is_training else "evaluates"
            raise RuntimeError(
                f"FDFA: the stage before {does} by a batch, and this one does not; all processes of a "
                "Pipeline make the same calls"
            )
        if x is not None and fingerprint(x) != batch.fingerprint:
            raise RuntimeError(
                "FDFA: the first stage was given another batch than this one; all processes must have "
                "the same batches in the same order, by a DataLoader with a generator of the same seed"
            )
        noise_state.copy_(header[:3])
        has_tangent, *numbers = header[3 + Batch.LENGTH :].tolist()
        layout = _Layout.read(numbers), bool(has_tangent)
        parts = batch.parts()
        if old is not None and old != layout:
            _wait(first)
        if old != layout:
            first = self._receive_pair(layout, parts[0].samples, device)
        self._received = layout
        for part, following in zip(parts, [*parts[1:], None], strict=True):
            after = [] if following is None else self._receive_pair(layout, following.samples, device)
            y, ty = _wait(first)
            yield part, batch, y, ty
            first = after

    def end(self, ending: Ending) -> None:
        """From the last stage to all."""
        error, tangent = ending.error, ending.tangent
        layout, old = (_Layout.of(error.contiguous()), tangent is not None), self._ending
        bits = struct.unpack("<q", struct.pack("<d", ending.loss))[0]
        first = _CHANNELS_FIRST.index(ending.channels_first)
        header = _packed([bits, first, int(layout[1]), *layout[0].numbers()], error.device)
        both = torch.stack([error] if tangent is None else [error, tangent.to(error.dtype)])
        content = both.contiguous().flatten().view(torch.uint8)
        if old == layout:
            self._broadcast(torch.cat([header.view(torch.uint8), content]))
        else:
            self._broadcast(torch.cat([header.view(torch.uint8), _memory(old, error.device)]))
            self._broadcast(content)
        self._ending = layout

    def ended(self, device: torch.device) -> Ending:
        """What the last stage sent."""
        length = 8 * (3 + _Layout.LENGTH)
        old = self._ending
        message = _memory(old, device, length)
        source = dist.get_global_rank(self.group, self.size - 1)
        dist.broadcast(message, source, self.group)
        bits, first, has_tangent, *numbers = message[:length].view(torch.int64).tolist()
        layout = _Layout.read(numbers), bool(has_tangent)
        content = message[length:]
        if old != layout:
            content = _memory(layout, device)
            dist.broadcast(content, source, self.group)
        self._ending = layout
        both = content.view(layout[0].dtype).view(1 + layout[1], *layout[0].shape)
        loss: float = struct.unpack("<d", struct.pack("<q", bits))[0]
        return Ending(loss, both[0], both[1] if has_tangent else None, _CHANNELS_FIRST[first])

    def finish(self) -> None:
        """Waits until all that was sent is."""
        for work, _ in self._under_way:
            work.wait()
        self._under_way = []

    def _send(self, t: Tensor) -> None:
        to = dist.get_global_rank(self.group, self.rank + 1)
        self._under_way.append((dist.isend(t, to, self.group), t))

    def _receive(self, message: Tensor) -> Any:
        source = dist.get_global_rank(self.group, self.rank - 1)
        return dist.irecv(message, source, self.group)

    def _receive_pair(
        self, layout: tuple[_Layout, bool], samples: int, device: torch.device
    ) -> list[tuple[Any, Tensor]]:
        tensors = [layout[0].empty(samples, device) for _ in range(1 + layout[1])]
        return [(self._receive(layout[0].message(t)), t) for t in tensors]

    def _broadcast(self, t: Tensor) -> None:
        source = dist.get_global_rank(self.group, self.rank)
        self._under_way.append((dist.broadcast(t, source, self.group, async_op=True), t))


def _packed(numbers: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def _memory(layout: tuple[_Layout, bool] | None, device: torch.device, before: int = 0) -> Tensor:
    size = 0 if layout is None else layout[0].bytes * (1 + layout[1])
    return torch.empty(before + size, dtype=torch.uint8, device=device)


def _wait(coming: list[tuple[Any, Tensor]]) -> tuple[Tensor, Tensor | None]:
    for work, _ in coming:
        work.wait()
    tensors = [t for _, t in coming]
    return tensors[0], tensors[1] if len(tensors) > 1 else None


def _check(y: Any) -> None:
    is_tensor = isinstance(y, Tensor)
    if not is_tensor or y.dtype not in _DTYPES or not 1 <= y.dim() <= _MOST_DIMENSIONS:
        got = f"{y.dtype} {list(y.shape)}" if is_tensor else type(y).__name__
        raise TypeError(f"FDFA: stages send one tensor of real numbers [N, *features]; got {got}")

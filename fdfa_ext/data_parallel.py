"""Data parallel training: processes that take a step together, each with a part of the batch."""

import weakref
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fdfa_ext._torch_internals import (
    graph_break,
    is_in_backward,
    is_in_join,
    is_recomputing,
    mesh_of,
    running_data_parallel,
)
from fdfa_ext.noise import flatten_features, unflatten_features
from fdfa_ext.warning import warn

_groups: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
_measuring = False


class Ranks:
    """The processes of a group in one step. Their rows are counted in the order of their ranks, as if
    one process had the whole batch.

    A row is a sample, token, pixel or node. Blocks of a `kind` have as many rows as each other in every
    process; how many is exchanged once for each kind, in the order in which all processes come to them.
    """

    def __init__(self, trainer: nn.Module, group: Any) -> None:
        self.trainer = trainer  # the module that averages gradients over the group
        self.group = _own_group(trainer, group)
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        # Whether the backward of this step averages gradients, or leaves that to one of a later step.
        self.averages_gradients = bool(getattr(trainer, "require_backward_grad_sync", True))
        self._exchanged: dict[int, Tensor] = {}

    def noise_state(self, own: Tensor, kind: int, rows: int) -> Tensor:
        """int64 [3]: seed and step of the first process, and the global index of this one's first row.

        own: this process's state.
        """
        states = self._states(own, kind, rows)
        first = states[0, 2] + states[: self.rank, 3].sum()
        return torch.cat([states[0, :2], first.view(1)])

    def weight(self, own: Tensor, kind: int, rows: int) -> Tensor:
        """What makes the mean over processes of their means over rows that over all rows: float64 [],
        1 where all have as many."""
        return rows * self.size / self._states(own, kind, rows)[:, 3].sum().double()

    def rows(self, own: Tensor, kinds: dict[int, int]) -> list[list[int]]:
        """Of each process, for each of these kinds, of which this process has so many."""
        states = [self._states(own, kind, rows)[:, 3] for kind, rows in kinds.items()]
        found: list[list[int]] = torch.stack(states).tolist()
        return found

    def _states(self, own: Tensor, kind: int, rows: int) -> Tensor:
        """int64 [size, 4]: noise state and rows of each process."""
        states = self._exchanged.get(kind)
        if states is None:
            state = torch.cat([own, own.new_tensor([rows])])
            gathered = [torch.empty_like(state) for _ in range(self.size)]
            dist.all_gather(gathered, state, group=self.group)
            states = self._exchanged[kind] = torch.stack(gathered)
        return states

    def gather(self, matrix: Tensor, rows: list[int], names: Sequence[str]) -> Tensor:
        """The rows [N, K] of all processes, of which each has so many, for the same blocks in each."""
        sent = matrix.new_zeros(max(rows) + 1, matrix.shape[1])
        sent[: len(matrix)] = matrix
        sent[-1] = _checksum(names)
        parts = [torch.empty_like(sent) for _ in rows]
        dist.all_gather(parts, sent, group=self.group)
        _check_blocks(names, [part[-1, 0] for part in parts])
        return torch.cat([part[:n] for part, n in zip(parts, rows, strict=True)])

    def mean(
        self, tensors: list[Tensor], rows: int, names: Sequence[str]
    ) -> tuple[list[Tensor], Tensor]:
        """The mean of each over the processes, equal in all of them to the bit, and whether any process
        has rows; in one message. For the same blocks in each, of which one on a GPU does not ask, since
        it would have to wait."""
        if tensors[0].is_cpu:
            own = torch.tensor([_checksum(names)])
            found = [torch.empty_like(own) for _ in range(self.size)]
            dist.all_gather(found, own, group=self.group)
            _check_blocks(names, found)
        sizes = [t.numel() for t in tensors]
        flat = torch.cat(
            [*(flatten_features(t).flatten() for t in tensors), tensors[0].new_full((1,), rows)]
        )
        dist.all_reduce(flat, group=self.group)
        *parts, count = (flat / self.size).split([*sizes, 1])
        means = [
            unflatten_features(part.view(len(t), -1), t.shape)
            for part, t in zip(parts, tensors, strict=True)
        ]
        return means, count[0] > 0

    def take_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Gives each tensor the values of the first process."""
        first = dist.get_global_rank(self.group, 0)
        for t in tensors:
            dist.broadcast(t.detach(), first, group=self.group)

    def leave_out(self, buffers: Iterable[Tensor]) -> None:
        """Spares these what buffers go through at each step: a copy of the first process's values."""
        trainer, spared = self.trainer, {id(t) for t in buffers}
        if isinstance(trainer, DistributedDataParallel):
            named = trainer.module.named_buffers()
            trainer.parameters_to_ignore.update(name for name, t in named if id(t) in spared)
            # It makes this list anew by the names above, but only where the list is not empty.
            trainer.modules_buffers = [t for t in trainer.modules_buffers if id(t) not in spared]


def _checksum(names: Sequence[str]) -> int:
    """A whole number that float32 holds."""
    return zlib.crc32("\n".join(names).encode()) % 2**24


def _check_blocks(names: Sequence[str], checksums: Sequence[Tensor]) -> None:
    """Raises unless these of all processes are that of the blocks of this one."""
    if any(int(checksum) != _checksum(names) for checksum in checksums):
        raise RuntimeError(
            "FDFA: the processes used different blocks or points in this step, but learn the feedback "
            f"of each together; this one used {', '.join(map(repr, names))}"
        )


def ranks_of_step(model: nn.Module, before: nn.Module | None, compiling: bool) -> Ranks | None:
    """The processes that take this step of the model together; None if it is one alone.

    They are those of the DistributedDataParallel whose forward runs, or of fully_shard.

    before: what averaged the gradients of the last step, which a checkpoint computes again in the
        backward.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    if _measuring:
        return None
    found = _trainer_of(model, before, compiling)
    if found is None or dist.get_world_size(found[1]) == 1:
        return None
    if compiling:
        graph_break("a compiler does not raise an error: it goes on without compiling")
        raise RuntimeError(
            "FDFA: torch.compile cannot train in several processes; train the model uncompiled"
        )
    return Ranks(*found)


def is_measuring() -> bool:
    return _measuring


@contextmanager
def measuring() -> Iterator[None]:
    """Within it steps are those of this process alone, which leaves no trace of them."""
    global _measuring
    before, _measuring = _measuring, True
    try:
        yield
    finally:
        _measuring = before


def _trainer_of(
    model: nn.Module, before: nn.Module | None, compiling: bool
) -> tuple[nn.Module, Any] | None:
    """What averages the gradients of this step, and its process group."""
    outer = running_data_parallel()
    if outer is None and isinstance(before, DistributedDataParallel) and is_recomputing():
        outer = before
    if outer is not None:
        if is_in_join(outer):
            raise RuntimeError(
                "FDFA: DistributedDataParallel.join goes on without the processes that have no batch "
                "left, but all learn the feedback; give each as many batches, empty ones in the end"
            )
        return outer, outer.process_group
    if dist.get_world_size() == 1:
        return None
    if is_in_backward() and not is_recomputing() and not compiling:
        raise RuntimeError(
            "FDFA: a reentrant checkpoint does not tell which processes train together; use "
            "torch.utils.checkpoint with use_reentrant=False"
        )
    for module in model.modules():
        mesh = mesh_of(module)
        if mesh is not None:
            return module, _group_of(mesh)
    if not compiling:
        warn(
            f"FDFA: there are {dist.get_world_size()} processes, and this one learns feedback by its "
            "own batches alone, since neither DistributedDataParallel runs the model nor fully_shard "
            "divides it or a module in it"
        )
    return None


def _own_group(trainer: nn.Module, group: Any) -> Any:
    """A group of the same processes for the feedback's messages, whose order is not that of the
    trainer's."""
    if trainer not in _groups:
        ranks = dist.get_process_group_ranks(group)
        _groups[trainer] = dist.new_group(ranks, use_local_synchronization=True)
    return _groups[trainer]


def _group_of(mesh: Any) -> Any:
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() == dist.get_world_size():
        return dist.group.WORLD
    raise RuntimeError(
        f"FDFA: fully_shard over {mesh.ndim} dimensions must have all processes: expected "
        f"{dist.get_world_size()}, got {mesh.size()}"
    )

"""A module's forward in eval mode that leaves no trace in the module."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Within it the module is in eval mode; at its end modes, buffers and torch's generators are as
    before."""
    members = [*module.modules()]
    modes = [(member, member.training) for member in members]
    buffers = save_buffers(member._buffers for member in members)
    try:
        # Not by the module's eval(), which may do more, such as merging weights.
        for member in members:
            member.training = False
        devices = {p.device for p in module.parameters() if p.is_cuda}
        with torch.random.fork_rng([*devices], device_type="cuda"):
            yield
    finally:
        for member, mode in modes:
            member.training = mode
        restore_buffers(buffers)


SavedBuffers = list[tuple[dict[str, Any], str, Tensor, Tensor]]


def save_buffers(buffers: Iterable[dict[str, Any]]) -> SavedBuffers:
    """Each with the module's dictionary that it is in, its name there, and its values."""
    return [
        (entries, name, buffer, buffer.clone())
        for entries in buffers
        for name, buffer in entries.items()
        if buffer is not None and not is_lazy(buffer)
    ]


@torch.no_grad()
def restore_buffers(saved: SavedBuffers) -> None:
    for entries, name, buffer, values in saved:
        entries[name] = buffer.copy_(values)

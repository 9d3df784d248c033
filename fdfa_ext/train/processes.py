"""The processes that torchrun starts, which train one net together."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


@contextmanager
def processes(device: torch.device | None) -> Iterator[torch.device | None]:
    """Connects them, if there are several; yields the device of this one."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield device
        return
    if device is not None and device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device is not None and device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def count() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    return count() == 1 or dist.get_rank() == 0


def own_part(t: Tensor) -> Tensor:
    """The rows of a batch [N, *] that are this process's: a share of N, or one less."""
    return t if count() == 1 else t.tensor_split(count())[dist.get_rank()]


def total(t: Tensor) -> Tensor:
    """The sum over the processes, in place."""
    if count() > 1:
        dist.all_reduce(t)
    return t

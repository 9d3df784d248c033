"""Processes that several tests of a file have in common, on gloo."""

import os
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo"
)

# Of a rank, the number of processes, names of what to run, and a folder for what each process saves.
Work = Callable[[int, int, list[str], str], None]


def states_of(
    work: Work, kind: str, world: int, names: Iterable[str], factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """For each of `world` processes what `work` has saved as <rank>.pt in the folder.

    kind: names the folder.
    """
    # pytest's own processes share them: the first that comes makes them for all.
    root = factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / f"{world}_{kind}"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            torch.multiprocessing.spawn(work, (world, [*names], str(folder)), nprocs=world)
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]

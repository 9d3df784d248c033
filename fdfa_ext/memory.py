"""Freed memory that a training step takes again, and what torch says where there is none."""

from functools import cache

import torch

# As torch's allocator on the CPU has it, and what counts the bytes of a tensor.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "size calculation overflowed")


def is_out_of_memory(error: BaseException) -> bool:
    """On the CPU it is a RuntimeError like any other."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


@cache
def keep_freed_memory() -> None:
    """Lets glibc keep up to 64 MiB of freed memory at the end of its heap.

    By its first thresholds it may give that back to the system after each step, to have it cleared page
    by page in the next: up to a third of a step of the paper's nets, by FDFA and backpropagation alike.
    They rise with the largest piece that was ever mapped and freed, up to 32 MiB. Here such a piece is
    mapped, and freed untouched. Does nothing where MALLOC_TRIM_THRESHOLD_ or another allocator says
    otherwise.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8, device="cpu")

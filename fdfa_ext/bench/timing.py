"""Contenders take turns within one run, so that a busy machine slows all of them alike."""

import os
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, TypeVar

import torch

from fdfa_ext.memory import is_out_of_memory

T = TypeVar("T")

OUT_OF_MEMORY = "out of memory"
_TURN = (
    0.05  # seconds of one turn, if all may have five: far above the clock's and the scheduler's grain
)
_LEAST_TURNS = 5
_SLOW = 4  # a implementation that takes so many times the fastest one's time sits out turns
_SLOW_TURNS = 4  # that is, all but one in so many


class Spread(NamedTuple):
    """Quartiles of a time in milliseconds."""

    lower: float
    median: float
    upper: float

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.lower:.3g}–{self.upper:.3g})"


@dataclass
class Implementation:
    """`step` is what is timed; `ms` gets the time of one step, an entry for each turn.

    One that fails takes no further turns; `error` says why.
    """

    name: str
    step: Callable[[], object]
    ms: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def spread(self) -> Spread:
        return Spread(*statistics.quantiles(self.ms, n=4, method="inclusive"))


def attempt(run: Callable[[], T]) -> tuple[T | None, str]:
    """(run(), ""), or None and in one line why it failed, so that the other implementations go on."""
    try:
        return run(), ""
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is one of the first
        if is_out_of_memory(error):
            return None, OUT_OF_MEMORY
        traceback.print_exc()
        return None, str(error).strip().partition("\n")[0] or type(error).__name__


def take_turns(implementations: Sequence[Implementation], seconds: float, device: torch.device) -> None:
    """Fills `ms` of each for about `seconds`, and with five turns at least.

    Each turn begins with an untimed step, which brings back into the caches what the others displaced.
    """
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def timed(step: Callable[[], object], repeats: int) -> float:
        synchronize()
        started = time.perf_counter()
        for _ in range(repeats):
            step()
        synchronize()
        return (time.perf_counter() - started) / repeats

    def warm(step: Callable[[], object]) -> float:
        timed(step, 2)  # compiles, allocates, tunes
        return timed(step, 1)

    def take_turn(each: Implementation, repeats: int) -> None:
        each.step()
        each.ms.append(1e3 * timed(each.step, repeats))

    estimates = {}
    for each in implementations:
        estimate, each.error = attempt(partial(warm, each.step))
        if estimate is not None:
            estimates[each.name] = estimate
    slow = {name for name, estimate in estimates.items() if estimate > _SLOW * min(estimates.values())}
    turn_seconds = min(_TURN, seconds / (_LEAST_TURNS * len(implementations)))
    repeats = {name: max(1, round(turn_seconds / estimate)) for name, estimate in estimates.items()}
    running = [each for each in implementations if not each.error]
    deadline = time.perf_counter() + seconds
    turn = 0
    while running:
        time_is_left = time.perf_counter() < deadline
        if not time_is_left and all(len(each.ms) >= _LEAST_TURNS for each in running):
            break
        first = turn % len(running)
        for each in running[first:] + running[:first]:
            if time_is_left and each.name in slow and turn % _SLOW_TURNS:
                continue
            _, each.error = attempt(partial(take_turn, each, repeats[each.name]))
        running = [each for each in running if not each.error]
        turn += 1


def peak_memory(step: Callable[[], object], device: torch.device) -> int:
    """The most bytes that torch's allocator held at once within one step, above what it held before."""
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it writes to stderr that it started
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profiler:
        step()
    kineto = profiler.profiler.kineto_results
    changes = [(e.start_ns(), e.nbytes()) for e in kineto.events() if e.name() == "[memory]"]
    held = peak = 0
    for _, n_bytes in sorted(changes, key=lambda change: change[0]):
        held += n_bytes
        peak = max(peak, held)
    return peak

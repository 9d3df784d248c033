"""Kills `fdfa_ext train` at random moments until it is through, and compares it with a run in one go.

    PYTHONPATH=. python scripts/kill_and_resume.py [KILLS] [SEED]

Some runs have a step or two an epoch, so that most kills fall into the writing of a checkpoint, and
some train in two processes. The state at the end, and the CSV without its seconds, must be the same to
the bit.
"""

import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdfa_ext.train.training import read_checkpoint

_TORCHRUN = "torch.distributed.run --standalone --nproc-per-node 2 -m"
RUNS = (  # how `python -m` starts them, and their settings
    ("", "--epochs 20"),
    ("", "--epochs 100 --batch-size 1437"),
    (_TORCHRUN, "--epochs 30 --batch-size 300"),
    ("", "--epochs 70 --batch-size 700 --feedback ema"),
)


def kill_until_through(kills: int, seed: int) -> int:
    """How many kills there were: at least `kills`."""
    rng, done = random.Random(seed), 0
    for number in count(seed):
        if done >= kills:
            break
        launcher, settings = RUNS[number % len(RUNS)]
        words = [*launcher.split(), "fdfa_ext", "train", *settings.split(), "--seed", str(number)]
        with tempfile.TemporaryDirectory() as name:
            expected, actual = Path(name) / "expected", Path(name) / "actual"
            started = time.perf_counter()
            assert _start(words, expected).wait() == 0
            seconds = time.perf_counter() - started
            while not _ends_within(seconds * rng.uniform(0.4, 1.0), _start(words, actual)):
                _kill_all_of(actual)
                done, seconds = done + 1, seconds * 1.05  # the machine may have become slower
                _check_whole(actual)
            assert _csv(actual) == _csv(expected), words
            _check_equal(actual / "run.pt", expected / "run.pt")
            print(f"{' '.join(words)}: {done} kills so far, equal to the bit", flush=True)
    return done


def _start(words: list[str], folder: Path) -> "subprocess.Popen[bytes]":
    where = ["--threads", "1", "--output", str(folder), "--checkpoint", str(folder / "run.pt")]
    return subprocess.Popen(
        [sys.executable, "-m", *words, *where],
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # which torchrun would set, with a warning
    )


def _ends_within(seconds: float, process: "subprocess.Popen[bytes]") -> bool:
    try:
        assert process.wait(timeout=seconds) == 0
    except subprocess.TimeoutExpired:
        return False
    return True


def _kill_all_of(folder: Path) -> None:
    """The run that writes to the folder: torchrun, if it has one, and all its processes."""
    while left := list(_processes_of(folder)):
        for number in left:
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        time.sleep(0.01)


def _processes_of(folder: Path) -> Iterator[int]:
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has just ended
            if str(folder).encode() in file.read_bytes():
                yield int(file.parent.name)


def _check_whole(folder: Path) -> None:
    """Both checkpoints that a kill leaves can be read, whatever the moment."""
    for file in (folder / "run.pt", folder / "run.pt.previous"):
        if file.exists():
            read_checkpoint(file)


def _csv(folder: Path) -> list[dict[str, str]]:
    with (folder / "fdfa.csv").open(newline="") as stream:
        return [{**row, "seconds": ""} for row in csv.DictReader(stream)]


def _check_equal(a: Path, b: Path) -> None:
    leaves = [list(_leaves(read_checkpoint(file)[1])) for file in (a, b)]
    for (place, one), (_, two) in zip(*leaves, strict=True):
        same = torch.equal(one, two) if isinstance(one, Tensor) else one == two
        assert same or "seconds" in place, place


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, each in pairs:
            yield from _leaves(each, f"{place}.{key}")
    else:
        yield place, value


if __name__ == "__main__":
    kills, seed = (int(word) for word in (sys.argv[1:] + ["100", "0"][len(sys.argv) - 1 :]))
    started = time.perf_counter()
    done = kill_until_through(kills, seed)
    print(f"{done} kills in {time.perf_counter() - started:.0f} s: nothing lost")

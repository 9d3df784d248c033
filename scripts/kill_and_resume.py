"""Kills `fdfa_ext train` at random moments until it is through, and compares it with a run in one go.

    PYTHONPATH=. python scripts/kill_and_resume.py [KILLS] [SEED]

Half of the runs have one step an epoch, so that most kills fall into the writing of a checkpoint. The
state at the end, and the CSV without its seconds, must be the same to the bit.
"""

import csv
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdfa_ext.train.training import read_checkpoint

SETTINGS = (
    "--epochs 60",
    "--epochs 300 --batch-size 1437",
    "--epochs 200 --batch-size 700 --feedback ema",
)


def kill_until_through(kills: int, seed: int) -> int:
    """How many kills there were: at least `kills`."""
    rng, done = random.Random(seed), 0
    for number in count(seed):
        if done >= kills:
            break
        settings = [*SETTINGS[number % len(SETTINGS)].split(), "--seed", str(number)]
        with tempfile.TemporaryDirectory() as name:
            expected, actual = Path(name) / "expected", Path(name) / "actual"
            started = time.perf_counter()
            assert _start(settings, expected).wait() == 0
            seconds = time.perf_counter() - started
            while _is_killed(_start(settings, actual), seconds * rng.uniform(0.2, 1.0)):
                done += 1
                _check_whole(actual)
            assert _csv(actual) == _csv(expected), settings
            _check_equal(actual / "run.pt", expected / "run.pt")
            print(f"{' '.join(settings)}: {done} kills so far, equal to the bit", flush=True)
    return done


def _is_killed(process: "subprocess.Popen[bytes]", seconds: float) -> bool:
    """Whether the process, killed after so many seconds, was not through before."""
    try:
        assert process.wait(timeout=seconds) == 0
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True
    return False


def _start(settings: list[str], folder: Path) -> "subprocess.Popen[bytes]":
    arguments = [*settings, "--threads", "1", "--output", str(folder)]
    command = [sys.executable, "-m", "fdfa_ext", "train", *arguments]
    return subprocess.Popen(
        [*command, "--checkpoint", str(folder / "run.pt")], stdout=subprocess.DEVNULL
    )


def _check_whole(folder: Path) -> None:
    """Both checkpoints that a kill leaves can be read, whatever the moment."""
    for file in folder.glob("run.pt*"):
        if not file.name.endswith(".part"):
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

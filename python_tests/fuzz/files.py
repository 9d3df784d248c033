"""Random damage to the files that commands read: a sentence, or what a whole file could hold.

`run` damages one file of a data set, a checkpoint or a record at a time, and reads it. The reader may
raise a UserError of one line and nothing else. It writes no file, takes no more memory than a small file
can need, and ends soon.

    cd python_tests && python -m fuzz.files --cases 3000 --seed 0
"""

import argparse
import random
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import test_train_data as valid

from fdfa_ext.arguments import UserError
from fdfa_ext.experiments.runs import read_record
from fdfa_ext.train.data import Dataset, load_dataset
from fdfa_ext.train.files import write_rows
from fdfa_ext.train.training import Config, Run, read_checkpoint

MOST_SECONDS = 10
MOST_KIB = 2**19  # more than before


def run(cases: int, seed: int) -> dict[str, int]:
    """How many files were damaged and read, by kind and by what came of it."""
    rng, counts = random.Random(seed), Counter[str]()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as name:
        kinds = _write_all(Path(name))
        for number in range(cases):
            folder, read = rng.choice(kinds)
            file = rng.choice([path for path in sorted(folder.rglob("*")) if path.is_file()])
            whole, before = file.read_bytes(), sorted(folder.rglob("*"))
            content = whole
            for _ in range(rng.choice([1, 1, 1, 2, 5])):
                content = rng.choice(DAMAGES)(rng, content)
            file.write_bytes(content)
            started = time.monotonic()
            what = f"{folder.name}/{file.name} of seed {seed}, number {number}: {content[:99]!r}"
            said, outcome = "", "read"
            try:
                read()
            except UserError as error:
                said, outcome = str(error), "refused"
            except BaseException as error:
                raise AssertionError(what) from error
            counts[f"{folder.name} {outcome}"] += 1
            assert said.isprintable(), f"{what}: {said}"
            assert time.monotonic() - started < MOST_SECONDS, what
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < MOST_KIB, what
            assert sorted(folder.rglob("*")) == before, what
            file.write_bytes(whole)
    return dict(sorted(counts.items()))


def _write_all(root: Path) -> list[tuple[Path, Callable[[], Any]]]:
    """Folders with small whole files, and what reads them."""
    kinds: list[tuple[Path, Callable[[], Any]]] = []
    for name in ("idx", "gz", "cifar10", "tiny", "checkpoint", "record"):
        (root / name).mkdir()
    valid.write_idx(root / "idx")
    valid.write_idx(root / "gz", compressed=True)
    valid.write_cifar(root / "cifar10")
    valid.write_tiny_imagenet(root / "tiny")
    for name, dataset in (
        ("idx", "mnist"),
        ("gz", "mnist"),
        ("cifar10", "cifar10"),
        ("tiny", "tiny-imagenet"),
    ):
        kinds.append((root / name, lambda d=dataset, n=name: load_dataset(d, root / n)))  # type: ignore[misc]
    digits = load_dataset("digits").head(8)
    trained = Run(Config(width=4), digits)
    trained.train_epoch()
    checkpoint, record = root / "checkpoint" / "run.pt", root / "record" / "run.csv"
    trained.save(checkpoint)
    write_rows([vars(result) for result in trained.history], record)
    kinds.append((root / "checkpoint", lambda: _continue(checkpoint, digits)))
    kinds.append((root / "record", lambda: read_record(record)))
    return kinds


def _continue(checkpoint: Path, data: Dataset) -> None:
    config, state = read_checkpoint(checkpoint)
    Run(config, data).load(state)


def _place(rng: random.Random, content: bytes) -> int:
    """Anywhere, but half of the time near the start, where headers are."""
    return rng.randrange(min(len(content), rng.choice([64, len(content) + 1])) + 1)


def _flip(rng: random.Random, content: bytes) -> bytes:
    at = _place(rng, content)
    return (
        content[:at]
        + bytes(byte ^ 1 << rng.randrange(8) for byte in content[at : at + 1])
        + content[at + 1 :]
    )


def _truncate(rng: random.Random, content: bytes) -> bytes:
    return content[: _place(rng, content)]


def _insert(rng: random.Random, content: bytes) -> bytes:
    at = _place(rng, content)
    return content[:at] + rng.randbytes(rng.choice([1, 2, 4, 100])) + content[at:]


def _drop(rng: random.Random, content: bytes) -> bytes:
    at = _place(rng, content)
    return content[:at] + content[at + rng.choice([1, 2, 4, 100]) :]


def _repeat(rng: random.Random, content: bytes) -> bytes:
    at, size = _place(rng, content), rng.choice([1, 4, 100, 2000])
    return content[: at + size] + content[at:]


def _overwrite(rng: random.Random, content: bytes) -> bytes:
    at = _place(rng, content)
    value = rng.choice(VALUES)
    return content[:at] + value + content[at + len(value) :]


VALUES = [
    *(number.to_bytes(size, order) for number in (0, 1, 2**7, 2**31 - 1) for size in (4, 8) for order in ("big", "little")),
    *(b"\xff" * size for size in (1, 2, 4, 8)),
    *(b"nan", b"inf", b"-1", b"1e999", b"\n", b"\r", b"\t", b"../", b"/", b"\x00", b'"', b"\xe2\x80\xa8"),
    # Opcodes of pickles: a global, a call, a build, a frame, long strings, memo places.
    *(b"cos\nsystem\n", b"R", b"b", b"(", b"t", b"\x81", b"\x93", b"."),
    *(b"\x95" + b"\xff" * 7 + b"\x00", b"\x8e" + b"\xff" * 7 + b"\x00", b"T\xff\xff\xff\x7f", b"r\xff\xff\xff\x7f"),
]  # fmt: skip
DAMAGES = [_flip, _truncate, _insert, _drop, _repeat, _overwrite, _overwrite]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(run(arguments.cases, arguments.seed))

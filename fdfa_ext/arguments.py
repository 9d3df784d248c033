"""What all commands share: the one exception that becomes a sentence, and types of arguments.

Each type turns a word into a value, or says in a sentence why not.
"""

import argparse
from collections.abc import Callable, Sequence

import torch

_MOST_THREADS = 4096  # torch aborts where the system does not let it start so many as it is told


class UserError(Exception):
    """Something that the user can put right: a missing file, a flag that fits nothing. One sentence.

    It may quote a foreign file: nothing in it breaks the line, or commands the terminal.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in sentence))


def whole(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 2^63 - 1")
    return int(text)


def threads(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= _MOST_THREADS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of threads from 1 to {_MOST_THREADS}"
        )
    return int(text)


def seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def device(text: str) -> torch.device:
    try:
        found = torch.device(text)
        torch.zeros(1, device=found).tolist()  # which a device without memory, as meta, has not
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        raise argparse.ArgumentTypeError(f"there is no device {text!r} here") from None
    return found


def some_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Some of the known words, separated by commas, none twice."""

    def parse(text: str) -> list[str]:
        words = text.split(",")
        if not set(words) <= set(known) or len(set(words)) < len(words):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not some of {', '.join(known)} (with commas between)"
            )
        return words

    return parse


def whole_numbers(text: str) -> list[int]:
    """Whole numbers of 1 or more, separated by commas."""
    return [whole(word) for word in text.split(",")]

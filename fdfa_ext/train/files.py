"""Files that a kill or a full disk leaves whole, with their old content or the new."""

import csv
import io
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def replacing(file: Path, previous: Path | None = None) -> Iterator[BinaryIO]:
    """A stream for the content that ``file`` has once the block ends; its folder is made.

    Where the block or the process ends early, the file is as it was. It exists at every moment, once it
    does. Its old content gets the name ``previous``, where one is given.

    Raises:
        OSError: the file cannot be written.
    """
    file = file.resolve()  # of a link, what it names
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _part(file)
    try:
        with unfinished.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        if previous is not None and file.exists():
            _keep(file, previous)
        os.replace(unfinished, file)
        _sync_folder(file.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def write_rows(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """CSV with the keys of the first row as columns."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    with replacing(file) as stream:
        stream.write(text.getvalue().encode())


def _part(file: Path) -> Path:
    return file.with_name(f"{file.name}.part")


def _keep(file: Path, previous: Path) -> None:
    """Names the content of ``file`` by ``previous`` too, which also exists at every moment."""
    unfinished = _part(previous)
    unfinished.unlink(missing_ok=True)
    try:
        os.link(file, unfinished)
    except OSError:  # a file system without hard links
        shutil.copyfile(file, unfinished)
    os.replace(unfinished, previous)
    unfinished.unlink(missing_ok=True)  # stays where both names were of one content before


def _sync_folder(folder: Path) -> None:
    """Puts the names of a folder's files on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Files that a kill or a full disk leaves whole, with their old content or the new."""

import csv
import fcntl
import io
import os
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from fdfa_ext.arguments import UserError


@contextmanager
def replacing(file: Path, previous: Path | None = None) -> Iterator[BinaryIO]:
    """A stream for the content that ``file`` has once the block ends; its folder is made.

    Where the block or the process ends early, the file is as it was. It exists at every moment, once it
    does. Its old content gets the name ``previous``, where one is given.

    Raises:
        UserError: it is something else than a file.
        OSError: the file cannot be written.
    """
    file = file.resolve()  # of a link, what it names
    check_regular(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _part(file)
    unfinished.unlink(missing_ok=True)  # left by a kill, or a link of somebody's
    try:
        with unfinished.open("xb") as stream:
            if file.exists():
                os.fchmod(stream.fileno(), stat.S_IMODE(file.stat().st_mode))
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        if previous is not None and file.exists():
            _keep(file, previous)
        os.replace(unfinished, file)
        _sync_folder(file.parent)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Of the blocks of one file, in all processes, one runs at a time.

    Raises:
        UserError: another process is in its block.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = file.with_name(f"{file.name}.lock")
    with lock.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process trains into {file}: let it end, or stop it") from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def check_regular(file: Path, most_bytes: int | None = None) -> None:
    """Before it is opened: a pipe or a device would never end.

    Raises:
        UserError: it is something else than a file, or larger.
    """
    if file.exists() and not file.is_file():
        raise UserError(f"{file} is a folder, a pipe or a device, and no file")
    if most_bytes is not None and file.exists() and file.stat().st_size > most_bytes:
        raise UserError(f"{file} has {file.stat().st_size} bytes, where {most_bytes} are the most")


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
        try:
            os.link(file, unfinished)
        except OSError:  # a file system without hard links
            shutil.copyfile(file, unfinished)
        os.replace(unfinished, previous)
    finally:
        unfinished.unlink(missing_ok=True)  # stays where both names were of one content before


def _sync_folder(folder: Path) -> None:
    """Puts the names of a folder's files on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""What experiments write: rows as CSV, text, and numbers in words."""

import csv
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def write_rows(rows: "Sequence[DataclassInstance]", file: Path) -> None:
    """CSV with the dataclass's fields as columns."""
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(rows[0])])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def write_text(text: str, file: Path) -> str:
    file.write_text(f"{text}\n")
    return text


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Over the seeds; the deviation of one is 0."""
    return fmean(values), pstdev(values)


def in_words(values: Sequence[float], digits: int = 2) -> str:
    """mean ± deviation over the seeds; the number alone where there is one."""
    mean, deviation = mean_and_deviation(values)
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if len(values) > 1 else "")


def band(axes: Any, xs: Sequence[float], lines: Sequence[Sequence[float]], **style: Any) -> None:
    """A line through the means over the seeds, with a band of one deviation."""
    means, deviations = zip(
        *(mean_and_deviation(values) for values in zip(*lines, strict=True)), strict=True
    )
    (drawn,) = axes.plot(xs, means, **style)
    if len(lines) > 1:
        low = [m - d for m, d in zip(means, deviations, strict=True)]
        high = [m + d for m, d in zip(means, deviations, strict=True)]
        axes.fill_between(xs, low, high, color=drawn.get_color(), alpha=0.2, linewidth=0)

"""What experiments write: rows as CSV, text, and numbers in words."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from fdfa_ext.train.files import replacing


def write_text(text: str, file: Path) -> str:
    with replacing(file) as stream:
        stream.write(f"{text}\n".encode())
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

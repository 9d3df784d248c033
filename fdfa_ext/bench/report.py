"""What a person reads of the timings: Markdown tables and plots."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fdfa_ext.bench.contenders import Case
from fdfa_ext.bench.operators import OperatorTime
from fdfa_ext.bench.timing import Spread

_SMALL = 0.01  # of a step: operators below it share one line


@dataclass(frozen=True)
class StepTime:
    """One method on one case. memory: peak bytes, of what outlives a step and of the step itself.

    None for a CUDA graph, whose memory is kept from one step to the next, so that a peak says nothing.
    """

    case: Case
    method: str
    ms: Spread
    memory: int | None


def _line(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _table(head: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    return "\n".join([_line(head), "|" + "---|" * len(head), *map(_line, rows)])


def _best_bp(rows: Sequence[StepTime]) -> StepTime | None:
    return min((r for r in rows if r.method.startswith("bp")), key=lambda r: r.ms.median, default=None)


def by_case(rows: Sequence[StepTime]) -> dict[Case, list[StepTime]]:
    cases: dict[Case, list[StepTime]] = {}
    for row in rows:
        cases.setdefault(row.case, []).append(row)
    return cases


def step_table(rows: Sequence[StepTime]) -> str:
    """Ratios are to the fastest backpropagation of the case; of memory, to the fastest that has one."""

    def cells(row: StepTime, group: Sequence[StepTime]) -> list[object]:
        best, leanest = _best_bp(group), _best_bp([each for each in group if each.memory])
        time_ratio = f"{row.ms.median / best.ms.median:.2f}" if best else ""
        memory, memory_ratio = "", ""
        if row.memory:
            memory = f"{row.memory / 2**20:.3g}"
            if leanest and leanest.memory:
                memory_ratio = f"{row.memory / leanest.memory:.2f}"
        case = row.case
        named = [case.net, case.shape, case.batch_size, row.method]
        return [*named, row.ms, time_ratio, memory, memory_ratio]

    head = ["net", "input", "batch", "method", "ms", "/ best BP", "peak MiB", "/ best BP"]
    groups = by_case(rows).values()
    return _table(head, [cells(row, group) for group in groups for row in group])


def operator_table(rows: Sequence[OperatorTime], step_ms: float) -> str:
    """Most expensive first. `step_ms`: the whole step's time, which also has what lies between."""
    total = {id(row): row.calls * row.ms.median for row in rows}
    shown = [r for r in rows if total[id(r)] >= _SMALL * step_ms or r.name.startswith("fdfa::")]
    others = sum(total[id(r)] for r in rows if r not in shown)

    def cells(row: OperatorTime) -> list[object]:
        seconds = row.ms.median / 1e3
        reference = ["", ""]
        if row.reference_ms is not None:
            reference = [f"{row.reference_ms:.3g}", f"{row.reference_ms / row.ms.median:.1f}"]
        return [
            row.name,
            row.shapes,
            row.calls,
            row.ms,
            "" if "less" in row.name else f"{total[id(row)] / step_ms:.1%}",
            f"{row.n_bytes / seconds / 1e9:.3g}",
            f"{row.n_flops / seconds / 1e9:.3g}" if row.n_flops else "",
            f"{row.of_roofline:.0%}",
            *reference,
        ]

    head = [
        "operator",
        "largest tensors",
        "calls",
        "ms",
        "of step",
        "GB/s",
        "GFLOP/s",
        "of roofline",
        "plain torch ms",
        "/ ours",
    ]
    ordered = sorted(shown, key=lambda row: -total[id(row)])
    small = ["others", "", "", f"{others:.3g}", f"{others / step_ms:.1%}", *[""] * 5]
    return _table(head, [*map(cells, ordered), small])


def plot_ratios(rows: Sequence[StepTime], title: str, file: Path) -> None:
    """A group of bars for each case: time of each method relative to the fastest backpropagation."""
    from matplotlib.figure import Figure

    groups = by_case(rows)
    methods = list(dict.fromkeys(row.method for row in rows))
    figure = Figure(figsize=(max(6.0, 1.8 * len(groups)), 4.2), layout="constrained")
    axes = figure.subplots()
    for number, method in enumerate(methods):
        places, heights = [], []
        for place, group in enumerate(groups.values()):
            best = _best_bp(group)
            for row in group:
                if row.method == method:
                    places.append(place + (number - (len(methods) - 1) / 2) * 0.8 / len(methods))
                    heights.append(row.ms.median / best.ms.median if best else row.ms.median)
        axes.bar(places, heights, 0.8 / len(methods), label=method)
    labels = [f"{c.net}\n{c.shape}, batch {c.batch_size}" for c in groups]
    axes.set_xticks(range(len(groups)), labels, fontsize=8)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(ylabel="step time / best backpropagation", yscale="log")
    axes.legend()
    axes.grid(axis="y", alpha=0.3)
    figure.suptitle(title, fontsize=8)
    figure.savefig(file, dpi=120)


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Of the straight line through the points on logarithmic axes: y grows as x to that power."""
    log_x, log_y = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_x, mean_y = sum(log_x) / len(xs), sum(log_y) / len(ys)
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in zip(log_x, log_y, strict=True))
    return covariance / sum((x - mean_x) ** 2 for x in log_x)


def plot_sweep(rows: Sequence[StepTime], parameter: str, title: str, file: Path) -> None:
    """Time and peak memory over one parameter of the case; the legend has each method's slope."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    for method in dict.fromkeys(row.method for row in rows):
        mine = [row for row in rows if row.method == method]
        xs = [float(getattr(row.case, parameter)) for row in mine]
        curves = [(time_axes, [row.ms.median for row in mine])]
        if all(row.memory for row in mine):
            curves.append((memory_axes, [(row.memory or 0) / 2**20 for row in mine]))
        for axes, ys in curves:
            axes.plot(xs, ys, marker=".", label=f"{method}, slope {slope(xs, ys):.2f}")
    time_axes.set_ylabel("ms a step")
    memory_axes.set_ylabel("peak memory, MiB")
    for axes in (time_axes, memory_axes):
        axes.set(xlabel=parameter.replace("_", " "), xscale="log", yscale="log")
        axes.legend()
        axes.grid(alpha=0.3, which="both")
    figure.suptitle(title, fontsize=8)
    figure.savefig(file, dpi=120)

"""What a person reads of the timings: Markdown tables and plots."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fdfa_ext.bench.implementations import GRAPHED, Case
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


@dataclass(frozen=True)
class StepFailure:
    """A method that gave no figures on a case. error: why, in one line."""

    case: Case
    method: str
    error: str


def table_line(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def table_head(cells: Sequence[str]) -> str:
    return f"{table_line(cells)}\n|{'---|' * len(cells)}"


def _best_bp(row: StepTime, group: Sequence[StepTime]) -> StepTime | None:
    """The fastest of the row's own kind: a graph spares both methods the same launches."""
    graphed = row.method in GRAPHED
    rivals = [r for r in group if r.method.startswith("bp") and (r.method in GRAPHED) == graphed]
    return min(rivals, key=lambda r: r.ms.median, default=None)


def _time_ratio(row: StepTime, group: Sequence[StepTime]) -> float | None:
    best = _best_bp(row, group)
    return row.ms.median / best.ms.median if best else None


def by_case(rows: Sequence[StepTime]) -> dict[Case, list[StepTime]]:
    cases: dict[Case, list[StepTime]] = {}
    for row in rows:
        cases.setdefault(row.case, []).append(row)
    return cases


STEP_HEAD = table_head(
    ["net", "input", "batch", "outputs", "method", "ms", "/ best BP", "peak MiB", "/ best BP"]
)


def step_lines(rows: Sequence[StepTime], failures: Sequence[StepFailure] = ()) -> str:
    """One case's lines of the table. Ratios are to the fastest backpropagation: of eager methods to the
    fastest eager one, of CUDA graphs to the fastest graph.
    """

    def named(row: StepTime | StepFailure) -> list[object]:
        case = row.case
        return [case.net, case.shape, case.batch_size, case.outputs, row.method]

    def cells(row: StepTime) -> list[object]:
        best, ratio = _best_bp(row, rows), _time_ratio(row, rows)
        memory, memory_ratio = "", ""
        if row.memory:
            memory = f"{row.memory / 2**20:.3g}"
            if best and best.memory:
                memory_ratio = f"{row.memory / best.memory:.2f}"
        return [*named(row), row.ms, f"{ratio:.2f}" if ratio else "", memory, memory_ratio]

    lines = [*map(cells, rows), *([*named(row), row.error, "", "", ""] for row in failures)]
    return "\n".join(map(table_line, lines))


def step_summary(rows: Sequence[StepTime]) -> str:
    """The range of FDFA's ratios over all cases, in one line; empty where none has both methods."""
    found = []
    for method in ("fdfa", "fdfa-graphed"):
        groups = by_case(rows).values()
        ratios = [_time_ratio(row, group) for group in groups for row in group if row.method == method]
        known = [ratio for ratio in ratios if ratio]
        if known:
            found.append(f"{method} {min(known):.2f} to {max(known):.2f} of best BP")
    return ", ".join(found)


OPERATOR_HEAD = table_head(
    [
        "net",
        "operator",
        "largest tensors",
        "calls",
        "ms",
        "of step",
        "GB/s",
        "GFLOP/s",
        "of roofline",
        "bound by",
        "plain torch ms",
        "/ ours",
    ]
)


def operator_lines(net: str, rows: Sequence[OperatorTime], step: Spread) -> str:
    """One net's lines of the table, after the whole step the most expensive operator first. `step` also
    has what lies between operators.
    """
    step_ms = step.median
    total = {id(row): row.calls * row.ms.median for row in rows}
    shown = [r for r in rows if total[id(r)] >= _SMALL * step_ms or r.name.startswith("fdfa::")]
    others = sum(total[id(r)] for r in rows if r not in shown)

    def cells(row: OperatorTime) -> list[object]:
        seconds = row.ms.median / 1e3
        reference = ["", ""]
        if row.reference_ms is not None:
            reference = [f"{row.reference_ms:.3g}", f"{row.reference_ms / row.ms.median:.1f}"]
        return [
            net,
            row.name,
            row.shapes,
            row.calls,
            row.ms,
            "" if "less" in row.name else f"{total[id(row)] / step_ms:.1%}",
            f"{row.n_bytes / seconds / 1e9:.3g}",
            f"{row.n_flops / seconds / 1e9:.3g}" if row.n_flops else "",
            f"{row.of_roofline:.0%}",
            row.bound,
            *reference,
        ]

    lines: list[list[object]] = [[net, "whole step", "", "", step, "", *[""] * 6]]
    lines += map(cells, sorted(shown, key=lambda row: -total[id(row)]))
    if others:
        lines.append([net, "others", "", "", f"{others:.3g}", f"{others / step_ms:.1%}", *[""] * 6])
    return "\n".join(map(table_line, lines))


def operator_summary(rows: Sequence[OperatorTime]) -> str:
    """How close this package's kernels come to what the machine allows, in one line."""
    # The others with products get them from a library.
    kernels = [row for row in rows if row.name.startswith("fdfa::feedback") or not row.n_flops]
    ours = [row for row in kernels if row.name.startswith("fdfa::")]
    total = sum(row.calls * row.ms.median for row in ours)
    least = sum(row.calls * row.ms.median * row.of_roofline for row in ours)
    return f"fdfa's kernels reach {least / total:.0%} of the roofline" if ours else ""


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
            for row in group:
                if row.method == method:
                    places.append(place + (number - (len(methods) - 1) / 2) * 0.8 / len(methods))
                    heights.append(_time_ratio(row, group) or row.ms.median)
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

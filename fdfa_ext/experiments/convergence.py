"""Figures 3 and 4: training loss and test accuracy by epoch and by run time, CIFAR10."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path

from fdfa_ext.experiments.report import band, in_words, mean_and_deviation, write_text
from fdfa_ext.experiments.runs import (
    Job,
    Options,
    Record,
    net_name,
    paper_config,
    run_all,
    way_name,
    ways,
)
from fdfa_ext.methods import METHODS
from fdfa_ext.train.files import write_rows

_QUANTITIES = {"train_loss": "training loss, nats", "test_accuracy": "test accuracy"}


@dataclass(frozen=True)
class Point:
    """After an epoch; means and deviations over the seeds. seconds: of training, from the start."""

    net: str
    method: str
    epoch: int
    seconds: float
    train_loss: float
    train_loss_deviation: float
    test_accuracy: float
    test_accuracy_deviation: float


def convergence(name: str, options: Options, folder: Path) -> str:
    """Runs the nets by all methods; writes points.csv, figure.png, table.md; returns the Markdown."""
    by_time = name == "figure-4"
    dataset = (options.datasets or ("cifar10",))[0]
    models = ["cnn"] if by_time else ["mlp", "cnn"]
    methods = [m for m in METHODS if m in (options.methods or METHODS)]
    configs = [
        paper_config(model=model, dataset=dataset, epochs=options.epochs, **way)
        for model in models
        for way in ways(model, methods, options.patch)
        if (model, way["method"]) != ("mlp", "lg-fg-a")  # one hidden layer: nothing to be greedy
    ]
    jobs = [Job(replace(c, seed=seed)) for c in configs for seed in range(options.seeds)]
    # Runs beside each other take each other's time.
    records = (
        run_all(jobs, replace(options, jobs=1), f"{name}/records")
        if by_time
        else run_all(jobs, options)
    )
    groups = {
        (net_name(config), way_name(config)): records[i * options.seeds : (i + 1) * options.seeds]
        for i, config in enumerate(configs)
    }
    points = [asdict(point) for key, group in groups.items() for point in _points(*key, group)]
    write_rows(points, folder / "points.csv")
    _plot(groups, by_time, f"{name}, {dataset}", folder / "figure.png")
    return write_text(_markdown(groups), folder / "table.md")


def _points(net: str, method: str, group: Sequence[Record]) -> list[Point]:
    seconds = _seconds(group)
    return [
        Point(
            *(net, method, epoch + 1, seconds[epoch]),
            *mean_and_deviation([record[epoch]["train_loss"] for record in group]),
            *mean_and_deviation([record[epoch]["test_accuracy"] for record in group]),
        )
        for epoch in range(len(group[0]))
    ]


def _seconds(group: Sequence[Record]) -> list[float]:
    each = [mean_and_deviation([r["seconds"] for r in rows])[0] for rows in zip(*group, strict=True)]
    return list(accumulate(each))


def _markdown(groups: Mapping[tuple[str, str], Sequence[Record]]) -> str:
    lines = [
        "| net | method | training loss | test accuracy, % | best of any epoch, % | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for (net, method), group in groups.items():
        loss = in_words([record[-1]["train_loss"] for record in group], 4)
        last = in_words([100 * record[-1]["test_accuracy"] for record in group])
        best = in_words([100 * max(row["test_accuracy"] for row in record) for record in group])
        lines.append(f"| {net} | {method} | {loss} | {last} | {best} | {_seconds(group)[-1]:.0f} |")
    return "\n".join(lines)


def _plot(
    groups: Mapping[tuple[str, str], Sequence[Record]], by_time: bool, title: str, file: Path
) -> None:
    from matplotlib.figure import Figure  # without pyplot: needs no display

    nets = list(dict.fromkeys(net for net, _ in groups))
    figure = Figure(figsize=(11, 4.2 * len(nets)), layout="constrained")
    panels = figure.subplots(len(nets), 2, squeeze=False)
    for row, net in zip(panels, nets, strict=True):
        for axes, (quantity, label) in zip(row, _QUANTITIES.items(), strict=True):
            for number, method in enumerate(dict.fromkeys(method for _, method in groups)):
                if group := groups.get((net, method)):
                    xs = _seconds(group) if by_time else range(1, len(group[0]) + 1)
                    lines = [[epoch[quantity] for epoch in record] for record in group]
                    marker = "." if len(lines[0]) < 30 else ""
                    band(axes, xs, lines, label=method, color=f"C{number}", marker=marker)
            axes.set(xlabel="seconds" if by_time else "epoch", ylabel=label, title=net)
            axes.grid(alpha=0.3)
        row[0].set_yscale("log")
        row[1].legend()
    figure.suptitle(title)
    figure.savefig(file, dpi=120)

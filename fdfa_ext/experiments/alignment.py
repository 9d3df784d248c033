"""Figure 8: the angle between each layer's estimate and the true gradient, over the epochs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean

from fdfa_ext.arguments import UserError
from fdfa_ext.experiments.report import band, in_words, write_text
from fdfa_ext.experiments.runs import Job, Options, Record, run_all
from fdfa_ext.metrics import gradient_alignment
from fdfa_ext.train.files import write_rows
from fdfa_ext.train.training import Config, Run

_METHODS = ("dfa", "dkp", "fdfa")
_HIDDEN = 4  # of the five layers; the output layer's gradient is exact
_IMAGES = 1000  # of training, that the angle is measured on


@dataclass(frozen=True)
class Point:
    """The angle of a layer after an epoch; layer 1 is the first."""

    method: str
    seed: int
    epoch: int
    layer: int
    degrees: float


def angles(run: Run) -> dict[str, float]:
    """Angle of each hidden layer's weights, in degrees, for the feedback as it stands."""
    batch = (run.data.train_images[:_IMAGES], run.data.train_labels[:_IMAGES])
    found = gradient_alignment(run.model, batch)
    # Module 0 flattens the images.
    return {f"layer {layer}": found[f"{layer}.weight"] for layer in range(1, _HIDDEN + 1)}


def alignment(name: str, options: Options, folder: Path) -> str:
    """Trains by each method; writes points.csv, figure.png, table.md; returns the Markdown."""
    dataset = (options.datasets or ("mnist",))[0]
    methods = [m for m in _METHODS if m in (options.methods or _METHODS)]
    if not methods:
        raise UserError(f"{name} is of the methods {', '.join(_METHODS)}: give some of them")
    configs = [
        Config(method=m, dataset=dataset, hidden=_HIDDEN, epochs=options.epochs) for m in methods
    ]
    jobs = [Job(replace(c, seed=s), watch=angles) for c in configs for s in range(options.seeds)]
    records = run_all(jobs, options)
    groups = {m: records[i * options.seeds : (i + 1) * options.seeds] for i, m in enumerate(methods)}
    points = [
        Point(job.config.method, job.config.seed, int(row["epoch"]), layer, row[f"layer {layer}"])
        for job, record in zip(jobs, records, strict=True)
        for row in record
        for layer in range(1, _HIDDEN + 1)
    ]
    write_rows([asdict(point) for point in points], folder / "points.csv")
    _plot(groups, f"{name}, {dataset}", folder / "figure.png")
    return write_text(_markdown(groups), folder / "table.md")


def _markdown(groups: Mapping[str, Sequence[Record]]) -> str:
    lines = [
        "| layer | " + " | ".join(f"{m}, mean | {m}, last" for m in groups) + " |",
        "|---|" + "---|---|" * len(groups),
    ]
    for layer in range(1, _HIDDEN + 1):
        words = [str(layer)]
        for group in groups.values():
            lines_of_seeds = [[row[f"layer {layer}"] for row in record] for record in group]
            words.append(in_words([fmean(line) for line in lines_of_seeds], 1))
            words.append(in_words([line[-1] for line in lines_of_seeds], 1))
        lines.append(f"| {' | '.join(words)} |")
    last = "Degrees between estimate and true gradient, mean over the epochs and after the last."
    return "\n".join([*lines, "", last])


def _plot(groups: Mapping[str, Sequence[Record]], title: str, file: Path) -> None:
    from matplotlib.figure import Figure  # without pyplot: needs no display

    figure = Figure(figsize=(4.2 * len(groups), 4.2), layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    for axes, (method, group) in zip(panels, groups.items(), strict=True):
        for layer in range(1, _HIDDEN + 1):
            lines = [[row[f"layer {layer}"] for row in record] for record in group]
            marker = "." if len(lines[0]) < 30 else ""
            band(axes, range(1, len(lines[0]) + 1), lines, label=f"layer {layer}", marker=marker)
        axes.set(xlabel="epoch", title=method)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("angle, degrees")
    panels[-1].legend()
    figure.suptitle(title)
    figure.savefig(file, dpi=120)

"""Figure 7: normalised variance of the gradients against the loss that one epoch reaches.

A net of two layers is trained by backpropagation with more and more noise on its gradients, and by
forward gradients. Where points of the methods lie on the line of backpropagation, it is their variance
that decides their convergence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor

from fdfa_ext.experiments.report import in_words, write_text
from fdfa_ext.experiments.runs import Job, Options, run_all
from fdfa_ext.metrics import estimator_variance
from fdfa_ext.train.files import write_rows
from fdfa_ext.train.training import EVAL_BATCH, Config, Run

_METHODS = ("fdfa", "fg-a", "fg-w")
_NOISE = (0.0, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # deviation over root mean square of the gradient
_WIDTH = 1000
_BATCH = 64
_BATCHES = 4  # that the variance is a mean over
_DRAWS = 64  # of the noise for each: enough to tell 0.9999 from 1
_LOSS_IMAGES = 10000  # of training


@dataclass(frozen=True)
class Point:
    """noise: of backpropagation, else 0. variance: over the estimates' mean square. loss: in nats."""

    method: str
    noise: float
    seed: int
    variance: float
    loss: float


def add_noise(run: Run, level: float) -> None:
    """From now on every gradient of the run's net has `level` times its own size in white noise."""

    def noisy(gradient: Tensor) -> Tensor:
        return gradient + level * gradient.square().mean().sqrt() * torch.randn_like(gradient)

    for parameter in run.model.module.parameters():
        parameter.register_hook(noisy)


def variance(run: Run) -> dict[str, float]:
    """Normalised variance of the hidden weights' gradient, and the loss without noise."""
    images, labels = run.data.train_images, run.data.train_labels
    parts = zip(images.split(_BATCH), labels.split(_BATCH), strict=True)
    found = [
        estimator_variance(run.model, batch, draws=_DRAWS, normalize=True)["1.weight"]
        for batch, _ in zip(parts, range(_BATCHES), strict=False)
    ]
    run.model.eval()
    with torch.no_grad():
        parts = zip(
            images[:_LOSS_IMAGES].split(EVAL_BATCH),
            labels[:_LOSS_IMAGES].split(EVAL_BATCH),
            strict=True,
        )
        total = sum(float(F.cross_entropy(run.model(x), y, reduction="sum")) for x, y in parts)
    return {"variance": fmean(found), "loss": total / min(len(images), _LOSS_IMAGES)}


def variance_and_loss(name: str, options: Options, folder: Path) -> str:
    """Trains an epoch for each point; writes points.csv, figure.png, table.md; returns the Markdown."""
    dataset = (options.datasets or ("mnist",))[0]
    wanted = [("bp", noise) for noise in _NOISE]
    wanted += [(m, 0.0) for m in _METHODS if m in (options.methods or _METHODS)]
    kinds = [(method, noise, seed) for method, noise in wanted for seed in range(options.seeds)]
    jobs = [
        Job(
            Config(method=method, dataset=dataset, width=_WIDTH, epochs=1, seed=seed),
            variant=f"noise{noise:g}" if noise else "",
            prepare=partial(add_noise, level=noise) if noise else None,
            watch=variance,
        )
        for method, noise, seed in kinds
    ]
    records = run_all(jobs, options)
    points = [
        Point(*kind, record[-1]["variance"], record[-1]["loss"])
        for kind, record in zip(kinds, records, strict=True)
    ]
    write_rows([asdict(point) for point in points], folder / "points.csv")
    _plot(points, f"{name}, {dataset}", folder / "figure.png")
    return write_text(_markdown(points), folder / "table.md")


def rank_correlation(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Spearman's, of values without ties: 1 where ys rise with xs throughout."""
    ranks = torch.tensor([xs, ys], dtype=torch.float64).argsort(1).argsort(1)
    return float(torch.corrcoef(ranks.double())[0, 1])


def _groups(points: Sequence[Point]) -> Mapping[tuple[str, float], list[Point]]:
    found: dict[tuple[str, float], list[Point]] = {}
    for point in points:
        found.setdefault((point.method, point.noise), []).append(point)
    return found


def _markdown(points: Sequence[Point]) -> str:
    lines = ["| method | noise | normalised variance | loss after one epoch |", "|---|---|---|---|"]
    for (method, noise), own in _groups(points).items():
        spread = in_words([p.variance for p in own], 6)
        lines.append(f"| {method} | {noise:g} | {spread} | {in_words([p.loss for p in own], 4)} |")
    correlations = []
    for seed in dict.fromkeys(p.seed for p in points):
        own = [p for p in points if p.seed == seed]
        correlations.append(rank_correlation([p.variance for p in own], [p.loss for p in own]))
    return "\n".join([*lines, "", f"Rank correlation of all points: {in_words(correlations)}."])


def _plot(points: Sequence[Point], title: str, file: Path) -> None:
    from matplotlib.figure import Figure  # without pyplot: needs no display

    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, method in enumerate(("bp", *_METHODS)):
        own = [p for p in points if p.method == method]
        # Both ends of the axis are infinitely far.
        xs = [min(max(p.variance, 1e-7), 1 - 1e-5) for p in own]
        label = "bp with noise" if method == "bp" else method
        axes.plot(xs, [p.loss for p in own], ".", color=f"C{number}", label=label)
    axes.set(
        xscale="logit", yscale="log", xlabel="normalised variance", ylabel="loss, nats", title=title
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)

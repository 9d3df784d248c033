"""Figures 5 and 6: the variance that the noise gives to gradient estimates, in a two-layer net.

Each point is the mean over single images of z₂ (eq. 18), for the hidden weights. As the propositions
assume, the output layer is not perturbed, and its weights have one scale whatever the width, so that
no derivative shrinks or grows with the net.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdfa_ext import FDFA, FDFALinear
from fdfa_ext.bench.report import slope
from fdfa_ext.experiments.report import band, in_words, write_text
from fdfa_ext.experiments.runs import Options
from fdfa_ext.metrics import estimator_variance
from fdfa_ext.train.data import Dataset, load_dataset
from fdfa_ext.train.files import write_rows

_NEURONS = 100  # of the hidden layer where it is not what varies
_OUTPUTS = 10
_OUTPUT_SCALE = 0.01  # small, so that the softmax is far from saturation at every width


@dataclass(frozen=True)
class Size:
    """How much of an experiment to do."""

    images: int  # that a point is a mean over
    draws: int  # of the noise, for each image


_QUICK, _FULL = Size(images=4, draws=32), Size(images=8, draws=128)


@dataclass(frozen=True)
class Point:
    """One point of a line. slope of the line: what the paper's theory says."""

    line: str
    x: float
    variance: float
    expected_slope: float
    seed: int = 0


def variance_slopes(name: str, options: Options, folder: Path) -> str:
    """Measures the points; writes points.csv, figure.png and table.md; returns the Markdown."""
    from tqdm import tqdm

    make_points, x_label = FIGURES[name]
    dataset = (options.datasets or ("mnist",))[0]
    data = load_dataset(dataset, options.data_dir)
    size = _QUICK if options.quick else _FULL
    points = [
        replace(point, seed=seed)
        for seed in range(options.seeds)
        for point in tqdm(make_points(data, size, seed), unit="point", leave=False, disable=None)
    ]
    write_rows([asdict(point) for point in points], folder / "points.csv")
    _plot(points, x_label, f"{name}, {dataset}", folder / "figure.png")
    return write_text(_markdown(points, x_label), folder / "table.md")


def figure_5(data: Dataset, size: Size, seed: int) -> Iterator[Point]:
    """FDFA over the feedback's rate α, from feedback that has converged (Proposition 2)."""
    for alpha in (1e-4, 1e-3, 1e-2, 1e-1, 0.5):
        net = _net(_inputs(data), _NEURONS, seed)
        model = FDFA(net, feedback="ema", feedback_lr=alpha, example_input=_images(data, 2))
        weight = net[1].weight
        assert isinstance(weight, Tensor)
        model.feedback["0"].copy_(weight)
        yield Point("fdfa", alpha, _variance(model, data, size, 1), 2.0)


def figure_6_inputs(data: Dataset, size: Size, seed: int) -> Iterator[Point]:
    """FG-W and FG-A over the inputs, which are an image's pixels several times (Propositions 5, 6)."""
    for method, theory in (("fg-w", 1.0), ("fg-a", 0.0)):
        for copies in (1, 2, 4, 8):
            inputs = copies * _inputs(data)
            model = _forward_gradients(data, method, inputs, _NEURONS, copies, seed)
            yield Point(method, inputs, _variance(model, data, size, copies), theory)


def figure_6_neurons(data: Dataset, size: Size, seed: int) -> Iterator[Point]:
    """FG-W and FG-A over the hidden neurons (Propositions 5, 6)."""
    for method, theory in (("fg-w", 1.0), ("fg-a", 1.0)):
        for neurons in (50, 100, 200, 400, 800):
            model = _forward_gradients(data, method, _inputs(data), neurons, 1, seed)
            yield Point(method, neurons, _variance(model, data, size, 1), theory)


FIGURES: Mapping[str, tuple[Callable[[Dataset, Size, int], Iterator[Point]], str]] = {
    "figure-5": (figure_5, "feedback learning rate α"),
    "figure-6-inputs": (figure_6_inputs, "inputs"),
    "figure-6-neurons": (figure_6_neurons, "hidden neurons"),
}


def _net(inputs: int, neurons: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    hidden = FDFALinear(inputs, neurons, bias=False, activation="relu")
    output = nn.Linear(neurons, _OUTPUTS, bias=False)
    nn.init.kaiming_uniform_(hidden.weight, nonlinearity="relu")
    nn.init.normal_(output.weight, std=_OUTPUT_SCALE)
    output.requires_grad_(False)
    return nn.Sequential(hidden, output)


def _forward_gradients(
    data: Dataset, method: str, inputs: int, neurons: int, copies: int, seed: int
) -> FDFA:
    return FDFA(_net(inputs, neurons, seed), method=method, example_input=_images(data, 2, copies))


def _inputs(data: Dataset) -> int:
    return data.train_images[0].numel()


def _images(data: Dataset, n: int, copies: int = 1) -> Tensor:
    return data.train_images[:n].flatten(1).repeat(1, copies)


def _variance(model: FDFA, data: Dataset, size: Size, copies: int) -> float:
    images = _images(data, size.images, copies)
    batches = zip(images.split(1), data.train_labels[: size.images].split(1), strict=True)
    return fmean(
        estimator_variance(model, batch, F.cross_entropy, size.draws)["0.weight"] for batch in batches
    )


def _lines(points: Sequence[Point]) -> dict[str, list[list[Point]]]:
    """Name of a line → its points, of each seed."""
    found: dict[str, dict[int, list[Point]]] = {}
    for point in points:
        found.setdefault(point.line, {}).setdefault(point.seed, []).append(point)
    return {line: list(of_seeds.values()) for line, of_seeds in found.items()}


def _slopes(of_seeds: Sequence[Sequence[Point]]) -> list[float]:
    return [slope([p.x for p in own], [p.variance for p in own]) for own in of_seeds]


def _markdown(points: Sequence[Point], x_label: str) -> str:
    rows = [f"| method | slope of the variance over {x_label} | theory |", "|---|---|---|"]
    for line, of_seeds in _lines(points).items():
        rows.append(f"| {line} | {in_words(_slopes(of_seeds))} | {of_seeds[0][0].expected_slope:g} |")
    return "\n".join(rows)


def _plot(points: Sequence[Point], x_label: str, title: str, file: Path) -> None:
    from matplotlib.figure import Figure  # without pyplot: needs no display

    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes: Any = figure.subplots()
    for line, of_seeds in _lines(points).items():
        xs = [p.x for p in of_seeds[0]]
        label = f"{line}, slope {fmean(_slopes(of_seeds)):.2f}"
        band(axes, xs, [[p.variance for p in own] for own in of_seeds], marker="o", label=label)
    axes.set(xscale="log", yscale="log", xlabel=x_label, ylabel="variance of the estimate", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)

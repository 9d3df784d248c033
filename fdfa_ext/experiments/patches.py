"""The variance of an estimate of B over the side of the patches and the batch: docs/estimation.md."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from fdfa_ext import FDFA, FDFAConv2d, FDFALinear
from fdfa_ext.experiments.report import in_words, write_text
from fdfa_ext.experiments.runs import Options
from fdfa_ext.metrics import mean_jacobian
from fdfa_ext.patches import patch_means, patch_pixels
from fdfa_ext.train.data import Dataset, load_dataset
from fdfa_ext.train.files import write_rows

_BLOCKS = {"0": "conv 1", "1": "conv 2", "4": "dense"}


@dataclass(frozen=True)
class Size:
    """How much of the experiment to do."""

    patches: tuple[int, ...]
    batches: tuple[int, ...]
    draws: int  # of the noise


_QUICK, _FULL = Size((1, 2, 4), (4, 16), 100), Size((1, 2, 4, 8, 16), (16, 64, 256), 200)


@dataclass(frozen=True)
class Point:
    """Mean over a block's B of the variance of one estimate's elements."""

    block: str
    patch: int
    batch: int
    seed: int
    measured: float
    formula: float


def patch_variance(name: str, options: Options, folder: Path) -> str:
    """Measures the points; writes points.csv, figure.png and table.md; returns the Markdown."""
    from tqdm import tqdm

    dataset = (options.datasets or ("cifar10",))[0]
    data = load_dataset(dataset, options.data_dir)
    size = _QUICK if options.quick else _FULL
    points = [
        point
        for seed in range(options.seeds)
        for point in tqdm(_points(data, size, seed), unit="point", leave=False, disable=None)
    ]
    write_rows([asdict(point) for point in points], folder / "points.csv")
    _plot(points, f"{name}, {dataset}", folder / "figure.png")
    return write_text(_markdown(points), folder / "table.md")


def _points(data: Dataset, size: Size, seed: int) -> Iterator[Point]:
    images = data.train_images[: max(size.batches)]
    models = {patch: _model(data, patch, seed) for patch in size.patches}
    formula = _formula(models, images, size.batches)
    for patch, model in models.items():
        for batch in size.batches:
            for name, measured in _measured(model, images[:batch], size.draws).items():
                theory = formula[name, patch, batch]
                yield Point(_BLOCKS[name], patch, batch, seed, measured, theory)


def _model(data: Dataset, patch: int, seed: int) -> FDFA:
    """The same net for every patch, without normalisation, whose B is the newest estimate alone."""
    channels, height, width = data.image_shape
    torch.manual_seed(seed)
    net = nn.Sequential(
        FDFAConv2d(channels, 8, 3, padding=1, activation="relu"),
        FDFAConv2d(8, 16, 3, padding=1, activation="relu"),
        nn.MaxPool2d(2),
        nn.Flatten(),
        FDFALinear(16 * (height // 2) * (width // 2), 64, activation="relu"),
        nn.Linear(64, data.n_classes),
    )
    example = data.train_images[:2]
    model = FDFA(net, feedback="ema", feedback_lr=0.5, patch=patch, example_input=example)
    model.feedback_lr = 1.0
    return model


def _measured(model: FDFA, images: Tensor, draws: int) -> dict[str, float]:
    """Unbiased variance of B over so many draws of the noise."""
    sums = {name: torch.zeros_like(b, dtype=torch.double) for name, b in model.feedback.items()}
    squares = {name: torch.zeros_like(value) for name, value in sums.items()}
    for _ in range(draws):
        model(images).sum().backward()
        for name, matrix in model.feedback.items():
            sums[name] += matrix
            squares[name] += matrix.double().square()
    return {
        name: float(((squares[name] - total.square() / draws) / (draws - 1)).mean())
        for name, total in sums.items()
    }


def _formula(
    models: dict[int, FDFA], images: Tensor, batches: Sequence[int]
) -> dict[tuple[str, int, int], float]:
    """Block, patch, batch → mean over k and P of Var G = Σ_n (Σ_Q |Q|² M² + ν² + |P|² M_P²) / (N |P|)².

    ν² is the other blocks' sum over Q, so that both are one sum over the patches of all.
    """
    any_model = next(iter(models.values()))
    sums: dict[tuple[str, int], float] = {}
    found: dict[tuple[str, int, int], float] = {}
    for n, image in enumerate(images.split(1), start=1):
        jacobians = mean_jacobian(any_model, image)  # of one sample: its own
        for patch in models:
            pixels = {
                name: patch_pixels(j.shape, patch, j.device) if j.dim() == 4 else torch.ones(())
                for name, j in jacobians.items()
            }
            weighted = {name: patch_means(j, patch) * pixels[name] for name, j in jacobians.items()}
            total = sum(w.square().flatten(1).sum(1) for w in weighted.values())
            assert isinstance(total, Tensor)
            for name, w in weighted.items():
                variance = (total.view(-1, *[1] * (w.dim() - 1)) + w.square()) / pixels[name].square()
                sums[name, patch] = sums.get((name, patch), 0.0) + float(variance.mean())
        if n in batches:
            found |= {(*key, n): value / n**2 for key, value in sums.items()}
    return found


def _markdown(points: Sequence[Point]) -> str:
    batches = list(dict.fromkeys(p.batch for p in points))
    lines = [
        "| block | patch | "
        + " | ".join(f"batch {n}, formula | measured / formula" for n in batches)
        + " |",
        "|---|---|" + "---|---|" * len(batches),
    ]
    for block, patch in dict.fromkeys((p.block, p.patch) for p in points):
        words = [block, str(patch)]
        for batch in batches:
            own = [p for p in points if (p.block, p.patch, p.batch) == (block, patch, batch)]
            words.append(f"{fmean(p.formula for p in own):.2e}")
            words.append(in_words([p.measured / p.formula for p in own]))
        lines.append(f"| {' | '.join(words)} |")
    return "\n".join(lines)


def _plot(points: Sequence[Point], title: str, file: Path) -> None:
    from matplotlib.figure import Figure  # without pyplot: needs no display

    blocks = list(dict.fromkeys(p.block for p in points))
    figure = Figure(figsize=(4.2 * len(blocks), 4.2), layout="constrained")
    panels: Any = figure.subplots(1, len(blocks), squeeze=False)[0]
    for axes, block in zip(panels, blocks, strict=True):
        for color, batch in enumerate(dict.fromkeys(p.batch for p in points)):
            own = [p for p in points if (p.block, p.batch) == (block, batch)]
            xs = list(dict.fromkeys(p.patch for p in own))
            measured, formula = (
                [fmean(getattr(p, what) for p in own if p.patch == patch) for patch in xs]
                for what in ("measured", "formula")
            )
            axes.plot(xs, measured, "o", color=f"C{color}", label=f"batch {batch}")
            axes.plot(xs, formula, "-", color=f"C{color}")
        axes.set(xscale="log", yscale="log", xlabel="side of the patches, pixels", title=block)
        axes.set_xticks(xs, [str(x) for x in xs])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("variance of one estimate of B")
    panels[-1].legend(title="lines: formula")
    figure.suptitle(title)
    figure.savefig(file, dpi=120)

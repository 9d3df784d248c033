"""``python -m fdfa_ext experiment``: a figure to points, CSV, plot and a table of slopes."""

import argparse
import csv
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from fdfa_ext.arguments import seed
from fdfa_ext.bench.report import slope
from fdfa_ext.experiments.variance import FIGURES, FULL, QUICK, Point
from fdfa_ext.train.data import DATASETS, load_dataset

DESCRIPTION = "Repeat a figure of the paper: CSV, plot and a Markdown table."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("figure", choices=FIGURES, help="which")
    parser.add_argument("--dataset", default="mnist", choices=DATASETS, help="images (default mnist)")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="folder of the files")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of weights and noise")
    parser.add_argument("--quick", action="store_true", help="fewer images and draws, in seconds")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder for the files (default runs/FIGURE)"
    )


def experiment(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    make_points, x_label = FIGURES[args.figure]
    data = load_dataset(args.dataset, args.data_dir)
    size = QUICK if args.quick else FULL
    points = list(tqdm(make_points(data, size, args.seed), unit="point", leave=False, disable=None))
    output = args.output or Path("runs") / args.figure
    output.mkdir(parents=True, exist_ok=True)
    _write_csv(points, output / "points.csv")
    _plot(points, x_label, f"{args.figure}, {args.dataset}", output / "figure.png")
    table = slope_table(points, x_label)
    (output / "table.md").write_text(table + "\n")
    print(table, f"CSV, plot and table: {output}", sep="\n\n")


def slope_table(points: Sequence[Point], x_label: str) -> str:
    """Markdown: the slope of each line on logarithmic axes, beside the theory's."""
    rows = [f"| method | slope of the variance over {x_label} | theory |", "|---|---|---|"]
    for line, own in _lines(points).items():
        found = slope([p.x for p in own], [p.variance for p in own])
        rows.append(f"| {line} | {found:.2f} | {own[0].expected_slope:g} |")
    return "\n".join(rows)


def _lines(points: Sequence[Point]) -> dict[str, list[Point]]:
    names = dict.fromkeys(point.line for point in points)
    return {name: [point for point in points if point.line == name] for name in names}


def _write_csv(points: Sequence[Point], file: Path) -> None:
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(Point)])
        writer.writeheader()
        writer.writerows(asdict(point) for point in points)


def _plot(points: Sequence[Point], x_label: str, title: str, file: Path) -> None:
    from matplotlib.figure import Figure  # without pyplot: needs no display

    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    for line, own in _lines(points).items():
        xs, ys = [p.x for p in own], [p.variance for p in own]
        axes.plot(xs, ys, marker="o", label=f"{line}, slope {slope(xs, ys):.2f}")
    axes.set(xscale="log", yscale="log", xlabel=x_label, ylabel="variance of the estimate", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)

"""``python -m fdfa_ext experiment``: a table or figure of the paper, by name."""

import argparse
from collections.abc import Callable
from pathlib import Path

from fdfa_ext.arguments import UserError, device, some_of, whole
from fdfa_ext.experiments.alignment import alignment
from fdfa_ext.experiments.convergence import convergence
from fdfa_ext.experiments.noise import variance_and_loss
from fdfa_ext.experiments.patches import patch_variance
from fdfa_ext.experiments.runs import Options
from fdfa_ext.experiments.tables import TABLES, table
from fdfa_ext.experiments.variance import FIGURES, variance_slopes
from fdfa_ext.methods import METHODS
from fdfa_ext.train.data import DATASETS

DESCRIPTION = """Repeat a table or figure of the paper, or the variance of estimates in patches: CSV,
plot and a Markdown table. A stopped experiment goes on where it was, and experiments share the runs
that they have in common."""

_Experiment = Callable[[str, Options, Path], str]  # name, options, folder → Markdown
EXPERIMENTS: dict[str, _Experiment] = {
    **dict.fromkeys(TABLES, table),
    **dict.fromkeys(("figure-3", "figure-4"), convergence),
    **dict.fromkeys(FIGURES, variance_slopes),
    "figure-7": variance_and_loss,
    "figure-8": alignment,
    "patch-variance": patch_variance,
}
_WITH_PATCHES = ("table-2", "table-3", "figure-3", "figure-4")
_FULL = {"seeds": 10, "epochs": 100}
_QUICK = {"seeds": 2, "epochs": 2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("name", choices=EXPERIMENTS, help="which")
    words = "[,...]"
    add("--datasets", type=some_of(DATASETS), metavar=f"SET{words}", help="in place of the paper's")
    add("--methods", type=some_of(list(METHODS)), metavar=f"METHOD{words}", help="some of the paper's")
    add("--data-dir", type=Path, metavar="DIR", help="folder of the data sets' files")
    add("--seeds", type=whole, metavar="N", help="how many, from 0 on (default 10; 2 with --quick)")
    add(
        "--epochs",
        type=whole,
        metavar="N",
        help="of training, where that is more than one (default 100; 2 with --quick)",
    )
    add(
        "--patch",
        type=patch_size,
        metavar="PIXELS",
        help="of table-2, table-3 and figures 3 and 4: a run of fdfa in such patches beside fdfa",
    )
    add("--quick", action="store_true", help="fewer epochs, seeds and images, in minutes")
    add("--jobs", type=whole, metavar="N", help="runs at a time (default: one a core)")
    add("--device", type=device, help="device, such as cuda (default cpu)")
    add("--output", type=Path, metavar="DIR", default=Path("runs"), help="results go to DIR/NAME")


def patch_size(text: str) -> int:
    if (size := whole(text)) < 2:
        raise argparse.ArgumentTypeError("1 is fdfa as it is; patches have a side of 2 or more")
    return size


def experiment(args: argparse.Namespace) -> None:
    try:
        import matplotlib  # noqa: F401
        import tqdm  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"experiments need {error.name}: pip install {error.name}") from None

    if args.name not in TABLES and len(args.datasets or ()) > 1:
        raise UserError(f"{args.name} is of one data set; got {', '.join(args.datasets)}")
    runs_fdfa = args.methods is None or "fdfa" in args.methods
    if args.patch and not (args.name in _WITH_PATCHES and runs_fdfa):
        raise UserError(f"--patch is for fdfa in {', '.join(_WITH_PATCHES)}; {args.name} has none")
    size = _QUICK if args.quick else _FULL
    options = Options(
        output=args.output,
        datasets=tuple(args.datasets) if args.datasets else None,
        methods=tuple(args.methods) if args.methods else None,
        data_dir=args.data_dir,
        seeds=args.seeds or size["seeds"],
        epochs=args.epochs or size["epochs"],
        patch=args.patch,
        quick=args.quick,
        device=args.device,
        jobs=args.jobs,
    )
    folder = options.output / args.name
    folder.mkdir(parents=True, exist_ok=True)
    text = EXPERIMENTS[args.name](args.name, options, folder)
    print(text, f"CSV, plot and table: {folder}", sep="\n\n")

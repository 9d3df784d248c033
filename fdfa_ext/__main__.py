"""Command line: ``python -m fdfa_ext train`` and ``python -m fdfa_ext info``."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from fdfa_ext.train.data import DATASETS, load_dataset
from fdfa_ext.train.errors import UserError
from fdfa_ext.train.models import MODELS
from fdfa_ext.train.training import METHODS, Config, EpochResult, Run, read_checkpoint

_CONFIG_FIELDS = [field.name for field in fields(Config)]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")  # one sentence, without the long usage


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, or 2 after a sentence on what the user got wrong."""
    parser = _Parser(prog="fdfa_ext", description="Forward Direct Feedback Alignment for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_train_arguments(
        commands.add_parser(
            "train",
            help="train a net by FDFA, by backpropagation, or by both and compare",
            description="Train a net and write CSV and plot. The defaults are the paper's Appendix A.",
        )
    )
    commands.add_parser("info", help="print what this package was built for")
    args = parser.parse_args(arguments)
    try:
        if args.command == "train":
            _train(vars(args))
        else:
            _info()
    except UserError as error:
        print(f"fdfa_ext: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _add_train_arguments(parser: argparse.ArgumentParser) -> None:
    default = Config()

    def add(flag: str, kind: Callable[[str], Any], help: str, **more: Any) -> None:
        # No default value here: what the user did not say comes from Config, or from the checkpoint.
        parser.add_argument(flag, type=kind, default=argparse.SUPPRESS, help=help, **more)

    add("--model", str, f"net to train (default {default.model})", choices=MODELS)
    add("--hidden", _whole, "hidden layers of the mlp (default 1)", metavar="LAYERS")
    add(
        "--width",
        _whole,
        "units of each hidden layer (default 800; for cifar10 1000)",
        metavar="UNITS",
    )
    add("--dataset", str, f"data set (default {default.dataset})", choices=DATASETS)
    add(
        "--data-dir",
        Path,
        "folder of the files (default $FDFA_DATA_DIR, then data)",
        metavar="DIR",
    )
    add(
        "--method",
        _methods,
        f"{', '.join(METHODS)}, or both, trained in turn and compared (default {default.method})",
        metavar="METHOD[,METHOD]",
    )
    add(
        "--feedback",
        str,
        f"rule that learns the feedback B (default {default.feedback})",
        choices=("adam", "ema", "grad"),
    )
    add(
        "--feedback-lr",
        _positive,
        f"rate of the feedback rule, not decayed (default {default.feedback_lr:g})",
        metavar="RATE",
    )
    add("--noise", str, f"perturbation (default {default.noise})", choices=("gaussian", "rademacher"))
    add(
        "--backend",
        str,
        f"compiled ops or their definition in plain torch (default {default.backend})",
        choices=("fused", "reference"),
    )
    add(
        "--epochs",
        _whole,
        f"epochs, resumed ones included (default {default.epochs})",
        metavar="N",
    )
    add("--batch-size", _whole, f"images a step (default {default.batch_size})", metavar="N")
    add(
        "--lr",
        _positive,
        f"Adam's rate for the weights, x 0.95 each epoch (default {default.lr:g})",
        metavar="RATE",
    )
    add("--seed", _seed, f"seed of weights, data order and noise (default {default.seed})", metavar="N")
    add("--device", _device, "device, such as cpu or cuda:0 (default cpu)")
    add("--threads", _whole, "CPU threads (default: torch's choice)", metavar="N")
    add(
        "--checkpoint",
        Path,
        "write the run's state to this file after each epoch",
        metavar="FILE",
    )
    add(
        "--resume",
        Path,
        "continue this checkpoint's run, with its settings, up to --epochs",
        metavar="FILE",
    )
    add(
        "--output",
        Path,
        "folder for CSV and plot (default runs/DATASET-MODEL-METHOD-seedSEED, with hidden and width "
        "where given)",
        metavar="DIR",
    )


def _train(given: dict[str, Any]) -> None:
    try:
        from fdfa_ext.train import report
    except ModuleNotFoundError as error:
        raise UserError(f"the train command needs {error.name}: pip install {error.name}") from None

    if "threads" in given:
        torch.set_num_threads(given["threads"])
    settings = {name: value for name, value in given.items() if name in _CONFIG_FIELDS}
    methods = settings.pop("method", None)
    checkpoint = None
    if "resume" in given:
        base, checkpoint = read_checkpoint(given["resume"])
        if methods:
            settings["method"] = ",".join(methods)
        wanted = replace(base, **settings)
        changed = [name for name in _CONFIG_FIELDS if getattr(base, name) != getattr(wanted, name)]
        if changed not in ([], ["epochs"]):
            names = ", ".join(f"--{name.replace('_', '-')}" for name in changed if name != "epochs")
            raise UserError(f"{given['resume']} was trained with another {names}, which cannot change")
        configs = [wanted]
    else:
        configs = [Config(**settings, method=method) for method in methods or [Config.method]]
    if len(configs) > 1 and "checkpoint" in given:
        raise UserError("--checkpoint holds one run: give one --method")

    first = configs[0]
    trained = "-".join(config.method for config in configs)
    size = "".join(f"-{word}{n}" for word, n in (("hidden", first.hidden), ("width", first.width)) if n)
    title = f"{first.dataset}-{first.model}{size}-{trained}-seed{first.seed}"
    output = given.get("output", Path("runs") / title)
    data = load_dataset(first.dataset, given.get("data_dir"))
    histories: dict[str, list[EpochResult]] = {}
    for config in configs:
        run = Run(config, data, given.get("device"))
        if checkpoint:
            run.load(checkpoint)
        output.mkdir(parents=True, exist_ok=True)
        _fit(run, output / f"{config.method}.csv", given.get("checkpoint"))
        histories[config.method] = run.history
    report.plot(histories, title, output / "curves.png")
    print(report.final_table(histories), f"CSV and plot: {output}", sep="\n\n")


def _fit(run: Run, csv_file: Path, checkpoint: Path | None) -> None:
    from tqdm import tqdm

    from fdfa_ext.train import report

    config = run.config
    print(f"{config.dataset}, {config.model}, {config.method}, seed {config.seed}")
    print(report.EPOCH_HEADER, flush=True)
    total, done = (run.steps_per_epoch * epochs for epochs in (config.epochs, len(run.history)))
    # disable=None: no bar where stderr is a file.
    with tqdm(total=total, initial=done, unit="step", leave=False, disable=None) as bar:
        while len(run.history) < config.epochs:
            result = run.train_epoch(bar.update)
            with bar.external_write_mode():
                print(report.epoch_line(result), flush=True)
            report.write_csv(run.history, csv_file)
            if checkpoint:
                run.save(checkpoint)
    print()


def _info() -> None:
    from fdfa_ext import build_info

    facts: dict[str, str] = build_info()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name.ljust(width)}  {value}")


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _methods(text: str) -> list[str]:
    methods = text.split(",")
    if not set(methods) <= set(METHODS) or len(set(methods)) < len(methods):
        raise argparse.ArgumentTypeError(f"{text!r} is not {', '.join(METHODS)}, or both with a comma")
    return methods


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise argparse.ArgumentTypeError(f"there is no device {text!r} here") from None
    return device


if __name__ == "__main__":
    sys.exit(main())

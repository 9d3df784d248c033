"""``python -m fdfa_ext train``: arguments to runs, runs to lines, CSV, plot and table."""

import argparse
import importlib
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

import torch

from fdfa_ext.arguments import UserError, device, positive, seed, some_of, threads, whole
from fdfa_ext.dual_pass import BACKENDS
from fdfa_ext.feedback import RULES
from fdfa_ext.methods import METHODS
from fdfa_ext.noise import NOISES
from fdfa_ext.train.data import DATASETS, load_dataset
from fdfa_ext.train.files import locked, write_rows
from fdfa_ext.train.models import MODELS, WEIGHTS
from fdfa_ext.train.processes import count, is_first, processes
from fdfa_ext.train.training import (
    Config,
    DamagedCheckpoint,
    EpochResult,
    Run,
    previous_of,
    read_checkpoint,
)

_CONFIG_FIELDS = [field.name for field in fields(Config)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = Config()

    def add(flag: str, kind: Callable[[str], Any], help: str, **more: Any) -> None:
        # No default value here: what the user did not say comes from Config, or from the checkpoint.
        parser.add_argument(flag, type=kind, default=argparse.SUPPRESS, help=help, **more)

    add("--model", str, f"net to train (default {default.model})", choices=MODELS)
    add("--hidden", whole, "hidden layers of the mlp (default 1)", metavar="LAYERS")
    add(
        "--width",
        whole,
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
        some_of(list(METHODS)),
        f"{', '.join(METHODS)}; several are trained in turn and compared (default {default.method})",
        metavar="METHOD[,METHOD]",
    )
    add(
        "--feedback",
        str,
        f"rule that learns the feedback B (default {default.feedback})",
        choices=RULES,
    )
    add(
        "--feedback-lr",
        positive,
        f"rate of the feedback rule, not decayed (default {default.feedback_lr:g})",
        metavar="RATE",
    )
    add(
        "--feedback-every",
        whole,
        "steps of which one learns the feedback; the others take the time of dfa (default "
        f"{default.feedback_every})",
        metavar="STEPS",
    )
    add(
        "--weights",
        str,
        f"W at the start; zero is for dfa (default {default.weights})",
        choices=WEIGHTS,
    )
    add("--noise", str, f"perturbation (default {default.noise})", choices=NOISES)
    add(
        "--patch",
        whole,
        f"side of the patches of images that are perturbed as one (default {default.patch})",
        metavar="PIXELS",
    )
    add(
        "--backend",
        str,
        f"compiled ops or their definition in plain torch (default {default.backend})",
        choices=list(BACKENDS),
    )
    add(
        "--epochs",
        whole,
        f"epochs, resumed ones included (default {default.epochs})",
        metavar="N",
    )
    add("--batch-size", whole, f"images a step (default {default.batch_size})", metavar="N")
    add(
        "--lr",
        positive,
        f"Adam's rate for the weights, x 0.95 each epoch (default {default.lr:g})",
        metavar="RATE",
    )
    add("--seed", seed, f"seed of weights, data order and noise (default {default.seed})", metavar="N")
    add("--device", device, "device, such as cpu or cuda:0 (default cpu)")
    add("--threads", threads, "CPU threads (default: torch's choice)", metavar="N")
    add(
        "--checkpoint",
        Path,
        "write the state of the run of one method to this file at the start, after each epoch and when "
        "interrupted; a run that the file holds goes on where it was",
        metavar="FILE",
    )
    add(
        "--resume",
        Path,
        "continue this checkpoint's run, with its settings, up to --epochs; the file stays as it is",
        metavar="FILE",
    )
    add(
        "--output",
        Path,
        "folder for CSV and plot (default runs/DATASET-MODEL-METHOD-seedSEED, with hidden and width "
        "where given)",
        metavar="DIR",
    )


def train(given: dict[str, Any]) -> None:
    """What the command does, for the arguments that were given, by name."""
    try:
        importlib.import_module("fdfa_ext.train.report")
    except ModuleNotFoundError as error:
        raise UserError(f"the train command needs {error.name}: pip install {error.name}") from None

    if "threads" in given:
        torch.set_num_threads(given["threads"])
    if "checkpoint" in given and given["checkpoint"].is_dir():
        raise UserError(f"--checkpoint {given['checkpoint']} is a folder: give a file")
    configs, checkpoint = _runs(given)

    with processes(given.get("device")) as device:
        _train(configs, checkpoint, given | {"device": device})


def _train(configs: list[Config], checkpoint: dict[str, Any] | None, given: dict[str, Any]) -> None:
    from fdfa_ext.train import report

    first = configs[0]
    trained = "-".join(config.method for config in configs)
    size = "".join(f"-{word}{n}" for word, n in (("hidden", first.hidden), ("width", first.width)) if n)
    title = f"{first.dataset}-{first.model}{size}-{trained}-seed{first.seed}"
    output = given.get("output", Path("runs") / title)
    data = load_dataset(first.dataset, given.get("data_dir"))
    histories: dict[str, list[EpochResult]] = {}
    for config in configs:
        run = Run(config, data, given["device"])
        if checkpoint:
            run.load(checkpoint)
        output.mkdir(parents=True, exist_ok=True)
        file = given.get("checkpoint")
        with locked(file) if file and is_first() else nullcontext():
            # With --resume the one kept before may be what is resumed, and stays as it is.
            rewrites = "resume" not in given and len(run.history) < config.epochs
            _fit(run, output / f"{config.method}.csv", file, rewrites)
        histories[config.method] = run.history
    if not is_first():
        return
    report.plot(histories, title, output / "curves.png")
    print(report.final_table(histories), f"CSV and plot: {output}", sep="\n\n")


def _runs(given: dict[str, Any]) -> tuple[list[Config], dict[str, Any] | None]:
    """The runs that were asked for, and the state in which the first begins, if it is resumed."""
    settings = {name: value for name, value in given.items() if name in _CONFIG_FIELDS}
    methods = settings.pop("method", [Config.method])
    if len(methods) > 1 and given.keys() & {"checkpoint", "resume"}:
        raise UserError("--checkpoint and --resume are for one run: give one --method")
    if "resume" in given:
        file = given["resume"]
        base, checkpoint = read_checkpoint(file)
        wanted = replace(base, **settings | ({"method": methods[0]} if "method" in given else {}))
        if (later := _later(given.get("checkpoint"), base, checkpoint)) is not None:
            checkpoint = later
    else:
        configs = [Config(**settings, method=method) for method in methods]
        file, wanted = given.get("checkpoint"), configs[0]
        if file is None or not (file.exists() or previous_of(file).exists()):
            return configs, None
        base, checkpoint = read_checkpoint(file)
    changed = [name for name in _CONFIG_FIELDS if getattr(base, name) != getattr(wanted, name)]
    if changed not in ([], ["epochs"]):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in changed if name != "epochs")
        raise UserError(f"{file} was trained with another {names}, which cannot change")
    if (done := len(checkpoint["history"])) > wanted.epochs:
        raise UserError(f"{file} holds {done} epochs, more than --epochs {wanted.epochs}")
    return [wanted], checkpoint


def _later(file: Path | None, base: Config, resumed: dict[str, Any]) -> dict[str, Any] | None:
    """What --checkpoint holds, if it goes on from what --resume holds: the command is given again.

    Raises:
        UserError: the file is of something else, which would be overwritten.
    """
    if file is None or not file.exists():
        return None
    try:
        config, checkpoint = read_checkpoint(file)
    except DamagedCheckpoint:
        return None
    if replace(config, epochs=base.epochs) != base:
        raise UserError(f"--checkpoint {file} holds another run than --resume: give another file")
    return checkpoint if len(checkpoint["history"]) >= len(resumed["history"]) else None


def _fit(run: Run, csv_file: Path, checkpoint: Path | None, rewrites: bool) -> None:
    """rewrites: a checkpoint that is there is written at the start too."""
    from tqdm import tqdm

    from fdfa_ext.train import report

    config = run.config
    if not is_first():
        while len(run.history) < config.epochs:
            run.train_epoch()
        return
    goes_on = f", after step {run.steps}" if run.steps else ""
    print(f"{config.dataset}, {config.model}, {config.method}, seed {config.seed}{goes_on}")
    print(report.EPOCH_HEADER, flush=True)
    total, done = config.epochs * run.steps_per_epoch, run.steps
    # disable=None: no bar where stderr is a file.
    with (
        tqdm(total=total, initial=done, unit="step", leave=False, disable=None) as bar,
        _between_steps(run, checkpoint, bar.clear) as check_interrupt,
    ):

        def on_step() -> None:
            bar.update()
            check_interrupt()

        if run.history:
            _write_history(run, csv_file)
        # Where it cannot be written, that is said before an epoch is lost.
        if checkpoint and (rewrites or not checkpoint.exists()):
            run.save(checkpoint)
        while len(run.history) < config.epochs:
            result = run.train_epoch(on_step)
            with bar.external_write_mode():
                print(report.epoch_line(result), flush=True)
            _write_history(run, csv_file)
            if checkpoint:
                run.save(checkpoint)
    print()


def _write_history(run: Run, file: Path) -> None:
    write_rows([asdict(result) for result in run.history], file)


@contextmanager
def _between_steps(
    run: Run, checkpoint: Path | None, clear: Callable[[], Any]
) -> Iterator[Callable[[], None]]:
    """What to call after each step: an interrupted run is saved there, and ends.

    ``clear`` makes room for what it says. A second interruption ends it at once. Processes that train
    together end at once too: they would have to agree on the step. So does a run without a checkpoint.
    """
    if checkpoint is None or count() > 1 or current_thread() is not main_thread():
        yield lambda: None
        return
    received: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # A shell starts what runs in the background with signals ignored, which stay so.
    before = {n: handler for n, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def receive(number: int, frame: Any) -> None:
        received.append(number)
        restore()

    def check() -> None:
        if received:
            number = received.pop()
            run.save(checkpoint)
            clear()
            where = f"after step {run.steps} of {run.config.epochs * run.steps_per_epoch}"
            print(
                f"fdfa_ext: interrupted {where}, in {checkpoint}: the same command goes on from there",
                file=sys.stderr,
                flush=True,
            )
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, receive)
    try:
        yield check
    finally:
        restore()

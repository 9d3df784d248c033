"""Many training runs: several at a time, and none that is on file is done twice."""

import csv
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from fdfa_ext.arguments import UserError
from fdfa_ext.train.data import Dataset, load_dataset
from fdfa_ext.train.files import check_regular, locked, write_rows
from fdfa_ext.train.training import Config, EpochResult, Run, read_checkpoint, remove_checkpoint

Record = list[dict[str, float]]  # of a run: a row an epoch, EpochResult's fields and what was watched
_COLUMNS = {field.name for field in fields(EpochResult)}

# The paper states 1e-4 for every run. Its figures for fg-w, and on the convolutional net for bp and
# fg-a, come at ten times that: docs/results.md.
_FAST_LR = 1e-3
_FAST_ON_CNN = ("bp", "fg-a")
_QUICK_IMAGES = {"alexnet": 128}  # of training, and at most as many to test
_QUICK_IMAGES_OTHERWISE = 10000


@dataclass(frozen=True)
class Options:
    """What the user may choose of any experiment. None: what the experiment has in the paper."""

    output: Path = Path("runs")  # an experiment writes to output/NAME, runs to output/records
    datasets: tuple[str, ...] | None = None
    methods: tuple[str, ...] | None = None
    data_dir: Path | None = None
    seeds: int = 10
    epochs: int = 100
    patch: int | None = None  # of an fdfa that is run beside the paper's on convolutional nets
    quick: bool = False  # a part of the images
    device: torch.device | None = None
    jobs: int | None = None  # runs at a time; None: one for each core, or one on another device


@dataclass(frozen=True)
class Job:
    """A run to do. Functions must be such as can be sent to another process."""

    config: Config
    variant: str = ""  # tells apart, in the file's name, jobs of one configuration
    prepare: Callable[[Run], Any] | None = None  # called before training starts or continues
    watch: Callable[[Run], dict[str, float]] | None = None  # called after each epoch, for its row


def paper_config(method: str, model: str = Config.model, **settings: Any) -> Config:
    """A run as the paper's tables and curves have it."""
    fast = method == "fg-w" or (model == "cnn" and method in _FAST_ON_CNN)
    return Config(method=method, model=model, lr=_FAST_LR if fast else Config.lr, **settings)


def ways(model: str, methods: Sequence[str], patch: int | None) -> list[dict[str, Any]]:
    """Settings of a net's runs: the methods, and fdfa in patches beside it where asked for."""
    found: list[dict[str, Any]] = []
    for method in methods:
        found.append({"method": method})
        if patch is not None and method == "fdfa" and model != "mlp":
            found.append({"method": method, "patch": patch})
    return found


def run_all(jobs: Sequence[Job], options: Options, records: str = "records") -> list[Record]:
    """The records of all jobs, in order; those not on file yet are run.

    A run writes its record and a checkpoint after each epoch to the folder `records` of the output, so
    that a stopped experiment goes on from there, and experiments share what runs they have in common.
    """
    from tqdm import tqdm

    folder = options.output / records
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{_name(job, options.quick)}.csv" for job in jobs]
    on_file = [_on_file(job, file) for job, file in zip(jobs, files, strict=True)]
    left = [i for i, job in enumerate(jobs) if len(on_file[i]) < job.config.epochs]
    for dataset in dict.fromkeys(jobs[i].config.dataset for i in left):
        load_dataset(dataset, options.data_dir)  # what is missing is said before anything runs
    cores = os.cpu_count() or 1
    at_once = min(options.jobs or (1 if options.device else cores), max(1, len(left)))
    tasks = [(jobs[i], files[i], options) for i in left]
    total = sum(jobs[i].config.epochs for i in left)
    with tqdm(total=total, unit="epoch", leave=False, disable=None) as bar:
        if at_once == 1:
            for task in tasks:
                _work(*task, on_epoch=bar.update)
        else:
            _in_parallel(tasks, at_once, max(1, cores // at_once), bar.update)
    return [_on_file(job, file) for job, file in zip(jobs, files, strict=True)]


def _on_file(job: Job, file: Path) -> Record:
    """The epochs of this run that are on file."""
    record = read_record(file)[: job.config.epochs]
    rate = record[0]["lr"] if record else job.config.lr
    if rate != job.config.lr:
        raise UserError(
            f"{file} is of a run at rate {rate:g}, where this one has {job.config.lr:g}: "
            "move it away, or choose another --output"
        )
    return record


def read_record(file: Path) -> Record:
    """A run's rows so far; none where there is no such file.

    Raises:
        UserError: the file is no record.
    """
    check_regular(file)
    try:
        with file.open(newline="") as stream:
            rows = csv.DictReader(stream)
            record = [{name: float(cell) for name, cell in row.items()} for row in rows]
            is_record = set(rows.fieldnames or ()) >= _COLUMNS
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, csv.Error):
        is_record = False
    if not is_record or [row["epoch"] for row in record] != list(range(1, len(record) + 1)):
        raise UserError(f"{file} is not the record of a run: move it away")
    return record


def net_name(config: Config) -> str:
    """As the result tables call it: mlp-N for the mlp of N layers, output included."""
    return f"mlp-{(config.hidden or 1) + 1}" if config.model == "mlp" else config.model


def way_name(config: Config) -> str:
    """As the result tables call its method: fdfa-patch4 for fdfa in patches of 4 pixels."""
    return config.method if config.patch == 1 else f"{config.method}-patch{config.patch}"


def _name(job: Job, quick: bool) -> str:
    config = job.config
    watched = job.watch.__name__ if job.watch else ""
    width = "" if config.width is None else f"width{config.width}"
    parts = (
        *(config.dataset, net_name(config), width, way_name(config), job.variant, watched),
        *(f"seed{config.seed}", "quick" if quick else ""),
    )
    return "-".join(filter(None, parts))


@cache
def _data(dataset: str, data_dir: Path | None) -> Dataset:
    return load_dataset(dataset, data_dir)


def _work(job: Job, file: Path, options: Options, on_epoch: Callable[[], Any]) -> None:
    config = job.config
    data = _data(config.dataset, options.data_dir)
    if options.quick:
        data = data.head(_QUICK_IMAGES.get(config.model, _QUICK_IMAGES_OTHERWISE))
    with locked(file):
        _train(job, Run(config, data, options.device), file, on_epoch)


def _train(job: Job, run: Run, file: Path, on_epoch: Callable[[], Any]) -> None:
    config, checkpoint, record = job.config, file.with_suffix(".pt"), read_record(file)
    if checkpoint.exists():
        saved, state = read_checkpoint(checkpoint)
        done = len(state["history"])
        if replace(saved, epochs=config.epochs) == config and done <= len(record):
            run.load(state)
            for _ in range(done):
                on_epoch()
    if record and not run.history:
        print(
            f"fdfa_ext: {file} has {len(record)} of {config.epochs} epochs, and {checkpoint.name} is "
            "no state to go on from: this run starts again",
            file=sys.stderr,
            flush=True,
        )
    del record[len(run.history) :]
    if job.prepare:
        job.prepare(run)
    while len(run.history) < config.epochs:
        row = asdict(run.train_epoch())
        record.append(row | job.watch(run) if job.watch else row)
        write_rows(record, file)
        run.save(checkpoint)
        on_epoch()
    remove_checkpoint(checkpoint)  # the record is what remains


def _in_parallel(
    tasks: Sequence[tuple[Job, Path, Options]], at_once: int, threads: int, on_epoch: Callable[[], Any]
) -> None:
    # Fresh processes: one that is forked after torch has made threads may hang.
    context = multiprocessing.get_context("spawn")
    epochs = context.Queue()
    with ProcessPoolExecutor(at_once, context, _start_worker, (epochs, threads)) as pool:
        try:
            running = {pool.submit(_work_in_worker, *task) for task in tasks}
            while running:
                done, running = wait(running, timeout=0.5)
                while not epochs.empty():
                    epochs.get()
                    on_epoch()
                for future in done:
                    future.result()
        except BaseException:  # said at once, not when the other runs are through
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


_epochs: Any = None  # of a worker: the queue that counts its epochs


def _start_worker(epochs: Any, threads: int) -> None:
    global _epochs
    _epochs = epochs
    torch.set_num_threads(threads)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Or a worker would go on after a kill of the command."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work_in_worker(job: Job, file: Path, options: Options) -> None:
    _work(job, file, options, on_epoch=lambda: _epochs.put(None))

"""``python -m fdfa_ext bench`` and ``python -m fdfa_ext profile``."""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fdfa_ext.arguments import UserError, device, positive, some_of, whole, whole_numbers
from fdfa_ext.bench import report
from fdfa_ext.bench.contenders import (
    DEFAULT,
    DTYPES,
    GRAPHED,
    INPUTS,
    METHODS,
    MODELS,
    Case,
    TrainingStep,
    methods_for,
    training_step,
)
from fdfa_ext.bench.machine import description, measure_limits
from fdfa_ext.bench.operators import record, time_operators
from fdfa_ext.bench.timing import Contender, peak_memory, take_turns
from fdfa_ext.memory import keep_freed_memory

BENCH_DESCRIPTION = (
    "Time whole training steps: forward, cross-entropy, backward, fused Adam on the weights and Adam "
    "on the feedback. All methods take turns within one run. Prints medians, quartiles, peak memory."
)
PROFILE_DESCRIPTION = (
    "Time each operator of one training step alone, with the bytes and FLOPs that it cannot avoid, its "
    "share of the machine's measured limits, and the same operator in plain torch."
)
_SWEEPS = {
    "batch_size": (16, 32, 64, 128, 256, 512, 1024),
    "width": (100, 200, 400, 800, 1600, 3200),
    "hidden": (1, 2, 4, 8, 16),
    "outputs": (10, 30, 100, 300, 1000),
}
_STEP_SECONDS = 3.0  # of timing the whole step that the operators are compared with
_TRACED_STEPS = 3


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models",
        type=some_of(MODELS),
        default="mlp2,mlp4,cnn,cnn-two-pool",
        metavar="MODEL[,...]",
        help=f"of {', '.join(MODELS)} (default %(default)s)",
    )
    parser.add_argument(
        "--shapes",
        type=some_of(INPUTS),
        default="mnist",
        metavar="SHAPE[,...]",
        help=f"input shapes, of {', '.join(INPUTS)} (default %(default)s); digits, where overhead "
        "shows, are for the mlps, and alexnet has 3 x 224 x 224",
    )
    parser.add_argument(
        "--methods",
        type=some_of(METHODS),
        default=",".join(DEFAULT),
        metavar="METHOD[,...]",
        help="default %(default)s",
    )
    parser.add_argument(
        "--batch-sizes", type=whole_numbers, default="64", metavar="N[,...]", help="default 64"
    )
    parser.add_argument(
        "--sweep",
        choices=tuple(_SWEEPS),
        help="time the first model over a range of this, the rest as in the paper; --plot has slopes",
    )
    parser.add_argument(
        "--seconds", type=positive, default=10.0, help="of timing for each case (default %(default)s)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a plot (PNG)")
    _add_common_arguments(parser)


def add_profile_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=MODELS, default="mlp4", help="default %(default)s")
    parser.add_argument(
        "--shape",
        choices=INPUTS,
        default="mnist",
        help="input shape (default %(default)s); alexnet has 3 x 224 x 224",
    )
    recorded = [method for method in METHODS if method not in GRAPHED]  # a replay calls no operator
    parser.add_argument("--method", choices=recorded, default="fdfa", help="default %(default)s")
    parser.add_argument("--batch-size", type=whole, default=64, metavar="N", help="default 64")
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="also write a chrome trace of three steps, with their operators (open in Perfetto)",
    )
    parser.add_argument(
        "--nvtx",
        action="store_true",
        help="also run three steps with a NVTX range for each operator, to be seen by Nsight Systems: "
        "nsys profile python -m fdfa_ext profile --device cuda --nvtx",
    )
    _add_common_arguments(parser)


def _add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--outputs", type=whole, metavar="K", help="network outputs (default 10; alexnet 100)"
    )
    parser.add_argument(
        "--device", type=device, default="cpu", help="device, such as cpu or cuda:0 (default cpu)"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of the matrix products (default %(default)s); bfloat16 by torch.autocast, without the "
        "plain forms",
    )
    parser.add_argument(
        "--threads", type=whole, metavar="N", help="CPU threads (default: torch's choice)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")


def bench(args: argparse.Namespace) -> None:
    """What the command does, for its arguments."""
    title = _set_up(args)
    rows: list[report.StepTime] = []
    for case in _cases(args):
        print(f"{case.net}, {case.shape}, batch {case.batch_size} ...", file=sys.stderr, flush=True)
        rows += time_steps(case, args.methods, args.seconds, args.device, args.dtype)
    print(title, report.step_table(rows), sep="\n\n")
    if args.json:
        _write_json(args.json, title, [asdict(row) for row in rows])
    if args.plot and args.sweep:
        report.plot_sweep(rows, args.sweep, title, args.plot)
    elif args.plot:
        report.plot_ratios(rows, title, args.plot)


def time_steps(
    case: Case, methods: list[str], seconds: float, device: torch.device, dtype: str
) -> list[report.StepTime]:
    """The methods' whole training steps on one case, interleaved; and their peak memory."""
    methods = methods_for(case, methods, dtype, device)
    steps = [training_step(case, method, device, dtype) for method in methods]
    contenders = [Contender(method, step.run) for method, step in zip(methods, steps, strict=True)]
    take_turns(contenders, seconds, device)
    return [
        report.StepTime(case, each.name, each.spread, _memory(each.name, step, device))
        for each, step in zip(contenders, steps, strict=True)
    ]


def _memory(method: str, step: TrainingStep, device: torch.device) -> int | None:
    return None if method in GRAPHED else step.resident_bytes + peak_memory(step.run, device)


def _cases(args: argparse.Namespace) -> Iterator[Case]:
    if args.sweep:
        case = Case.of(args.models[0], args.shapes[0], args.batch_sizes[0], args.outputs)
        if args.sweep in ("width", "hidden") and not case.is_mlp:
            raise UserError(f"--sweep {args.sweep} is for the mlps, not for {case.model}")
        for value in _SWEEPS[args.sweep]:
            changed: dict[str, Any] = {args.sweep: value}
            yield replace(case, **changed)
        return
    for model in args.models:
        for shape in args.shapes if model != "alexnet" else args.shapes[:1]:
            for batch_size in args.batch_sizes:
                yield Case.of(model, shape, batch_size, args.outputs)


def profile(args: argparse.Namespace) -> None:
    """What the command does, for its arguments."""
    title = _set_up(args)
    case = Case.of(args.model, args.shape, args.batch_size, args.outputs)
    (method,) = methods_for(case, [args.method], args.dtype, args.device)
    step = training_step(case, method, args.device, args.dtype).run
    whole_step = Contender(args.method, step)
    take_turns([whole_step], _STEP_SECONDS, args.device)
    limits = measure_limits(args.device, torch.bfloat16 if args.dtype == "bfloat16" else torch.float32)
    rows = time_operators(record(step), limits, args.device)
    print(
        f"{title}, {limits.bytes / 1e9:.3g} GB/s, {limits.flops / 1e9:.4g} GFLOP/s",
        f"{case.net}, {case.shape}, batch {case.batch_size}, {args.method}: "
        f"{whole_step.spread} ms a step",
        report.operator_table(rows, whole_step.spread.median),
        sep="\n\n",
    )
    if args.json:
        _write_json(args.json, title, [asdict(row) for row in rows])
    if args.trace:
        _write_trace(step, args.trace, args.device)
    if args.nvtx:
        with torch.autograd.profiler.emit_nvtx():
            _named_steps(step)


def _set_up(args: argparse.Namespace) -> str:
    """Settings of torch that hold for all contenders; returns the head of the report."""
    plot = getattr(args, "plot", None)
    files = {"--json": args.json, "--plot": plot, "--trace": getattr(args, "trace", None)}
    for argument, file in files.items():
        if file and not file.absolute().parent.is_dir():
            raise UserError(f"{argument} {file}: there is no folder {file.parent}")
        if file and file.is_dir():
            raise UserError(f"{argument} {file} is a folder: give a file")
    if plot:
        _check_plot(plot)
    if getattr(args, "nvtx", False) and args.device.type != "cuda":
        raise UserError(f"--nvtx is for CUDA devices; got --device {args.device}")
    if args.device.type == "cuda" and args.device.index is not None:
        torch.cuda.set_device(args.device)  # whose streams, graphs and clocks are meant
    keep_freed_memory()  # for all contenders, as FDFA has it
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = args.dtype == "tf32"
    torch.set_float32_matmul_precision("high" if args.dtype == "tf32" else "highest")
    return f"{description(args.device)}, {args.dtype}"


def _check_plot(file: Path) -> None:
    if not find_spec("matplotlib"):
        raise UserError("--plot needs matplotlib: pip install matplotlib")
    from matplotlib.figure import Figure

    known = Figure().canvas.get_supported_filetypes()
    if file.suffix[1:] not in known:
        raise UserError(f"--plot {file} must end in one of {', '.join(f'.{each}' for each in known)}")


def _write_json(file: Path, title: str, rows: list[dict[str, Any]]) -> None:
    file.write_text(json.dumps({"machine": title, "rows": rows}, indent=1) + "\n")


def _write_trace(step: Any, file: Path, device: torch.device) -> None:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        _named_steps(step)
    profiler.export_chrome_trace(str(file))


def _named_steps(step: Any) -> None:
    for number in range(_TRACED_STEPS):
        with torch.profiler.record_function(f"step {number}"):
            step()

"""``python -m fdfa_ext bench`` and ``python -m fdfa_ext profile``."""

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch

from fdfa_ext.arguments import UserError, device, positive, some_of, threads, whole, whole_numbers
from fdfa_ext.bench import report
from fdfa_ext.bench.implementations import (
    DEFAULT,
    DTYPES,
    GRAPHED,
    INPUTS,
    METHODS,
    MODELS,
    Case,
    TimedStep,
    methods_for,
    training_step,
)
from fdfa_ext.bench.machine import description, machine_facts, measure_limits
from fdfa_ext.bench.operators import OperatorTime, record, time_operators
from fdfa_ext.bench.timing import (
    OUT_OF_MEMORY,
    Implementation,
    Spread,
    attempt,
    peak_memory,
    take_turns,
)
from fdfa_ext.memory import keep_freed_memory
from fdfa_ext.train.files import replacing

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
_STEP_SECONDS = 1.0  # of timing the whole step that the operators are compared with
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
        help=f"of {', '.join(METHODS)} (default %(default)s)",
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
    parser.add_argument(
        "--outputs",
        type=whole_numbers,
        metavar="K[,...]",
        help="network outputs (default 10; alexnet 100); all nets with the first number come first",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a plot (PNG)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="do not time again what the file of --json holds of this hardware, torch and commit",
    )
    _add_common_arguments(parser)


def add_profile_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=some_of(MODELS),
        default="mlp4",
        metavar="MODEL[,...]",
        help=f"of {', '.join(MODELS)} (default %(default)s)",
    )
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
        "--outputs", type=whole, metavar="K", help="network outputs (default 10; alexnet 100)"
    )
    parser.add_argument(
        "--only-fdfa", action="store_true", help="time this package's operators and none of torch's"
    )
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
        "--threads", type=threads, metavar="N", help="CPU threads (default: torch's choice)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")


def bench(args: argparse.Namespace) -> int:
    """What the command does, for its arguments. Returns 1 if a method failed for want of anything but
    memory, else 0.

    What is known of a case is printed and written as soon as it is, so that a run which is cut short
    loses only the rest.
    """
    title = _set_up(args)
    if args.resume and not args.json:
        raise UserError("--resume goes on with the file of --json: give one")
    facts = {**machine_facts(args.device), "dtype": args.dtype}
    known = _earlier_rows(args.json, facts) if args.resume else {}
    rows: list[report.StepTime] = []
    failures: list[report.StepFailure] = []
    print(title, "", report.STEP_HEAD, sep="\n", flush=True)
    for case in _cases(args):
        print(f"{case.net}, {case.shape}, batch {case.batch_size} ...", file=sys.stderr, flush=True)
        methods = methods_for(case, args.methods, args.dtype, args.device)
        timed, failed = known.get(case, []), list[report.StepFailure]()
        if [row.method for row in timed] != methods:
            gc.collect()  # the nets of the case before, whose memory this one may need
            timed, failed = time_steps(case, methods, args.seconds, args.device, args.dtype)
        print(report.step_lines(timed, failed), flush=True)
        rows += timed
        failures += failed
        if args.json:
            _write_json(
                args.json,
                machine=title,
                rows=[facts | asdict(row) for row in rows],
                failures=[facts | asdict(row) for row in failures],
            )
    print("", report.step_summary(rows), sep="\n")
    if args.plot and args.sweep:
        report.plot_sweep(rows, args.sweep, title, args.plot)
    elif args.plot:
        report.plot_ratios(rows, title, args.plot)
    return int(any(row.error != OUT_OF_MEMORY for row in failures))


def time_steps(
    case: Case, methods: list[str], seconds: float, device: torch.device, dtype: str
) -> tuple[list[report.StepTime], list[report.StepFailure]]:
    """The methods' whole training steps on one case, interleaved; and their peak memory."""
    implementations, steps = [], {}
    failures = []

    def fail(method: str, error: str) -> None:
        failures.append(report.StepFailure(case, method, error))

    for method in methods:
        step, error = attempt(partial(training_step, case, method, device, dtype))
        if step is None:
            fail(method, error)
            continue
        steps[method] = step
        implementations.append(Implementation(method, step.run))
    if implementations:
        take_turns(implementations, seconds, device)
    rows = []
    for each in implementations:
        memory, error = attempt(partial(_memory, each.name, steps[each.name], device))
        if each.error or error:
            fail(each.name, each.error or error)
        else:
            rows.append(report.StepTime(case, each.name, each.spread, memory))
    return rows, failures


def _earlier_rows(file: Path, facts: dict[str, str]) -> dict[Case, list[report.StepTime]]:
    """What an earlier run wrote, if it was made of the same and nobody can have changed it since."""
    exact = facts["commit"] != "unknown" and not facts["commit"].endswith("-dirty")
    if not exact or not file.exists():
        return {}
    try:
        rows = json.loads(file.read_text())["rows"]
        return report.by_case([_step_time(row) for row in rows if facts.items() <= row.items()])
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise UserError(f"{file} is not what bench --json writes: move it away") from None


def _step_time(row: dict[str, Any]) -> report.StepTime:
    """Out of a file."""
    method, ms, memory = row["method"], row["ms"], row["memory"]
    if method not in METHODS or any(type(time) is not float for time in ms):
        raise ValueError("no timed method")
    if not (memory is None or type(memory) is int):
        raise ValueError("no count of bytes")
    return report.StepTime(Case(**row["case"]), method, Spread(*ms), memory)


def _memory(method: str, step: TimedStep, device: torch.device) -> int | None:
    return None if method in GRAPHED else step.resident_bytes + peak_memory(step.run, device)


def _cases(args: argparse.Namespace) -> Iterator[Case]:
    if args.sweep:
        outputs = args.outputs[0] if args.outputs else None
        case = Case.of(args.models[0], args.shapes[0], args.batch_sizes[0], outputs)
        if args.sweep in ("width", "hidden") and not case.is_mlp:
            raise UserError(f"--sweep {args.sweep} is for the mlps, not for {case.model}")
        for value in _SWEEPS[args.sweep]:
            changed: dict[str, Any] = {args.sweep: value}
            yield replace(case, **changed)
        return
    for outputs, model in product(args.outputs or [None], args.models):
        for shape in args.shapes if model != "alexnet" else args.shapes[:1]:
            for batch_size in args.batch_sizes:
                yield Case.of(model, shape, batch_size, outputs)


def profile(args: argparse.Namespace) -> int:
    """What the command does, for its arguments. Returns 1 if an operator failed, else 0.

    A net's lines are printed and written as soon as they are known.
    """
    title = _set_up(args)
    if args.trace and len(args.model) > 1:
        raise UserError(f"--trace is of one net; got --model {','.join(args.model)}")
    limits = measure_limits(args.device, torch.bfloat16 if args.dtype == "bfloat16" else torch.float32)
    print(
        f"{title}, {limits.bytes / 1e9:.3g} GB/s, {limits.flops / 1e9:.4g} GFLOP/s, in a feedback step "
        f"{limits.feedback_flops / 1e9:.4g}; batch {args.batch_size}, {args.method}",
        "",
        report.OPERATOR_HEAD,
        sep="\n",
        flush=True,
    )
    facts = {**machine_facts(args.device), "dtype": args.dtype, "method": args.method}
    rows: list[OperatorTime] = []
    records = []
    failed = False
    for model in args.model:
        case = Case.of(model, args.shape, args.batch_size, args.outputs)
        (method,) = methods_for(case, [args.method], args.dtype, args.device)
        step = training_step(case, method, args.device, args.dtype).run
        whole_step = Implementation(args.method, step)
        take_turns([whole_step], _STEP_SECONDS, args.device)
        if whole_step.error:
            raise RuntimeError(whole_step.error)
        timed: list[OperatorTime] = []
        for call in record(step):
            if args.only_fdfa and not call.is_ours:
                continue
            found, error = attempt(partial(time_operators, [call], limits, args.device))
            timed += found or []
            failed = failed or bool(error)
        print(report.operator_lines(case.net, timed, whole_step.spread), flush=True)
        rows += timed
        records += [{**facts, "case": asdict(case), **asdict(row)} for row in timed]
        if args.json:
            _write_json(args.json, machine=title, limits=limits._asdict(), rows=records)
        if args.trace:
            _write_trace(step, args.trace, args.device)
        if args.nvtx:
            with torch.autograd.profiler.emit_nvtx():
                _named_steps(step)
    print("", report.operator_summary(rows), sep="\n")
    return int(failed)


def _set_up(args: argparse.Namespace) -> str:
    """Settings of torch that hold for all implementations; returns the head of the report."""
    plot = getattr(args, "plot", None)
    files = {"--json": args.json, "--plot": plot, "--trace": getattr(args, "trace", None)}
    for argument, file in files.items():
        if file and not file.absolute().parent.is_dir():
            raise UserError(f"{argument} {file}: there is no folder {file.parent}")
        if file and file.exists() and not file.is_file():
            raise UserError(f"{argument} {file} is a folder, a pipe or a device: give a file")
    if plot:
        _check_plot(plot)
    if getattr(args, "nvtx", False) and args.device.type != "cuda":
        raise UserError(f"--nvtx is for CUDA devices; got --device {args.device}")
    if args.device.type == "cuda" and args.device.index is not None:
        torch.cuda.set_device(args.device)  # whose streams, graphs and clocks are meant
    keep_freed_memory()  # for all implementations, as FDFA has it
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


def _write_json(file: Path, **content: Any) -> None:
    with replacing(file) as stream:
        stream.write((json.dumps(content, indent=1) + "\n").encode())


def _write_trace(step: Any, file: Path, device: torch.device) -> None:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        _named_steps(step)
    with tempfile.TemporaryDirectory() as folder, replacing(file) as stream:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))  # which raises nothing where it cannot write
        stream.write(trace.read_bytes())


def _named_steps(step: Any) -> None:
    for number in range(_TRACED_STEPS):
        with torch.profiler.record_function(f"step {number}"):
            step()

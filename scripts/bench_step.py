"""Times whole training steps of FDFA beside backprop's, and on a GPU the two kernels alone.

    python scripts/bench_step.py --device cuda --json bench.json

A step is zero_grad, forward, cross-entropy, backward and fused Adam on W; FDFA's backward holds the
step of Adam on B too. All contenders of one net take turns within one run, so that a busy machine slows
all of them alike. Prints Markdown: medians, with the quartiles in parentheses.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fdfa_ext import FDFA, build_info
from fdfa_ext._ops import fused
from fdfa_ext.train.models import build_net

HIDDEN = {"mlp2": 1, "mlp4": 3}  # the mlps: 784-800-10 and 784-800-800-800-10
MODELS = [*HIDDEN, "cnn", "cnn-two-pool"]
SHAPES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
N_CLASSES = 10
N_BATCHES = 16  # enough that no contender learns them by heart and computes with zeros from then on
REFERENCE_TURNS = 3  # of one step: it is slow, and only its order of magnitude matters

KERNEL_BATCH = 128
KERNEL_FEATURES = (64 * 55 * 55, 4096)  # AlexNet's first convolution and its dense layers
KERNEL_OUTPUTS = (10, 100, 200)
KERNEL_REPEATS = 20
COLD_BYTES = 2**28  # several times any L2 cache


class Spread(NamedTuple):
    """Quartiles of a time in milliseconds."""

    lower: float
    median: float
    upper: float

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.lower:.3g}–{self.upper:.3g})"


def spread(ms: list[float]) -> Spread:
    return Spread(*statistics.quantiles(ms, n=4, method="inclusive"))


@dataclass
class Contender:
    name: str
    step: Callable[[], None]
    steps_per_turn: int
    max_turns: float = math.inf
    ms: list[float] = field(default_factory=list)  # of a step, one entry for each turn


def contender(kind: str, model: str, shape: str, args: argparse.Namespace) -> Contender:
    """kind: "FDFA", "reference", "BP" or "BP channels_last"; same weights and batches for all."""
    torch.manual_seed(0)
    family = "mlp" if model in HIDDEN else model
    width = 1000 if shape == "cifar10" else 800
    net: nn.Module = build_net(family, SHAPES[shape], N_CLASSES, HIDDEN.get(model, 1), width)
    order = torch.contiguous_format if kind == "BP" or family == "mlp" else torch.channels_last
    net = net.to(device=args.device, memory_format=order)  # type: ignore[call-overload]
    size = args.batch_size
    batches = [
        (
            torch.randn(size, *SHAPES[shape]).to(args.device).contiguous(memory_format=order),
            torch.randint(N_CLASSES, (size,)).to(args.device),
        )
        for _ in range(N_BATCHES)
    ]
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, fused=True)
    if not kind.startswith("BP"):
        backend = "reference" if kind == "reference" else "fused"
        net = FDFA(net, feedback="adam", backend=backend, example_input=batches[0][0])
    net.train()
    endless = cycle(batches)

    def step() -> None:
        images, labels = next(endless)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()

    if kind == "reference":
        return Contender(kind, step, steps_per_turn=1, max_turns=REFERENCE_TURNS)
    return Contender(kind, step, 20 if args.device.type == "cuda" else 5)


def take_turns(contenders: list[Contender], args: argparse.Namespace) -> None:
    """Fills their `ms` until each has `steps` timed steps or time is over; 3 turns at least."""
    synchronize = torch.cuda.synchronize if args.device.type == "cuda" else lambda: None
    for each in contenders:
        for _ in range(1 if each.max_turns < math.inf else 5):
            each.step()
    deadline = time.perf_counter() + args.seconds
    for turn in range(max(3, math.ceil(args.steps / contenders[0].steps_per_turn))):
        if turn >= 3 and time.perf_counter() > deadline:
            break
        first = turn % len(contenders)
        for each in contenders[first:] + contenders[:first]:
            if turn >= each.max_turns:
                continue
            each.step()  # untimed: what the others displaced comes back into the caches
            synchronize()
            started = time.perf_counter()
            for _ in range(each.steps_per_turn):
                each.step()
            synchronize()
            each.ms.append(1e3 * (time.perf_counter() - started) / each.steps_per_turn)


def time_steps(model: str, shape: str, args: argparse.Namespace) -> dict[str, Any]:
    kinds = ["FDFA", "BP", *([] if model in HIDDEN else ["BP channels_last"]), "reference"]
    contenders = [contender(kind, model, shape, args) for kind in kinds]
    take_turns(contenders, args)
    spreads = {each.name: spread(each.ms) for each in contenders}
    best = min((kind for kind in kinds if kind.startswith("BP")), key=lambda kind: spreads[kind].median)
    return {"model": model, "shape": shape, "best_bp": best, "spreads": spreads}


def step_line(row: dict[str, Any]) -> str:
    spreads, best = row["spreads"], row["best_bp"]
    fdfa, bp, reference = spreads["FDFA"], spreads[best], spreads["reference"]
    note = " channels_last" if "channels_last" in best else ""
    return (
        f"| {row['model']} | {row['shape']} | {fdfa} | {bp}{note} | {fdfa.median / bp.median:.2f} "
        f"| {reference} | {reference.median / fdfa.median:.1f} |"
    )


def graph_ms(make: Callable[[], Callable[[], Any]], n_bytes: int) -> Spread:
    """One call's time on the GPU, in a CUDA graph of several, which no launch on the CPU delays.

    Each call has data of its own, so much in all that none is in a cache.
    """
    calls = [make() for _ in range(max(3, math.ceil(COLD_BYTES / n_bytes)))]
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call() for call in calls]  # kept, so that every call writes to memory of its own
    ms = []
    for _ in range(KERNEL_REPEATS + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        ms.append(start.elapsed_time(end) / len(calls))
    del results
    return spread(ms[1:])


def time_kernels(device: torch.device) -> list[dict[str, Any]]:
    """The kernels against a copy of 512 MiB, in GB/s of the bytes that they cannot avoid, float32."""
    n, state = KERNEL_BATCH, torch.tensor([1, 2, 0], device=device)
    rand = partial(torch.randn, device=device)

    def copy() -> Callable[[], Any]:
        return rand(2**27).clone

    def perturb(d: int) -> Callable[[], Any]:
        return partial(fused.perturb, rand(n, d), rand(n, d), state, 0, "gaussian")

    def linear(d: int) -> Callable[[], Any]:
        operands = (rand(n, 16), rand(n, 16), rand(d, 16), rand(d))
        return partial(fused.linear, *operands, state, 0, "relu", "gaussian")

    def products(d: int) -> Callable[[], Any]:
        x, tangent, weight = rand(n, 16), rand(n, 16), rand(d, 16)
        return lambda: (x.mm(weight.t()), tangent.mm(weight.t()))

    def feedback_step(rule: str, d: int, k: int) -> Callable[[], Any]:
        adam = (0 * rand(k, d), rand(k, d).square(), torch.ones_like(state[:1]))
        matrices = (rand(k, d), *(adam if rule == "adam" else (None, None, None)))
        operands = (*matrices, rand(n, k), rand(n, k), rand(n, d), state, 0, "relu", "gaussian")
        return partial(fused.feedback_step, *operands, 1e-4, 0.9, 0.999, 1e-8)

    rows: list[dict[str, Any]] = []

    def add(name: str, d: int, k: int | None, n_bytes: int, ms: Spread) -> None:
        rate = n_bytes / ms.median / 1e6
        share = rate / rows[0]["rate"] if rows else 1.0
        rows.append({"kernel": name, "D": d, "K": k, "ms": ms, "rate": rate, "share_of_copy": share})

    add("copy", 2**27, None, 2**30, graph_ms(copy, 2**30))
    for d in KERNEL_FEATURES:
        matrix = 4 * n * d
        add("perturb", d, None, 2 * matrix, graph_ms(partial(perturb, d), 2 * matrix))
        whole = graph_ms(partial(linear, d), 4 * matrix)
        bare = graph_ms(partial(products, d), 2 * matrix).median
        add("linear less its products", d, None, 4 * matrix, Spread(*(ms - bare for ms in whole)))
        for rule, matrices in (("adam", 3), ("ema", 1)):
            for k in KERNEL_OUTPUTS:
                n_bytes = 2 * matrices * 4 * k * d + 2 * matrix + 2 * 4 * n * k
                ms = graph_ms(partial(feedback_step, rule, d, k), n_bytes)
                add(f"feedback_step {rule}", d, k, n_bytes, ms)
    return rows


def kernel_line(row: dict[str, Any]) -> str:
    cells = [row["kernel"], row["D"], row["K"] or "", row["ms"], f"{row['rate']:.0f}"]
    return f"| {' | '.join(map(str, cells))} | {row['share_of_copy']:.0%} |"


def header(args: argparse.Namespace) -> str:
    """Hardware, torch, threads and commit: what a number means nothing without."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    hardware = f"{names[0] if names else platform.processor()} ({build_info()['CPU kernels']})"
    if args.device.type == "cuda":
        hardware = f"{torch.cuda.get_device_name(args.device)}, {hardware}"
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return (
        f"{hardware}, torch {torch.__version__}, {torch.get_num_threads()} threads, load "
        f"{os.getloadavg()[0]:.1f}, commit {commit}, batch {args.batch_size}, float32"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--models", default=",".join(MODELS), help="default: %(default)s")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100, help="timed steps of each contender")
    parser.add_argument("--seconds", type=float, default=60.0, help="limit for each net and shape")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    args = parser.parse_args()
    models, shapes = args.models.split(","), args.shapes.split(",")
    for name in {*models, *shapes} - {*MODELS, *SHAPES}:
        parser.error(f"unknown model or shape {name!r}")
    if args.threads:
        torch.set_num_threads(args.threads)
    title = header(args)

    steps, kernels = [], []
    for shape in shapes:
        for model in models:
            print(f"{model}, {shape} ...", file=sys.stderr, flush=True)
            steps.append(time_steps(model, shape, args))
    if args.device.type == "cuda":
        print("kernels ...", file=sys.stderr, flush=True)
        kernels = time_kernels(args.device)
    if args.json:
        figures = {"header": title, "steps": steps, "kernels": kernels}
        args.json.write_text(json.dumps(figures, indent=1) + "\n")

    if kernels:
        print("| kernel | D | K | ms | GB/s of necessary bytes | share of copy |")
        print("|---" * 6 + "|", *map(kernel_line, kernels), "", sep="\n")
    print(title, end="\n\n")
    print("| model | shape | FDFA ms | best BP ms | FDFA / BP | reference ms | reference / FDFA |")
    print("|---" * 7 + "|", *map(step_line, steps), sep="\n")


if __name__ == "__main__":
    main()

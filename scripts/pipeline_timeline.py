"""Times the stages of a dense net in processes of this machine, by backpropagation (1F1B of
torch.distributed.pipelining) and by FDFA's Pipeline, interleaved, and draws a step of each.

    PYTHONPATH=. python scripts/pipeline_timeline.py docs/records/pipeline.csv docs/figures/pipeline.png
"""

import argparse
import csv
import os
import platform
import socket
import statistics
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from fdfa_ext import FDFA, FDFALinear, Pipeline

WIDTH, LAYERS, BATCH = 800, 8, 256
ROUNDS, STEPS = 15, 4
COLUMNS = ["way", "stages", "stage", "what", "start", "end"]


def dense(is_block: bool) -> nn.Sequential:
    torch.manual_seed(0)
    sizes = [784, *[WIDTH] * (LAYERS - 1)]
    hidden: list[nn.Module] = []
    for n_in, n_out in pairwise(sizes):
        layer = FDFALinear(n_in, n_out, activation="relu")
        hidden.append(layer if is_block else nn.Sequential(nn.Linear(n_in, n_out), nn.ReLU()))
    return nn.Sequential(*hidden, nn.Linear(WIDTH, 10))


class Watch:
    """What a process did in its last step, [what, start, end] in seconds of the machine's clock."""

    def __init__(self) -> None:
        self.events: list[tuple[str, float, float]] = []

    def timed(self, what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.events.append((what, start, time.perf_counter()))
            return result

        return run


def steps(rank: int, stages: int, watch: Watch) -> dict[str, Callable[[], Any]]:
    """A training step by each way."""
    torch.manual_seed(0)  # the same batch in all processes
    x, target = torch.randn(BATCH, 784), torch.randint(10, (BATCH,))
    starts = [LAYERS * stage // stages for stage in range(stages + 1)]

    def adam(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(module.parameters(), 1e-4, fused=True)

    part = dense(is_block=False)[starts[rank] : starts[rank + 1]]
    stage = PipelineStage(part, rank, stages, torch.device("cpu"))
    schedule = Schedule1F1B(stage, n_microbatches=stages, loss_fn=F.cross_entropy)
    stage.forward_one_chunk = watch.timed("forward", stage.forward_one_chunk)
    stage.backward_one_chunk = watch.timed("backward", stage.backward_one_chunk)
    of_part = adam(part)

    model = FDFA(dense(is_block=True), example_input=x[:2])
    names = [str(start) for start in starts[1:-1]]
    pipeline = Pipeline(model, names, n_microbatches=stages, loss_fn=F.cross_entropy)
    pipeline._run = watch.timed("forward", pipeline._run)  # type: ignore[method-assign]
    pipeline._learn = watch.timed("backward", pipeline._learn)  # type: ignore[method-assign]
    of_model = adam(model)

    def backpropagation() -> None:
        of_part.zero_grad()
        schedule.step(*([x] if rank == 0 else []), target=target if rank == stages - 1 else None)
        watch.timed("optimizer", of_part.step)()

    def fdfa() -> None:
        of_model.zero_grad()
        pipeline.step(x, target)
        watch.timed("optimizer", of_model.step)()

    ways: dict[str, Callable[[], Any]] = {"1F1B": backpropagation, "FDFA": fdfa}
    if rank == 0:
        ways |= {"backpropagation, one process": alone(False, x, target, adam)}
        ways |= {"FDFA, one process": alone(True, x, target, adam)}
    return ways


def alone(is_fdfa: bool, x: Tensor, target: Tensor, adam: Any) -> Callable[[], Any]:
    net = dense(is_block=is_fdfa)
    model = FDFA(net, example_input=x[:2]) if is_fdfa else net
    optimizer = adam(model)

    def step() -> None:
        optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this process learns by its own batches alone
            output = model(x)
        F.cross_entropy(output, target).backward()
        optimizer.step()

    return step


def work(rank: int, stages: int, port: int, path: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=stages)
    watch = Watch()
    ways = steps(rank, stages, watch)
    names = ["1F1B", "FDFA", "backpropagation, one process", "FDFA, one process"]
    times: dict[str, list[float]] = {name: [] for name in names}
    lines: dict[str, list[tuple[float, float, list[tuple[str, float, float]]]]] = {}
    for _ in range(ROUNDS):
        for name in names:
            dist.barrier()
            for _ in range(STEPS):
                watch.events = []
                start = time.perf_counter()
                if name in ways:
                    ways[name]()
                if "one process" not in name:
                    dist.barrier()
                end = time.perf_counter()
                times[name].append(end - start)
                lines.setdefault(name, []).append((start, end, watch.events))
    torch.save((times, lines), f"{path}.{rank}")
    dist.barrier()
    dist.destroy_process_group()


def measured(stages: int, folder: Path) -> tuple[dict[str, float], list[list[Any]]]:
    """The median step of each way in seconds, and the events of that step."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = str(folder / "timeline")
    mp.spawn(work, (stages, port, path), nprocs=stages)
    found = [torch.load(f"{path}.{rank}", weights_only=False) for rank in range(stages)]
    medians = {name: statistics.median(own[STEPS:]) for name, own in found[0][0].items()}
    rows: list[list[Any]] = []
    for name in ("1F1B", "FDFA"):
        own = found[0][0][name]
        step = min(range(STEPS, len(own)), key=lambda i: abs(own[i] - medians[name]))
        zero = found[0][1][name][step][0]
        for rank, (_, lines) in enumerate(found):
            rows += [
                [name, stages, rank, what, round(1e3 * (start - zero), 3), round(1e3 * (end - zero), 3)]
                for what, start, end in lines[name][step][2]
            ]
    return medians, rows


def draw(record: Path, figure: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    with record.open() as file:
        rows = [*csv.DictReader(line for line in file if not line.startswith("#"))]
    kinds = [*dict.fromkeys((int(row["stages"]), row["way"]) for row in rows)]
    colors = {"forward": "tab:blue", "backward": "tab:orange", "optimizer": "tab:gray"}
    shown, axes = pyplot.subplots(len(kinds), 1, figsize=(9, 6.5), height_ratios=[k[0] for k in kinds])
    longest = {n: max(float(row["end"]) for row in rows if int(row["stages"]) == n) for n, _ in kinds}
    for place, (stages, way) in zip(axes, kinds, strict=True):
        for row in rows:
            if (int(row["stages"]), row["way"]) == (stages, way):
                start, end = float(row["start"]), float(row["end"])
                color = colors[row["what"]]
                place.barh(int(row["stage"]), end - start, left=start, color=color, edgecolor="white")
        place.set(xlim=(0, longest[stages]), yticks=range(stages), ylabel="stage")
        place.set_title(f"{way}, {stages} processes", fontsize=9, loc="left")
        place.invert_yaxis()
    axes[-1].set_xlabel("ms")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=color) for color in colors.values()]
    names = ["forward", "gradients", "optimizer"]
    shown.legend(handles, names, loc="upper right", ncols=3, fontsize=8, frameon=False)
    shown.tight_layout()
    shown.savefig(figure, dpi=110)


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((x.split(":")[1].strip() for x in lines if "model name" in x), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("record", type=Path, help="a CSV file, written anew")
    parser.add_argument("figure", type=Path)
    parser.add_argument("--draw-only", action="store_true", help="the figure from the record")
    args = parser.parse_args()
    if not args.draw_only:
        rows: list[list[Any]] = []
        comments = [f"# {processor()}, torch {torch.__version__}, one thread a process"]
        for stages in (2, 4):
            medians, own = measured(stages, args.record.parent)
            rows += own
            for rank in range(stages):
                (args.record.parent / f"timeline.{rank}").unlink()
            words = "; ".join(f"{name} {1e3 * t:.1f} ms" for name, t in medians.items())
            comments.append(f"# {stages} processes: {words}")
            print(comments[-1][2:])
        with args.record.open("w", newline="") as file:
            file.writelines(f"{comment}\n" for comment in comments)
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([COLUMNS, *rows])
    draw(args.record, args.figure)


if __name__ == "__main__":
    main()

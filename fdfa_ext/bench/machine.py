"""What a figure means nothing without: the hardware with its limits, torch, threads and commit."""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fdfa_ext import build_info
from fdfa_ext._ops import fused

_REPEATS = 10


def description(device: torch.device) -> str:
    """One line for a table's head."""
    facts = machine_facts(device)
    return (
        f"{facts['hardware']}, torch {facts['torch']}, {torch.get_num_threads()} threads, load "
        f"{os.getloadavg()[0]:.1f}, commit {facts['commit']}"
    )


def machine_facts(device: torch.device) -> dict[str, str]:
    """What has to be equal for two figures to stand side by side: hardware, torch and commit."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    hardware = f"{names[0] if names else platform.processor()} ({build_info()['CPU kernels']})"
    if device.type == "cuda":
        hardware = f"{torch.cuda.get_device_name(device)}, {hardware}"
    return {"hardware": hardware, "torch": torch.__version__, "commit": _commit()}


def _commit() -> str:
    """$FDFA_COMMIT, which a copy without .git needs, or what git says of this checkout."""
    named = os.environ.get("FDFA_COMMIT")
    if named:
        return named
    root = Path(__file__).parents[2]
    # Without one of its own, git would answer for whatever repository the package lies in.
    if not (root / ".git").exists():
        return "unknown"
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class Limits(NamedTuple):
    """What the machine was measured to do at best, in units a second."""

    bytes: float  # read and written by a copy larger than the caches
    flops: float  # of a matrix product by the faster library, in the dtype in question
    feedback_flops: float  # of a feedback step's products, which are in single precision

    def seconds(self, n_bytes: float, n_flops: float) -> float:
        """The roofline: no faster can it be, unless its data are in a cache."""
        return max(n_bytes / self.bytes, n_flops / self.flops)


def measure_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    on_gpu = device.type == "cuda"
    source = torch.empty(2**28 if on_gpu else 2**25, device=device).normal_()
    target = torch.empty_like(source)
    side = 8192 if on_gpu else 1024
    a = torch.randn(side, side, device=device)
    flops = _product_flops(a.to(dtype))
    return Limits(
        2 * source.nbytes / _best(lambda: target.copy_(source), device),
        flops,
        _tf32_flops(a) / 3 if on_gpu else _product_flops(a),  # three products of tf32 (tensor_core.h)
    )


def _product_flops(a: Tensor) -> float:
    return float(2 * len(a) ** 3 / _best(lambda: fused.mm(a, a), a.device))


def _tf32_flops(a: Tensor) -> float:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return _product_flops(a)
    finally:
        torch.set_float32_matmul_precision(before)


def _best(run: Callable[[], object], device: torch.device) -> float:
    """Median of the faster half of the repeats, in seconds: the machine at its best, without flukes."""
    seconds = []
    for _ in range(_REPEATS + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(sorted(seconds[1:])[: _REPEATS // 2])

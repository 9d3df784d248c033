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
    """What a machine does at best, in units a second."""

    bytes: float  # read and written by a copy larger than the caches
    flops: float  # of a matrix product by the faster library, in the dtype in question
    feedback_flops: float  # of a feedback step's products, which are in single precision or tf32

    def seconds(self, n_bytes: float, n_flops: float) -> float:
        """The roofline: no faster can it be, unless its data are in a cache."""
        return max(n_bytes / self.bytes, n_flops / self.flops)


def feedback_flops(tf32_flops: float) -> float:
    """Of a feedback step on CUDA: three products of tf32 for each (csrc/cuda/tensor_core.h), or one
    where torch allows tf32.
    """
    exact = torch.get_float32_matmul_precision() == "highest"
    return tf32_flops / 3 if exact else tf32_flops


class DataSheet(NamedTuple):
    """What the maker of a GPU promises, in units a second."""

    name: str
    device: str  # as torch.cuda.get_device_name has it
    bytes: float
    flops: float  # in float32
    tf32_flops: float  # dense

    @property
    def limits(self) -> Limits:
        """In float32 throughout: torch must not allow tf32."""
        return Limits(self.bytes, self.flops, feedback_flops(self.tf32_flops))


# NVIDIA's "H100 Tensor Core GPU Datasheet" and "H200 Tensor Core GPU Datasheet", columns SXM. Their 989
# TFLOP/s of tf32 are with sparsity, of which half are dense.
DATA_SHEETS = (
    DataSheet("H100 SXM", "NVIDIA H100 80GB HBM3", 3.35e12, 67e12, 495e12),
    DataSheet("H200 SXM", "NVIDIA H200", 4.8e12, 67e12, 495e12),
)


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
        feedback_flops(_tf32_flops(a)) if on_gpu else _product_flops(a),
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

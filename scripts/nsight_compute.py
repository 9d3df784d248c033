"""Nsight Compute on the kernels of one AlexNet step by FDFA: a Markdown table of its key figures.

Of the epilogue, the feedback step and the max-pool, each kernel's longest launch. The argument is the
file for ncu's own output.
"""

import csv
import subprocess
import sys
from pathlib import Path

KERNELS = "regex:(epilogue|feedback|max_pool|max_pool_quads)_kernel"
LAUNCHES = 24  # more than two passes have
METRICS = {
    "µs": "gpu__time_duration.sum",  # in ns
    "MB": "dram__bytes.sum",
    "memory, % of peak": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "SM, % of peak": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "active warps, %": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}
SCALES = {"µs": 1e-3, "MB": 1e-6}


def main() -> int:
    output = Path(sys.argv[1])
    # The clocks stay as they are, so that the times are those of a normal run.
    ncu = ["ncu", "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none"]
    ncu += ["--kernel-name", KERNELS, "--launch-count", str(LAUNCHES)]
    ncu += ["--metrics", ",".join(METRICS.values()), "--force-overwrite", "--log-file", str(output)]
    step = ["-m", "fdfa_ext", "bench", "--device", "cuda", "--models", "alexnet", "--methods", "fdfa"]
    step += ["--batch-sizes", "128", "--seconds", "0.01"]
    status = subprocess.run([*ncu, sys.executable, *step]).returncode
    text = output.read_text() if output.exists() else ""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    launches = list(csv.DictReader(lines))[1:]  # the first has the units
    if not launches:
        print(text)
        return status or 1
    print("|", " | ".join(["kernel", "grid", *METRICS]), "|")
    print("|" + "---|" * (len(METRICS) + 2))
    longest = {}
    for launch in sorted(launches, key=lambda each: number(each, "µs")):
        longest[launch["Kernel Name"].partition("<")[0].split(" ")[-1]] = launch
    for kernel, launch in longest.items():
        figures = [f"{number(launch, name):.3g}" for name in METRICS]
        print("|", " | ".join([kernel, launch["Grid Size"], *figures]), "|")
    return status


def number(launch: dict[str, str], name: str) -> float:
    return float(launch[METRICS[name]].replace(",", "")) * SCALES.get(name, 1)


if __name__ == "__main__":
    sys.exit(main())

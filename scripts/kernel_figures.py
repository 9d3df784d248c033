"""What the compiled CUDA kernels tell without a GPU: a Markdown table, and an error for a broken limit.

Registers, spills and shared memory are ptxas's; instructions and loads are read from the disassembly.
Needs nvcc, and nvdisasm from the CUDA toolkit or `pip install nvidia-cuda-nvdisasm`. Arguments are an
architecture (default sm_90) and a document that is to have the table.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLAGS = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-lineinfo"]  # setup.py's
REGISTERS = 65536  # of a multiprocessor
SHARED = {"sm_80": 164, "sm_90": 228}  # KiB of shared memory
RESERVED = 1024  # bytes of it that a thread block takes beside its own
WARPS = 8  # of a thread block of the feedback kernel
LEAST_RESIDENT = 3  # thread blocks of the feedback kernel on a multiprocessor
MOST_INSTRUCTIONS = 300  # of the epilogue for four features with noise
LEAST_LOADED = 4  # elements of B, and of each moment, under way before the first store


@dataclass
class Kernel:
    """One instantiation; `name` is mangled, `code` its instructions."""

    name: str
    registers: int
    spilled: int  # bytes
    shared: int  # bytes
    code: list["Instruction"]

    @property
    def family(self) -> str:
        """Its name without what the compiler puts around it."""
        found = re.search(r"\d([a-z_]+)_kernel", self.name)
        assert found is not None, self.name
        return found[1].replace("_", " ")

    @property
    def warps(self) -> int:
        """That the registers of one multiprocessor suffice for: they are dealt out by 256."""
        return min(64, REGISTERS // (-(-self.registers * 32 // 256) * 256))

    def resident(self, architecture: str) -> int:
        """Thread blocks of WARPS warps that one multiprocessor holds."""
        by_memory = SHARED.get(architecture, 164) * 1024 // (self.shared + RESERVED)
        return min(self.warps // WARPS, by_memory)


@dataclass
class Instruction:
    label: str  # where it can be jumped to, or ""
    operation: str  # with its modifiers
    target: str  # of a branch, or ""
    conditional: bool


def compile_kernels(source: Path, architecture: str) -> list[Kernel]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = ["nvcc", *FLAGS, f"-I{ROOT / 'csrc'}", f"-arch={architecture}", "-Xptxas", "-v"]
        report = run([*command, "-cubin", "-o", str(cubin), str(source)])
        code = disassemble(cubin)
    pattern = (
        r"Compiling entry function '(\S+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers(?:.*?(\d+) bytes smem)?"
    )
    return [
        Kernel(name, int(registers), int(stored) + int(loaded), int(shared or 0), code[name])
        for name, stored, loaded, registers, shared in re.findall(pattern, joined(report))
    ]


def joined(report: str) -> str:
    """ptxas's report with a line for each kernel."""
    return report.replace("\n", " ").replace("ptxas info    : Compiling", "\nCompiling")


def disassemble(cubin: Path) -> dict[str, list[Instruction]]:
    packaged = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / "nvdisasm"
    text = run([shutil.which("nvdisasm") or str(packaged), "--print-code", str(cubin)])
    kernels: dict[str, list[Instruction]] = {}
    label = ""
    for line in text.splitlines():
        if found := re.match(r"\s*\.section\s+\.text\.([^,]+),", line):
            code = kernels.setdefault(found[1], [])
        elif found := re.match(r"\s*(\.L\w+):", line):
            label = found[1]
        elif found := re.match(r"\s*/\*\w{4,}\*/\s+(@!?U?P\w+ )?\s*([A-Z][\w.]*)(.*)", line):
            condition, operation, rest = found.groups()
            target = re.search(r"`\((\.L\w+)\)", rest) if operation == "BRA" else None
            conditional = condition is not None or (target is not None and "P" in rest.split("`")[0])
            code.append(Instruction(label, operation, target[1] if target else "", conditional))
            label = ""
    return kernels


def run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        sys.exit(f"kernel_figures: {command[0]} was not found")
    except subprocess.CalledProcessError as error:
        sys.exit(f"kernel_figures: {' '.join(command)}\n{error.stderr}")
    return done.stdout + done.stderr


def issued_in_loop(code: list[Instruction]) -> int:
    """Instructions of one round of the first loop that loads and stores vectors of global memory.

    On the way that a thread goes: past the slow paths of square roots, which are calls, and through
    everything else, so with all optional pointers given.
    """
    places = {instruction.label: at for at, instruction in enumerate(code) if instruction.label}
    for end, instruction in enumerate(code):
        start = places.get(instruction.target, end)
        operations = [each.operation for each in code[start:end]]
        if all(any(re.match(kind, each) for each in operations) for kind in ("LDG.*", "STG.*")):
            break
    else:
        raise ValueError("no loop loads and stores")
    issued, at = 0, start
    while at <= end:
        instruction, issued = code[at], issued + 1
        target = places.get(instruction.target, at)
        if at < end and target > at:
            skipped = [each.operation for each in code[at + 1 : target]]
            if not instruction.conditional or any(each.startswith("CALL") for each in skipped):
                at = target
                continue
        at += 1
    return issued


def loaded_before_stores(code: list[Instruction]) -> int:
    """The fewest elements of B and of each of its two moments that Adam's vector code loads before it
    stores any: runs of vector loads that vector stores of the same width and number follow."""
    accesses = [
        (found[1], int(found[2]))
        for instruction in code
        if (found := re.match(r"(LDG|STG)\.E(?:\.\w+)*?\.(64|128)\b", instruction.operation))
    ]
    runs: list[list[tuple[str, int]]] = []
    for access in accesses:
        if runs and runs[-1][0] == access:
            runs[-1].append(access)
        else:
            runs.append([access])
    updates = [
        len(loads) * loads[0][1] // 32 // 3
        for loads, stores in pairwise(runs)
        if loads[0][0] == "LDG" and stores[0] == ("STG", loads[0][1]) and len(loads) == len(stores) >= 3
    ]
    return min(updates, default=0)


def main() -> int:
    architecture = sys.argv[1] if len(sys.argv) > 1 else "sm_90"
    broken: list[str] = []
    rows: list[list[object]] = []

    def limit(kernel: str, holds: bool, what: str) -> None:
        if not holds:
            broken.append(f"{kernel}: {what}")

    def add(title: str, kernels: list[Kernel], figure: Callable[[list[Kernel]], str]) -> None:
        registers = max(kernel.registers for kernel in kernels)
        spilled = max(kernel.spilled for kernel in kernels)
        limit(title, spilled == 0, f"{spilled} bytes are spilled")
        warps = min(kernel.warps for kernel in kernels)
        shared = max(kernel.shared for kernel in kernels)
        rows.append([title, len(kernels), registers, spilled, shared, warps, figure(kernels)])

    def epilogue(kernels: list[Kernel]) -> str:
        # T float, f relu, Gaussian noise
        (kernel,) = (k for k in kernels if "IfLNS_10ActivationE1ELNS_5NoiseE0E" in k.name)
        issued = issued_in_loop(kernel.code)
        limit("epilogue", issued <= MOST_INSTRUCTIONS, f"{issued} instructions for four features")
        return f"{issued} instructions for four features (float, relu, Gaussian)"

    def feedback(title: str) -> Callable[[list[Kernel]], str]:
        def figure(kernels: list[Kernel]) -> str:
            loaded = min(loaded_before_stores(kernel.code) for kernel in kernels)
            resident = min(kernel.resident(architecture) for kernel in kernels)
            limit(title, loaded >= LEAST_LOADED, f"Adam loads {loaded} elements before it stores")
            limit(title, resident >= LEAST_RESIDENT, f"{resident} thread blocks a multiprocessor")
            return (
                f"{resident} thread blocks / SM; Adam loads {loaded} elements of B and of each moment "
                "before it stores"
            )

        return figure

    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    with ThreadPoolExecutor(os.cpu_count()) as compilers:
        found = compilers.map(partial(compile_kernels, architecture=architecture), sources)
        compiled = [kernel for kernels in found for kernel in kernels]

    families: dict[str, list[Kernel]] = {}
    for kernel in compiled:
        families.setdefault(kernel.family, []).append(kernel)
    wide, narrow = "feedback, wide columns", "feedback, narrow columns"
    add("epilogue", families.pop("epilogue"), epilogue)
    both = families.pop("feedback")
    for title, tiles in ((wide, 4), (narrow, 1)):
        add(title, [k for k in both if f"Li{tiles}EEEv" in k.name], feedback(title))
    for title, kernels in families.items():
        add(title, kernels, lambda _: "")

    head = ["kernel", "compiled", "registers", "spilled, B", "shared, B", "warps / SM", ""]
    title = f"{architecture}, {run(['nvcc', '--version']).strip().splitlines()[-1]}"
    lines = [f"| {' | '.join(map(str, line))} |" for line in [head, ["---"] * len(head), *rows]]
    print(title, "", *lines, sep="\n")
    for document in map(Path, sys.argv[2:]):
        text = document.read_text()
        if title in text:  # another compiler has other figures
            broken += [f"{document} lacks: {line}" for line in lines if line not in text]
    for line in broken:
        print(f"kernel_figures: {line}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    os.environ.setdefault("LC_ALL", "C")
    sys.exit(main())

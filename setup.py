"""Builds fdfa_ext._C: for the CPU, and for CUDA where torch has it and nvcc is there.

A wheel is of the torch release that it was built with: its version ends in +torch2.13.cpu or
+torch2.13.cu130, and it requires torch 2.13. The source distribution requires any release of
[tool.fdfa_ext] in pyproject.toml.

Environment: FDFA_CUDA=1 demands CUDA and fails without it, FDFA_CUDA=0 leaves it out;
TORCH_CUDA_ARCH_LIST names the GPU architectures (default: 8.0, 9.0 and PTX of 9.0, which later GPUs
compile when they first load it); MAX_JOBS limits the compiler processes. FDFA_SANITIZE,
"address,undefined" say, builds with these sanitizers (scripts/sanitize.sh).
"""

import os
import re
import sys
import tomllib
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils import cpp_extension
except ModuleNotFoundError as error:
    raise SystemExit(
        "fdfa_ext is compiled against the torch that will run it, and pip's isolated build environment "
        "hides that one. Install torch first, then build with:\n"
        "    pip install --no-build-isolation ."
    ) from error

ROOT = Path(__file__).parent
TORCH_RELEASES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["fdfa_ext"]["torch"]
VERSION = "0.1.0"
CPU_FLAGS = ["-O3", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
CPU_FLAGS += ["-g0"]  # Python's own flags ask for debug information, which doubles the compiler's time
# Error messages name files, torch's headers among them: the same in whichever folder they lie.
CPU_FLAGS += [f"-ffile-prefix-map={folder}/=" for folder in (Path(torch.__file__).parents[1], ROOT)]


def sources(*groups: str) -> list[str]:
    """The files of these groups in csrc/sources.txt, which CMakeLists.txt reads too."""
    lines = (ROOT / "csrc" / "sources.txt").read_text().split("\n")
    pairs = [line.split() for line in lines if line]
    return [f"csrc/{path}" for group, path in pairs if group in groups]


def wants_cuda() -> bool:
    choice = os.environ.get("FDFA_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        raise SystemExit(f"FDFA_CUDA must be 0, 1 or auto; got {choice!r}")
    if choice == "0":
        return False
    missing = []
    if torch.version.cuda is None:
        missing.append(f"torch {torch.__version__} is a CPU build")
    if cpp_extension.CUDA_HOME is None:
        missing.append("nvcc was not found (set CUDA_HOME)")
    if missing and choice == "1":
        raise SystemExit("FDFA_CUDA=1 demands a CUDA build, but " + " and ".join(missing))
    return not missing


def sanitizer_flags() -> list[str]:
    """After all others, whose optimisation would hide lines and accesses."""
    sanitizers = os.environ.get("FDFA_SANITIZE", "")
    if not sanitizers:
        return []
    # The types of torch's objects, which `vptr` compares, are hidden in its libraries.
    checks = [f"-fsanitize={sanitizers}", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
    return [*checks, "-O1", "-g1", "-fno-omit-frame-pointer"]


def extension(cuda: bool):
    architectures = ""
    if cuda:
        architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    macros = [
        ("FDFA_TORCH_VERSION", f'"{torch.__version__}"'),
        ("FDFA_CUDA_VERSION", f'"{torch.version.cuda if cuda else ""}"'),
        ("FDFA_CUDA_ARCHITECTURES", f'"{architectures}"'),
    ]
    sanitize = sanitizer_flags()
    # OpenMP at compile time only: the pool is the one torch brings. Linking another would give two.
    flags = {"cxx": [*CPU_FLAGS, "-fopenmp", *sanitize]}
    # torch's own. A compiler that links it statically would give this module a second one, and a
    # stream of one in the hands of the other crashes, as where an error message has a number in it.
    link = ["-l:libstdc++.so.6", *sanitize]
    include_dirs = [str(ROOT / "csrc")]
    if not cuda:
        return cpp_extension.CppExtension(
            "fdfa_ext._C",
            sources("cpu", "ops"),
            include_dirs=include_dirs,
            define_macros=macros,
            extra_compile_args=flags,
            extra_link_args=link,
        )
    # -lineinfo costs no speed, and lets profilers and sanitizers name lines.
    flags["nvcc"] = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-lineinfo"]
    return cpp_extension.CUDAExtension(
        "fdfa_ext._C",
        sources("cpu", "ops", "cuda", "cuda_ops"),
        include_dirs=include_dirs,
        define_macros=[*macros, ("FDFA_WITH_CUDA", None)],
        extra_compile_args=flags,
        extra_link_args=link,
    )


class Build(cpp_extension.BuildExtension):
    """Also writes down which torch it was built for, to be read where the module cannot be loaded."""

    def run(self) -> None:
        super().run()
        target = Path(self.get_ext_fullpath("fdfa_ext._C")).parent / "_built_for.txt"
        target.write_text(torch.__version__ + "\n")


def torch_release() -> str:
    """'2.13' of '2.13.0+cpu': within it torch keeps its binary interface."""
    release = ".".join(re.findall(r"\d+", torch.__version__)[:2])
    if release not in TORCH_RELEASES:
        raise SystemExit(
            f"fdfa_ext supports torch {', '.join(TORCH_RELEASES)}, and torch {torch.__version__} is "
            f'installed. Install another: pip install "torch=={TORCH_RELEASES[-1]}.*"'
        )
    return release


def versions(cuda: bool) -> tuple[str, str]:
    """Of this package, and of the torch that it requires."""
    if {"sdist", "egg_info"} & set(sys.argv):
        minor = int(TORCH_RELEASES[-1].split(".")[1])
        return VERSION, f"torch>={TORCH_RELEASES[0]},<2.{minor + 1}"
    release = torch_release()
    backend = f"cu{torch.version.cuda.replace('.', '')}" if cuda else "cpu"
    return f"{VERSION}+torch{release}.{backend}", f"torch=={release}.*"


WITH_CUDA = wants_cuda()
version, required_torch = versions(WITH_CUDA)
setup(
    version=version,
    install_requires=[required_torch, "numpy"],
    ext_modules=[extension(WITH_CUDA)],
    cmdclass={"build_ext": Build},
)

"""Loads the compiled operators."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import torch


def _release(version: str) -> str:
    """'2.13' of '2.13.0+cpu': within it torch keeps its binary interface."""
    found = re.match(r"\d+\.\d+", version)
    return found.group() if found else version


def _remedy() -> str:
    """Names the wheel for the torch that runs, by its local version, which setup.py writes."""
    backend = f"cu{torch.version.cuda.replace('.', '')}" if torch.version.cuda else "cpu"
    return (
        f"Take the wheel whose version ends in +torch{_release(torch.__version__)}.{backend}, or build "
        "it in the project's folder with: pip install --no-build-isolation ."
    )


def _load_extension() -> Any:
    built_for = Path(__file__).with_name("_built_for.txt")
    if not built_for.exists():
        raise ImportError(f"fdfa_ext's compiled extension is missing. {_remedy()}")
    version = built_for.read_text().strip()
    if _release(version) != _release(torch.__version__):
        raise ImportError(
            f"fdfa_ext was built for torch {version}, but torch {torch.__version__} is installed. "
            + _remedy()
        )
    try:
        return import_module("fdfa_ext._C")
    except ImportError as error:
        raise ImportError(
            f"fdfa_ext's compiled extension does not load: {error}. {_remedy()}"
        ) from error


extension = _load_extension()

# The operators' schemas and comments: csrc/ops/schema.cpp.
fused = torch.ops.fdfa


def build_info() -> dict[str, str]:
    """What this build of the package was made for and what it runs on, as text for people."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        package = version("fdfa_ext")
    except PackageNotFoundError:
        package = "not installed, imported from its source folder"
    cuda = extension.cuda_version
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "fdfa_ext": package,
        "built for torch": extension.torch_version,
        "running torch": torch.__version__,
        "CUDA kernels": f"CUDA {cuda}, architectures {extension.cuda_architectures}"
        if cuda
        else "not built",
        "GPU": gpu,
        "CPU kernels": extension.cpu_isa(),
        "CPU threads": str(torch.get_num_threads()),
    }

"""Packages of others, which `make test-zoo` installs."""

import functools
import importlib.util
import sys
from typing import Any

import pytest
import torch


def library(name: str) -> Any:
    """Skips where it is not installed. One that is but does not import is an error."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        pytest.skip(f"{name.partition('.')[0]} is not installed")
    _declare_torchvision()
    return importlib.import_module(name)


@functools.cache
def _declare_torchvision() -> None:
    """torchvision from PyPI is compiled for a CUDA build of torch. Beside a CPU build it does not find its
    operators, which nothing here uses, and imports where they are declared."""
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor a, Tensor b, float c) -> Tensor")

"""Warnings, at the line of user code that leads to them."""

import sys
import warnings


def warn(message: str) -> None:
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _package_of(frame.f_globals) in ("fdfa_ext", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _package_of(module: dict[str, object]) -> str:
    return str(module.get("__name__", "")).split(".")[0]

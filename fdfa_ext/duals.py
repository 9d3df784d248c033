"""Dual tensors of torch's forward mode, and the levels that they live in."""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from fdfa_ext._ops import extension
from fdfa_ext._torch_internals import (
    enter_dual_level,
    exit_dual_level,
    is_in_dual_level,
    is_in_transform,
)

# torch has one level of forward mode for all threads, and one choice of its kernels.
_one_thread = threading.RLock()


# For eager steps; a compiler traces torch's own.
make_dual = extension.make_dual
make_dual_of_fresh = extension.make_dual_of_fresh  # of a primal that nobody else has
unpack_dual = extension.unpack_dual  # primal and tangent, None for none
has_tangent = extension.has_tangent


def only_tensor(result: Any) -> Tensor:
    """What a model returns.

    Raises:
        TypeError: it is no tensor.
    """
    if not isinstance(result, Tensor):
        raise TypeError(
            f"FDFA: the module must return one tensor; got {type(result).__name__}. Name the module "
            "that returns the output [N, K] by output="
        )
    return result


def first_tensor(result: Any) -> Tensor | None:
    """The tensor that a module returns, alone or as the first of several."""
    if isinstance(result, Tensor):
        return result
    if isinstance(result, tuple) and result and isinstance(result[0], Tensor):
        return result[0]
    return None


def with_first(result: Any, tensor: Tensor) -> Any:
    """The same with another such tensor."""
    if isinstance(result, Tensor):
        return tensor
    rest = (tensor, *result[1:])
    if type(result).__module__ == torch.return_types.__name__:
        return type(result)(rest)
    return type(result)(*rest) if hasattr(result, "_fields") else rest


def refuse_unknown(what: str, error: NotImplementedError) -> None:
    """Raises the error for something that torch has no forward mode for; leaves other errors alone.

    Raises:
        RuntimeError: `what` cannot carry a tangent.
    """
    if "forward AD" in str(error) or "jvp" in str(error):
        raise RuntimeError(
            f"FDFA: {what} cannot carry a tangent, since torch has no forward mode for it; use a "
            "method without tangents, such as dfa or dkp, another module, or a JVP rule for its class "
            f"(fdfa_ext.register_jvp). torch says: {error}"
        ) from error


def forward_mode() -> AbstractContextManager[object]:
    """A level of torch's forward mode, for this thread alone."""
    return forward_ad.dual_level() if torch.compiler.is_compiling() else _Level()


def some_forward_mode() -> AbstractContextManager[object]:
    """The level that this thread has opened, or its own; a sequence has none."""
    return forward_ad.dual_level() if torch.compiler.is_compiling() else _SomeLevel()


def is_own_level_open() -> bool:
    """Whether tangents are those of a pass: others, of user code, may need a graph."""
    return _Level.is_open and not is_in_transform()


class _Level:
    # As forward_ad.dual_level, in a third of its time.

    __slots__ = ()
    is_open = False

    def __enter__(self) -> None:
        _one_thread.acquire()
        try:
            enter_dual_level()
            _Level.is_open = True
        except BaseException:
            _one_thread.release()
            raise

    def __exit__(self, *error: object) -> None:
        _Level.is_open = False
        exit_dual_level()
        _one_thread.release()


class _SomeLevel:
    __slots__ = ("_own",)

    def __enter__(self) -> None:
        _one_thread.acquire()
        self._own = None if is_in_dual_level() else _Level()
        if self._own is not None:
            self._own.__enter__()

    def __exit__(self, *error: object) -> None:
        if self._own is not None:
            self._own.__exit__()
        _one_thread.release()


# What torch.nn.attention.sdpa_kernel does, in a third of its 40 us.
_FUSED_ATTENTION = [
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
]


@contextmanager
def attention_by_products() -> Iterator[None]:
    """Within it attention takes plain products: fused, it has no forward mode."""
    with _one_thread:
        enabled = [ask() for ask, _ in _FUSED_ATTENTION]
        for _, enable in _FUSED_ATTENTION:
            enable(False)
        try:
            yield
        finally:
            for (_, enable), was in zip(_FUSED_ATTENTION, enabled, strict=True):
                enable(was)


@contextmanager
def step_by_step() -> Iterator[None]:
    """Within it recurrent layers are chains of functions, which have a forward mode."""
    libraries: list[Any] = [torch.backends.mkldnn, torch.backends.cudnn]
    with _one_thread:
        enabled = [library.enabled for library in libraries]
        try:
            for library in libraries:
                library.enabled = False
            yield
        finally:
            for library, was in zip(libraries, enabled, strict=True):
                library.enabled = was


@contextmanager
def slow_attention() -> Iterator[None]:
    """Within it attention in eval mode and without gradients takes no kernel without forward mode."""
    mha = torch.backends.mha
    with _one_thread:
        fast = mha.get_fastpath_enabled()
        mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            mha.set_fastpath_enabled(fast)

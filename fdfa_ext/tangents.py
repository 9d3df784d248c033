"""How a tangent passes through the modules of an FDFABlock, and through some functions anywhere.

torch's forward mode is right for every module, but records the tangent's own graph and works through
several passes over memory. Two kinds of modules have a shorter way with the library's own kernels:

- linear ones: the tangent goes through the module without its bias;
- those with a symmetric Jacobian: elementwise functions, and batch-norm, whose Jacobian for each
  channel is γ/σ (I - 11ᵀ/M - x̂x̂ᵀ/M). Their JVP is their VJP, which autograd has.

On two cores, Conv-BatchNorm-ReLU from [64, 15, 24, 24] to [64, 40, 20, 20] takes less than half of
forward mode's time.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fdfa_ext._ops import fused
from fdfa_ext.reference import batch_norm_tangent

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_SYMMETRIC = (
    *BATCH_NORMS,
    nn.ReLU,
    nn.LeakyReLU,
    nn.Tanh,
    nn.Sigmoid,
    nn.GELU,
    nn.SiLU,
)


def forward_dual(module: nn.Module, y: Tensor, ty: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(module(y), its tangent) for an input y with tangent ty, None for none.

    Must be called within a dual level. The primal keeps its autograd graph to the module's parameters;
    the tangent has none. A tangent that the module drops comes back as None.
    """
    if ty is None:
        return module(y), None
    kind = plain_type(module)
    if kind in _CONVOLUTIONS:
        with torch.no_grad():
            tangent = module._conv_forward(ty, module.weight, None)  # type: ignore[operator]
        return module(y), tangent
    if kind is nn.Linear:
        with torch.no_grad():
            tangent = F.linear(ty, module.weight)  # type: ignore[arg-type]
        return module(y), tangent
    if torch.compiler.is_compiling():
        # It traces no gradient within the forward pass, and no forward mode of batch-norm.
        if kind in BATCH_NORMS:
            fixed: Any = None if module.training else module.running_var
            weight: Any = module.weight
            return module(y), batch_norm_tangent(y.detach(), ty, weight, fixed, module.eps)  # type: ignore[arg-type]
    # In place, the input would be gone by the time its gradient is asked for.
    elif kind in _SYMMETRIC and y.requires_grad and not getattr(module, "inplace", False):
        out = module(y)
        (tangent,) = torch.autograd.grad(out, y, ty, retain_graph=True)
        return out, tangent
    out, tangent = unpack_dual(module(make_dual(y, ty)))
    return out, None if tangent is None else tangent.detach()


def makes_tangent(module: nn.Module) -> bool:
    """Whether forward_dual's tangent is new memory, never the input's or a view of it."""
    return plain_type(module) in (*_CONVOLUTIONS, nn.Linear)


def plain_type(module: nn.Module) -> type[nn.Module] | None:
    """Its type, by which its function is known, or None where a hook may do something else.

    To be compared with exact types: so may a subclass or a parametrization.
    """
    return None if module._forward_hooks or module._forward_pre_hooks else type(module)


class FunctionRules(TorchFunctionMode):
    """Within it, some functions of a dual tensor take a shorter way than torch's forward mode.

    That one also multiplies the missing tangents of a linear layer's weight and bias and adds these
    zeros by a detour through Python: for the output layer of 784-800-10, batch 64, a sixth of the whole
    training step. Max-pooling takes it a pass for the winners and one to gather their tangents.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        rule = _RULES.get(func)
        if rule is not None:
            out = rule(*args, **(kwargs or {}))
            if out is not None:
                return out
        return func(*args, **kwargs) if kwargs else func(*args)


# A rule returns None where it does not apply.


# The reference backend may meet CUDA tensors where the extension has no CUDA kernels.
_POOL_DEVICES = [
    device
    for device in ("cpu", "cuda")
    if torch._C._dispatch_has_kernel_for_dispatch_key("fdfa::max_pool2d", device.upper())
]


def _max_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | None:
    x, tangent = unpack_dual(input)
    if (
        tangent is None
        or x.requires_grad
        or ceil_mode
        or return_indices
        or dilation not in (1, (1, 1))
        or x.device.type not in _POOL_DEVICES
        or not (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
        or x.dtype != torch.float32
    ):
        return None
    size = _pair(kernel_size)
    return make_dual(*fused.max_pool2d(x, tangent, size, _pair(stride or size), _pair(padding)))


def _pair(value: int | Sequence[int]) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values


_RULES: dict[Any, Any] = {F.linear: fused.dual_linear, F.max_pool2d: _max_pool2d}


# torch.autograd.forward_ad's functions take three times as long. There is no level but 0 in torch.
def unpack_dual(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Primal and tangent, None for none."""
    return torch._unpack_dual(x, level=0)


def make_dual(primal: Tensor, tangent: Tensor) -> Tensor:
    return torch._make_dual(primal, tangent, level=0)


def without_rules() -> AbstractContextManager[Any]:
    """Within it no call asks FunctionRules, which costs more than most calls themselves."""
    return torch._C.DisableTorchFunction()

"""How a tangent passes through torch's modules, and through some functions anywhere.

torch's forward mode is right for every module, but records the tangent's own graph, works through
several passes over memory and costs calls from Python. Most modules of real nets have a JVP rule, a
shorter way with the library's own kernels, which takes the tangent beside its primal and needs no dual
tensors:

- those that are affine in their input: the tangent goes through the module without its bias;
- those with a symmetric Jacobian: elementwise functions, and batch-norm, whose Jacobian for each
  channel is γ/σ (I - 11ᵀ/M - x̂x̂ᵀ/M). Their JVP is their VJP, which autograd has;
- max-pooling: the tangent of the winner.

On two cores, Conv-BatchNorm-ReLU from [64, 15, 24, 24] to [64, 40, 20, 20] takes less than half of
forward mode's time, and the forward pass of 64-128-10 with 32 samples 0.7 of it.
"""

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.overrides import TorchFunctionMode

from fdfa_ext import reference
from fdfa_ext._ops import fused
from fdfa_ext.reference import batch_norm_tangent

Pair = tuple[Tensor, Tensor]  # primal and tangent
MaybePair = tuple[Tensor, Tensor | None]
Step = Callable[[Tensor, Tensor | None], MaybePair]

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
ACTIVATION_NAMES: dict[Any, str] = {  # of the operators
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
}
# Those of every module, torch's own dictionaries.
GLOBAL_HOOKS: tuple[dict[int, Any], ...] = (
    nn_module._global_forward_hooks,
    nn_module._global_forward_pre_hooks,
    nn_module._global_backward_hooks,
    nn_module._global_backward_pre_hooks,
)


def forward_dual(module: nn.Module, y: Tensor, ty: Tensor | None) -> MaybePair:
    """(module(y), its tangent) for an input y with tangent ty, None for none.

    The primal keeps its autograd graph to the module's parameters; the tangent has none. A tangent that
    the module drops comes back as None. While torch.compile traces, it must be called within a dual
    level.
    """
    rule = _jvp_rule(module)
    if ty is not None and torch.compiler.is_compiling():
        # It traces no gradient within the forward pass, and no forward mode of batch-norm.
        if rule is _symmetric and isinstance(module, BATCH_NORMS):
            fixed: Any = None if module.training else module.running_var
            weight: Any = module.weight
            ty = batch_norm_tangent(y.detach(), ty, weight, fixed, module.eps).to(ty.dtype)
            return module(y), ty
        if rule in (_symmetric, _max_pool):
            rule = None
    return (_forward_mode if rule is None else rule)(module, y, ty)


def _forward_mode(function: Callable[[Tensor], Tensor], y: Tensor, ty: Tensor | None) -> MaybePair:
    if ty is None:
        with function_rules():
            return function(y), None
    with nullcontext() if torch.compiler.is_compiling() else _some_forward_mode(), function_rules():
        dual = make_dual(y, ty)
        if torch.compiler.is_compiling():
            # A dual is a view, and of modules that change views in place torch 2.11 compiles some
            # wrongly. The compiled program has no such copy.
            dual = dual.clone()
        result = function(dual)
        if not isinstance(result, Tensor):  # the caller has the words for it
            return result, None
        out, tangent = unpack_dual(result)
        return out, None if tangent is None else tangent.detach()


def forward_mode() -> AbstractContextManager[Any]:
    """A level of torch's forward mode, with attention by plain products: fused, it has no such mode."""
    return forward_ad.dual_level() if torch.compiler.is_compiling() else _own_forward_mode()


# What torch.nn.attention.sdpa_kernel does, in a third of its 40 us.
_FUSED_ATTENTION = [
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
]


# torch has one level of forward mode for all threads, and one choice of attention's kernels.
_one_thread = threading.RLock()


@contextmanager
def _some_forward_mode() -> Iterator[None]:
    """The level that this thread has opened, or its own; a net that runs side by side has none."""
    with _one_thread, nullcontext() if forward_ad._current_level >= 0 else _own_forward_mode():
        yield


@contextmanager
def _own_forward_mode() -> Iterator[None]:
    with _one_thread:
        enabled = [ask() for ask, _ in _FUSED_ATTENTION]
        for _, enable in _FUSED_ATTENTION:
            enable(False)
        try:
            with forward_ad.dual_level():
                yield
        finally:
            for (_, enable), was in zip(_FUSED_ATTENTION, enabled, strict=True):
                enable(was)


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


def rule_step(module: nn.Module) -> Step | None:
    """forward_dual of this module with its JVP rule found in advance, for passes that nothing compiles;
    None where it has none. The answer holds as long as the module, its class and its hooks do."""
    rule = _jvp_rule(module)
    return None if rule is None else partial(rule, module)


def forward_mode_step(function: Callable[[Tensor], Tensor]) -> Step:
    """Primal and tangent of a function by torch's forward mode."""
    return partial(_forward_mode, function)


def makes_tangent(module: nn.Module) -> bool:
    """Whether forward_dual's tangent is new memory, never the input's or a view of it."""
    return _jvp_rule(module) in (_linear, _convolution)


def hooks_of(module: nn.Module) -> tuple[dict[int, Any], ...]:
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )


def plain_type(module: nn.Module | None) -> type[nn.Module] | None:
    """Its type, by which its function is known, or None where something else may be done: by a hook, or
    by a function in the place of its own.

    To be compared with exact types: a subclass or a parametrization is another function too.
    """
    if module is None:  # torch allows it among a module's children
        return None
    kind = type(module)
    changed = any(hooks_of(module)) or any(GLOBAL_HOOKS) or has_own_forward(module) or is_patched(kind)
    return None if changed else kind


def has_own_forward(module: nn.Module) -> bool:
    """Whether the instance has another function in the place of its class's."""
    return any([name in module.__dict__ for name in FORWARD_NAMES])


def is_patched(kind: type[nn.Module]) -> bool:
    """Whether a class of torch's has lost the functions that torch gave it."""
    functions = FORWARD_FUNCTIONS.get(kind, ())
    return any([getattr(kind, name) is not function for name, function in functions])


def _linear(module: Any, y: Tensor, ty: Tensor | None) -> MaybePair:
    if ty is None:
        return fused.product(y, module.weight, module.bias), None
    pair: Pair = fused.dual_linear(y, ty, module.weight, module.bias)
    return pair


def _convolution(module: Any, y: Tensor, ty: Tensor | None) -> MaybePair:
    if y.dim() == 4 and reference.skips_pixels(y, module.weight, module.stride, module.padding):
        geometry = (module.stride, module.padding, module.dilation, module.groups)
        if ty is not None:
            ty = reference.convolve(ty, module.weight.detach(), None, *geometry)
        return reference.convolve(y, module.weight, module.bias, *geometry), ty
    if ty is not None:
        ty = module._conv_forward(ty, module.weight.detach(), None)
    return module(y), ty


def _flatten(module: Any, y: Tensor, ty: Tensor | None) -> MaybePair:
    # Most nets have one, and its call costs twice its work.
    start, end = module.start_dim, module.end_dim
    return y.flatten(start, end), None if ty is None else ty.flatten(start, end)


def _without_parameters(module: nn.Module, y: Tensor, ty: Tensor | None) -> MaybePair:
    return module(y), None if ty is None else module(ty)


def _symmetric(module: nn.Module, y: Tensor, ty: Tensor | None) -> MaybePair:
    if ty is None:
        return module(y), None
    if y.requires_grad:
        out = module(y)
        (tangent,) = torch.autograd.grad(out, y, ty, retain_graph=True)
        return out, tangent
    with torch.enable_grad():
        leaf = y.detach().requires_grad_()
        out = module(leaf)
    keeps_graph = any(p.requires_grad for p in module.parameters())
    (tangent,) = torch.autograd.grad(out, leaf, ty, retain_graph=keeps_graph)
    return out if keeps_graph else out.detach(), tangent


def _max_pool(module: Any, y: Tensor, ty: Tensor | None) -> MaybePair:
    if ty is None:
        return module(y), None
    geometry = pool_geometry(module)
    if has_fused_pool(module) and _takes_pool(y):
        pooled, tangent = fused.max_pool2d(y.detach(), ty, *geometry)
        return module(y) if y.requires_grad else pooled, tangent
    pooled, winners = F.max_pool2d(y, *geometry, module.dilation, module.ceil_mode, return_indices=True)
    return pooled, reference.gather_winners(ty, winners)


def single_precision(x: Tensor) -> bool:
    """Whether all is computed in float32."""
    return x.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)


def pool_geometry(pool: nn.MaxPool2d) -> tuple[list[int], list[int], list[int]]:
    """Kernel size, stride and padding, each along height and width."""
    return _pair(pool.kernel_size), _pair(pool.stride), _pair(pool.padding)


def has_fused_pool(pool: nn.MaxPool2d) -> bool:
    return not (pool.ceil_mode or pool.return_indices) and pool.dilation in (1, (1, 1))


JvpRule = Callable[[Any, Tensor, Tensor | None], MaybePair]
_JVP_RULES: dict[type[nn.Module], JvpRule] = {
    nn.Linear: _linear,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
    nn.Flatten: _flatten,
    **dict.fromkeys(
        (nn.Unflatten, nn.Identity, nn.AvgPool2d, nn.AdaptiveAvgPool2d), _without_parameters
    ),
    **dict.fromkeys((*BATCH_NORMS, *ACTIVATION_NAMES), _symmetric),
    nn.MaxPool2d: _max_pool,
}
# What a module's call comes down to, in its class or, patched, in the instance.
FORWARD_NAMES = ("forward", "_conv_forward")


def _torchs_own(kind: type[nn.Module], name: str) -> Any:
    """A function of a class; None if it had been patched before this package was imported."""
    function = getattr(kind, name)
    home = nn_module if name in vars(nn.Module) and name != "forward" else sys.modules[kind.__module__]
    return function if function.__globals__ is vars(home) else None


# By class, the functions that the rules and the fused operators stand for.
FORWARD_FUNCTIONS: dict[type[nn.Module], list[tuple[str, Any]]] = {
    kind: [
        (name, _torchs_own(kind, name))
        for name in (*FORWARD_NAMES, "__call__", "_call_impl")
        if hasattr(kind, name)
    ]
    for kind in (*_JVP_RULES, nn.Sequential)
}


# By class, the attributes that decide between rules and between fused operators. Each call reads all
# others anew.
OPTIONS: dict[type[nn.Module], tuple[str, ...]] = {
    **dict.fromkeys((nn.ReLU, nn.SiLU), ("inplace",)),
    nn.LeakyReLU: ("inplace", "negative_slope"),
    nn.GELU: ("approximate",),
    nn.MaxPool2d: ("kernel_size", "dilation", "ceil_mode", "return_indices"),
    nn.Conv2d: ("padding", "padding_mode"),
}


def _jvp_rule(module: Any) -> JvpRule | None:
    kind = plain_type(module)
    rule = None if kind is None else _JVP_RULES.get(kind)
    if rule is _symmetric and getattr(module, "inplace", False):
        return None  # the input would be gone by the time its gradient is asked for
    if rule is _max_pool and module.return_indices:
        return None
    return rule


_HALF = (torch.bfloat16, torch.float16)


class FunctionRules(TorchFunctionMode):
    """Within it, some functions of a dual tensor take a shorter way than torch's forward mode.

    That one also multiplies the missing tangents of a linear layer's weight and bias and adds these
    zeros by a detour through Python: for the output layer of 784-800-10, batch 64, a sixth of the whole
    training step. Max-pooling takes it a pass for the winners and one to gather their tangents. Group
    normalisation it refuses for images in channels_last. Tangents keep their primal's dtype.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        rule = _RULES.get(func)
        if rule is not None:
            out = rule(*args, **(kwargs or {}))
            if out is not None:
                return _in_one_dtype(out)
        return _in_one_dtype(func(*args, **kwargs) if kwargs else func(*args))


def _in_one_dtype(out: Any) -> Any:
    """A dual tensor with a tangent of its primal's dtype.

    torch's forward mode leaves the float32 of a norm's weight to the tangent of a 16-bit primal, with
    which no later product is possible.
    """
    if not isinstance(out, Tensor) or out.dtype not in _HALF:
        return out
    primal, tangent = unpack_dual(out)
    if tangent is None or tangent.dtype == primal.dtype:
        return out
    return make_dual(primal, tangent.to(primal.dtype))


# A rule returns None where it does not apply.


# The reference backend may meet CUDA tensors where the extension has no CUDA kernels.
_POOL_DEVICES = [
    device
    for device in ("cpu", "cuda")
    if torch._C._dispatch_has_kernel_for_dispatch_key("fdfa::max_pool2d", device.upper())
]


def _dual_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    x, tangent = unpack_dual(input)
    constant = unpack_dual(weight)[1] is None and (bias is None or unpack_dual(bias)[1] is None)
    if tangent is None or not constant:
        return None
    return make_dual(*fused.dual_linear(x, tangent, weight, bias))


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
    plain = not (ceil_mode or return_indices) and dilation in (1, (1, 1))
    if tangent is None or x.requires_grad or not plain or not _takes_pool(x):
        return None
    size = _pair(kernel_size)
    return make_dual(*fused.max_pool2d(x, tangent, size, _pair(stride or size), _pair(padding)))


def _takes_pool(x: Tensor) -> bool:
    """Whether the operator does: other memory orders it would copy."""
    return (
        x.device.type in _POOL_DEVICES
        and x.dtype == torch.float32
        and x.dim() == 4
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _pair(value: int | Sequence[int]) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    x, tangent = unpack_dual(input)
    if x.is_contiguous() and (tangent is None or tangent.is_contiguous()):
        return None
    x = x.contiguous()  # in other orders torch 2.13's backward crashes where x needs no gradient
    dual = x if tangent is None else make_dual(x, tangent.contiguous())
    return F.group_norm(dual, num_groups, weight, bias, eps)


# torch.autograd.forward_ad's functions take three times as long. There is no level but 0 in torch.
def unpack_dual(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Primal and tangent, None for none."""
    return torch._unpack_dual(x, level=0)


def make_dual(primal: Tensor, tangent: Tensor) -> Tensor:
    return torch._make_dual(primal, tangent, level=0)


_RULES: dict[Any, Any] = {
    F.linear: _dual_linear,
    F.conv2d: reference.convolve,
    F.max_pool2d: _max_pool2d,
    F.group_norm: _group_norm,
}


@contextmanager
def function_rules() -> Iterator[None]:
    """Within it FunctionRules hold, also in the middle of without_rules; for eager steps alone: a
    compiled one traces torch's own forward mode."""
    if torch.compiler.is_compiling():
        yield
        return
    with torch._C._EnableTorchFunction(), FunctionRules():
        yield


def without_rules() -> AbstractContextManager[Any]:
    """Within it no call asks FunctionRules, which costs more than most calls themselves."""
    return torch._C.DisableTorchFunction()

"""How a tangent passes through torch's modules and functions: their Jacobian-vector products.

torch's forward mode is right for all of them, but multiplies and adds tangents that are zero, works
through several passes over memory and records the tangent's own graph. What most nets consist of has a
JVP rule here, a shorter way with the library's own kernels, which takes the tangent beside its primal:

- a function that is affine in its input maps the tangent without its bias;
- one with a symmetric Jacobian has its VJP for a JVP, for which the library has a kernel: elementwise
  functions, softmax, and batch-norm, whose Jacobian for each channel is γ/σ (I - 11ᵀ/M - x̂x̂ᵀ/M), as is
  that of instance-norm for each channel of a sample. Those of layer-norm and group-norm are such
  matrices with γ as a factor of the rows. torch's forward mode of norms takes 1/σ³, which overflows in
  float16;
- max-pooling takes the tangent of the winner.

A module in a sequence is given primal and tangent apart. Where user code runs, both travel as
torch's dual tensors, and the rules hold for functions: `function_rules`.

On two cores, Conv-BatchNorm-ReLU from [64, 15, 24, 24] to [64, 40, 20, 20] takes less than half of
forward mode's time, and the forward pass of 64-128-10 with 32 samples 0.7 of it.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.overrides import TorchFunctionMode

from fdfa_ext import reference
from fdfa_ext._ops import fused
from fdfa_ext._torch_internals import (
    CALL_NAMES,
    GLOBAL_HOOKS,
    DisableTorchFunction,
    EnableTorchFunction,
    has_kernel,
    hooks_of,
    is_in_checkpoint,
    is_in_transform,
    traced_make_dual,
    traced_unpack_dual,
    without_forward_mode,
)
from fdfa_ext.arithmetic import ARITHMETIC_RULES
from fdfa_ext.attention import ATTENTION_RULES
from fdfa_ext.duals import (
    attention_by_products,
    has_tangent,
    is_own_level_open,
    make_dual,
    make_dual_of_fresh,
    some_forward_mode,
    unpack_dual,
)
from fdfa_ext.recurrent import RECURRENT_RULES
from fdfa_ext.reference import batch_norm_tangent

PrimalTangent = tuple[Tensor, Tensor | None]
Call = Callable[[Tensor, Tensor | None], PrimalTangent]

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
ACTIVATION_NAMES: dict[Any, str] = {  # of the operators
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
}
aten = torch.ops.aten
# As torch has them, whatever a user puts in their place, which is what calls the rules.
_GROUP_NORM, _MAX_POOL2D, _RELU = F.group_norm, F.max_pool2d, F.relu
_INSTANCE_NORM = F.instance_norm
_OWN = {name: function for name, function in vars(F).items() if type(function) is FunctionType}


def forward_dual(module: nn.Module, x: Tensor, tangent: Tensor | None) -> PrimalTangent:
    """(module(x), its tangent) for an input x with this tangent, None for none.

    The primal keeps its autograd graph to the module's parameters; the tangent has none. A tangent that
    the module drops comes back as None. While torch.compile traces, it must be called within a dual
    level and TracedRules.
    """
    rule = _module_rule(module)
    if tangent is not None and torch.compiler.is_compiling() and rule not in _COMPILABLE:
        rule = None
    return _by_forward_mode(module, x, tangent) if rule is None else rule(module, x, tangent)


def rule_call(module: nn.Module) -> Call | None:
    """forward_dual of this module with its JVP rule found in advance, for passes that nothing compiles;
    None where it has none. The answer holds as long as the module, its class and its hooks do."""
    rule = _module_rule(module)
    return None if rule is None else partial(rule, module)


def forward_mode_call(function: Callable[[Tensor], Tensor]) -> Call:
    """Primal and tangent of a function by torch's forward mode."""
    return partial(_by_forward_mode, function)


def _by_forward_mode(
    function: Callable[[Tensor], Tensor], x: Tensor, tangent: Tensor | None
) -> PrimalTangent:
    if tangent is None:
        with function_rules():
            return function(x), None
    if torch.compiler.is_compiling():
        # A dual is a view, and of modules that change views in place torch 2.11 compiles some wrongly.
        # The compiled program has no such copy.
        result = function(traced_make_dual(x, tangent).clone())
        y, ty = traced_unpack_dual(result)
        return y, None if ty is None else ty.detach()
    with some_forward_mode(), function_rules():
        result = function(make_dual(x, tangent))
        if not isinstance(result, Tensor):  # the caller has the words for it
            return result, None
        y, ty = unpack_dual(result)
        return y, None if ty is None else ty.detach()


def makes_tangent(module: nn.Module) -> bool:
    """Whether forward_dual's tangent is new memory, never the input's or a view of it."""
    return _module_rule(module) in (_linear_module, _convolution_module)


# What is known of a module


def plain_type(module: nn.Module | None) -> type[nn.Module] | None:
    """Its type, by which its function is known, or None where something else may be done: by a hook, or
    by a function in the place of its own.

    To be compared with exact types: a subclass or a parametrization is another function too.
    """
    if module is None:  # torch allows it among a module's children
        return None
    kind = type(module)
    if any(hooks_of(module)) or any(GLOBAL_HOOKS):
        return None
    return None if has_own_forward(module) or is_patched(kind) else kind


def has_own_forward(module: nn.Module) -> bool:
    """Whether the instance has another function in the place of its class's."""
    return any([name in module.__dict__ for name in FORWARD_NAMES])


def is_patched(kind: type[nn.Module]) -> bool:
    """Whether a torch class has lost the functions that torch gave it, or torch the functions that
    these call."""
    functions = FORWARD_FUNCTIONS.get(kind, ())
    called = CALLED_FUNCTIONS.get(kind, ())
    return any([getattr(kind, name) is not function for name, function in functions]) or any(
        [home[name] is not function for home, name, function in called]
    )


# Rules for functions. Each is given the function, its input as primal and tangent, and its other
# arguments under torch's names, none of which has a tangent; None where it does not apply.

FunctionRule = Callable[..., tuple[Tensor, Tensor] | None]


def single_precision(x: Tensor) -> bool:
    """Whether all is computed in float32."""
    return x.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)


def _linear(
    function: Any, x: Tensor, tangent: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    pair: tuple[Tensor, Tensor] = fused.dual_linear(x, tangent, weight, bias)
    return pair


def _convolution(
    function: Any,
    x: Tensor,
    tangent: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *geometry: Any,
    **named: Any,
) -> tuple[Tensor, Tensor]:
    y = function(x, weight, bias, *geometry, **named)
    return y, function(tangent, weight.detach(), None, *geometry, **named)


def _relu(
    function: Any, x: Tensor, tangent: Tensor, inplace: bool = False
) -> tuple[Tensor, Tensor] | None:
    if inplace:
        return None
    y = function(x)
    return y, aten.threshold_backward(tangent, y.detach(), 0)


def _leaky_relu(
    function: Any, x: Tensor, tangent: Tensor, negative_slope: float = 0.01, inplace: bool = False
) -> tuple[Tensor, Tensor] | None:
    if inplace:
        return None
    y = function(x, negative_slope)
    return y, aten.leaky_relu_backward(tangent, x.detach(), negative_slope, False)


def _takes_activation(x: Tensor, tangent: Tensor) -> bool:
    """Whether dual_activation does: it takes one exponential for both, and one pass over memory."""
    return (
        x.device.type in _DEVICES
        and x.dtype in (torch.float32, *_HALF)
        and x.dtype == tangent.dtype
        and x.layout == torch.strided
    )


def _activation(name: str, x: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    pair: tuple[Tensor, Tensor] = fused.dual_activation(x, tangent, name)
    return pair


def _gelu(
    function: Any, x: Tensor, tangent: Tensor, *, approximate: str = "none"
) -> tuple[Tensor, Tensor]:
    if approximate == "none" and _takes_activation(x, tangent):
        return _activation("gelu", x, tangent)
    y = function(x, approximate=approximate)
    return y, aten.gelu_backward(tangent, x.detach(), approximate=approximate)


def _silu(
    function: Any, x: Tensor, tangent: Tensor, inplace: bool = False
) -> tuple[Tensor, Tensor] | None:
    if inplace:
        return None
    if _takes_activation(x, tangent):
        return _activation("silu", x, tangent)
    return function(x), aten.silu_backward(tangent, x.detach())


def _sigmoid(function: Any, x: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    if _takes_activation(x, tangent):
        return _activation("sigmoid", x, tangent)
    y = function(x)
    return y, aten.sigmoid_backward(tangent, y.detach())


def _tanh(function: Any, x: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    if _takes_activation(x, tangent):
        return _activation("tanh", x, tangent)
    y = function(x)
    return y, aten.tanh_backward(tangent, y.detach())


def _batch_norm(
    function: Any,
    x: Tensor,
    tangent: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    fixed = (running_mean, running_var)
    if torch.compiler.is_compiling():  # which traces no gradient within the forward pass
        # Before the function moves running_var.
        ty = batch_norm_tangent(x.detach(), tangent, weight, None if training else running_var, eps)
        y = function(x, *fixed, weight, bias, training, momentum, eps)
        return y, ty.to(y.dtype)
    if (
        _is_float32_image(x)
        and single_precision(x)
        and _is_float32(weight, bias, *fixed)
        and x.numel() > x.shape[1]
        and not is_in_checkpoint()  # which computes it again without rules
    ):
        pair: tuple[Tensor, Tensor] = fused.dual_batch_norm(
            x, tangent, weight, bias, *fixed, training, momentum, eps
        )
        return pair
    rest = (*fixed, weight, bias, training, momentum, eps)
    return _symmetric(lambda t: function(t, *rest), (weight, bias), x, tangent)


def _instance_norm(
    function: Any,
    x: Tensor,
    tangent: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    rest = (running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    if torch.compiler.is_compiling():

        def of_all(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.detach().repeat(len(x))

        one = (1, -1, *x.shape[2:])  # sample, with the channels of all
        var = None if use_input_stats else of_all(running_var)
        given = (x.detach().reshape(one), tangent.reshape(one), of_all(weight), var)
        ty = batch_norm_tangent(*given, eps).view(x.shape)
        y = function(x, *rest)
        return y, ty.to(y.dtype)
    return _symmetric(lambda t: function(t, *rest), (weight, bias), x, tangent)


def _symmetric(
    function: Callable[[Tensor], Tensor], parameters: Iterable[Any], x: Tensor, tangent: Tensor
) -> tuple[Tensor, Tensor]:
    """parameters: what the function uses beside x, for which the primal keeps its graph."""
    if not torch.is_grad_enabled():
        parameters = ()
    elif x.requires_grad:
        y = function(x)
        (ty,) = torch.autograd.grad(y, x, tangent, retain_graph=True)
        return y, ty
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        y = function(leaf)
    keeps_graph = any([isinstance(p, Tensor) and p.requires_grad for p in parameters])
    (ty,) = torch.autograd.grad(y, leaf, tangent, retain_graph=keeps_graph)
    return y if keeps_graph else y.detach(), ty


def _layer_norm(
    function: Any,
    x: Tensor,
    tangent: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor] | None:
    if x.dtype == torch.float64:
        return None
    shape = list(normalized_shape)
    if single_precision(x) and _is_float32(weight, bias):
        y, mean, inverse_std = torch.native_layer_norm(x, shape, weight, bias, eps)
        x = x.detach()
    else:
        y = function(x, shape, weight, bias, eps)
        x, tangent = x.detach().float(), tangent.float()
        _, mean, inverse_std = torch.native_layer_norm(x, shape, None, None, eps)
    statistics = (mean.detach(), inverse_std.detach())
    only_input = (True, False, False)
    ty = aten.native_layer_norm_backward(tangent, x, shape, *statistics, None, None, only_input)[0]
    return y, (ty if weight is None else ty.mul_(weight.detach())).to(y.dtype)


def _rms_norm(
    function: Any,
    x: Tensor,
    tangent: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, Tensor] | None:
    if not single_precision(x) or not _is_float32(weight):
        return None
    y = function(x, normalized_shape, weight, eps)
    with torch.no_grad():
        x, dims = x.detach(), list(range(-len(normalized_shape), 0))
        inverse = x.square().mean(dims, keepdim=True)
        inverse = inverse.add_(torch.finfo(x.dtype).eps if eps is None else eps).rsqrt_()
        along = (x * tangent).mean(dims, keepdim=True).mul_(inverse).mul_(inverse)
        ty = torch.addcmul(tangent, x, along, value=-1).mul_(inverse)
        return y, ty if weight is None else ty.mul_(weight)


def _power(function: Any, x: Tensor, tangent: Tensor, exponent: Any) -> tuple[Tensor, Tensor] | None:
    if not isinstance(exponent, (int, float)) or exponent == 0:
        return None
    if torch.is_autocast_enabled(x.device.type):  # which may change the type
        return None
    slope = x.detach() * exponent if exponent == 2 else x.detach().pow(exponent - 1).mul_(exponent)
    return function(x, exponent), slope.mul_(tangent)


def _clamp(
    function: Any, x: Tensor, tangent: Tensor, min: Any = None, max: Any = None
) -> tuple[Tensor, Tensor] | None:
    if isinstance(min, Tensor) or isinstance(max, Tensor):
        return None
    detached = x.detach()
    inside = torch.ones_like(detached)
    for bound, compared in ((min, torch.ge), (max, torch.le)):
        if bound is not None:
            inside.mul_(compared(detached, bound))
    # Not a product, which an infinite tangent outside would make NaN.
    return function(x, min, max), aten.threshold_backward(tangent, inside, 0)


def _square(function: Any, x: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    return function(x), (x.detach() * 2).mul_(tangent)


def _group_norm(
    function: Any,
    x: Tensor,
    tangent: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor] | None:
    if x.dtype == torch.float64 or x.dim() < 2 or x.numel() == 0 or x.shape[1] % num_groups != 0:
        return None
    n, channels = x.shape[:2]
    x, tangent = _row_major(x), _row_major(tangent)
    sizes = (n, channels, x[0, 0].numel(), num_groups)
    if single_precision(x) and _is_float32(weight, bias):
        y, mean, inverse_std = torch.native_group_norm(x, weight, bias, *sizes, eps)
        x = x.detach()
    else:
        y = function(x, num_groups, weight, bias, eps)
        x, tangent = x.detach().float(), tangent.float()
        _, mean, inverse_std = torch.native_group_norm(x, None, None, *sizes, eps)
    statistics = (mean.detach(), inverse_std.detach())
    only_input = (True, False, False)
    ty = aten.native_group_norm_backward(tangent, x, *statistics, None, *sizes, only_input)[0]
    if weight is not None:
        ty.mul_(weight.detach().view(-1, *[1] * (x.dim() - 2)))
    return y, ty.to(y.dtype)


def _row_major(x: Tensor) -> Tensor:
    """By its strides too, which `contiguous` leaves in channels_last for one channel or one pixel."""
    return x.contiguous().flatten().view(x.shape)


def _is_float32(*parameters: Tensor | None) -> bool:
    return all([p is None or p.dtype == torch.float32 for p in parameters])


def _max_pool2d(
    function: Any,
    x: Tensor,
    tangent: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> tuple[Tensor, Tensor] | None:
    if return_indices:
        return None
    size, step, pad = _pair(kernel_size), _pair(stride or kernel_size), _pair(padding)
    if not ceil_mode and dilation in (1, (1, 1)) and _is_float32_image(x):
        pooled, ty = fused.max_pool2d(x.detach(), tangent, size, step, pad)
        return _MAX_POOL2D(x, size, step, pad) if x.requires_grad else pooled, ty
    geometry = (size, step, pad, dilation, ceil_mode)
    pooled, winners = _MAX_POOL2D(x, *geometry, return_indices=True)
    return pooled, reference.gather_winners(tangent, winners)


# The reference backend may meet CUDA tensors where the extension has no CUDA kernels.
_DEVICES = [device for device in ("cpu", "cuda") if has_kernel("fdfa::max_pool2d", device)]


def _is_image_in_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _is_float32_image(x: Tensor) -> bool:
    """Whether operators take it: other memory orders they would copy."""
    return x.device.type in _DEVICES and x.dtype == torch.float32 and _is_image_in_channels_last(x)


def _pair(value: int | Sequence[int]) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values


def _softmax(
    function: Any,
    x: Tensor,
    tangent: Tensor,
    dim: int | None = None,
    *rest: Any,  # in F.softmax and torch.softmax another argument each
    dtype: torch.dtype | None = None,
    **named: Any,
) -> tuple[Tensor, Tensor] | None:
    if dim is None or rest or dtype not in (None, x.dtype):
        return None
    if torch.is_autocast_enabled(x.device.type):  # which may change the type
        return None
    y = function(x, dim)
    return y, aten._softmax_backward_data(tangent, y.detach(), dim, x.dtype)


def _dropout(
    function: Any,
    x: Tensor,
    tangent: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """The same mask for both, drawn as torch draws it."""
    features = _DROPOUT_OF_FEATURES.get(function)
    if inplace or not training or x.numel() == 0 or features not in (None, x.dim()):
        return None
    if isinstance(p, Tensor) or not 0 < p < 1:  # torch draws from a tensor otherwise
        return None
    if features is None and x.device.type == "cuda":
        y, keep = torch.native_dropout(x, p, True)
        return y, aten.native_dropout_backward(tangent, keep, 1 / (1 - p))
    mask = torch.empty_like(x) if features is None else x.new_empty(*x.shape[:2], *[1] * (features - 2))
    mask.bernoulli_(1 - p).div_(1 - p)
    return x * mask, tangent * mask


# By function, the dimensions of a batch whose features it drops as a whole.
_DROPOUT_OF_FEATURES = {F.dropout1d: 3, F.dropout2d: 4, F.dropout3d: 5}


def _refuse_gradient(function: Any, outputs: Any, *args: Any, **named: Any) -> None:
    """Of torch.autograd.grad: rules leave no tangents in the graph, and its results would have none."""
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    if any(isinstance(t, Tensor) and has_tangent(t) for t in outputs):
        raise RuntimeError(
            "FDFA: the forward takes a gradient of what depends on blocks or points, and this gradient "
            "has no tangent; use a method without tangents, such as dfa or dkp"
        )


_FUNCTION_RULES: dict[Any, FunctionRule] = {
    F.linear: _linear,
    **dict.fromkeys(
        (
            F.conv1d,
            F.conv2d,
            F.conv3d,
            F.conv_transpose1d,
            F.conv_transpose2d,
            F.conv_transpose3d,
        ),
        _convolution,
    ),
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), _relu),
    F.leaky_relu: _leaky_relu,
    F.gelu: _gelu,
    F.silu: _silu,
    **dict.fromkeys((torch.sigmoid, Tensor.sigmoid), _sigmoid),
    **dict.fromkeys((torch.tanh, Tensor.tanh), _tanh),
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    **dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax), _softmax),
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), _max_pool2d),
    F.rms_norm: _rms_norm,
    **dict.fromkeys((F.dropout, *_DROPOUT_OF_FEATURES), _dropout),
    **dict.fromkeys((torch.pow, Tensor.pow, Tensor.__pow__), _power),
    **dict.fromkeys((torch.square, Tensor.square), _square),
    **dict.fromkeys((torch.clamp, Tensor.clamp, torch.clip, Tensor.clip), _clamp),
}
_DUAL_RULES = {
    **ARITHMETIC_RULES,
    **ATTENTION_RULES,
    **RECURRENT_RULES,
    torch.autograd.grad: _refuse_gradient,
}


def _contiguous_group_norm(input: Tensor, *rest: Any, **named: Any) -> Tensor:
    # In other orders torch 2.13's backward crashes where the input needs no gradient, and its forward
    # mode refuses.
    primal, tangent = unpack_dual(input)
    if tangent is None:
        return _group_norm_of_primal(primal, *rest, **named)
    return _GROUP_NORM(make_dual(_row_major(primal), _row_major(tangent)), *rest, **named)


def _group_norm_of_primal(input: Tensor, *rest: Any, **named: Any) -> Tensor:
    return _GROUP_NORM(_row_major(input), *rest, **named)


def _contiguous_instance_norm(input: Tensor, *rest: Any, **named: Any) -> Tensor:
    # Of one sample torch 2.13's backward is wrong for a gradient in channels_last, as blocks have it.
    y = _INSTANCE_NORM(input, *rest, **named)
    if len(y) == 1 and y.requires_grad:
        y.register_hook(Tensor.contiguous)
    return y


def _relu_in_place(input: Tensor, inplace: bool = False) -> Tensor:
    tangent = unpack_dual(input)[1] if inplace and is_own_level_open() else None
    if tangent is None:
        return _RELU(input, inplace)
    with without_forward_mode():
        _RELU(input, inplace=True)  # the primal alone
    tangent, output = tangent.detach(), unpack_dual(input)[0].detach()
    aten.threshold_backward(tangent, output, 0, grad_input=tangent)
    return input


def _conv2d(input: Tensor, weight: Tensor, *rest: Any, **named: Any) -> Tensor:
    """F.conv2d, whose result lies in channels_last.

    Where it has more row-major weights than pixels, oneDNN takes half the time in row-major order: from
    512 to 512 channels with 2x2 pixels of 32 samples 4.8, 9.9 and 6.1 ms for result and gradients of
    weight and input, against 10.2, 24.4 and 11.4. With 64 channels and 16x16 pixels channels_last takes
    half.
    """
    if input.dim() != 4 or input.layout != torch.strided:
        return reference.convolve(input, weight, *rest, **named)
    last = torch.channels_last
    by_rows = (
        input.device.type == "cpu"
        and weight.numel() > input.numel()
        and weight.is_contiguous()
        and not weight.is_contiguous(memory_format=last)
    )
    input = input.contiguous() if by_rows else input.contiguous(memory_format=last)
    output = reference.convolve(input, weight, *rest, **named)
    return output.contiguous(memory_format=last) if by_rows else output


def _view(input: Tensor, *shape: Any, **named: Any) -> Tensor:
    """Tensor.view, for which an image in channels_last is put into row-major order, as the caller has
    it: in place, so that the view has its memory."""
    try:
        return Tensor.view(input, *shape, **named)
    except RuntimeError:
        is_shape = not named and not any(isinstance(value, torch.dtype) for value in shape)
        if not is_shape or input._is_view() or not _is_image_in_channels_last(input):
            raise
        tangent = unpack_dual(input)[1]
        for t in (input, tangent):
            if t is not None:
                t.data = t.data.contiguous()
        return Tensor.view(input, *shape)


def _by_products(function: Any, *args: Any, **named: Any) -> Any:
    operands = [t for t in (*args, *named.values()) if isinstance(t, Tensor)]
    if not is_in_transform() and not any(map(has_tangent, operands)):
        return function(*args, **named)
    with attention_by_products():
        return function(*args, **named)


# What stands in for functions that no rule applied to.
_STAND_INS: dict[Any, Callable[..., Any]] = {
    F.conv2d: reference.convolve,
    F.group_norm: _contiguous_group_norm,
    F.instance_norm: _contiguous_instance_norm,
    F.relu: _relu_in_place,
    **{function: partial(_by_products, function) for function in ATTENTION_RULES},
}
_HALF = (torch.bfloat16, torch.float16)


class FunctionRules(TorchFunctionMode):
    """Within it, functions that have a JVP rule take it. Tangents keep their primal's dtype."""

    stand_ins = _STAND_INS

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if type(func) is FunctionType:
            func = torchs_own(func)
        rule, dual_rule = _FUNCTION_RULES.get(func), _DUAL_RULES.get(func)
        stand_in = self.stand_ins.get(func, func)
        if rule is not None or dual_rule is not None or stand_in is not func:
            # A subclass's functions may do anything, and a compiler has rules of its own.
            if any([kind is not Tensor for kind in types]) or torch.compiler.is_compiling():
                return func(*args, **(kwargs or {}))
            if is_own_level_open():
                dual = None
                if dual_rule is not None:
                    dual = dual_rule(func, *args, **(kwargs or {}))
                elif rule is not None and args:
                    dual = _by_rule(rule, stand_in, *args, **(kwargs or {}))
                if dual is not None:
                    return dual
        return _in_one_dtype(stand_in(*args, **kwargs) if kwargs else stand_in(*args))


def torchs_own(function: Any) -> Any:
    """torch's own function where another stands in its place: it is that which calls a mode, by the
    name that both go by."""
    home = function.__globals__
    if home is vars(F) or home.get("__name__", "").startswith("torch."):
        return function
    return next((own for name, own in _OWN.items() if vars(F).get(name) is function), function)


def _by_rule(rule: FunctionRule, function: Any, input: Any, *rest: Any, **named: Any) -> Tensor | None:
    if not isinstance(input, Tensor) or not input.is_floating_point():
        return None
    x, tangent = unpack_dual(input)
    if tangent is None:
        return None
    for value in (*rest, *named.values()) if named else rest:
        if isinstance(value, Tensor) and has_tangent(value):
            return None
    # torch's forward mode records the graph of a tangent, which nobody asks for.
    tangent = tangent.detach() if tangent.requires_grad else tangent
    pair = rule(function, x, tangent, *rest, **named)
    return None if pair is None else make_dual_of_fresh(*pair)


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


class PointRules(FunctionRules):
    """Those of a model with points, whose convolutions return images in channels_last."""

    stand_ins = _STAND_INS | {F.conv2d: _conv2d, Tensor.view: _view}


_TRACED_RULES: dict[Any, FunctionRule] = {
    F.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
}


class TracedRules(TorchFunctionMode):
    """The rules of norms, whose forward mode torch.compile cannot trace."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func is Tensor.unflatten:  # whose code, called as a function, it cannot trace within a mode
            return args[0].unflatten(*args[1:], **named)
        if func in _TRACED_RULES and args:
            x, tangent = traced_unpack_dual(args[0])
            if tangent is not None:
                pair = _TRACED_RULES[func](func, x, tangent, *args[1:], **named)
                if pair is not None:
                    return traced_make_dual(*pair)
        return func(*args, **named)


_RULES, _POINT_RULES = FunctionRules(), PointRules()


class _WithRules:
    __slots__ = ("_enabled", "_rules")

    def __init__(self, rules: FunctionRules) -> None:
        self._rules = rules

    def __enter__(self) -> None:
        self._enabled = EnableTorchFunction()
        self._enabled.__enter__()
        self._rules.__enter__()

    def __exit__(self, *error: object) -> None:
        self._rules.__exit__(None, None, None)
        self._enabled.__exit__(None, None, None)


def function_rules() -> AbstractContextManager[object]:
    """Within it FunctionRules hold, also in the middle of without_rules; for eager steps alone: a
    compiled one traces torch's own forward mode."""
    return nullcontext() if torch.compiler.is_compiling() else _WithRules(_RULES)


def point_rules() -> AbstractContextManager[object]:
    """The same with PointRules."""
    return _WithRules(_POINT_RULES)


def without_rules() -> AbstractContextManager[Any]:
    """Within it no call asks FunctionRules, which costs more than most calls themselves."""
    return DisableTorchFunction()


# Rules for modules


ModuleRule = Callable[[Any, Tensor, Tensor | None], PrimalTangent]


def _linear_module(module: Any, x: Tensor, tangent: Tensor | None) -> PrimalTangent:
    if tangent is None:
        return fused.product(x, module.weight, module.bias), None
    return _linear(None, x, tangent, module.weight, module.bias)


def _convolution_module(module: Any, x: Tensor, tangent: Tensor | None) -> PrimalTangent:
    if x.dim() == 4 and module.padding_mode == "zeros":
        geometry = (module.stride, module.padding, module.dilation, module.groups)
        if tangent is not None:
            tangent = _conv2d(tangent, module.weight.detach(), None, *geometry)
        return _conv2d(x, module.weight, module.bias, *geometry), tangent
    if tangent is not None:
        tangent = module._conv_forward(tangent, module.weight.detach(), None)
    return module(x), tangent


def _flatten(module: Any, x: Tensor, tangent: Tensor | None) -> PrimalTangent:
    # Most nets have one, and its call costs twice its work.
    start, end = module.start_dim, module.end_dim
    return x.flatten(start, end), None if tangent is None else tangent.flatten(start, end)


def _without_parameters(module: nn.Module, x: Tensor, tangent: Tensor | None) -> PrimalTangent:
    return module(x), None if tangent is None else module(tangent)


def _batch_norm_module(module: Any, x: Tensor, tangent: Tensor | None) -> PrimalTangent:
    if tangent is None:
        return module(x), None
    return _symmetric(module, (module.weight, module.bias), x, tangent)


def _max_pool_module(module: Any, x: Tensor, tangent: Tensor | None) -> PrimalTangent:
    if tangent is None:
        return module(x), None
    pair = _max_pool2d(
        F.max_pool2d,
        x,
        tangent,
        module.kernel_size,
        module.stride,
        module.padding,
        module.dilation,
        module.ceil_mode,
    )
    assert pair is not None, "the indices were not asked for"
    return pair


def _by_function(rule: FunctionRule, function: Any, *options: str) -> ModuleRule:
    """The rule of a module that is one call of a function, with these attributes as arguments."""

    def module_rule(module: Any, x: Tensor, tangent: Tensor | None) -> PrimalTangent:
        arguments = {name: getattr(module, name) for name in options}
        if tangent is None:
            return function(x, **arguments), None
        pair = rule(function, x, tangent, **arguments)
        return _by_forward_mode(module, x, tangent) if pair is None else pair

    return module_rule


def pool_geometry(pool: nn.MaxPool2d) -> tuple[list[int], list[int], list[int]]:
    """Kernel size, stride and padding, each along height and width."""
    return _pair(pool.kernel_size), _pair(pool.stride), _pair(pool.padding)


def has_fused_pool(pool: nn.MaxPool2d) -> bool:
    return not (pool.ceil_mode or pool.return_indices) and pool.dilation in (1, (1, 1))


MODULE_RULES: dict[type[nn.Module], ModuleRule] = {
    nn.Linear: _linear_module,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution_module),
    nn.Flatten: _flatten,
    **dict.fromkeys(
        (nn.Unflatten, nn.Identity, nn.AvgPool2d, nn.AdaptiveAvgPool2d), _without_parameters
    ),
    **dict.fromkeys(BATCH_NORMS, _batch_norm_module),
    nn.ReLU: _by_function(_relu, F.relu),
    nn.LeakyReLU: _by_function(_leaky_relu, F.leaky_relu, "negative_slope"),
    nn.GELU: _by_function(_gelu, F.gelu, "approximate"),
    nn.SiLU: _by_function(_silu, F.silu),
    nn.Sigmoid: _by_function(_sigmoid, torch.sigmoid),
    nn.Tanh: _by_function(_tanh, torch.tanh),
    nn.LayerNorm: _by_function(_layer_norm, F.layer_norm, "normalized_shape", "weight", "bias", "eps"),
    nn.GroupNorm: _by_function(
        _group_norm, _group_norm_of_primal, "num_groups", "weight", "bias", "eps"
    ),
    nn.MaxPool2d: _max_pool_module,
}
_COMPILABLE = (None, _linear_module, _convolution_module, _flatten, _without_parameters)
# What a module's call comes down to, in its class or, patched, in the instance.
FORWARD_NAMES = ("forward", "_conv_forward")


def _torchs_own(kind: type[nn.Module], name: str) -> Any:
    """A function of a class; None if it had been patched before this package was imported."""
    function = getattr(kind, name)
    home = nn_module if name in vars(nn.Module) and name != "forward" else sys.modules[kind.__module__]
    return function if function.__globals__ is vars(home) else None


def _names_of_calls(kind: type[nn.Module]) -> list[str]:
    return [name for name in (*FORWARD_NAMES, *CALL_NAMES) if hasattr(kind, name)]


# By class, the functions that the rules and the fused operators stand for.
FORWARD_FUNCTIONS: dict[type[nn.Module], list[tuple[str, Any]]] = {
    kind: [(name, _torchs_own(kind, name)) for name in _names_of_calls(kind)]
    for kind in (*MODULE_RULES, nn.Sequential)
}


_NO_CODE = (lambda: None).__code__  # of what is no function of Python's


def _called_by(kind: type[nn.Module]) -> list[tuple[dict[str, Any], str, Any]]:
    """The global functions of torch that its forward calls by name, each with their dictionary."""
    names = [
        name
        for function in (getattr(kind, name, None) for name in FORWARD_NAMES)
        for name in getattr(function, "__code__", _NO_CODE).co_names
    ]
    called = {(n, "F") for n in names if n[0] != "_" and callable(vars(F).get(n))}
    # Those of torch that it calls, or that the functions of torch.nn.functional call in their turn.
    names += [n for name, _ in called for n in getattr(vars(F)[name], "__code__", _NO_CODE).co_names]
    called |= {(n, "torch") for n in names if isinstance(vars(torch).get(n), BuiltinFunctionType)}
    homes = {"F": vars(F), "torch": vars(torch)}
    return [(homes[home], name, homes[home][name]) for name, home in sorted(called)]


# By class, the functions that its own calls.
CALLED_FUNCTIONS = {kind: _called_by(kind) for kind in MODULE_RULES}


# By class, the attributes that decide between rules and between fused operators. Each call reads all
# others anew.
OPTIONS: dict[type[nn.Module], tuple[str, ...]] = {
    **dict.fromkeys((nn.ReLU, nn.SiLU), ("inplace",)),
    nn.LeakyReLU: ("inplace", "negative_slope"),
    nn.GELU: ("approximate",),
    nn.MaxPool2d: ("kernel_size", "dilation", "ceil_mode", "return_indices"),
    nn.Conv2d: ("padding", "padding_mode"),
}


_REGISTERED: set[type[nn.Module]] = set()


def register_jvp(kind: type[nn.Module]) -> Callable[[ModuleRule], ModuleRule]:
    """Decorator for the JVP rule of a module class, and of no subclass: (module, x, tangent) → (y, ty).

    It is asked in training steps that nothing compiles, wherever a module of this class is called with
    one tensor x that has a tangent, of x's shape and dtype. y keeps its autograd graph to the module's
    parameters, and ty = J tangent has y's shape and no graph. The module itself may be called for y.

    Raises:
        TypeError: kind is no class of modules.
        ValueError: the class has a rule.
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"FDFA: a JVP rule is that of a module class; got {kind!r}")
    if kind in MODULE_RULES:
        raise ValueError(f"FDFA: {kind.__name__} has a JVP rule")

    def register(rule: ModuleRule) -> ModuleRule:
        def checked(module: Any, x: Tensor, tangent: Tensor | None) -> PrimalTangent:
            if tangent is None:
                return module(x), None
            found = rule(module, x, tangent)
            if not isinstance(found, tuple) or len(found) != 2:
                raise TypeError(
                    f"FDFA: the JVP rule of {kind.__name__} must return a pair, the output and its "
                    f"tangent; got {type(found).__name__}"
                )
            y, ty = found
            if ty is None or ty.shape != y.shape or ty.requires_grad:
                got = "none" if ty is None else f"{list(ty.shape)}, requires_grad={ty.requires_grad}"
                raise RuntimeError(
                    f"FDFA: the JVP rule of {kind.__name__} must return a tangent of the output's "
                    f"shape {list(y.shape)} and without a graph; got {got}"
                )
            return y, ty

        MODULE_RULES[kind] = checked
        FORWARD_FUNCTIONS[kind] = [(name, getattr(kind, name)) for name in _names_of_calls(kind)]
        _REGISTERED.add(kind)
        return rule

    return register


def registered_rule(module: nn.Module) -> ModuleRule | None:
    """The rule that register_jvp has for it, where its call comes down to its class's forward."""
    kind = type(module)
    changed = kind not in _REGISTERED or has_own_forward(module) or is_patched(kind)
    return None if changed else MODULE_RULES[kind]


def call_by_rule(module: Any, rule: ModuleRule, *args: Any, **kwargs: Any) -> tuple[Any, bool]:
    """What a module's forward returns, and whether that is a dual tensor by its rule."""
    if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
        primal, tangent = unpack_dual(args[0])
        if tangent is not None:
            with without_rules():
                y, ty = rule(module, primal, tangent)
                assert ty is not None, "the rule is checked"
                return make_dual(y, ty), True
    return type(module).forward(module, *args, **kwargs), False


def _module_rule(module: Any) -> ModuleRule | None:
    kind = plain_type(module)
    rule = None if kind is None else MODULE_RULES.get(kind)
    if rule is not None and getattr(module, "inplace", False):
        return None  # the input would be gone by the time its derivative is asked for
    if rule is _max_pool_module and module.return_indices:
        return None
    return rule

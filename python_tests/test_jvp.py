"""Jacobian-vector products by rule: whatever shorter way is taken, they are torch's forward mode's."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from nets import Residue
from torch import Tensor, nn

from fdfa_ext.duals import forward_mode
from fdfa_ext.jvp import FunctionRules, forward_dual, function_rules


@pytest.mark.parametrize("norm", [lambda: nn.GroupNorm(2, 4), Residue])
def test_the_tangent_of_group_normalisation_is_its_directional_derivative(norm: Any) -> None:
    module = norm().double()
    for p in module.parameters():
        nn.init.normal_(p)
    x, tangent = torch.randn(2, 5, 4, 3, 3, dtype=torch.double).unbind()
    _, expected = torch.func.jvp(module, (x,), (tangent,))
    order = torch.channels_last
    _, ty = forward_dual(
        module, x.contiguous(memory_format=order), tangent.contiguous(memory_format=order)
    )
    torch.testing.assert_close(ty, expected)


@pytest.mark.parametrize(
    "chain",
    [
        lambda: [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()],
        lambda: [nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), nn.GELU(), nn.MaxPool2d(2)],
        lambda: [nn.BatchNorm2d(2), nn.SiLU(), nn.Conv2d(2, 4, 3)],
        lambda: [nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 5), nn.Tanh()],
        lambda: [nn.Flatten(), nn.Linear(128, 6), nn.LayerNorm(6), nn.Softmax(1), nn.LeakyReLU()],
    ],
)
def test_tangent_of_a_block_is_that_of_forward_mode(chain: Any) -> None:
    """Whatever way forward_dual takes for a module, it is torch's own forward-mode derivative."""
    modules = chain()
    x, tangent = torch.randn(2, 5, 2, 8, 8, dtype=torch.double).unbind()
    for module in modules:
        module.double()
    with forward_mode():
        y, ty = x, tangent
        for module in modules:
            y, ty = forward_dual(module, y, ty)
        expected = forward_ad.unpack_dual(nn.Sequential(*modules)(forward_ad.make_dual(x, tangent)))
    torch.testing.assert_close(y, expected.primal)
    torch.testing.assert_close(ty, expected.tangent)
    assert not ty.requires_grad


@pytest.mark.parametrize("moving", [(True, False), (True, True), (False, True), (False, False)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_tangents_are_those_of_forward_mode(moving: tuple[bool, bool], bias: bool) -> None:
    """Also for a weight that has a tangent itself, as that of a layer whose weights are computed."""
    tensors = [torch.randn(2, *size, dtype=torch.double) for size in ((5, 6), (4, 6))]
    b = torch.randn(4, dtype=torch.double) if bias else None
    results = []
    for rules in (FunctionRules(), contextlib.nullcontext()):
        with forward_mode(), rules:
            x, weight = (
                forward_ad.make_dual(*t) if dual else t[0]
                for t, dual in zip(tensors, moving, strict=True)
            )
            results.append(forward_ad.unpack_dual(F.linear(x, weight, bias=b)))
    assert (results[0].tangent is not None) == any(moving)
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 2},
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)},
        {"kernel_size": 3, "stride": 2, "ceil_mode": True},
        {"kernel_size": 2, "dilation": 2},
        {"kernel_size": 2, "return_indices": True},
    ],
)
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_max_pool_tangents_are_those_of_forward_mode(
    arguments: dict[str, Any], order: torch.memory_format, needs_gradient: bool
) -> None:
    x, tangent = (t.contiguous(memory_format=order) for t in torch.randn(2, 3, 4, 8, 9).unbind())
    x.requires_grad_(needs_gradient)
    results: list[list[Any]] = []
    for rules in (FunctionRules(), contextlib.nullcontext()):
        with forward_mode(), rules:
            out = F.max_pool2d(forward_ad.make_dual(x, tangent), **arguments)
            y = out[0] if isinstance(out, tuple) else out
            assert y.requires_grad == needs_gradient
            results.append(
                [*forward_ad.unpack_dual(y), *out[1:]]
                if isinstance(out, tuple)
                else [*forward_ad.unpack_dual(y)]
            )
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=0)


IMAGES = (5, 4, 6, 6)
NORM = {"weight": torch.randn(4) + 2, "bias": torch.randn(4)}
KERNEL = torch.randn(4, 4, 3, 3)
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: F.linear(x, KERNEL[0, 0].repeat(1, 2), torch.ones(3)),
    "conv1d": lambda x: F.conv1d(x[:, :, 0], KERNEL[..., 0], torch.ones(4)),
    "conv2d": lambda x: F.conv2d(x, weight=KERNEL, bias=torch.ones(4), stride=2),
    "1x1 with a stride": lambda x: F.conv2d(x, KERNEL[..., :1, :1], None, 2),
    "conv3d": lambda x: F.conv3d(x[:, :, None], KERNEL[:, :, None], torch.ones(4), padding=1),
    "conv_transpose2d": lambda x: F.conv_transpose2d(
        x, KERNEL, torch.ones(4), output_padding=1, stride=2
    ),
    "relu": F.relu,
    "torch.relu": torch.relu,
    "Tensor.relu": Tensor.relu,
    "relu in place": lambda x: F.relu(x * 1, inplace=True),
    "relu in place after a sum": lambda x: F.relu(x * 2 + x, inplace=True) * x,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.3),
    "leaky_relu in place": lambda x: F.leaky_relu(x * 1, inplace=True),
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "silu in place": lambda x: F.silu(x * 1, inplace=True),
    "sigmoid": torch.sigmoid,
    "Tensor.sigmoid": Tensor.sigmoid,
    "tanh": torch.tanh,
    "F.tanh": F.tanh,
    "batch_norm": lambda x: F.batch_norm(x, torch.zeros(4), torch.ones(4), **NORM, training=True),
    "batch_norm in evaluation": lambda x: F.batch_norm(x, torch.ones(4), 2 * torch.ones(4), **NORM),
    "batch_norm alone": lambda x: F.batch_norm(x, None, None, training=True),
    "layer_norm": lambda x: F.layer_norm(x, (6, 6), KERNEL[0, 0].repeat(2, 2), torch.ones(6, 6)),
    "layer_norm alone": lambda x: F.layer_norm(x, (6,)),
    "group_norm": lambda x: F.group_norm(x, 2, NORM["weight"], NORM["bias"]),
    "group_norm alone": lambda x: F.group_norm(x, 4, eps=0.1),
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "torch.max_pool2d": lambda x: torch.max_pool2d(x, [3, 2], [1, 2], 1),
    "max_pool2d of one image": lambda x: F.max_pool2d(x[0], 2, dilation=2),
    "attention": lambda x: F.scaled_dot_product_attention(x, x * 2, x),
    "a weight with a tangent": lambda x: F.linear(x[0, 0], x[0, 1], x[0, 2, 0]),
    "by its name": lambda x: F.relu(input=x),
}


@pytest.mark.parametrize("needs_gradient", [False, True])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_have_the_tangents_and_gradients_of_torch(
    name: str, order: torch.memory_format, needs_gradient: bool
) -> None:
    tangent = torch.randn(IMAGES).contiguous(memory_format=order)
    leaf = torch.randn(IMAGES).contiguous(memory_format=order).requires_grad_(needs_gradient)
    results = []
    for has_rules in (True, False):
        leaf.grad = None
        with (
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
            forward_mode(),
        ):
            x = leaf * 1 if needs_gradient else leaf
            x = forward_ad.make_dual(x, tangent.clone(memory_format=torch.preserve_format))
            if "group" in name and not has_rules:  # torch has no forward mode of other orders
                x = x.contiguous()
            with function_rules() if has_rules else contextlib.nullcontext():
                y = FUNCTIONS[name](x)
            primal, ty = forward_ad.unpack_dual(y)
            assert ty is not None
        results.append([primal.detach(), ty.detach()])
        if needs_gradient:
            primal.square().sum().backward()
            results[-1].append(leaf.grad)
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=5e-5)


def test_a_norms_parameters_keep_their_graph_beside_the_tangent() -> None:
    for norm in (nn.BatchNorm2d(4), nn.LayerNorm([6, 6]), nn.GroupNorm(2, 4)):
        grads = []
        for dual in (True, False):
            torch.manual_seed(1)
            x, tangent = torch.randn(2, *IMAGES).unbind()
            norm.zero_grad()
            y, ty = forward_dual(norm, x, tangent) if dual else (norm(x), None)
            assert ty is None or not ty.requires_grad
            y.pow(3).sum().backward()
            grads.append([p.grad.clone() for p in norm.parameters() if p.grad is not None])
        assert len(grads[0]) == 2
        torch.testing.assert_close(*grads)


def test_functions_of_complex_numbers_are_torchs() -> None:
    z, t = torch.randn(2, 5, dtype=torch.cfloat).unbind()
    for function in (torch.tanh, torch.sigmoid):
        tangents = []
        for rules in (contextlib.nullcontext(), function_rules()):
            with forward_mode(), rules:
                tangents.append(forward_ad.unpack_dual(function(forward_ad.make_dual(z, t))).tangent)
        torch.testing.assert_close(*tangents)

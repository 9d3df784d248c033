"""Jacobian-vector products by rule: whatever shorter way is taken, they are torch's forward mode's."""

import contextlib
import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from nets import Residue
from torch import Tensor, nn

from fdfa_ext.duals import forward_mode, has_tangent, make_dual, unpack_dual
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
KEYS = torch.ones(1, 6, 6, dtype=torch.bool).tril(1)
BIAS = torch.randn(6, 6)
QUERIES = torch.randn(2, *IMAGES).unbind()
HEADS = nn.MultiheadAttention(6, 2).requires_grad_(False)
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
    "batch_norm, then in place": lambda x: F.batch_norm(x, None, None, **NORM, training=True).add_(x),
    "conv2d, then in place": lambda x: F.conv2d(x, KERNEL).mul_(2).relu_(),
    "softmax": lambda x: F.softmax(x, dim=1),
    "Tensor.softmax": lambda x: x.softmax(-1),
    "softmax of another type": lambda x: F.softmax(x, dim=1, dtype=torch.float64).float(),
    "torch.softmax of another type": lambda x: torch.softmax(x, 1, torch.float64).float(),
    "attention": lambda x: F.scaled_dot_product_attention(x, x * 2, x),
    "causal attention": lambda x: F.scaled_dot_product_attention(x, x * 2, x, is_causal=True),
    "masked attention": lambda x: F.scaled_dot_product_attention(x, x * 2, x, attn_mask=KEYS),
    "biased attention": lambda x: F.scaled_dot_product_attention(x, x, x, BIAS, scale=0.3),
    "attention of queries": lambda x: F.scaled_dot_product_attention(x, *QUERIES),
    "attention of keys": lambda x: F.scaled_dot_product_attention(QUERIES[0], x, QUERIES[1]),
    "attention of values": lambda x: F.scaled_dot_product_attention(*QUERIES, x),
    "attention with a moving bias": lambda x: F.scaled_dot_product_attention(x, x, x, x * 2),
    "grouped attention": lambda x: F.scaled_dot_product_attention(
        x, x[:, :2], x[:, :2], enable_gqa=True
    ),
    "multi-head attention": lambda x: HEADS(*[x[:, 0]] * 3, need_weights=False)[0],
    "multi-head attention, masked": lambda x: HEADS(
        *[x[:, 0]] * 3, need_weights=False, attn_mask=~KEYS[:, :5, :5].squeeze(0)
    )[0],
    "multi-head attention, biased": lambda x: HEADS(*[x[:, 0]] * 3, attn_mask=BIAS[:5, :5])[0],
    "multi-head attention, padded": lambda x: HEADS(
        *[x[:, 0]] * 3, need_weights=False, key_padding_mask=torch.ones(6, 5).triu(3).bool()
    )[0],
    "multi-head attention, causal": lambda x: HEADS(
        *[x[:, 0]] * 3, need_weights=False, attn_mask=~KEYS[0, :5, :5].tril(), is_causal=True
    )[0],
    "multi-head attention of no sample": lambda x: torch.cat(
        [HEADS(*[x[:, :0, 0]] * 3, need_weights=False)[0].sum() + x[0, 0, 0]]
    ),
    "multi-head attention by moving weights": lambda x: F.multi_head_attention_forward(
        *[x[:, 0]] * 3,
        6,
        2,
        x[:3, 0].flatten(0, 1),
        None,
        None,
        None,
        False,
        0.0,
        x[0, 0],
        None,
        need_weights=False,
    )[0],
    "multi-head attention of two": lambda x: HEADS(x[:, 0], x[:, 1], x[:, 2], need_weights=False)[0],
    "rms_norm": lambda x: F.rms_norm(x, (6, 6), KERNEL[0, 0].repeat(2, 2)),
    "rms_norm alone": lambda x: F.rms_norm(x, (6,), eps=0.1),
    "square": lambda x: torch.square(x) + x**2 + x.pow(2),
    "cube": lambda x: torch.pow(x, 3) + x.pow(-1),
    "root": lambda x: (x.abs() + 0.1) ** 0.5,
    "powers": lambda x: x**0 + 2**x + (x.abs() + 1) ** BIAS,
    "sum": lambda x: x + BIAS,
    "sum from the left": lambda x: 2 * BIAS + x + 1,
    "sum with more dimensions": lambda x: x[0] + torch.ones(2, 4, 6, 1),
    "sum of two": lambda x: torch.add(x, x[:1].tanh(), alpha=2) + (3 + x),
    "sum of types": lambda x: (x + BIAS.double()).float() + (BIAS.double() + x[:, :1]),
    "sum with a number's tensor": lambda x: x + torch.tensor(2.0, dtype=torch.double),
    "difference": lambda x: torch.sub(BIAS, x, alpha=3) - (x - BIAS),
    "difference from the left": lambda x: (1 - x) + torch.rsub(x, BIAS),
    "difference of two": lambda x: x.subtract(x[0].tanh()),
    "product": lambda x: x * BIAS,
    "product with a number": lambda x: 0.5 * x + x.mul(3) * torch.tensor(2.0),
    "product with more dimensions": lambda x: torch.mul(torch.ones(2, 1, 1, 1, 6), x),
    "product of two": lambda x: x * x.tanh() + x[:1] * x + x * x[:, :1],
    "product with a mask": lambda x: x * (BIAS > 0),
    "product of itself": lambda x: x * x,
    "matmul": lambda x: x @ BIAS + BIAS @ x,
    "matmul with a vector": lambda x: (x @ BIAS[0])[..., None] + (BIAS[0] @ x)[..., None],
    "matmul of two": lambda x: torch.matmul(x, x.tanh().mT) @ x[0, 0],
    "by keywords": lambda x: (
        torch.mm(x[0, 0], mat2=BIAS)
        + torch.addmm(BIAS, mat1=x[0, 0], mat2=BIAS)
        + torch.add(input=x[0, 0], other=BIAS)
        + BIAS[None].baddbmm(batch1=x[0, :1], batch2=x[1, :1], beta=0.5, alpha=2)[0]
    ),
    "with numbers first": lambda x: (
        torch.addmm(2.0, BIAS, 0.5, x[0, 0], BIAS) + (x[0, 0] * 1).add_(2, BIAS)
    ),
    "expanded operands": lambda x: (
        torch.maximum(x, torch.ones(6).expand(6, 6)) + torch.addcmul(x, BIAS[0].expand(6, 6), x)
    ),
    "clamp of infinities": lambda x: (x * 1e3).exp().clamp(max=10) + (x * 0).log().clamp(min=-10) + x,
    "clamp between turned bounds": lambda x: x.clamp(min=0.5, max=0.0) + x,
    "of complex parts": lambda x: torch.tanh(
        torch.view_as_complex(x[0, :, :, :2].contiguous()).conj().imag
    ),
    "einsum of one, in place": lambda x: _turned_in_place(x * 1),
    "mm": lambda x: torch.mm(x[0, 0], BIAS) + x[0, 0].mm(x[0, 1]),
    "bmm": lambda x: torch.bmm(x[0], x[1]) + x[0].bmm(BIAS.expand(4, 6, 6)),
    "addmm": lambda x: (
        torch.addmm(BIAS[0], x[0, 0], BIAS) + torch.addmm(x[0, 1, 0], BIAS, x[0, 2], beta=2, alpha=3)
    ),
    "addmm to a bias that moves": lambda x: x[0, 0].addmm(BIAS, BIAS),
    "baddbmm": lambda x: torch.baddbmm(x[0], x[1], x[2], alpha=0.5) + BIAS.baddbmm(x[0], x[3], beta=0),
    "clamp": lambda x: x.clamp(min=-0.5, max=1.0) + torch.clamp(x, max=0) + torch.clip(x, 0.1),
    "clamp by a tensor": lambda x: x.clamp(BIAS),
    "maximum": lambda x: torch.maximum(x, BIAS) + torch.minimum(BIAS, x),
    "addcmul": lambda x: torch.addcmul(BIAS, x, BIAS, value=2) + torch.lerp(BIAS, x, BIAS),
    "prelu": lambda x: F.prelu(x, NORM["weight"]),
    "bilinear": lambda x: F.bilinear(x, QUERIES[0], KERNEL[:, 0, :1, :1].repeat(1, 6, 6)),
    "cosine similarity": lambda x: F.cosine_similarity(x, QUERIES[0], -1)[..., None],
    "outer": lambda x: torch.outer(x[0, 0, 0], BIAS[0]) + torch.dot(BIAS[0], x[0, 0, 1]),
    "einsum": lambda x: torch.einsum("ncij,jk->nick", x, BIAS),
    "einsum of three": lambda x: torch.einsum("ncij,jk,nckl->nil", [x, BIAS, x.tanh()]),
    "einsum of one": lambda x: torch.einsum("ncij->nijc", x).mul_(2),
    "quotient": lambda x: x / (BIAS.abs() + 1),
    "quotient from the left": lambda x: 1 / (x.abs() + 1) + BIAS / (x.abs() + 1),
    "quotient of two": lambda x: x[:1].tanh() / (x.abs() + 1),
    "quotient by a number": lambda x: torch.div(x, 3) + x.true_divide(2),
    "rounded quotient": lambda x: torch.div(x, 0.1, rounding_mode="floor") + x,
    "sum in place": lambda x: (x * 1).add_(BIAS, alpha=2).sub_(3),
    "product in place": lambda x: (x * 1).mul_(BIAS).div_(2),
    "product in place with itself": lambda x: x.clone().mul_(x.detach()),
    "rounded in place": lambda x: x.clone().div_(0.1, rounding_mode="floor") + x,
    "of a part in place": lambda x: _in_part(x.clone()),
    "a weight with a tangent": lambda x: F.linear(x[0, 0], x[0, 1], x[0, 2, 0]),
    "by its name": lambda x: F.relu(input=x),
    "dropout": lambda x: _seeded(F.dropout, x, 0.3),
    "dropout of features": lambda x: (
        _seeded(F.dropout2d, x, 0.3)
        + _seeded(F.dropout3d, x[None], 0.3)[0]
        + _seeded(F.dropout1d, x[0], 0.3)
        + _seeded(F.dropout1d, x[0, 0], 0.3)
    ),
    "dropout of nothing and all": lambda x: (
        F.dropout(x, 0.0) + F.dropout(x, 1.0) + F.dropout(x, 0.5, False)
    ),
    "dropout in place": lambda x: _seeded(F.dropout, x * 1, 0.3, True, True),
}


def _seeded(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    torch.manual_seed(2)
    return function(*arguments)


def _turned_in_place(x: Tensor) -> Tensor:
    torch.einsum("ncij->ncji", x).mul_(BIAS)
    return x


def _in_part(x: Tensor) -> Tensor:
    x[:, 0] += BIAS
    x[:, 1] *= BIAS
    x[:, 2] /= (x[:, 3] * 1).abs() + 1
    return x


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
            # That of the sum of squares is zero behind a norm, but for rounding.
            torch.manual_seed(0)
            (primal * torch.randn(primal.shape)).sum().backward()
            results[-1].append(leaf.grad)
    for mine, expected in zip(*results, strict=True):
        # Where torch's gradient is NaN, of 0 · ∞, so is that of the rule.
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=5e-5, equal_nan=True)


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


def test_tangents_have_no_graph() -> None:
    """Not even where a primal has one: nobody asks for it, and it would keep memory."""
    weight = torch.randn(6, 6, requires_grad=True)
    with forward_mode(), function_rules():
        x = forward_ad.make_dual(*torch.randn(2, 6, 6).unbind())
        for function in (
            lambda x: x * weight + weight,
            lambda x: weight @ x,
            lambda x: x / weight,
            lambda x: torch.einsum("ij,jk->ik", x, weight),
            lambda x: F.gelu(x * weight) * F.silu(x + weight),
            lambda x: F.rms_norm(x, (6,), weight[0]) ** 2,
            lambda x: F.scaled_dot_product_attention(x @ weight, x, x @ weight),
        ):
            y, ty = forward_ad.unpack_dual(function(x))
            assert y.requires_grad
            assert ty is not None
            assert not ty.requires_grad


class Negated(Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        return torch.neg(result) if func is Tensor.mul else result


def test_functions_of_a_subclass_of_tensors_are_its_own() -> None:
    with forward_mode(), function_rules():
        x = forward_ad.make_dual(torch.ones(2), torch.ones(2))
        y = (x.as_subclass(Negated) * 3).as_subclass(Tensor)
        assert [t.tolist() for t in forward_ad.unpack_dual(y)] == [[-3, -3], [-3, -3]]


def test_a_function_without_a_home_is_called_as_it_is() -> None:
    """As code that is made from a string may be."""
    home: dict[str, Any] = {}
    exec("def overridable(x): return x * 3", home)
    with forward_mode(), function_rules():
        x = forward_ad.make_dual(torch.ones(2), torch.ones(2))
        y = torch.overrides.handle_torch_function(home["overridable"], (x,), x)
    assert y.tolist() == [3, 3]


def test_a_gradient_that_has_no_tangent_is_refused() -> None:
    def of_energy(x: Tensor) -> Tensor:
        return x - torch.autograd.grad(x.pow(3).sum(), x, create_graph=True)[0]

    leaf = torch.ones(2, requires_grad=True)
    with forward_mode(), function_rules():
        of_energy(leaf * 1)  # before the first block
        with pytest.raises(RuntimeError, match="the forward takes a gradient of what depends on"):
            of_energy(forward_ad.make_dual(leaf * 1, torch.ones(2)))


def test_products_of_autocast_have_its_type() -> None:
    x, tangent = torch.randn(2, 2, 4, 4).unbind()
    with forward_mode(), function_rules(), torch.autocast("cpu", torch.bfloat16):
        y, ty = forward_ad.unpack_dual(torch.bmm(*[forward_ad.make_dual(x, tangent)] * 2))
    assert y.dtype == ty.dtype == torch.bfloat16
    torch.testing.assert_close(ty.float(), tangent @ x + x @ tangent, rtol=0.05, atol=0.1)


def test_grouped_heads_of_keys_and_values_may_differ() -> None:
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 4, 7, 3)
    attend = partial(F.scaled_dot_product_attention, enable_gqa=True)
    with forward_mode(), function_rules():
        y, ty = forward_ad.unpack_dual(attend(forward_ad.make_dual(q, q), k, v))
    same = F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v)
    torch.testing.assert_close(y, same)
    near = [F.scaled_dot_product_attention(q * s, k.repeat_interleave(2, 1), v) for s in (1.01, 0.99)]
    torch.testing.assert_close(ty, (near[0] - near[1]) / 0.02, rtol=1e-2, atol=1e-3)


def test_a_function_that_is_compiled_by_itself_has_its_tangent() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, weight: F.gelu(x * weight), backend="eager")
    x, tangent, weight = torch.randn(3, 4, 6).unbind()
    results = []
    for function in (compiled, lambda x, weight: F.gelu(x * weight)):
        with forward_mode(), function_rules():
            results.append(forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent), weight)))
    torch.testing.assert_close(*results)


def test_attention_without_tangents_takes_torchs_fused_kernel() -> None:
    """As before the first point, and with methods without tangents."""
    x = torch.randn(2, 3, 5, 8, requires_grad=True)
    with function_rules():
        y = F.scaled_dot_product_attention(x, x, x)
    plain = F.scaled_dot_product_attention(x, x, x)
    assert type(y.grad_fn) is type(plain.grad_fn)
    assert "Flash" in type(plain.grad_fn).__name__


def test_functions_of_complex_numbers_are_torchs() -> None:
    z, t = torch.randn(2, 5, dtype=torch.cfloat).unbind()
    for function in (torch.tanh, torch.sigmoid):
        tangents = []
        for rules in (contextlib.nullcontext(), function_rules()):
            with forward_mode(), rules:
                tangents.append(forward_ad.unpack_dual(function(forward_ad.make_dual(z, t))).tangent)
        torch.testing.assert_close(*tangents)


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_batch_norm_moves_its_statistics_as_torchs_does(needs_gradient: bool) -> None:
    x, tangent = (
        t.contiguous(memory_format=torch.channels_last) for t in torch.randn(2, *IMAGES).unbind()
    )
    norms = [nn.BatchNorm2d(4) for _ in range(2)]
    with forward_mode(), function_rules():
        leaf = x.clone().requires_grad_(needs_gradient)
        y = norms[0](forward_ad.make_dual(leaf * 1 if needs_gradient else leaf, tangent))
        assert type(y.grad_fn).__name__.startswith("Cpp"), "by the operator"
    norms[1](x)
    torch.testing.assert_close(norms[0].state_dict(), norms[1].state_dict())


def test_dropped_weights_of_attention_are_dropped_from_tangent_and_gradients_too() -> None:
    """d = J u and Jᵀ e for the mask that was drawn, by the Jacobian of the same draw."""
    q, k, v, tq, tk, tv = torch.randn(6, 2, 3, 7, 4, dtype=torch.double).unbind()
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]

    def attention(*inputs: Tensor) -> Tensor:
        torch.manual_seed(0)
        return F.scaled_dot_product_attention(*inputs, dropout_p=0.5)

    with forward_mode(), function_rules():
        duals = [forward_ad.make_dual(*pair) for pair in ((q, tq), (k, tk), (v, tv))]
        y, ty = forward_ad.unpack_dual(attention(*duals))
        shifted = []
        for size in (1e-6, -1e-6):
            moved = [forward_ad.make_dual(a + size * b, b) for a, b in ((q, tq), (k, tk), (v, tv))]
            shifted.append(forward_ad.unpack_dual(attention(*moved)).primal)
        duals = [forward_ad.make_dual(t * 1, u) for t, u in zip(leaves, (tq, tk, tv), strict=True)]
        primal = forward_ad.unpack_dual(attention(*duals)).primal
    torch.testing.assert_close(ty, (shifted[0] - shifted[1]) / 2e-6, rtol=1e-5, atol=1e-7)
    error = torch.randn_like(y)
    gradients = torch.autograd.grad(primal, leaves, error)
    along = [(g * u).sum() for g, u in zip(gradients, (tq, tk, tv), strict=True)]
    torch.testing.assert_close(torch.stack(along).sum(), (error * ty).sum())
    assert not torch.equal(y, F.scaled_dot_product_attention(q, k, v))


def test_a_dual_tensor_keeps_the_graph_of_its_primal_where_none_is_recorded() -> None:
    leaf = torch.randn(2, 5, requires_grad=True)
    for primal in (leaf * 2, (leaf * 2).view(5, 2), leaf):
        with forward_mode(), torch.no_grad():
            dual = make_dual(primal, torch.ones_like(primal))
        assert dual.requires_grad
        (gradient,) = torch.autograd.grad(dual.sum(), leaf)
        assert gradient.any()


def test_a_result_of_a_rule_takes_its_tangent_without_a_view() -> None:
    """A view would be copied where the next function changes it in place."""
    x, weight = torch.randn(2, 5, 6).unbind()
    with forward_mode(), function_rules():
        leaf = weight.requires_grad_()
        y = F.linear(forward_ad.make_dual(x, x), leaf)
        assert forward_ad.unpack_dual(y).tangent is not None
        assert not y._is_view()


def test_no_gradient_goes_into_the_tangent_that_a_rule_is_given() -> None:
    """torch's forward mode, before a rule, records its graph; and has no second derivative of some."""
    norm, conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
    x, tangent = (
        t.contiguous(memory_format=torch.channels_last) for t in torch.randn(2, *IMAGES).unbind()
    )
    with forward_mode(), function_rules():
        leaf = x.requires_grad_()
        y = norm(conv(F.hardsigmoid(forward_ad.make_dual(leaf * 1, tangent))))
        primal = forward_ad.unpack_dual(y).primal
    primal.pow(3).sum().backward()
    found = leaf.grad
    leaf.grad = None
    norm(conv(F.hardsigmoid(leaf))).pow(3).sum().backward()
    torch.testing.assert_close(found, leaf.grad, rtol=1e-3, atol=1e-4)


def test_a_primal_does_not_keep_its_tangent_alive() -> None:
    """What autograd saves of inputs is the primal alone: tangents go with the duals."""
    weight = torch.randn(64, 64, requires_grad=True)
    kept: list[Any] = []

    class Watch(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self) -> None:
            super().__init__(lambda t: kept.append(t) or t, lambda t: t)

    with forward_mode(), function_rules(), Watch():
        y = F.linear(forward_ad.make_dual(*torch.randn(2, 5, 64).unbind()), weight)
        for function in (F.gelu, F.silu, lambda t: F.layer_norm(t, (64,))):
            y = F.linear(function(y), weight)
        activations = [t for t in kept if t.shape == (5, 64)]
        assert len(activations) > 6
        assert not any(has_tangent(t) for t in activations)
        assert all(t._base is None or not has_tangent(t._base) for t in activations)


def test_a_fused_batch_norm_refuses_second_derivatives() -> None:
    x, tangent = (
        t.contiguous(memory_format=torch.channels_last) for t in torch.randn(2, *IMAGES).unbind()
    )
    norm = nn.BatchNorm2d(4)
    with forward_mode(), function_rules():
        y = forward_ad.unpack_dual(norm(forward_ad.make_dual(x, tangent))).primal
        with pytest.raises(
            RuntimeError, match="batch-norm in a training step has no second derivative"
        ):
            torch.autograd.grad(y.square().sum(), norm.weight, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_attention_drops_in_other_types(dtype: torch.dtype) -> None:
    q, t = torch.randn(2, 2, 3, 7, 4, dtype=dtype).unbind()
    with forward_mode(), function_rules():
        x = forward_ad.make_dual(q, t)
        y = F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)
        assert forward_ad.unpack_dual(y).tangent.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.LayerNorm(16), (4, 16)),
        (nn.RMSNorm(16), (4, 16)),
        (nn.GroupNorm(2, 4), (3, 4, 5)),
        (nn.BatchNorm1d(16), (8, 16)),
        (nn.BatchNorm2d(4), (3, 4, 5, 5)),
        (nn.InstanceNorm2d(4), (3, 4, 5, 5)),
        (nn.InstanceNorm1d(4, affine=True), (3, 4, 9)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@pytest.mark.parametrize("as_function", [False, True])
def test_norms_of_small_numbers_in_16_bits(
    dtype: torch.dtype, norm: nn.Module, shape: tuple[int, ...], as_function: bool
) -> None:
    """Of σ = 0.01, 1/σ³ is beyond float16."""
    torch.manual_seed(0)
    x, tangent = (torch.randn(shape) / 100).to(dtype), torch.randn(shape).to(dtype)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.linspace(0.5, 2, parameter.numel()))
    given = copy.deepcopy(norm).to(dtype)
    _, expected = forward_dual(copy.deepcopy(norm).double(), x.double(), tangent.double())
    if as_function:
        with forward_mode(), function_rules():
            y, ty = unpack_dual(given(make_dual(x, tangent)))
    else:
        y, ty = forward_dual(given, x, tangent)
    assert y.dtype == ty.dtype == dtype
    error = (ty.double() - expected).abs().max() / expected.detach().abs().max()
    assert error < 4 * torch.finfo(dtype).eps

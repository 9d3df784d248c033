"""Every operator computes what the reference in plain torch defines."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from fuzz import operators as fuzz
from operands import DTYPES, RATE, as_double, assert_close, noise_state, rand

from fdfa_ext import reference
from fdfa_ext._ops import fused
from fdfa_ext.layers import ACTIVATIONS

SHAPES = [(1, 1, 1), (2, 3, 5), (5, 129, 151), (33, 8, 64), (0, 4, 6), (3, 4, 0)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("with_tangent", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_is_the_reference(
    device: torch.device, dtype: torch.dtype, activation: str, with_tangent: bool, with_bias: bool
) -> None:
    for n, d_in, d_out in SHAPES:
        x = rand(n, d_in, dtype=dtype, device=device)
        tangent = rand(n, d_in, dtype=dtype, device=device) if with_tangent else None
        weight = (rand(d_out, d_in, dtype=dtype, device=device) / max(d_in, 1) ** 0.5).to(dtype)
        bias = rand(d_out, dtype=dtype, device=device) if with_bias else None
        common = (noise_state(device), 3, activation, "gaussian")
        y, ty, pre = fused.linear(x, tangent, weight, bias, *common)
        y2, ty2, pre2 = reference.linear(*as_double(x, tangent, weight, bias), *common)
        assert_close(y, y2, dtype)
        # Away from the kinks of relu: there a rounding decides which side a sample is on.
        smooth = (
            pre2.abs() > 0.05 if activation in ("relu", "leaky_relu") else torch.ones_like(pre2) > 0
        )
        assert_close(ty[smooth], ty2[smooth], dtype, scale=4.0)
        if activation in ("gelu", "silu"):
            assert_close(pre, pre2, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["identity", "tanh", "gelu"])
@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"),
    [((1, 1), (0, 0), (1, 1), 1), ((2, 1), (1, 2), (1, 2), 1), ((1, 1), (1, 1), (1, 1), 2)],
)
def test_conv2d_is_the_reference(
    device: torch.device,
    dtype: torch.dtype,
    activation: str,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> None:
    for n, channels_last in ((1, False), (5, True), (0, False)):
        order = torch.channels_last if channels_last else torch.contiguous_format
        x = rand(n, 4, 9, 7, dtype=dtype, device=device).contiguous(memory_format=order)
        tangent = rand(n, 4, 9, 7, dtype=dtype, device=device)
        weight = (rand(6, 4 // groups, 3, 3, dtype=dtype, device=device) / 6).to(dtype)
        bias = rand(6, dtype=dtype, device=device)
        geometry = (stride, padding, dilation, groups)
        common = (*geometry, noise_state(device), 3, activation, "gaussian")
        for t in (None, tangent):
            y, ty, *_ = fused.conv2d(x, t, weight, bias, *common)
            y2, ty2, *_ = reference.conv2d(*as_double(x, t, weight, bias), *common)
            assert_close(y, y2, dtype)
            assert_close(ty, ty2, dtype, scale=4.0)
            assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("m", "k", "n"), [(3, 4, 5), (64, 300, 200), (130, 257, 129), (1, 2**21, 1), (0, 5, 3), (4, 0, 3)]
)
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
def test_mm_is_a_matrix_product(
    device: torch.device, m: int, k: int, n: int, transposed: tuple[bool, bool]
) -> None:
    """Large and small ones, which different libraries compute, in every memory order."""
    a = torch.randn(k, m, device=device).t() if transposed[0] else torch.randn(m, k, device=device)
    b = torch.randn(n, k, device=device).t() if transposed[1] else torch.randn(k, n, device=device)
    exact = a.double() @ b.double()
    scale = max(k, 1) ** 0.5
    torch.testing.assert_close(fused.mm(a, b).double() / scale, exact / scale, rtol=0, atol=2e-5)
    strided = torch.randn(m, 2 * k, device=device)[:, ::2]
    torch.testing.assert_close(
        fused.mm(strided, b).double() / scale, strided.double() @ b.double() / scale, rtol=0, atol=2e-5
    )


def test_mm_says_what_is_wrong() -> None:
    with pytest.raises(RuntimeError, match=r"mm: b must be \[k, n\] for a of \[m, k\]"):
        fused.mm(torch.randn(2, 3), torch.randn(2, 3))
    with pytest.raises(TypeError, match="mm: b must have the dtype of a"):
        fused.mm(torch.randn(2, 3), torch.randn(3, 2).double())


def test_without_noise_a_tangent_is_the_derivative_alone(device: torch.device) -> None:
    x, tangent = torch.randn(2, 5, 7, device=device).unbind()
    weight = torch.randn(6, 7, device=device)
    common = (weight, None, noise_state(device), 0, "tanh", "none")
    y, ty, _ = fused.linear(x, tangent, *common)
    torch.testing.assert_close(ty, (1 - y.square()) * (tangent @ weight.t()), rtol=1e-4, atol=1e-5)
    assert not fused.linear(x, None, *common)[1].any()
    with pytest.raises(ValueError, match="noise must be one of gaussian, rademacher; got 'none'"):
        fused.perturb(y, None, noise_state(device), 0, "none")


def test_an_operator_takes_no_dual_tensor() -> None:
    """It would return no tangent, without a word."""
    x, weight, state = torch.randn(2, 3), torch.randn(4, 3), noise_state(torch.device("cpu"))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        with pytest.raises(RuntimeError, match="linear: x must be no dual tensor"):
            fused.linear(dual, None, weight, None, state, 0, "relu", "gaussian")


def test_local_gradient_is_that_of_torch(device: torch.device) -> None:
    """The gradient that `pre` receives reaches weight and bias as autograd's own would; x gets none."""
    x = torch.randn(6, 4, 5, device=device, requires_grad=True)
    weight = torch.randn(3, 5, device=device, requires_grad=True)
    bias = torch.randn(3, device=device, requires_grad=True)
    y, ty, pre = fused.linear(x, x.detach(), weight, bias, noise_state(device), 0, "relu", "gaussian")
    assert not y.requires_grad
    assert not ty.requires_grad
    delta = torch.randn_like(y)
    expected = torch.autograd.grad(torch.nn.functional.linear(x, weight, bias), [weight, bias], delta)
    pre.backward(delta)
    assert x.grad is None
    torch.testing.assert_close((weight.grad, bias.grad), expected)


def test_local_gradient_of_a_convolution_is_that_of_torch(device: torch.device) -> None:
    x = torch.randn(5, 4, 8, 8, device=device)
    weight = torch.randn(6, 2, 3, 3, device=device, requires_grad=True)
    bias = torch.randn(6, device=device, requires_grad=True)
    geometry = ((2, 1), (1, 0), (1, 2), 2)
    rest = (*geometry, noise_state(device), 0, "relu", "gaussian")
    _, _, pre, _ = fused.conv2d(x, x, weight, bias, *rest)
    delta = torch.randn(pre.shape, device=device)
    expected = torch.autograd.grad(
        torch.nn.functional.conv2d(x, weight, bias, *geometry), [weight, bias], delta
    )
    pre.backward(delta)
    torch.testing.assert_close((weight.grad, bias.grad), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "checks",
    [
        ("test_schema", "test_autograd_registration", "test_faketensor"),
        pytest.param(("test_aot_dispatch_dynamic",), marks=pytest.mark.slow),
    ],
    ids=["schema", "compiled"],
)
def test_opcheck(device: torch.device, checks: tuple[str, ...]) -> None:
    opcheck = functools.partial(torch.library.opcheck, test_utils=checks)
    state = noise_state(device)
    for requires_grad in (False, True):
        x, weight, bias = (
            torch.randn(*shape, device=device, requires_grad=requires_grad)
            for shape in ((5, 3, 8), (6, 8), (6,))
        )
        images = torch.randn(4, 3, 9, 8, device=device)
        kernel = torch.randn(5, 3, 3, 3, device=device, requires_grad=requires_grad)
        for activation in ("relu", "gelu"):
            for t in (None, x.detach()):
                args = (x, t, weight, bias, state, 0, activation, "gaussian")
                opcheck(fused.linear.default, args)
            geometry = ((1, 2), (1, 0), (1, 1), 1)
            args = (images, images, kernel, None, *geometry, state, 0, activation, "gaussian")
            opcheck(fused.conv2d.default, args)
    for y in (torch.randn(4, 9, device=device), images):
        opcheck(fused.perturb.default, (y, y, state, 1, "gaussian"))
        opcheck(fused.dual_activation.default, (y.detach().requires_grad_(), y.detach(), "silu"))
    opcheck(fused.next_noise.default, (state.clone(),))
    x, weight = (torch.randn(*size, device=device, requires_grad=True) for size in ((6, 4), (4,)))
    zeros, ones = torch.zeros(4, device=device), torch.ones(4, device=device)
    for t, out in ((x.detach(), torch.empty(6, 4, device=device)), (None, None)):
        noise = "gaussian" if t is not None else "none"
        rest = (True, 0.1, 1e-5, state, 0, "relu", noise)
        for counter in (None, torch.tensor(3, device=device)):
            running = (zeros.clone(), ones.clone(), counter)
            opcheck(fused.batch_norm.default, (x, t, out, weight, None, *running, *rest))
    args = (x.detach(), x.detach(), weight.detach(), zeros, ones, True)
    opcheck(fused.batch_norm_backward.default, args)
    for a in (torch.randn(4, 9, device=device), torch.randn(9, 4, device=device).t()):
        opcheck(fused.mm.default, (a, torch.randn(9, 5, device=device)))
    pool = ((2, 3), (2, 1), (1, 0))
    opcheck(fused.max_pool2d.default, (images, images, *pool))
    for anchor in (images, images.clone().requires_grad_()):
        for t in (None, images):
            args = (images, t, anchor, *pool, state, 0, "gaussian")
            opcheck(fused.max_pool2d_end.default, args)
    kernel = torch.randn(6, images.shape[1], 2, 2, device=device)
    for leaf in (kernel, kernel.clone().requires_grad_()):
        for t in (None, images):
            noise = "none" if t is None else "gaussian"
            rest = ((1, 1), (0, 0), (1, 1), 1, state, 0, "gelu", noise, sum(pool, ()))
            opcheck(fused.conv2d.default, (images, t, leaf, None, *rest))
    channels = images.shape[1]
    norm = (torch.ones(channels, device=device), None, zeros.new_zeros(channels))
    ordered = images.contiguous(memory_format=torch.channels_last)
    for leaf in (ordered, ordered.clone().requires_grad_()):
        for t in (None, ordered):
            noise = "none" if t is None else "gaussian"
            rest = (torch.ones(channels, device=device), None, True, 0.1, 1e-5, state, 0, "gelu", noise)
            args = (leaf, t, None, *norm, *rest, sum(pool, ()))
            opcheck(fused.batch_norm.default, args)
    delta, _, _, winners = fused.max_pool2d_end(images, None, images, *pool, state, 0, "none")
    args = (delta, winners, images.shape[2:], *pool)
    opcheck(fused.max_pool2d_backward.default, args)
    for saved_activation in (
        torch.randn(4, 9, device=device),
        images.contiguous(memory_format=torch.channels_last),
    ):
        order = torch.channels_last if saved_activation.dim() == 4 else torch.contiguous_format
        feedback = torch.randn(3, *saved_activation.shape[1:], device=device).contiguous(
            memory_format=order
        )
        moments = ([torch.rand_like(feedback)], [torch.rand_like(feedback)])
        error = torch.randn(4, 3, device=device)
        rest = ([1], ["relu"], "gaussian", 1.0)
        for follows in (
            (error, [saved_activation], [], state),
            (None, [saved_activation], [saved_activation], None),
        ):
            for adam in ((*moments, torch.tensor([1], device=device)), ([], [], None)):
                numbers = (RATE, 0.9, 0.999, 1e-8)
                args = (
                    [feedback],
                    *adam,
                    error,
                    *follows,
                    *rest,
                    *numbers,
                    [torch.empty_like(saved_activation)],
                )
                sums = [] if saved_activation.dim() == 4 else [torch.empty(9, device=device)]
                opcheck(fused.feedback_step.default, (*args, sums))
            opcheck(fused.feedback_gradient.default, ([feedback], error, *follows, *rest))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_runs_the_product_in_its_dtype_and_keeps_float32_weights(
    device: torch.device, dtype: torch.dtype
) -> None:
    x = torch.randn(6, 8, device=device)
    weight = torch.randn(4, 8, device=device, requires_grad=True)
    kernel = torch.randn(4, 2, 1, 1, device=device, requires_grad=True)
    state = noise_state(device)
    with torch.autocast(device.type, dtype):
        y, ty, pre = fused.linear(x, x, weight, None, state, 0, "relu", "gaussian")
        images = x.view(6, 2, 2, 2)
        y2, _, pre2, _ = fused.conv2d(
            images, images, kernel, None, (1, 1), (0, 0), (1, 1), 1, state, 0, "relu", "gaussian"
        )
    assert y.dtype == ty.dtype == y2.dtype == dtype
    pre.backward(torch.ones_like(y))
    pre2.backward(torch.ones_like(y2))
    assert weight.grad.dtype == kernel.grad.dtype == torch.float32
    assert weight.grad.abs().sum() > 0


def test_bad_arguments_name_the_operator_and_the_argument(device: torch.device) -> None:
    state = noise_state(device)
    x, weight = torch.randn(3, 5, device=device), torch.randn(4, 5, device=device)
    good = {
        "x": x, "tangent": x, "weight": weight, "bias": None, "noise_state": state,
        "block": 0, "activation": "relu", "noise": "gaussian",
    }  # fmt: skip
    for change, error, message in (
        ({"x": x[:, :4]}, RuntimeError, r"fdfa::linear: x must be \[N, \*, 5\]; got \[3, 4\]"),
        ({"x": x.double()}, TypeError, r"fdfa::linear: x must be float32, bfloat16 or float16; got Double"),
        ({"tangent": x[:2]}, RuntimeError, r"fdfa::linear: tangent must have shape \[3, 5\]; got \[2, 5\]"),
        ({"weight": weight.half()}, TypeError, "fdfa::linear: weight must have the dtype of x, Float; got Half"),
        ({"bias": x[0]}, RuntimeError, r"fdfa::linear: bias must have shape \[4\]; got \[5\]"),
        ({"noise_state": state[:2]}, RuntimeError, r"fdfa::linear: noise_state must be .* \[3\]; got"),
        ({"activation": "swish"}, ValueError, "fdfa::linear: activation must be one of identity, .*; got 'swish'"),
        ({"noise": "cauchy"}, ValueError, "fdfa::linear: noise must be one of gaussian, rademacher, none; got 'cauchy'"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            fused.linear(**{**good, **change})


@pytest.mark.parametrize("n", [5, 128, 129, 600])
def test_a_result_and_its_tangent_are_multiplied_as_any_two_tensors(
    device: torch.device, n: int
) -> None:
    """Where they lie one behind the other, one product takes both."""
    weights = torch.randn(2, 300, 300, device=device) / 300**0.5
    state = noise_state(device)
    y, ty, _ = fused.linear(
        torch.randn(n, 300, device=device), None, weights[0], None, state, 0, "tanh", "gaussian"
    )
    for t in (y, ty):
        assert t.untyped_storage().nbytes() == t.nbytes, "results of an operator share no storage"
    together, apart = (
        fused.linear(*operands, weights[1], None, state, 1, "tanh", "gaussian")
        for operands in ((y, ty), (y.clone(), ty.clone()))
    )
    for actual, expected in zip(together, apart, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_dual_activation_is_the_activation_and_its_derivative(
    device: torch.device, dtype: torch.dtype, activation: str
) -> None:
    """In any memory order, with the gradient of the activation."""
    orders = (lambda t: t, lambda t: t.mT, lambda t: t[:, ::2], lambda t: t[0, 0], lambda t: t[:0])
    for order in orders:
        x, tangent, error = (order(rand(3, 8, 1031, dtype=dtype, device=device)) for _ in range(3))
        if activation in ("relu", "leaky_relu"):  # away from the kink
            x = x + 0.1 * x.sign()
        x.requires_grad_()
        y, ty = fused.dual_activation(x, tangent, activation)
        exact, exact_tangent = reference.dual_activation(*as_double(x, tangent), activation)
        assert_close(y, exact, dtype)
        assert_close(ty, exact_tangent, dtype, scale=4.0)
        assert not ty.requires_grad
        y.backward(error)
        gradient = reference.dual_activation(*as_double(x, error), activation)[1]
        assert_close(x.grad, gradient, dtype, scale=4.0)


def test_dual_activation_of_many_dimensions_and_of_one_number(device: torch.device) -> None:
    for shape in ((), (1,), (2, 3, 4, 5, 6)):
        x, tangent = torch.randn(2, *shape, device=device).unbind()
        y, ty = fused.dual_activation(x, tangent, "tanh")
        torch.testing.assert_close(y, x.tanh())
        torch.testing.assert_close(ty, tangent * (1 - x.tanh() ** 2))


def test_second_derivatives_of_dual_activation(device: torch.device) -> None:
    x = torch.randn(6, device=device, requires_grad=True)
    for name, function in (
        ("silu", torch.nn.functional.silu),
        ("gelu", torch.nn.functional.gelu),
        ("tanh", torch.tanh),
    ):
        found = []
        for y in (fused.dual_activation(x, torch.ones_like(x), name)[0], function(x)):
            (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            found += torch.autograd.grad(gradient.square().sum(), x)
        torch.testing.assert_close(*found)


def test_dual_activation_lays_out_its_results_as_torch_does(device: torch.device) -> None:
    x = torch.randn(2, 3, 4, 6, device=device).to(memory_format=torch.channels_last)[:, :, ::2]
    for t in fused.dual_activation(x, x, "gelu"):
        assert t.stride() == torch.nn.functional.gelu(x).stride()


def test_dual_activation_refuses_what_it_cannot_do(device: torch.device) -> None:
    x = torch.randn(3, 5, device=device)
    for arguments, error, message in (
        ((x.double(), x, "tanh"), TypeError, "fdfa::dual_activation: x must be float32, .*; got Double"),
        ((x, x.half(), "tanh"), TypeError, "dual_activation: tangent must have the dtype of x, Float; got Half"),
        ((x, x[:2], "tanh"), RuntimeError, r"dual_activation: tangent must have shape \[3, 5\]; got \[2, 5\]"),
        ((x, x, "swish"), ValueError, "dual_activation: activation must be one of identity, .*; got 'swish'"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            fused.dual_activation(*arguments)


@pytest.mark.parametrize(("n", "features", "outputs"), [(4, 6, 3), (64, 512, 300)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_dual_linear_is_linear_twice(
    device: torch.device, n: int, features: int, outputs: int, with_bias: bool
) -> None:
    """Small and large ones, which different libraries compute; with torch's gradients."""
    x, tangent = torch.randn(2, n, features, device=device).unbind()
    weight = (torch.randn(outputs, features, device=device) / features**0.5).requires_grad_()
    bias = torch.randn(outputs, device=device, requires_grad=True) if with_bias else None
    error = torch.randn(n, outputs, device=device)
    y, ty = fused.dual_linear(x, tangent, weight, bias)
    assert not ty.requires_grad
    inputs = [weight] if bias is None else [weight, bias]
    expected = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ty, tangent @ weight.detach().t(), rtol=1e-4, atol=1e-4)
    for actual, gradient in zip(
        torch.autograd.grad(y, inputs, error), torch.autograd.grad(expected, inputs, error), strict=True
    ):
        torch.testing.assert_close(actual, gradient, rtol=1e-4, atol=1e-4)


def test_products_take_what_torch_takes_and_refuse_other_tangents() -> None:
    x, weight = torch.randn(3, 5), torch.randn(5)
    torch.testing.assert_close(fused.product(x, weight, None), torch.nn.functional.linear(x, weight))
    with pytest.raises(
        RuntimeError, match=r"dual_linear: tangent must have shape \[3, 5\]; got \[2, 5\]"
    ):
        fused.dual_linear(x, x[:2], torch.randn(4, 5), None)


def test_random_arguments_of_every_operator() -> None:
    """The first cases of `python -m fuzz.operators`."""
    calls = fuzz.run(cases=1000, seed=0)
    assert set(calls) == fuzz.all_operators()


@contextmanager
def suppress_and_note(messages: list[str]) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, TypeError, ValueError) as error:
        messages.append(str(error))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool], ids=str)
def test_numbers_that_are_not_real_are_refused_in_an_operators_name(dtype: torch.dtype) -> None:
    """One argument at a time. `mm` takes and refuses what torch does, in torch's words."""
    messages: dict[str, list[str]] = {}
    for number in range(6 * len(fuzz.OPERATORS)):
        case = list(fuzz.OPERATORS.values())[number % len(fuzz.OPERATORS)](fuzz.Source(number))
        if case.operator == "mm":
            continue
        for i, argument in enumerate(case.args):
            if not isinstance(argument, torch.Tensor) or not argument.is_floating_point():
                continue
            args = [*case.args[:i], argument.to(dtype), *case.args[i + 1 :]]
            with suppress_and_note(messages.setdefault(case.operator, [])):
                getattr(fused, case.operator)(*args)
    assert {operator for operator, said in messages.items() if said} == fuzz.all_operators() - {
        "mm",
        "next_noise",
    }
    for operator, said in messages.items():
        assert all("fdfa::" in message for message in said), (operator, said)

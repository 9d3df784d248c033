"""Every operator computes what the reference in plain torch defines."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from fdfa_ext import reference
from fdfa_ext._ops import fused
from fdfa_ext.functional import ACTIVATIONS, NOISES

# Against the reference in float32 on the same rounded inputs. A 16-bit result is off by its own
# rounding (half a unit in the last place of bfloat16 is 2⁻⁹ of the value); where the derivative is
# taken from a rounded activation, that adds as much again.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
DTYPES = list(TOLERANCE)
RATE = torch.tensor(0.1, dtype=torch.double)
SHAPES = [(1, 1, 1), (2, 3, 5), (5, 129, 151), (33, 8, 64), (0, 4, 6), (3, 4, 0)]


def noise_state(device: torch.device, step: int = 5, first_sample: int = 3) -> Tensor:
    return torch.tensor([-7_777_777_777_777, step, first_sample], device=device)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
    """|actual - expected| ≤ tolerance · (|expected| + scale)."""
    assert actual.shape == expected.shape
    assert actual.dtype == dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=tolerance, atol=tolerance * scale, check_stride=False
    )


def rand(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def as_double(*values: Tensor | None) -> list[Tensor | None]:
    return [None if value is None else value.double() for value in values]


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
            y, ty, _ = fused.conv2d(x, t, weight, bias, *common)
            y2, ty2, _ = reference.conv2d(*as_double(x, t, weight, bias), *common)
            assert_close(y, y2, dtype)
            assert_close(ty, ty2, dtype, scale=4.0)
            assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(9, 5), (64, 3), (6, 15, 5, 4), (2, 40, 9, 30), (1, 1, 2, 1)])
def test_batch_norm_is_the_reference(
    device: torch.device, activation: str, training: bool, affine: bool, shape: tuple[int, ...]
) -> None:
    """Results, running statistics and the gradients of x, weight and bias; far from the origin too."""
    channels = shape[1]
    order = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    upstream = torch.randn(shape, device=device)
    for tangent in (None, torch.randn(shape, device=device).contiguous(memory_format=order)):
        x = (torch.randn(shape, device=device) * 2 + 7).contiguous(memory_format=order)
        weight = torch.rand(channels, device=device) + 0.5 if affine else None
        bias = torch.randn(channels, device=device) if affine else None
        running = (
            torch.full((channels,), 6.5, device=device),
            torch.rand(channels, device=device) + 3,
        )
        results = []
        for backend, dtype in ((fused, torch.float32), (reference, torch.float64)):
            leaves = [
                None if t is None else t.to(dtype, copy=True).requires_grad_()
                for t in (x, weight, bias)
            ]
            t = None if tangent is None else tangent.to(dtype, copy=True)
            statistics = [value.to(dtype, copy=True) for value in running]
            ty = torch.empty_like(leaves[0]) if t is None else t
            y, pre = backend.batch_norm(
                leaves[0],
                t,
                ty,
                *leaves[1:],
                *statistics,
                training,
                0.1,
                1e-5,
                noise_state(device),
                3,
                activation,
                "gaussian",
            )[:2]
            pre.backward(upstream.to(dtype))
            results.append([y, ty, *statistics, *[leaf.grad for leaf in leaves if leaf is not None]])
            smooth = (
                pre.detach().abs() > 0.01
                if activation in ("relu", "leaky_relu")
                else torch.ones(shape, device=device) > 0
            )
        for actual, expected in zip(*results, strict=True):
            if expected.shape == shape:
                actual, expected = actual[smooth], expected[smooth]
            # Two values a channel are normalised to ±1: their gradients are zero but for rounding.
            torch.testing.assert_close(
                actual.double(), expected, rtol=2e-5, atol=5e-5, check_stride=False
            )


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [
        ((2, 2), (2, 2), (0, 0)),
        ((3, 3), (2, 2), (1, 1)),
        ((3, 2), (1, 3), (1, 0)),
        ((5, 7), (1, 1), (2, 3)),
    ],
)
def test_max_pool2d_is_the_reference(
    kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], device: torch.device
) -> None:
    """Equal values, whose first one wins, and NaN included."""
    for shape in ((3, 15, 9, 8), (1, 1, 5, 7), (0, 4, 6, 7)):
        x, tangent = torch.randn(2, *shape, device=device).mul(3).unbind()
        x = x.round()
        if x.numel():
            x[0, 0, 2, 3] = torch.nan
        for order in (torch.contiguous_format, torch.channels_last):
            args = (x.contiguous(memory_format=order), tangent, kernel, stride, padding)
            for actual, expected in zip(
                fused.max_pool2d(*args), reference.max_pool2d(*args), strict=True
            ):
                torch.testing.assert_close(
                    actual, expected, rtol=0, atol=0, equal_nan=True, check_stride=False
                )


@pytest.mark.parametrize("channels", [1, 4, 11, 15, 16, 40])
@pytest.mark.parametrize(
    "geometry", [((2, 2), (2, 2), (0, 0)), ((3, 3), (2, 2), (1, 1)), ((2, 3), (3, 1), (0, 1))]
)
@pytest.mark.parametrize("with_tangent", [False, True])
@pytest.mark.parametrize("noise", ["gaussian", "rademacher", "none"])
def test_max_pool2d_end_is_the_reference(
    device: torch.device, channels: int, geometry: Any, with_tangent: bool, noise: str
) -> None:
    """Also its gradient, which goes to the handle's winners, with equal values and NaN among them."""
    x, tangent, handle = torch.randn(3, 3, channels, 9, 8, device=device).unbind()
    x, tangent = x.mul(3).round(), tangent if with_tangent else None
    x[0, 0, 2, 3] = torch.nan
    results = []
    for ops in (fused, reference):
        leaf = handle.clone().requires_grad_()
        y, ty, pre, winners = ops.max_pool2d_end(
            x, tangent, leaf, *geometry, noise_state(device), 2, noise
        )
        delta = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(device)
        pre.backward(delta)
        dx = ops.max_pool2d_backward(delta, winners, x.shape[2:], *geometry)
        results.append((y, ty, winners, leaf.grad, dx))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(
            actual, expected, rtol=1e-6, atol=1e-6, equal_nan=True, check_stride=False
        )


@pytest.mark.parametrize("channels", [1, 4, 15])
@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_max_pool2d_end_perturbs_as_perturb_does(
    device: torch.device, channels: int, noise: str
) -> None:
    """To the last bit: the feedback step makes the same noise again."""
    x, tangent = torch.randn(2, 3, channels, 9, 7, device=device).unbind()
    state, geometry = noise_state(device), ((3, 2), (2, 1), (1, 0))
    for t in (None, tangent):
        y, plain, *_ = fused.max_pool2d_end(x, t, x, *geometry, state, 2, "none")
        ty = fused.max_pool2d_end(x, t, x, *geometry, state, 2, noise)[1]
        assert torch.equal(ty, fused.perturb(y, None if t is None else plain, state, 2, noise))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pool", [((2, 2), (2, 2), (0, 0)), ((3, 2), (1, 3), (1, 0))])
def test_batch_norm_max_pool2d_is_batch_norm_and_a_pool(
    device: torch.device, activation: str, training: bool, pool: tuple[Any, ...]
) -> None:
    """The operators alone are held to the reference; gradients and running statistics included."""
    for shape in ((2, 15, 9, 8), (5, 3, 6, 7)):
        x, tangent = torch.randn(2, *shape, device=device).unbind()
        x, tangent = (t.contiguous(memory_format=torch.channels_last) for t in (x, tangent))
        for t, noise in ((None, "none"), (None, "gaussian"), (tangent, "none"), (tangent, "gaussian")):
            results = []
            for pooled_at_once in (True, False):
                leaves = [
                    p.clone().requires_grad_()
                    for p in (x, torch.linspace(0.5, 2, shape[1], device=device), x[0, :, 0, 0])
                ]
                running = [torch.zeros(shape[1], device=device), torch.ones(shape[1], device=device)]
                rest = (*running, training, 0.1, 1e-5, noise_state(device), 3, activation, noise)
                if pooled_at_once:
                    y, pre, _, _, *pooled = fused.batch_norm_max_pool2d(
                        leaves[0], t, *leaves[1:], *rest, *pool
                    )
                else:
                    ty = torch.empty_like(x)
                    y, pre, *_ = fused.batch_norm(leaves[0], t, ty, *leaves[1:], *rest)
                    pooled = fused.max_pool2d(y, ty, *pool)
                pre.backward(torch.ones_like(y).cumsum(-1))
                results.append((y, *pooled, *running, *[leaf.grad for leaf in leaves]))
            for actual, expected in zip(*results, strict=True):
                torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
@pytest.mark.parametrize("pool", [((2, 2), (2, 2), (0, 0)), ((3, 2), (1, 3), (1, 0))])
def test_conv2d_max_pool2d_is_the_reference(
    device: torch.device, activation: str, pool: tuple[Any, ...]
) -> None:
    """The block's own output and the pool after it; δ reaches weight and bias as through conv2d."""
    for n, channels in ((1, 4), (5, 15), (0, 3)):
        x, tangent = torch.randn(2, n, 4, 9, 7, device=device).unbind()
        weight, bias = (
            torch.randn(channels, 4, 3, 3, device=device) / 6,
            torch.randn(channels).to(device),
        )
        rest = ((1, 1), (1, 0), (1, 1), 1, noise_state(device), 3, activation)
        for t, noise in ((None, "none"), (None, "gaussian"), (tangent, "none"), (tangent, "gaussian")):
            results = []
            for ops, dtype in ((fused, torch.float32), (reference, torch.float64)):
                w, b = (p.to(dtype, copy=True).requires_grad_() for p in (weight, bias))
                given = (x.to(dtype), None if t is None else t.to(dtype))
                y, pre, *pooled = ops.conv2d_max_pool2d(*given, w, b, *rest, noise, *pool)
                pre.backward(torch.ones_like(pre))
                results.append((y, *pooled, w.grad, b.grad))
            for actual, expected in zip(*results, strict=True):
                torch.testing.assert_close(
                    actual.double(), expected, rtol=1e-4, atol=1e-4, check_stride=False
                )


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


def test_max_pool2d_says_what_is_wrong() -> None:
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(RuntimeError, match=r"max_pool2d: x must be \[N, C, H, W\]"):
        fused.max_pool2d(x[0], x[0], (2, 2), (2, 2), (0, 0))
    with pytest.raises(RuntimeError, match="no larger than the padded image"):
        fused.max_pool2d(x, x, (5, 2), (2, 2), (0, 0))
    with pytest.raises(RuntimeError, match="tangent must have shape"):
        fused.max_pool2d(x, x[:1], (2, 2), (2, 2), (0, 0))
    with pytest.raises(RuntimeError, match="height, width, kernel and stride must be positive"):
        fused.max_pool2d(x[:, :, :0], x[:, :, :0], (2, 2), (2, 2), (1, 0))
    huge = torch.empty(1, 1, 1, 1).expand(1, 2**16, 2**15, 1)
    with pytest.raises(RuntimeError, match=r"less than 2\^31 elements"):
        fused.max_pool2d(huge, huge, (1, 1), (1, 1), (0, 0))


def test_winners_are_checked() -> None:
    x = torch.randn(2, 3, 32, 32)
    state, geometry = noise_state(torch.device("cpu")), ((2, 2), (2, 2), (0, 0))
    with pytest.raises(RuntimeError, match="max_pool2d_end: a window must have at most 256 places"):
        fused.max_pool2d_end(x, x, x, (16, 17), (1, 1), (0, 0), state, 0, "gaussian")
    y, _, _, winners = fused.max_pool2d_end(x, x, x, *geometry, state, 0, "gaussian")
    for delta, places, size, message in (
        (y, winners.int(), (32, 32), "winners must be uint8"),
        (y, winners[:1], (32, 32), "winners must have shape"),
        (y, winners, (34, 32), "delta must have shape"),
        (y[0], winners, (32, 32), r"delta must be \[N, C, H', W'\] in float32"),
        (y.double(), winners, (32, 32), r"delta must be \[N, C, H', W'\] in float32"),
    ):
        with pytest.raises((RuntimeError, TypeError), match=f"max_pool2d_backward: {message}"):
            fused.max_pool2d_backward(delta, places, size, *geometry)
    # What is no place of the window moves nothing.
    assert not fused.max_pool2d_backward(y, winners.fill_(255), (32, 32), *geometry).any()


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_backward_is_the_reference(device: torch.device, training: bool) -> None:
    delta, x = torch.randn(2, 6, 5, 4, 3, device=device).unbind()
    x = (x + 3).contiguous(memory_format=torch.channels_last)
    for weight in (None, torch.randn(5, device=device)):
        # Any statistics will do for constants; those of the batch for the rest.
        mean, inverse_std = torch.randn(5, device=device), torch.rand(5, device=device) + 0.5
        if training:
            mean, inverse_std = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0).rsqrt()
        results = fused.batch_norm_backward(delta, x, weight, mean, inverse_std, training)
        expected = reference.batch_norm_backward(
            *as_double(delta, x, weight, mean, inverse_std), training
        )
        for actual, value in zip(results, expected, strict=True):
            torch.testing.assert_close(actual.double(), value, rtol=1e-5, atol=2e-5, check_stride=False)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_counts_the_batches_whose_statistics_it_takes(
    device: torch.device, training: bool
) -> None:
    x = torch.randn(4, 3, 6, 6, device=device).contiguous(memory_format=torch.channels_last)
    running = (torch.zeros(3, device=device), torch.ones(3, device=device))
    for ops in (fused, reference):
        counter = torch.tensor(5, device=device)
        rest = (*running, training, 0.1, 1e-5, noise_state(device), 0, "relu", "gaussian")
        ty = torch.empty_like(x)
        ops.batch_norm(x, None, ty, None, None, *rest, num_batches_tracked=counter)
        assert counter == (6 if training else 5)
        pool = ((2, 2), (2, 2), (0, 0))
        ops.batch_norm_max_pool2d(x, None, None, None, *rest, *pool, num_batches_tracked=counter)
        assert counter == (7 if training else 5)


def test_batch_norm_backward_of_an_empty_batch_is_zero(device: torch.device) -> None:
    x, ones = torch.ones(0, 3, device=device), torch.ones(3, device=device)
    dx, dweight, dbias = fused.batch_norm_backward(x, x, ones, ones, ones, False)
    assert dx.shape == x.shape
    assert not dweight.any()
    assert not dbias.any()


def test_batch_norm_says_what_is_wrong_and_leaves_the_statistics_alone() -> None:
    state = noise_state(torch.device("cpu"))

    def run(x: Tensor, mean: Tensor, training: bool = True, counter: Tensor | None = None) -> None:
        statistics = (mean, torch.ones(3), training, 0.1, 1e-5)
        ty = torch.empty_like(x)
        fused.batch_norm(x, None, ty, None, None, *statistics, state, 0, "relu", "gaussian", counter)

    mean = torch.zeros(3)
    with pytest.raises(RuntimeError, match=r"batch_norm: x must be \[N, C\].*channels_last"):
        run(torch.randn(2, 3, 4, 4), mean)
    with pytest.raises(RuntimeError, match=r"batch_norm: x must be float32; got Double"):
        run(torch.randn(4, 3, dtype=torch.double), mean)
    with pytest.raises(RuntimeError, match="x must have channels"):
        run(torch.randn(4, 0), torch.zeros(0))
    with pytest.raises(RuntimeError, match="more than one value a channel"):
        run(torch.randn(1, 3), mean)
    with pytest.raises(RuntimeError, match=r"running_mean must have shape \[3\]; got \[4\]"):
        run(torch.randn(4, 3), torch.zeros(4))
    with pytest.raises(RuntimeError, match="num_batches_tracked must be one int64 on cpu; got Float"):
        run(torch.randn(4, 3), mean, counter=torch.zeros(1))
    assert not mean.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("shape", [(3, 7), (2, 5, 6), (2, 3, 4, 5), (0, 3), (2, 4099)])
def test_perturb_is_the_reference(
    device: torch.device, dtype: torch.dtype, noise: str, shape: tuple[int, ...]
) -> None:
    y = rand(*shape, dtype=dtype, device=device)
    for tangent in (None, rand(*shape, dtype=dtype, device=device)):
        actual = fused.perturb(y, tangent, noise_state(device), 1, noise)
        expected = reference.perturb(*as_double(y, tangent), noise_state(device), 1, noise)
        assert_close(actual, expected, dtype)


def feedback_step(
    ops: Any,
    matrices: Sequence[Tensor],
    updates: Tensor | None,
    gate: Tensor,
    *common: Any,
    output: Tensor | None = None,
    decay: float = 1.0,
) -> Tensor:
    """δ of one block. matrices: B and its moments, of which only B moves without `updates`.

    common: error, tangent, noise_state, block, activation, noise.
    """
    error, tangent, state, block, activation, noise = common
    outputs = [] if output is None else [output]
    feedback, *moments = [[m] for m in matrices] if updates is not None else [[matrices[0]], [], []]
    order = torch.channels_last if not matrices[0].is_contiguous() else torch.contiguous_format
    delta = torch.empty_like(gate, memory_format=order)
    numbers = (decay, RATE, 0.9, 0.999, 1e-8)
    rest = (error, tangent, [gate], outputs, state, [block], [activation], noise, *numbers, [delta])
    biased = gate.dim() == 2
    bias_grads = [torch.full(gate.shape[1:], torch.nan, device=gate.device)] if biased else []
    output_bias_grad = torch.full(error.shape[1:], torch.nan, device=gate.device)
    ops.feedback_step(feedback, *moments, updates, *rest, bias_grads, output_bias_grad)
    torch.testing.assert_close(output_bias_grad, error.float().sum(0), rtol=1e-4, atol=1e-4)
    if biased:
        torch.testing.assert_close(bias_grads[0], delta.float().sum(0), rtol=1e-4, atol=1e-4)
    return delta


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("follows", "rule"),
    [*product(["tangent", "outputs"], ["ema", "adam", "gradient"]), ("nothing", "fixed")],
)
@pytest.mark.parametrize("activation", ["identity", "relu", "sigmoid", "gelu"])
@pytest.mark.parametrize(
    ("shape", "outputs"),
    [
        ((1, 1), 1),
        ((5, 129), 10),
        ((130, 151), 3),
        ((4, 3, 5), 2),
        ((2, 3, 4, 5), 7),
        ((3, 70), 130),
        ((200, 70), 140),  # more than a tile of each
        ((0, 6), 4),
    ],
)
def test_feedback_step_is_the_reference(
    device: torch.device,
    dtype: torch.dtype,
    follows: str,
    rule: str,
    activation: str,
    shape: tuple[int, ...],
    outputs: int,
) -> None:
    """For B as it follows the tangent (FDFA), the blocks' outputs (Kolen-Pollack) or nothing."""
    order = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    gate = rand(*shape, dtype=dtype, device=device)
    error = torch.randn(shape[0], outputs, device=device)
    tangent = torch.randn_like(error) if follows == "tangent" else None
    state = noise_state(device) if follows == "tangent" else None
    y = rand(*shape, dtype=dtype, device=device) if follows == "outputs" else None
    decay = 0.3 if follows == "outputs" else 1.0
    feedback = torch.randn(outputs, *shape[1:], device=device).contiguous(memory_format=order)
    exp_avg = torch.randn_like(feedback)
    exp_avg_sq = torch.rand_like(feedback) + 0.1
    results = []
    for ops in (fused, reference):
        matrices = [feedback.clone(), exp_avg.clone(), exp_avg_sq.clone()]
        if rule == "gradient":
            ys = [] if y is None else [y]
            rest = (error, tangent, [gate], ys, state, [2], [activation], "gaussian", decay)
            (delta,), (gradient,) = ops.feedback_gradient([matrices[0]], *rest)
            assert torch.equal(matrices[0], feedback)
            results.append((delta, gradient))
        else:
            updates = torch.tensor([3], device=device) if rule == "adam" else None
            common = (error, tangent, state, 2, activation, "gaussian")
            delta = feedback_step(ops, matrices, updates, gate, *common, output=y, decay=decay)
            assert updates is None or updates == 4
            assert torch.equal(matrices[0], feedback) == (follows == "nothing" or len(gate) == 0)
            results.append((delta, *matrices))
    (delta, *matrices), (delta2, *matrices2) = results
    for actual, expected in zip(matrices, matrices2, strict=True):
        assert actual.stride() == expected.stride()
        assert_close(actual, expected, torch.float32)
    assert_close(delta, delta2, dtype, scale=outputs**0.5)


def test_strided_inputs_give_the_dense_result(device: torch.device) -> None:
    state = noise_state(device)
    x, tangent = torch.randn(2, 6, 10, device=device).unbind()
    weight = torch.randn(9, 5, device=device)
    strided = (x[:, ::2], tangent[:, ::2])
    dense = [t.contiguous() for t in strided]
    for a, b in zip(
        fused.linear(*strided, weight.t().contiguous().t(), None, state, 0, "relu", "gaussian"),
        fused.linear(*dense, weight, None, state, 0, "relu", "gaussian"),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    gate = torch.randn(9, 6, device=device).t()
    error = torch.randn(4, 6, device=device).t()
    results = []
    for g, e in ((gate, error), (gate.contiguous(), error.contiguous())):
        feedback = torch.zeros(4, 9, device=device)
        delta = feedback_step(fused, [feedback], None, g, e, e, state, 0, "relu", "gaussian")
        results.append((feedback, delta))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("rule", ["ema", "adam"])
def test_a_batch_that_overflowed_leaves_what_it_reached_of_the_feedback_alone(
    device: torch.device, rule: str
) -> None:
    """The rest of B moves as ever: a tangent of inf or NaN at one output reaches one row of B."""
    gate, error = torch.randn(5, 70, device=device), torch.randn(5, 4, device=device)
    tangent = torch.randn(5, 4, device=device)
    tangent[1, 2], tangent[3, 0] = float("inf"), float("nan")
    results = []
    for ops in (fused, reference):
        matrices = list((torch.rand(3, 4, 70, generator=torch.Generator().manual_seed(1))).to(device))
        before = [m.clone() for m in matrices]
        updates = torch.tensor([1], device=device) if rule == "adam" else None
        common = (error, tangent, noise_state(device), 0, "relu", "gaussian")
        results.append([feedback_step(ops, matrices, updates, gate, *common), *matrices])
        for matrix, old in zip(matrices[: 3 if rule == "adam" else 1], before, strict=False):
            assert torch.equal(matrix[[0, 2]], old[[0, 2]])
            assert not (matrix[[1, 3]] == old[[1, 3]]).all(1).any()
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, torch.float32)


def test_the_feedback_step_takes_either_setting_of_tf32(device: torch.device) -> None:
    """torch refuses to read the older one once the newer one differs from it."""
    gate, error = torch.randn(5, 70, device=device), torch.randn(5, 4, device=device)
    feedback = torch.randn(4, 70, device=device)
    rest = (error, error, noise_state(device), 0, "identity", "gaussian")
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    try:
        settings.fp32_precision = "tf32"
        delta = feedback_step(fused, [feedback], None, gate, *rest)
    finally:
        settings.fp32_precision = before
    torch.testing.assert_close(delta, error @ feedback, rtol=1e-2, atol=1e-2)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    state = noise_state(torch.device("cpu"))
    y = torch.randn(40, 5000)
    error = torch.randn(40, 10)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        matrices = torch.zeros(3, 10, 5000).unbind()
        common = (error, error, state, 1, "relu", "gaussian")
        delta = feedback_step(fused, matrices, torch.tensor([0]), y, *common)
        results.append((fused.perturb(y, y, state, 1, "gaussian"), *matrices, delta))
    torch.set_num_threads(1)
    for one, several in zip(*results, strict=True):
        assert torch.equal(one, several)


def test_two_half_batches_are_perturbed_as_one_whole(device: torch.device) -> None:
    y = torch.zeros(6, 11, device=device)
    whole = fused.perturb(y, None, noise_state(device, first_sample=0), 1, "gaussian")
    halves = [
        fused.perturb(y[:3], None, noise_state(device, first_sample=i), 1, "gaussian") for i in (0, 3)
    ]
    assert torch.equal(whole, torch.cat(halves))


def test_philox_words_are_the_published_vectors() -> None:
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]
    for counter_and_key, expected in (
        ([0] * 6, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 6, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (pi, [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ):
        words = [torch.tensor([w]) for w in counter_and_key]
        assert [int(w) for w in reference.philox(words[:4], words[4:])] == expected


def test_signs_come_from_the_reference_words_exactly(device: torch.device) -> None:
    """Rademacher noise shows the top bit of every Philox word: fused and reference make the same integers."""
    y = torch.zeros(7, 1003, device=device)
    for block in (0, 1, 17):
        fused_signs = fused.perturb(y, None, noise_state(device), block, "rademacher")
        assert torch.equal(
            fused_signs, reference.perturb(y, None, noise_state(device), block, "rademacher")
        )


@pytest.mark.parametrize("noise", NOISES)
def test_noise_has_zero_mean_unit_variance_and_is_independent(device: torch.device, noise: str) -> None:
    n, d = 512, 2048
    y = torch.zeros(n, d, device=device)
    streams = [
        fused.perturb(y, None, noise_state(device, step), block, noise).double()
        for step, block in ((0, 0), (0, 1), (1, 0))
    ]
    u = streams[0]
    error = (n * d) ** -0.5
    kurtosis, kurtosis_error = (3.0, 96**0.5 * error) if noise == "gaussian" else (1.0, 1e-12)
    assert abs(u.mean()) < 5 * error
    assert abs(u.pow(2).mean() - 1) < 5 * 2**0.5 * error
    assert abs(u.pow(4).mean() - kurtosis) < 5 * kurtosis_error
    pairs = [
        (u, streams[1]),  # blocks
        (u, streams[2]),  # steps
        (u[1:], u[:-1]),  # samples
        *((u[:, k:], u[:, :-k]) for k in (1, 2, 3, 4)),  # features, within a Philox quad and across
    ]
    for a, b in pairs:
        assert abs((a * b).mean()) < 5 * a.numel() ** -0.5
        # Box-Muller's pairs share a radius: their squares must not be related either.
        assert abs(((a**2 - 1) * (b**2 - 1)).mean()) < 5 * 2 * a.numel() ** -0.5


def test_next_noise_returns_the_state_and_advances_it(device: torch.device) -> None:
    for ops in (fused, reference):
        state = noise_state(device, step=41)
        assert ops.next_noise(state).tolist() == [-7_777_777_777_777, 41, 3]
        assert state.tolist() == [-7_777_777_777_777, 42, 3]


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
    _, _, pre = fused.conv2d(x, x, weight, bias, *geometry, noise_state(device), 0, "relu", "gaussian")
    delta = torch.randn(pre.shape, device=device)
    expected = torch.autograd.grad(
        torch.nn.functional.conv2d(x, weight, bias, *geometry), [weight, bias], delta
    )
    pre.backward(delta)
    torch.testing.assert_close((weight.grad, bias.grad), expected, rtol=1e-4, atol=1e-4)


def test_opcheck(device: torch.device) -> None:
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
                torch.library.opcheck(fused.linear.default, args)
            geometry = ((1, 2), (1, 0), (1, 1), 1)
            args = (images, images, kernel, None, *geometry, state, 0, activation, "gaussian")
            torch.library.opcheck(fused.conv2d.default, args)
    for y in (torch.randn(4, 9, device=device), images):
        torch.library.opcheck(fused.perturb.default, (y, y, state, 1, "gaussian"))
    torch.library.opcheck(fused.next_noise.default, (state.clone(),))
    x, weight = (torch.randn(*size, device=device, requires_grad=True) for size in ((6, 4), (4,)))
    zeros, ones = torch.zeros(4, device=device), torch.ones(4, device=device)
    for t, out in ((x.detach(), torch.empty(6, 4, device=device)), (None, None)):
        running = (zeros.clone(), ones.clone(), True, 0.1, 1e-5)
        noise = "gaussian" if t is not None else "none"
        args = (x, t, out, weight, None, *running, state, 0, "relu", noise)
        for counter in (None, torch.tensor(3, device=device)):
            torch.library.opcheck(fused.batch_norm.default, (*args, counter))
    args = (x.detach(), x.detach(), weight.detach(), zeros, ones, True)
    torch.library.opcheck(fused.batch_norm_backward.default, args)
    for a in (torch.randn(4, 9, device=device), torch.randn(9, 4, device=device).t()):
        torch.library.opcheck(fused.mm.default, (a, torch.randn(9, 5, device=device)))
    pool = ((2, 3), (2, 1), (1, 0))
    torch.library.opcheck(fused.max_pool2d.default, (images, images, *pool))
    for handle in (images, images.clone().requires_grad_()):
        for t in (None, images):
            args = (images, t, handle, *pool, state, 0, "gaussian")
            torch.library.opcheck(fused.max_pool2d_end.default, args)
    kernel = torch.randn(6, images.shape[1], 2, 2, device=device)
    for leaf in (kernel, kernel.clone().requires_grad_()):
        for t in (None, images):
            noise = "none" if t is None else "gaussian"
            rest = ((1, 1), (0, 0), (1, 1), 1, state, 0, "gelu", noise, *pool)
            torch.library.opcheck(fused.conv2d_max_pool2d.default, (images, t, leaf, None, *rest))
    channels = images.shape[1]
    norm = (torch.ones(channels, device=device), None, zeros.new_zeros(channels))
    ordered = images.contiguous(memory_format=torch.channels_last)
    for leaf in (ordered, ordered.clone().requires_grad_()):
        for t in (None, ordered):
            noise = "none" if t is None else "gaussian"
            rest = (torch.ones(channels, device=device), True, 0.1, 1e-5, state, 0, "gelu", noise)
            args = (leaf, t, *norm, *rest, *pool)
            torch.library.opcheck(fused.batch_norm_max_pool2d.default, args)
    delta, _, _, winners = fused.max_pool2d_end(images, None, images, *pool, state, 0, "none")
    args = (delta, winners, images.shape[2:], *pool)
    torch.library.opcheck(fused.max_pool2d_backward.default, args)
    for gate in (
        torch.randn(4, 9, device=device),
        images.contiguous(memory_format=torch.channels_last),
    ):
        order = torch.channels_last if gate.dim() == 4 else torch.contiguous_format
        feedback = torch.randn(3, *gate.shape[1:], device=device).contiguous(memory_format=order)
        moments = ([torch.rand_like(feedback)], [torch.rand_like(feedback)])
        error = torch.randn(4, 3, device=device)
        rest = ([1], ["relu"], "gaussian", 1.0)
        for follows in ((error, [gate], [], state), (None, [gate], [gate], None)):
            for adam in ((*moments, torch.tensor([1], device=device)), ([], [], None)):
                numbers = (RATE, 0.9, 0.999, 1e-8)
                args = ([feedback], *adam, error, *follows, *rest, *numbers, [torch.empty_like(gate)])
                sums = [] if gate.dim() == 4 else [torch.empty(9, device=device)]
                torch.library.opcheck(fused.feedback_step.default, (*args, sums))
            torch.library.opcheck(fused.feedback_gradient.default, ([feedback], error, *follows, *rest))


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
        y2, _, pre2 = fused.conv2d(
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


def test_a_refused_feedback_step_changes_nothing(device: torch.device) -> None:
    """Of two blocks the second one is wrong."""
    gate, error = torch.randn(3, 5, device=device), torch.randn(3, 2, device=device)
    feedback, m, v = (torch.randn(2, 5, device=device) for _ in range(3))
    updates = torch.tensor([1], device=device)
    delta = torch.zeros_like(gate)
    good = {
        "feedback": [feedback, feedback], "exp_avg": [m, m], "exp_avg_sq": [v, v], "updates": updates,
        "error": error, "tangent": error, "gates": [gate, gate], "outputs": [],
        "noise_state": noise_state(device), "blocks": [0, 1], "activations": ["relu", "relu"],
        "noise": "gaussian", "decay": 1.0, "lr": RATE, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8,
        "deltas": [delta, delta], "bias_grads": [],
    }  # fmt: skip
    before = [t.clone() for t in (feedback, m, v, updates, delta)]
    for change, message in (
        ({"tangent": error[:2]}, "tangent must have shape"),
        ({"noise_state": None}, "a tangent needs the noise_state"),
        ({"outputs": [gate, gate]}, "the feedback follows the tangent or the outputs, not both"),
        ({"tangent": None}, "updates without tangent or outputs"),
        ({"tangent": None, "outputs": [gate]}, "outputs must have one entry for each of 2 blocks; got 1"),
        ({"tangent": None, "outputs": [gate, gate[:2]]}, r"output must have shape \[3, 5\]"),
        ({"gates": [gate, gate[:2]]}, r"gate must be \[3, \*features\]; got \[2, 5\]"),
        ({"gates": [gate]}, "gates must have one entry for each of 2 blocks; got 1"),
        ({"feedback": [feedback, feedback[:, :4]]}, r"feedback must have shape \[2, 5\]"),
        ({"updates": None}, "Adam needs exp_avg, exp_avg_sq and updates"),
        ({"lr": RATE.float()}, "lr must be a float64 scalar on the CPU; got Float"),
        ({"exp_avg": []}, "Adam needs exp_avg, exp_avg_sq and updates"),
        ({"exp_avg_sq": [v, v[:, :4]]}, "exp_avg_sq must have shape"),
        ({"deltas": [delta, delta[:, :4]]}, "delta must have shape"),
        ({"deltas": [delta, torch.zeros(3, 10, device=device)[:, ::2]]}, "delta must have the memory order"),
        ({"bias_grads": [delta[0]]}, "bias_grads must have one entry for each of 2 blocks; got 1"),
        ({"bias_grads": [delta[0], delta[0, :4]]}, r"bias_grads must have shape \[5\]; got \[4\]"),
        ({"output_bias_grad": delta[0]}, r"output_bias_grad must have shape \[2\]; got \[5\]"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="fdfa::feedback_step: " + message):
            fused.feedback_step(**{**good, **change})
        with pytest.raises(ValueError, match="activation must be one of"):
            fused.feedback_step(**{**good, "activations": ["relu", "swish"]})
        for tensor, old in zip((feedback, m, v, updates, delta), before, strict=True):
            assert torch.equal(tensor, old)


def test_blocks_of_several_sizes_and_dtypes_step_as_each_would_alone(device: torch.device) -> None:
    shapes, dtypes = ((4, 3), (4, 2, 5, 5), (4, 200)), (torch.float32, torch.float32, torch.bfloat16)
    activations = ["relu", "identity", "gelu"]
    error, tangent = torch.randn(2, 4, 3, device=device).unbind()
    state = noise_state(device)
    gates = [
        rand(*shape, dtype=dtype, device=device) for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    matrices = [
        [torch.rand(3, *shape[1:], device=device) for shape in shapes] for _ in range(3)
    ]  # B, exp_avg, exp_avg_sq
    alone = [[t.clone() for t in block] for block in zip(*matrices, strict=True)]
    deltas = [torch.empty_like(gate) for gate in gates]
    common = (error, tangent, gates, [], state, [0, 1, 2], activations, "gaussian")
    numbers = (1.0, RATE, 0.9, 0.999, 1e-8)
    sums = [
        torch.empty(3, device=device),
        torch.empty(0, device=device),
        torch.empty(200, device=device),
    ]
    updates = torch.tensor([6], device=device)
    fused.feedback_step(*matrices, updates, *common, *numbers, deltas, sums)
    assert updates == 7
    for i in (0, 2):
        torch.testing.assert_close(sums[i], deltas[i].float().sum(0))
    for i, block in enumerate(alone):
        updates = torch.tensor([6], device=device)
        rest = (error, tangent, state, i, activations[i], "gaussian")
        assert torch.equal(feedback_step(fused, block, updates, gates[i], *rest), deltas[i])
        for actual, expected in zip(block, (kind[i] for kind in matrices), strict=True):
            assert torch.equal(actual, expected)


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


def test_a_transposed_delta_is_the_same() -> None:
    """As the weight gradient takes it."""
    gate, error, tangent = torch.randn(33, 70), *torch.randn(2, 33, 10).unbind()
    deltas = torch.empty(33, 70), torch.empty(70, 33).t()
    sums: list[Tensor] = []
    for delta in deltas:
        follows = (tangent, [gate], [], noise_state(torch.device("cpu")))
        rest = ([1], ["tanh"], "gaussian", 1.0, RATE, 0.9, 0.999, 1e-8, [delta])
        sums.append(torch.empty(70))
        fused.feedback_step([torch.ones(10, 70)], [], [], None, error, *follows, *rest, sums[-1:])
    assert torch.equal(*deltas)
    assert torch.equal(*sums)
    torch.testing.assert_close(sums[0], deltas[0].sum(0))

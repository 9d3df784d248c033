"""Batch-norm and max-pooling compute what the reference in plain torch defines, alone and as one operator."""

from typing import Any

import pytest
import torch
from operands import as_double, noise_state
from torch import Tensor

from fdfa_ext import reference
from fdfa_ext._ops import fused
from fdfa_ext.layers import ACTIVATIONS


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
                None,
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
        rest = (training, 0.1, 1e-5, noise_state(device), 0, "relu", "gaussian")
        for n, (ty, pool) in enumerate([(torch.empty_like(x), None), (None, (2, 2, 2, 2, 0, 0))], 1):
            ops.batch_norm(x, None, ty, None, None, *running, counter, *rest, pool=pool)
            assert counter == (5 + n if training else 5)


def test_batch_norm_backward_of_an_empty_batch_is_zero(device: torch.device) -> None:
    x, ones = torch.ones(0, 3, device=device), torch.ones(3, device=device)
    dx, dweight, dbias = fused.batch_norm_backward(x, x, ones, ones, ones, False)
    assert dx.shape == x.shape
    assert not dweight.any()
    assert not dbias.any()


def test_batch_norm_says_what_is_wrong_and_leaves_the_statistics_alone() -> None:
    state = noise_state(torch.device("cpu"))

    def run(
        x: Tensor, mean: Tensor, training: bool = True, counter: Tensor | None = None, patch: int = 1
    ) -> None:
        statistics = (mean, torch.ones(3), counter, training, 0.1, 1e-5)
        rest = (state, 0, "relu", "gaussian", None, patch)
        fused.batch_norm(x, None, torch.empty_like(x), None, None, *statistics, *rest)

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
    with pytest.raises(ValueError, match="patch must be 1 or more; got 0"):
        run(torch.randn(4, 3), mean, patch=0)
    assert not mean.any()


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
    """Also its gradient, which goes to the anchor's winners, with equal values and NaN among them."""
    x, tangent, anchor = torch.randn(3, 3, channels, 9, 8, device=device).unbind()
    x, tangent = x.mul(3).round(), tangent if with_tangent else None
    x[0, 0, 2, 3] = torch.nan
    results = []
    for ops in (fused, reference):
        leaf = anchor.clone().requires_grad_()
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
    for padding in (2, 2**62, 2**63 - 1):
        with pytest.raises(RuntimeError, match="padding at most half the kernel"):
            fused.max_pool2d(x, x, (3, 3), (2, 2), (padding, 0))
    huge = torch.empty(1, 1, 1, 1).expand(1, 2**16, 2**15, 1)
    with pytest.raises(RuntimeError, match=r"less than 2\^31 elements"):
        fused.max_pool2d(huge, huge, (1, 1), (1, 1), (0, 0))


@pytest.mark.parametrize("wrong", [[], [1], [1, 1, 1]], ids=len)
def test_sides_are_two_numbers(wrong: list[int]) -> None:
    """A schema's int[2] lets lists of any length through."""
    x, state = torch.randn(2, 3, 4, 4), noise_state(torch.device("cpu"))
    ones, zeros = [1, 1], [0, 0]
    for sides in ((wrong, ones, zeros), (ones, wrong, zeros), (ones, ones, wrong)):
        for operator, before, after in (
            (fused.max_pool2d, (x, x), ()),
            (fused.max_pool2d_end, (x, None, x), (state, 0, "none")),
            (fused.max_pool2d_backward, (x, x.byte(), ones), ()),
        ):
            with pytest.raises(RuntimeError, match="kernel, stride and padding must be two numbers"):
                operator(*before, *sides, *after)
    with pytest.raises(RuntimeError, match="input_size must be two numbers"):
        fused.max_pool2d_backward(x, x.byte(), wrong, ones, ones, zeros)
    kernel = torch.randn(4, 3, 1, 1)
    for geometry in ((wrong, zeros, ones), (ones, wrong, ones), (ones, zeros, wrong)):
        with pytest.raises(RuntimeError, match="conv2d: stride, padding and dilation must be two"):
            fused.conv2d(x, None, kernel, None, *geometry, 1, state, 0, "relu", "none")


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


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pool", [((2, 2), (2, 2), (0, 0)), ((3, 2), (1, 3), (1, 0))])
def test_batch_norm_with_a_pool_is_batch_norm_and_a_pool(
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
                state = noise_state(device)
                rest = (*running, None, training, 0.1, 1e-5, state, 3, activation, noise)
                if pooled_at_once:
                    y, pre, _, _, *pooled = fused.batch_norm(
                        leaves[0], t, None, *leaves[1:], *rest, pool=sum(pool, ())
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
def test_conv2d_with_a_pool_is_the_reference(
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
                y, tangents, pre, pooled = ops.conv2d(*given, w, b, *rest, noise, pool=sum(pool, ()))
                pre.backward(torch.ones_like(pre))
                results.append((y, pooled, tangents, w.grad, b.grad))
            for actual, expected in zip(*results, strict=True):
                torch.testing.assert_close(
                    actual.double(), expected, rtol=1e-4, atol=1e-4, check_stride=False
                )

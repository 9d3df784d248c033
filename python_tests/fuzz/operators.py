"""Random arguments for every fused operator, against the reference in float64 and their own schema.

    python -m fuzz.operators [--cases 5000] [--seed 0] [--case 17]

A failure names seed and case, and `--case` repeats it. Values are of so few digits that products are
exact in every dtype, so that no rounding decides on which side of relu's kink an element is, or who wins
in a pool.
"""

import argparse
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from operands import TOLERANCE
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import fdfa_ext  # noqa: F401  (registers the fake kernels)
from fdfa_ext import reference
from fdfa_ext._ops import fused
from fdfa_ext.patches import patch_shape

ACTIVATIONS = list(reference.ACTIVATIONS)
defined: Any = reference  # mypy does not count arguments of several lists
Check = Callable[[Any], None]


def all_operators() -> set[str]:
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix("fdfa::") for name in names if name.startswith("fdfa::")}


class Source(random.Random):
    """Random shapes, values, and memory orders of tensors."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.values = torch.Generator().manual_seed(seed)

    def one_in(self, n: int) -> bool:
        return self.random() * n < 1

    def coin(self) -> bool:
        return self.random() < 0.5

    def size(self, most: int, least: int = 0) -> int:
        if self.one_in(5):
            return max(least, self.randrange(2))
        return self.randint(max(least, 1), most)

    def dtype(self) -> torch.dtype:
        return self.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16])

    def grid(self, *shape: int, dtype: torch.dtype = torch.float32, most: int = 2) -> Tensor:
        """Quarters from -most / 4 to most / 4: 64 products of two of them have a sum of 8 bits."""
        numbers = torch.randint(-most, most + 1, shape, generator=self.values)
        return (numbers / 4).to(dtype)

    def laid_out(self, t: Tensor, dense: bool = False) -> Tensor:
        """The same values in another memory order, or with its dimensions' order alone if `dense`."""
        kind = self.randrange(3 if dense else 7)
        if kind == 1:  # an offset that is no multiple of a vector
            offset = self.randint(1, 3)
            storage = t.new_empty(t.numel() + offset)
            return storage[offset:].as_strided(t.shape, t.stride()).copy_(t)
        if kind == 2 and t.dim() == 4 and not dense:
            return t.contiguous(memory_format=torch.channels_last)
        if kind in (3, 4) and t.dim() > 1:
            order = self.sample(range(t.dim()), t.dim())
            inverse = [order.index(i) for i in range(t.dim())]
            return t.permute(order).contiguous().permute(inverse)
        if kind == 5 and t.dim() > 0:
            padded = t.new_full([*t.shape[:-1], 2 * t.shape[-1] + 1], 99)
            return padded[..., 1::2].copy_(t)
        if kind == 6 and t.dim() > 0:
            dim = self.randrange(t.dim())
            wide = t.new_full([n + 2 * (i == dim) for i, n in enumerate(t.shape)], 99)
            return wide.narrow(dim, 1, t.shape[dim]).copy_(t)
        return t

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32, most: int = 2) -> Tensor:
        """A grid in any memory order, at times with one value for all of a dimension."""
        t = self.grid(*shape, dtype=dtype, most=most)
        if shape and self.one_in(8):
            dim = self.randrange(len(shape))
            return t.narrow(dim, 0, min(1, shape[dim])).expand(shape)
        return self.laid_out(t)

    def convolved(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """For a convolution: torch 2.13 computes others by strides of dimensions of one element."""
        t = self.tensor(*shape, dtype=dtype)
        return t.clone(memory_format=torch.contiguous_format) if 1 in shape else t

    def maybe(self, make: Callable[[], Tensor]) -> Tensor | None:
        return make() if self.coin() else None

    def images(self, *shape: int, **options: Any) -> Tensor:
        """Dense in channels_last."""
        t = self.grid(*shape, **options).contiguous(memory_format=torch.channels_last)
        return self.laid_out(t, dense=True)

    def dense(self, *shape: int, **options: Any) -> Tensor:
        return self.laid_out(self.grid(*shape, **options), dense=True)

    def noise_state(self) -> Tensor:
        seed = self.randrange(-(2**63), 2**63)
        return torch.tensor([seed, self.randrange(2**33), self.randrange(2**33)])

    def noise(self) -> str:
        return self.choice(["gaussian", "rademacher", "none"])

    def block(self) -> int:
        return self.choice([0, 1, self.randrange(2**20)])

    def window(self, height: int, width: int, most: int = 4) -> tuple[list[int], list[int], list[int]]:
        """Kernel, stride and padding of a pool that such images allow."""
        kernel, padding = [], []
        for side in (height, width):
            while True:
                k = self.randint(1, most)
                p = self.randint(0, k // 2)
                if side + 2 * p >= k:
                    break
            kernel.append(k)
            padding.append(p)
        return kernel, [self.randint(1, 3) for _ in range(2)], padding

    def pool(self, height: int, width: int) -> list[int]:
        kernel, stride, padding = self.window(height, width)
        return [*kernel, *stride, *padding]


@dataclass
class Case:
    """Arguments of an operator that it must take, and what it must make of them."""

    operator: str
    args: list[Any]
    check: Check  # of the results, after the call
    leaves: dict[str, Any] = field(
        default_factory=dict
    )  # tensors or lists of them with a gradient, by argument
    root: int = -1  # which result the gradients come from; -1: there is none
    gradients: Callable[[Tensor], Sequence[Tensor | None]] | None = (
        None  # of the leaves, for δ in float64
    )
    scratch: Sequence[Tensor] = ()  # inputs whose memory it may use


def close(
    actual: Tensor, expected: Tensor, scale: float = 1.0, dtype: torch.dtype | None = None
) -> None:
    """|actual - expected| ≤ tolerance · (|expected| + scale), where tolerance is that of the dtype."""
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    assert dtype is None or actual.dtype == dtype, f"dtype {actual.dtype}, expected {dtype}"
    tolerance = TOLERANCE.get(actual.dtype, 1e-12)
    a, e = actual.detach().double(), expected.detach().double()
    near = (a - e).abs() <= tolerance * (e.abs() + scale)
    if not near.all():
        at = (~near).nonzero()[0].tolist()
        raise AssertionError(
            f"{int((~near).sum())} of {near.numel()} elements differ, as at {at}: {a[tuple(at)]}, "
            f"expected {e[tuple(at)]} within {tolerance} · (|expected| + {scale})"
        )


def top(*tensors: Tensor | None) -> float:
    return 1 + sum(float(t.abs().max()) for t in tensors if t is not None and t.numel() > 0)


def doubles(*values: Any) -> list[Any]:
    """Tensors of floating dtype in float64, dense in the order of their dimensions or channels_last."""
    return [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values]


def dense_doubles(*values: Any) -> list[Any]:
    return [v.contiguous() if isinstance(v, Tensor) else v for v in doubles(*values)]


def check_dual(y: Tensor, ty: Tensor, pre: Tensor, expected: Sequence[Tensor], activation: str) -> None:
    y2, ty2, pre2 = expected[:3]
    close(y, y2, top(pre2), y.dtype)
    # f' of a y that is rounded, times the tangent.
    close(ty, ty2, 4 * top(ty2), y.dtype)
    assert pre.shape == y.shape
    if activation in reference.NEEDS_PRE_ACTIVATION:
        close(pre, pre2, top(pre2), y.dtype)


def next_noise(r: Source) -> Case:
    state = r.noise_state()
    before = state.clone()

    def check(snapshot: Tensor) -> None:
        assert torch.equal(snapshot, before)
        assert state.tolist() == [before[0], before[1] + 1, before[2]]

    return Case("next_noise", [state], check)


def matrices(r: Source) -> tuple[int, int, int]:
    if r.one_in(60):  # which other libraries compute
        return r.choice([(64, 64, 64), (130, 129, 128), (600, 64, 32), (200, 300, 10), (1, 64, 4096)])
    return r.size(7), r.size(9), r.size(9)


def mm(r: Source) -> Case:
    m, k, n = matrices(r)
    dtype = r.choice([r.dtype(), torch.float64]) if k <= 64 else torch.float32
    a, b = r.tensor(m, k, dtype=dtype), r.tensor(k, n, dtype=dtype)
    return Case("mm", [a, b], lambda c: close(c, a.double() @ b.double(), dtype=dtype))


def pair(r: Source, *shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of which the second lies behind the first, as the results of a block do, or anywhere."""
    if r.one_in(3):
        both = r.grid(2, *shape, dtype=dtype)
        return both[0], both[1]
    return r.tensor(*shape, dtype=dtype), r.tensor(*shape, dtype=dtype)


def linear(r: Source) -> Case:
    n, d_in, d_out = matrices(r)
    dtype = r.dtype() if d_in <= 64 else torch.float32
    between = [] if n > 9 else [r.size(3) for _ in range(r.choice([0, 0, 1, 2]))]
    x, t = pair(r, n, *between, d_in, dtype=dtype)
    tangent = r.maybe(lambda: t)
    weight = r.tensor(d_out, d_in, dtype=dtype)
    bias = r.maybe(lambda: r.tensor(d_out, dtype=dtype))
    rest = (r.noise_state(), r.block(), r.choice(ACTIVATIONS), r.noise())
    args = [x, tangent, weight, bias, *rest]

    def check(results: tuple[Tensor, Tensor, Tensor]) -> None:
        check_dual(*results, defined.linear(*dense_doubles(*args)), rest[2])

    def gradients(delta: Tensor) -> list[Tensor]:
        rows = math.prod(x.shape[:-1])
        flat = delta.reshape(rows, d_out)
        found = flat.t() @ x.double().reshape(rows, d_in)
        return [found, *([] if bias is None else [flat.sum(0)])]

    return Case("linear", args, check, with_bias(weight, bias), 2, gradients)


def with_bias(weight: Tensor | None, bias: Tensor | None, **others: Tensor) -> dict[str, Tensor]:
    every = {**others, "weight": weight, "bias": bias}
    return {name: t for name, t in every.items() if t is not None}


def torch_gradients(
    function: Callable[..., Tensor], *tensors: Tensor | None
) -> Callable[[Tensor], list[Tensor]]:
    """By torch's autograd in float64, of those that are there."""

    def gradients(delta: Tensor) -> list[Tensor]:
        leaves = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
        return list(torch.autograd.grad(function(*leaves), [t for t in leaves if t is not None], delta))

    return gradients


def conv2d(r: Source) -> Case:
    groups = r.choice([1, 1, 2, 3])
    channels, filters = groups * r.randint(1, 4), groups * r.randint(1, 5)
    kernel = [r.choice([1, 1, 2, 3]) for _ in range(2)]
    stride, dilation = ([r.randint(1, most) for _ in range(2)] for most in (3, 2))
    padding = [r.choice([0, 0, 1, 2]) for _ in range(2)]
    pooled = r.one_in(3)
    dtype = torch.float32 if pooled else r.dtype()
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    if dtype == torch.float16:
        # torch 2.13 crashes on a window of padding alone, on processors with AVX512-FP16.
        padding = [min(p, span - 1) for p, span in zip(padding, spans, strict=True)]
    size = [max(1, s - 2 * p) + r.randint(0, 5) for s, p in zip(spans, padding, strict=True)]
    if dtype == torch.bfloat16 and size[1] + 2 * padding[1] < spans[1] + stride[1]:
        stride[1] = 1  # one column by a stride is what torch 2.13 computes wrongly with AMX
    n = r.size(3)
    x = r.convolved(n, channels, *size, dtype=dtype)
    tangent = r.maybe(lambda: r.convolved(*x.shape, dtype=dtype))
    weight = r.convolved(filters, channels // groups, *kernel, dtype=dtype)
    bias = r.maybe(lambda: r.tensor(filters, dtype=dtype))
    geometry = (stride, padding, dilation, groups)
    out = [
        (s + 2 * p - span) // step + 1
        for s, p, span, step in zip(size, padding, spans, stride, strict=True)
    ]
    pool = r.pool(*out) if pooled else None
    patch = r.choice([1, 1, 2, 3, 100])
    activation = r.choice(ACTIVATIONS)
    common = (r.noise_state(), r.block(), activation, r.noise())
    args = [x, tangent, weight, bias, *geometry, *common, pool, patch]

    def check(results: tuple[Tensor, ...]) -> None:
        y, ty, pre, pooled = results
        expected = defined.conv2d(*doubles(x, tangent, weight, bias), *geometry, *common, None, patch)
        assert y.is_contiguous(memory_format=torch.channels_last)
        if pool is not None:
            check_pool(y, pooled, ty, expected[1], pool)
            ty = expected[1].to(y.dtype)  # which is not kept
        else:
            assert pooled.shape == (0,)
        check_dual(y, ty, pre, expected, activation)

    def function(weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.nn.functional.conv2d(x.double(), weight, bias, *geometry)

    tensors = (weight,) if bias is None else (weight, bias)
    return Case("conv2d", args, check, with_bias(weight, bias), 2, torch_gradients(function, *tensors))


def check_pool(y: Tensor, pooled: Tensor, pooled_tangent: Tensor, ty: Tensor, pool: list[int]) -> None:
    """Of y, whose roundings decide who wins, and of the tangent as it should be."""
    best, along = defined.max_pool2d(y.double(), ty, pool[:2], pool[2:4], pool[4:])
    assert torch.equal(pooled.double(), best)
    close(pooled_tangent, along, 20 * top(along), y.dtype)


def normalised(r: Source, dims: Sequence[int] = (2, 4)) -> tuple[Tensor, Tensor | None]:
    """x that can train, and a tangent."""
    if r.choice(dims) == 2:
        shape = [r.randint(2, 9), r.randint(1, 20)]
        return r.dense(*shape), r.maybe(lambda: r.tensor(*shape))
    shape = [r.randint(1, 3), r.randint(1, 20), r.randint(1, 5), r.randint(2, 5)]
    return r.images(*shape), r.maybe(lambda: r.tensor(*shape))


def channel_arguments(r: Source, channels: int, training: bool) -> list[Tensor | None]:
    """weight, bias and running statistics."""
    weight, bias = (r.maybe(lambda: r.dense(channels)) for _ in range(2))
    running = not training or r.coin()
    mean = r.dense(channels) if running else None
    return [weight, bias, mean, r.dense(channels).abs() + 0.5 if running else None]


# A norm divides by what may be small: the error of its statistics in float32 grows by that.
def check_norm(actual: Tensor, expected: Tensor) -> None:
    close(actual, expected, 20 * top(expected))


def batch_norm(r: Source) -> Case:
    training = r.coin()
    x, tangent = normalised(r)
    if not training and r.one_in(6):
        x, tangent = x[:0], None if tangent is None else tangent[:0]
    pool = r.pool(*x.shape[2:]) if x.dim() == 4 and r.one_in(3) else None
    noise = r.noise()
    needs_ty = pool is None and (tangent is not None or noise != "none" or r.coin())
    ty = torch.full_like(x, torch.nan) if needs_ty else None
    channels = channel_arguments(r, x.shape[1], training)
    counter = r.maybe(lambda: torch.tensor(r.randrange(9)))
    activation, eps, patch = r.choice(ACTIVATIONS), r.choice([1e-5, 1e-2]), r.choice([1, 1, 2, 9])
    rest = (training, r.choice([0.1, 0.0, 1.0]), eps, r.noise_state(), r.block(), activation, noise)
    args = [x, tangent, ty, *channels, counter, *rest, pool, patch]
    copies = [None if t is None else t.clone() for t in (*channels[2:], counter)]

    def check(results: tuple[Tensor, ...]) -> None:
        y, pre, mean, inverse_std, pooled, pooled_tangent = results
        running, counted = doubles(*copies[:2]), copies[2]
        out = torch.empty_like(x, dtype=torch.double)
        wide = doubles(x, tangent), doubles(*channels[:2])
        y2, pre2, *_ = defined.batch_norm(
            *wide[0], out, *wide[1], *running, counted, *rest, None, patch
        )
        check_norm(y, y2)
        if activation in reference.NEEDS_PRE_ACTIVATION:
            check_norm(pre, pre2)
        for moved, expected in zip(channels[2:], running, strict=True):
            if moved is not None:
                check_norm(moved, expected)
        assert counted is None or counted == counter
        dims = [0, *range(2, x.dim())]
        if training:
            check_norm(mean, x.double().mean(dims))
            check_norm(inverse_std, (x.double().var(dims, correction=0) + eps).rsqrt())
        else:
            check_norm(mean, running[0])
            check_norm(inverse_std, (running[1] + eps).rsqrt())
        if ty is not None:
            check_norm(ty, out)
        if pool is None:
            assert pooled.shape == pooled_tangent.shape == (0,)
        else:
            check_pool(y, pooled, pooled_tangent, out, pool)

    return Case("batch_norm", args, check, *norm_gradients(x, channels, copies, training, eps, root=1))


def norm_gradients(
    x: Tensor,
    channels: Sequence[Tensor | None],
    copies: Sequence[Any],
    training: bool,
    eps: float,
    root: int,
) -> tuple[dict[str, Tensor], int, Callable[[Tensor], list[Tensor]]]:
    weight, bias = channels[:2]
    mean, var = doubles(*copies[:2])

    def function(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return torch.nn.functional.batch_norm(x, mean, var, weight, bias, training, 0.0, eps)

    return with_bias(weight, bias, x=x), root, torch_gradients(function, x, weight, bias)


def dual_batch_norm(r: Source) -> Case:
    training = r.coin()
    x, _ = normalised(r)
    tangent = r.tensor(*x.shape)
    channels = channel_arguments(r, x.shape[1], training)
    copies = [None if t is None else t.clone() for t in channels[2:]]
    rest = (training, 0.1, 1e-2)

    def check(results: tuple[Tensor, Tensor]) -> None:
        out = torch.empty_like(x, dtype=torch.double)
        state = torch.zeros(3, dtype=torch.long)
        y, *_ = defined.batch_norm(
            *doubles(x, tangent),
            out,
            *doubles(*channels[:2], *copies),
            None,
            *rest,
            state,
            0,
            "identity",
            "none",
        )
        check_norm(results[0], y)
        check_norm(results[1], out)

    leaves = norm_gradients(x, channels, copies, training, rest[2], root=0)
    return Case("dual_batch_norm", [x, tangent, *channels, *rest], check, *leaves)


def batch_norm_backward(r: Source) -> Case:
    x, _ = normalised(r)
    if r.one_in(8):
        x = x[:0]
    delta, channels = r.tensor(*x.shape), x.shape[1]
    weight = r.maybe(lambda: r.dense(channels))
    dims = [0, *range(2, x.dim())]
    mean = x.mean(dims) if len(x) > 0 else r.dense(channels)
    var = x.var(dims, correction=0) if len(x) > 0 else r.dense(channels).abs()
    args = [delta, x, weight, mean, (var + 0.25).rsqrt(), r.coin()]

    def check(results: tuple[Tensor, ...]) -> None:
        for actual, expected in zip(results, defined.batch_norm_backward(*doubles(*args)), strict=True):
            check_norm(actual, expected)

    return Case("batch_norm_backward", args, check)


def dual_activation(r: Source) -> Case:
    shape = [r.size(5) for _ in range(r.randint(0, 5))]
    if r.one_in(20):
        shape = [r.choice([1023, 1025, 3000])]
    dtype, activation = r.dtype(), r.choice(ACTIVATIONS)
    x, tangent = r.tensor(*shape, dtype=dtype, most=12), r.tensor(*shape, dtype=dtype)

    def check(results: tuple[Tensor, Tensor]) -> None:
        for actual, expected in zip(
            results, defined.dual_activation(*doubles(x, tangent), activation), strict=True
        ):
            close(actual, expected, 4, dtype)

    def function(x: Tensor) -> Tensor:
        return reference.ACTIVATIONS[activation][0](x)

    leaves = {"x": x}
    return Case(
        "dual_activation", [x, tangent, activation], check, leaves, 0, torch_gradients(function, x)
    )


def product(r: Source) -> Case:
    return linear_twice(r, "product")


def dual_linear(r: Source) -> Case:
    return linear_twice(r, "dual_linear")


def linear_twice(r: Source, operator: str) -> Case:
    n, d_in, d_out = matrices(r)
    dtype = r.choice([r.dtype(), torch.float64]) if d_in <= 64 else torch.float32
    between = [r.size(3) for _ in range(r.choice([0, 0, 1]))]
    x, tangent = pair(r, n, *between, d_in, dtype=dtype)
    weight = r.tensor(d_out, d_in, dtype=dtype)
    bias = r.maybe(lambda: r.tensor(d_out, dtype=dtype))
    is_dual = operator == "dual_linear"

    def check(results: Any) -> None:
        y, *rest = results if is_dual else (results,)
        linear = torch.nn.functional.linear
        expected = linear(*doubles(x, weight, bias))
        close(y, expected, top(expected), dtype)
        for ty in rest:
            close(ty, linear(*doubles(tangent, weight)), dtype=dtype)

    tensors = [x, weight, *([] if bias is None else [bias])]
    leaves = with_bias(weight, bias, **({"x": x} if r.coin() else {}))
    function = torch.nn.functional.linear
    if "x" in leaves:
        gradients = torch_gradients(function, *tensors)
    else:
        gradients = torch_gradients(lambda *others: function(x.double(), *others), *tensors[1:])
    args = [x, tangent, weight, bias] if is_dual else [x, weight, bias]
    return Case(operator, args, check, leaves, 0, gradients)


def pooled_images(r: Source, most: int = 4) -> tuple[Tensor, list[Any]]:
    shape = [r.size(3), r.size(20, least=1), r.randint(1, 8), r.randint(1, 8)]
    return r.tensor(*shape), list(r.window(shape[2], shape[3], most))


def max_pool2d(r: Source) -> Case:
    x, window = pooled_images(r)
    tangent = r.tensor(*x.shape)

    def check(results: tuple[Tensor, Tensor]) -> None:
        for actual, expected in zip(
            results, defined.max_pool2d(*doubles(x, tangent), *window), strict=True
        ):
            assert torch.equal(actual.double(), expected)
            assert actual.is_contiguous(memory_format=torch.channels_last)

    return Case("max_pool2d", [x, tangent, *window], check)


def max_pool2d_end(r: Source) -> Case:
    x, window = pooled_images(r, most=r.choice([4, 16]))
    tangent, anchor = r.maybe(lambda: r.tensor(*x.shape)), r.tensor(*x.shape)
    noise, rest = r.noise(), [r.noise_state(), r.block()]
    patch = r.choice([1, 1, 2, 3, 100])
    args = [x, tangent, anchor, *window, *rest, noise, patch]

    def check(results: tuple[Tensor, ...]) -> None:
        y, ty, pre, winners = results
        y2, ty2, _, winners2 = defined.max_pool2d_end(
            *doubles(x, tangent), x.double(), *window, *rest, noise, patch
        )
        assert torch.equal(y.double(), y2)
        assert torch.equal(winners, winners2)
        close(ty, ty2, dtype=torch.float32)
        assert pre.shape == y.shape

    def gradients(delta: Tensor) -> list[Tensor]:
        leaf = torch.zeros(x.shape, dtype=torch.double, requires_grad=True)
        pre = defined.max_pool2d_end(x.double(), None, leaf, *window, *rest, "none")[2]
        return list(torch.autograd.grad(pre, leaf, delta))

    return Case("max_pool2d_end", args, check, {"anchor": anchor}, 2, gradients)


def max_pool2d_backward(r: Source) -> Case:
    x, window = pooled_images(r)
    state = torch.zeros(3, dtype=torch.long)
    y, _, _, winners = defined.max_pool2d_end(x, None, x, *window, state, 0, "rademacher")
    delta, size = r.tensor(*y.shape), list(x.shape[2:])
    args = [delta, r.laid_out(winners), size, *window]

    def check(dx: Tensor) -> None:
        assert torch.equal(dx.double(), defined.max_pool2d_backward(delta.double(), *args[1:]))

    return Case("max_pool2d_backward", args, check)


def features(r: Source) -> list[int]:
    if r.one_in(3):
        return [r.size(6, least=1), r.randint(1, 6), r.randint(1, 6)]
    return [r.size(9) for _ in range(r.randint(1, 2))] if r.coin() else [r.size(200)]


def perturb(r: Source) -> Case:
    shape, dtype = [r.size(4), *features(r)], r.dtype()
    y, tangent = r.tensor(*shape, dtype=dtype), r.maybe(lambda: r.tensor(*shape, dtype=dtype))
    rest = (
        r.noise_state(),
        r.block(),
        r.choice(["gaussian", "rademacher"]),
        r.choice([1, 1, 2, 3, 100]),
    )

    def check(ty: Tensor) -> None:
        expected = defined.perturb(*doubles(y, tangent), *rest)
        close(ty, expected, 4, dtype)

    return Case("perturb", [y, tangent, *rest], check)


@dataclass
class Blocks:
    """The blocks of a network: what feedback_step and the like take of them."""

    saved: list[Tensor]
    feedback: list[Tensor]
    outputs: list[Tensor]
    numbers: list[int]
    activations: list[str]
    error: Tensor
    tangent: Tensor | None
    noise_state: Tensor | None
    noise: str
    patch: int

    def follows(self) -> list[Any]:
        return [self.error, self.tangent, self.saved, self.outputs, self.noise_state]

    def names(self) -> list[Any]:
        return [self.numbers, self.activations, self.noise]


def network(r: Source, must_follow: bool = False, forward_order: bool = False) -> Blocks:
    """forward_order: B of images is in channels_last, as the forward counts features."""
    n, k, patch = r.size(9), r.randint(1, 12), r.choice([1, 1, 2, 3, 100])
    if r.one_in(30):
        n = r.choice([64, 65, 130])
    saved, feedback, outputs = [], [], []
    follow = r.choice(["tangent", "outputs"] if must_follow else ["tangent", "outputs", "nothing"])
    for _ in range(r.choice([0, 1, 1, 1, 2, 3])):
        shape, dtype = [n, *features(r)], r.dtype()
        if len(shape) == 2 and r.one_in(40):  # δ of which may lie the other way round
            shape[1] = -(-(1 << 14) // max(n, 1))
        saved.append(r.tensor(*shape, dtype=dtype))
        outputs.append(r.tensor(*shape, dtype=dtype))
        matrix = [k, *patch_shape(shape, patch)[1:]]
        images = len(shape) == 4 and (forward_order or patch > 1 or r.coin())
        feedback.append((r.images if images else r.dense)(*matrix))
    error_dtype = r.dtype()
    return Blocks(
        saved,
        feedback,
        outputs if follow == "outputs" else [],
        [r.block() for _ in saved],
        [r.choice(ACTIVATIONS) for _ in saved],
        r.tensor(n, k, dtype=error_dtype),
        r.tensor(n, k, dtype=r.dtype()) if follow == "tangent" else None,
        r.noise_state() if follow == "tangent" or r.coin() else None,
        r.choice(["gaussian", "rademacher"]),
        patch,
    )


def empty_delta(r: Source, saved: Tensor, matrix: Tensor, patch: int) -> Tensor:
    """In one of the orders that an operator takes."""
    if saved.dim() == 2 and r.coin():
        return torch.full(saved.shape[::-1], torch.nan, dtype=saved.dtype).t()
    row_major = matrix.is_contiguous() and not (saved.dim() == 4 and patch > 1)
    order = torch.contiguous_format if row_major else torch.channels_last
    return torch.full(saved.shape, torch.nan, dtype=saved.dtype).contiguous(memory_format=order)


def check_delta(actual: Tensor, expected: Tensor, outputs: int) -> None:
    close(actual, expected, 4 * outputs**0.5, expected.dtype)


def feedback_step(r: Source) -> Case:
    b = network(r)
    learns = b.tangent is not None or bool(b.outputs)
    adam = learns and bool(b.saved) and r.coin()
    exp_avg = [torch.empty_like(m).copy_(r.grid(*m.shape)) for m in b.feedback] if adam else []
    exp_avg_sq = (
        [torch.empty_like(m).copy_(r.grid(*m.shape).abs() + 0.25) for m in b.feedback] if adam else []
    )
    updates = torch.tensor([r.choice([0, 1, 1000])]) if adam else None
    deltas = [empty_delta(r, s, m, b.patch) for s, m in zip(b.saved, b.feedback, strict=True)]
    sums = [
        torch.full(s.shape[1:], torch.nan) if s.dim() == 2 and r.coin() else torch.empty(0)
        for s in b.saved
    ]
    k = b.error.shape[1]
    args = [
        *(b.feedback, exp_avg, exp_avg_sq, updates, *b.follows(), *b.names()),
        *(r.choice([1.0, 0.25]), torch.tensor(0.125, dtype=torch.double), 0.75, 0.5, 1e-8),
        *(deltas, sums if r.coin() else [], r.maybe(lambda: torch.full([k], torch.nan)), b.patch),
    ]
    copies = pytree.tree_map_only(Tensor, torch.clone, args)

    def check(_: None) -> None:
        defined.feedback_step(*copies)
        names = [argument.name for argument in fused.feedback_step.default._schema.arguments]
        for i, total in enumerate(copies[names.index("bias_grads")]):  # that of δ as it is rounded
            if total.numel() > 0:
                total.copy_(deltas[i].double().sum(0))
        for name, actual, expected in zip(names, args, copies, strict=True):
            if not isinstance(actual, list):
                actual, expected = [actual], [expected]
            for a, e in zip(actual, expected, strict=True):
                if name == "deltas":
                    check_delta(a, e, k)
                elif isinstance(a, Tensor):
                    close(a, e, 4 * top(e) if "bias" in name else 1.0, e.dtype)

    return Case("feedback_step", args, check)


def feedback_gradient(r: Source) -> Case:
    b = network(r, must_follow=True)
    if b.tangent is None and not b.outputs:
        b.tangent, b.noise_state = r.tensor(*b.error.shape), r.noise_state()
    args = [b.feedback, *b.follows(), *b.names(), r.choice([1.0, 0.25]), b.patch]

    def check(results: tuple[list[Tensor], list[Tensor]]) -> None:
        expected = defined.feedback_gradient(*args)
        for actual, other in zip(results[0], expected[0], strict=True):
            check_delta(actual, other, b.error.shape[1])
        for actual, other in zip(results[1], expected[1], strict=True):
            close(actual, other, dtype=torch.float32)

    return Case("feedback_gradient", args, check)


def feedback_node(r: Source) -> Case:
    b = network(r, forward_order=True)
    learns = b.tangent is not None or bool(b.outputs)
    rule = r.choice(["ema", "adam", "grad"]) if learns and b.saved else "fixed"
    adam = rule == "adam"
    exp_avg = [torch.empty_like(m).copy_(r.grid(*m.shape)) for m in b.feedback] if adam else []
    exp_avg_sq = (
        [torch.empty_like(m).copy_(r.grid(*m.shape).abs() + 0.25) for m in b.feedback] if adam else []
    )
    n, k = b.error.shape
    state = b.noise_state if b.noise_state is not None else r.noise_state()
    x_dtype = b.error.dtype
    x, tangent = r.tensor(n, k, dtype=x_dtype), b.tangent
    weight = bias = input = None
    if r.coin():
        width = r.randint(1, 9)
        weight, bias = r.tensor(k, width, dtype=x_dtype), r.maybe(lambda: r.tensor(k, dtype=x_dtype))
        wide = r.tensor(n, width, dtype=x_dtype)
        if r.coin():
            input = wide
            x = r.laid_out(torch.nn.functional.linear(*doubles(input, weight, bias)).to(x_dtype))
        else:
            x = wide
            tangent = None if tangent is None else r.tensor(n, width, dtype=x_dtype)
    anchors = [r.tensor(*s.shape, dtype=s.dtype) for s in b.saved]
    biased = [i for i, s in enumerate(b.saved) if s.dim() == 2 and r.coin()]
    biases = [r.tensor(*b.saved[i].shape[1:], dtype=b.saved[i].dtype) for i in biased]
    donated = [
        r.one_in(3) and can_hold_delta(s, m, b.patch) for s, m in zip(b.saved, b.feedback, strict=True)
    ]
    updates = torch.tensor([r.choice([0, 1, 1000])])
    lr = torch.tensor(0.125, dtype=torch.double)
    args: list[Any] = [
        *(x, tangent, weight, bias, state, anchors, biases, biased, b.saved, donated, b.outputs),
        *(b.feedback, exp_avg, exp_avg_sq, updates, b.numbers, b.activations, b.noise, rule),
        *(r.choice([1.0, 0.25]), lr, 0.75, 0.5, 1e-8, input, b.patch),
    ]
    copies = pytree.tree_map_only(Tensor, torch.clone, args)

    def check(output: Tensor) -> None:
        expected = (
            x
            if weight is None
            else torch.nn.functional.linear(*doubles(x if input is None else input, weight, bias))
        )
        close(output, expected, top(expected), x_dtype)
        moves = 1 if tangent is not None else 0
        assert (state - copies[4]).tolist() == [0, moves, 0]

    def gradients(delta: Tensor) -> list[Tensor]:
        wide = pytree.tree_map_only(Tensor, torch.clone, copies)
        for i in (
            0,
            1,
            2,
            3,
            24,
        ):  # the output layer in float64; the feedback in the reference's float32
            wide[i] = (
                wide[i].double() if wide[i] is not None and wide[i].is_floating_point() else wide[i]
            )
        leaves = [wide[i] for i in (0, 2, 3) if is_leaf(i)]
        matrices = wide[11] if rule == "grad" else []
        leaves += [*wide[5], *wide[6], *matrices]
        for leaf in leaves:
            leaf.requires_grad_()
        output = defined.feedback_node(*wide)
        # The kernels take the error as the output's dtype has it.
        found = list(torch.autograd.grad(output, leaves, delta, allow_unused=True))
        for mine, other in zip(
            (args[11], args[12], args[13], [updates]),
            (wide[11], wide[12], wide[13], [wide[14]]),
            strict=True,
        ):
            for a, e in zip(mine, other, strict=True):
                close(a, e, 4.0, e.dtype)
        return found

    def is_leaf(index: int) -> bool:
        return args[index] is not None and (index > 0 or weight is None)

    named: dict[str, Any] = {}
    for name, index in (("x", 0), ("weight", 2), ("bias", 3)):
        if is_leaf(index):
            named[name] = args[index]
    named |= {"anchors": anchors, "biases": biases}
    if rule == "grad":
        named["feedback"] = b.feedback
    scratch = [s for s, d in zip(b.saved, donated, strict=True) if d]
    scratch += [
        *exp_avg,
        *exp_avg_sq,
        updates,
        *([] if rule == "grad" else b.feedback),
    ]  # by the backward
    return Case("feedback_node", args, check, named, 0, gradients, scratch)


def can_hold_delta(saved: Tensor, matrix: Tensor, patch: int) -> bool:
    """Whether δ may take its memory: a tensor of its own in the order that δ has."""
    order = torch.channels_last if saved.dim() == 4 else torch.contiguous_format
    return saved.is_contiguous(memory_format=order) and saved._base is None


OPERATORS: dict[str, Callable[[Source], Case]] = {
    f.__name__: f
    for f in (
        *(next_noise, mm, linear, conv2d, batch_norm, batch_norm_backward, dual_batch_norm, product),
        *(dual_linear, dual_activation, max_pool2d, max_pool2d_end, max_pool2d_backward, perturb),
        *(feedback_step, feedback_gradient, feedback_node),
    )
}


# What a wrong argument may be refused by: an error of the operator or of its schema.
ERRORS = (RuntimeError, TypeError, ValueError)


def schema_of(operator: str) -> Any:
    return getattr(fused, operator).default._schema


def described(value: Any) -> str:
    if isinstance(value, Tensor):
        grad = ", grad" if value.requires_grad else ""
        return (
            f"{value.dtype} {list(value.shape)} by {value.stride()} at {value.storage_offset()}{grad}"
        )
    if isinstance(value, list):
        return "[" + "; ".join(described(v) for v in value) + "]"
    return repr(value)


def all_described(operator: str, args: Sequence[Any]) -> str:
    """None where they have not been made."""
    names = [argument.name for argument in schema_of(operator).arguments]
    return "\n".join(f"  {n} = {described(v)}" for n, v in zip(names, args, strict=False))


def tensors_in(values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def with_leaves(case: Case) -> tuple[list[Any], list[Tensor]]:
    """The arguments with leaves in the place of those that get a gradient, and these."""
    args, leaves = list(case.args), []
    names = [argument.name for argument in schema_of(case.operator).arguments]
    for name, values in case.leaves.items():
        fresh = pytree.tree_map_only(Tensor, lambda t: t.detach().requires_grad_(), values)
        args[names.index(name)] = fresh
        leaves += tensors_in(fresh)
    return args, leaves


def layout(t: Tensor) -> list[int]:
    """The strides that mean something: there is more than one element to go to."""
    strides = zip(t.shape, t.stride(), strict=True)
    return [stride for size, stride in strides if size > 1] if t.numel() > 0 else []


def check_fake(operator: str, args: Sequence[Any], results: Any) -> None:
    """A compiler's tensors without values foretell shape, dtype, strides and device."""
    mode = FakeTensorMode()
    fakes = pytree.tree_map_only(Tensor, lambda t: mode.from_tensor(t.detach()), list(args))
    with mode:
        foretold = tensors_in(getattr(fused, operator)(*fakes))
    for real, fake in zip(tensors_in(results), foretold, strict=True):
        for what in ("shape", "dtype", "device"):
            assert getattr(real, what) == getattr(fake, what), (
                f"fake {what}: {fake} for {described(real)}"
            )
        assert layout(real) == layout(fake), f"fake strides {fake.stride()} for {described(real)}"


class Fuzzer:
    """The calls of one run."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.calls: Counter[str] = Counter()

    def run_case(self, number: int) -> None:
        r = Source(hash((self.seed, number)))
        operator = list(OPERATORS)[number % len(OPERATORS)]
        self.under_way: tuple[str, Sequence[Any]] = operator, []
        try:
            self.check_case(r, OPERATORS[operator](r))
        except Exception as error:
            at, args = self.under_way
            raise AssertionError(
                f"seed {self.seed}, case {number}, fdfa::{at}:\n{all_described(at, args)}\n"
                f"{type(error).__name__}: {error}"
            ) from error

    def call(self, operator: str, args: Sequence[Any]) -> Any:
        self.calls[operator] += 1
        self.under_way = operator, args
        return getattr(fused, operator)(*args)

    def check_case(self, r: Source, case: Case) -> None:
        wants_gradient = case.gradients is not None and r.coin()
        args, leaves = with_leaves(case) if wants_gradient else (case.args, [])
        self.under_way = case.operator, args
        written = [argument.is_write for argument in schema_of(case.operator).arguments]
        kept = [a for a, is_written in zip(args, written, strict=True) if not is_written]
        inputs = [t for t in tensors_in(kept) if not any(t is s for s in case.scratch)]
        before = [t.detach().clone() for t in inputs]
        results = self.call(case.operator, args)
        case.check(results)
        if leaves:
            self.check_gradients(r, case, results, leaves)
        for old, new in zip(before, inputs, strict=True):
            assert torch.equal(old, new), f"an input has changed: {described(new)}"
        if r.one_in(8):
            self.calls[case.operator] += 1
            check_fake(case.operator, args, results)
        for _ in range(4):
            self.refuse(r, case)

    def check_gradients(self, r: Source, case: Case, results: Any, leaves: list[Tensor]) -> None:
        assert case.gradients is not None
        root = results[case.root] if isinstance(results, (tuple, list)) else results
        for result in tensors_in(results):
            assert result.requires_grad == (result is root)
        delta = r.tensor(*root.shape, dtype=root.dtype)
        found = torch.autograd.grad(root, leaves, delta, allow_unused=True)
        for leaf, actual, expected in zip(leaves, found, case.gradients(delta.double()), strict=True):
            assert (actual is None) == (expected is None)
            if actual is not None and expected is not None:
                scale = 20 if "norm" in case.operator else 4
                close(actual, expected, scale * top(expected), leaf.dtype)

    def refuse(self, r: Source, case: Case) -> None:
        """One wrong argument is refused by name and changes nothing, or does no harm."""
        schema = schema_of(case.operator).arguments
        i = r.randrange(len(case.args))
        name, value = schema[i].name, case.args[i]
        kind, wrong = r.choice(list(wrong_values(r, str(schema[i].type), name, value)))
        good, leaves = with_leaves(case) if case.gradients is not None else (case.args, [])
        args = [*good[:i], wrong, *good[i + 1 :]]
        written = [a for a, s in zip(args, schema, strict=True) if s.is_write]
        stage, touched = "forward", [t for t in tensors_in(written) if t.is_cpu]
        before = [t.clone() for t in touched]
        try:
            results = self.call(case.operator, args)
            if leaves and (root := tensors_in(results)[case.root]).requires_grad:
                stage = "backward"
                root.sum().backward()
        except (*ERRORS, IndexError) as error:
            message = str(error)
            if isinstance(error, IndexError) and case.operator != "conv2d":
                raise  # torch's convolution has no better error for kernels of no size
            assert "INTERNAL ASSERT" not in message, message
            assert (
                kind == "none"  # which torch takes for a tensor without anything
                or "fdfa::" in message
                or name in CHECKED_BY_TORCH.get(case.operator, ())
            ), f"no operator is named: {message}"
            for old, new in zip(before, touched, strict=True):
                assert stage == "backward" or torch.equal(old.nan_to_num(), new.nan_to_num()), (
                    f"a refused call changed {described(new)}: {message}"
                )
        else:
            differs = kind == "dtype" and dtypes(wrong) != dtypes(value)
            if name not in (*CHECKED_BY_TORCH.get(case.operator, ()), *UNUSED.get(case.operator, ())):
                taken = differs or kind in ("type", "name")
                assert not taken, f"a wrong {kind} of {name} is taken"


# Arguments that torch's own operators look at, in words of their own.
CHECKED_BY_TORCH = {
    "conv2d": ("x", "weight", "stride", "padding", "dilation", "groups"),
    "product": ("x", "weight", "bias"),
    "dual_linear": ("x", "tangent", "weight", "bias"),
    "max_pool2d_backward": ("input_size",),
    "feedback_node": ("x", "weight", "bias", "input"),
}
# Those that an operator may have no use for, or not before the backward.
UNUSED = {
    "max_pool2d_end": ("anchor",),
    "feedback_step": ("noise_state", "bias_grads"),
    "feedback_gradient": ("noise_state",),
    "feedback_node": ("noise_state", "anchors", "biases", "exp_avg", "exp_avg_sq", "updates", "lr"),
}


def dtypes(values: Any) -> list[torch.dtype]:
    return [t.dtype for t in tensors_in(values) if t.numel() > 0]


def wrong_values(r: Source, kind: str, name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What is no good, or may be none, in the place of an argument of that type."""
    if not kind.startswith("Optional"):
        yield "none", None
    elif value is None:
        value = torch.zeros(2, 2) if "Tensor" in kind else [1]
        yield "given", value
    if kind.endswith(("[Tensor]", "Tensor")) and isinstance(value, (list, Tensor)):
        if isinstance(value, list):
            yield (
                "count",
                value[:-1]
                if value and r.coin()
                else [*value, *(value or [torch.zeros(2, 2)])][: len(value) + 1],
            )
            if value:
                j = r.randrange(len(value))
                for what, wrong in wrong_values(r, "Tensor", name, value[j]):
                    yield what, [*value[:j], wrong, *value[j + 1 :]]
            return
        yield (
            "dtype",
            value.to(r.choice([torch.int64, torch.complex64, torch.bool, torch.float64, torch.uint8])),
        )
        yield "shape", value.unsqueeze(r.randint(0, value.dim()))
        yield "device", torch.empty_like(value, device="meta")
        if value.dim() > 0:
            dim = r.randrange(value.dim())
            yield "shape", torch.cat([value, value.narrow(dim, 0, min(1, value.shape[dim]))], dim)
            yield "shape", value.select(dim, 0) if value.shape[dim] > 0 else value.flatten()
            yield "size", value.narrow(dim, 0, 0)
    elif ("int" in kind or "bool" in kind) and isinstance(value, list):
        yield "count", value[:-1]
        yield "count", [*value, 1]
        yield "count", []
        if value:
            j = r.randrange(len(value))
            large = [2**40, 2**62, 2**63 - 1, -(2**62)]
            if name != "padding":  # which a convolution would take memory for
                large.append(2**31)
            for wrong in (-1, 0, r.choice(large)) if "int" in kind else ():
                yield "number", [*value[:j], wrong, *value[j + 1 :]]
    elif kind == "int":
        yield "number", r.choice([-1, 0, 2**31, 2**62, -(2**63)])
        yield "type", "one"
    elif kind == "str":
        yield "name", r.choice(["", "nonsense", "RELU", "Gaussian"])
    elif kind == "List[str]":
        yield "count", value[:-1] if value else ["relu"]
        yield "name", [*value[:-1], "nonsense"]
    elif kind == "float" or kind == "bool":
        yield "type", "one"


def run(cases: int, seed: int, verbose: bool = False) -> dict[str, int]:
    """Calls by operator; a failure raises with what repeats it. verbose: prints each case before it."""
    assert set(OPERATORS) == all_operators(), "an operator has no case, or a case no operator"
    fuzzer = Fuzzer(seed)
    for number in range(cases):
        if verbose:
            print(f"case {number}", flush=True)
        fuzzer.run_case(number)
    return dict(fuzzer.calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this one alone")
    parser.add_argument("--verbose", action="store_true", help="print each case before it, for a crash")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.case is not None:
        Fuzzer(options.seed).run_case(options.case)
        return
    calls = run(options.cases, options.seed, options.verbose)
    for operator, count in calls.items():
        print(f"{count:10,} {operator}")
    print(f"{sum(calls.values()):10,} calls, seed {options.seed}")


if __name__ == "__main__":
    main()

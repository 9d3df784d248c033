"""Random nets, and random programs that use them: both back-ends do the same, and the same as plain torch.

`run` draws nets and operations on them by hypothesis. Each net is trained twice, by the fused operators
in its own dtype and by `backend="reference"` in float64. After each operation outputs, gradients and all
state are compared, and the reference goes on from the state of the other, so that roundings do not add
up. What one of them refuses the other one must refuse, by an error of a documented kind, and no error
may change feedback, moments or noise.

Two nets of the same state that differ by roundings differ much where a net is badly conditioned: at a
kink of ReLU, or behind the norm of two values that are nearly equal. A difference beyond the tolerance
is therefore a fault unless the reference itself moves as far when its weights and inputs move by a few
roundings. `counts["ill-conditioned"]` says how often that was so.

    PYTHONPATH=.:python_tests python -m fuzz.nets --cases 150 --seed 0
"""

import argparse
import copy
import io
import math
import pickle
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import hypothesis
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, reject, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn

from fdfa_ext import FDFA, FDFABlock, FDFAConv2d, FDFALinear
from fdfa_ext.methods import METHODS
from fdfa_ext.patches import patch_means, patch_pixels, patch_shape, spread
from fdfa_ext.points import place_of
from fdfa_ext.reference import perturbation

counts: Counter[str] = Counter()

# Modules that the drawn nets are made of.


class Residual(nn.Module):
    """x + body(x)."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Skips(nn.Module):
    """A forward of its own: blocks with skip connections between them, of which one may come twice."""

    def __init__(
        self, first: nn.Module, *rest: nn.Module, head: nn.Module, twice: bool = False
    ) -> None:
        super().__init__()
        self.first, self.rest, self.head, self.twice = first, nn.ModuleList(rest), head, twice

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.rest:
            x = x + block(x)
        if self.twice:
            x = x + self.rest[0](torch.tanh(x))
        return self.head(x)


class Penalised(Skips):
    """Keeps a hidden activation, on which the loss has a penalty."""

    penalty: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        self.penalty = 0.1 * h.square().mean() if torch.is_grad_enabled() else None
        for block in self.rest:
            h = h + block(h)
        return self.head(h)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"penalty": None}  # whose graph cannot be copied


class Mean(nn.Module):
    """The mean over tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Wave(nn.Module):
    """A function of the user's own, on elements."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sin(x)


class Masks(nn.Dropout):
    """Drops the same elements each time: a pass that is made anew would draw others."""

    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return super().forward(x)


# Strategies: code of modules, so that an example can be pasted into a script.

ACTIVATIONS = ["identity", "relu", "leaky_relu", "tanh", "sigmoid", "gelu", "silu"]
FUNCTIONS = [
    *("nn.ReLU()", "nn.LeakyReLU()", "nn.Tanh()", "nn.Sigmoid()", "nn.GELU()", "nn.SiLU()"),
    *("nn.ReLU(inplace=True)", "nn.LeakyReLU(0.2)", "nn.GELU('tanh')", "nn.ELU()", "nn.Softplus()"),
    *("nn.Mish()", "nn.Hardtanh()", "nn.Identity()", "nn.Dropout(0.0)", "Wave()"),
]
# What may follow a block or point, whose output is needed later.
OUT_OF_PLACE = [function for function in FUNCTIONS if "inplace" not in function]
SHAPELESS = (nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.Softplus, nn.Mish)
booleans, integers, sampled = st.booleans, st.integers, st.sampled_from
Draw = Callable[[st.SearchStrategy[Any]], Any]


@dataclass(frozen=True)
class Net:
    """Code of a net whose input is [N, *shape], and of FDFA's argument `at`."""

    code: str
    shape: tuple[int, ...]
    at: str = "None"


# What that code may name.
KINDS = [Residual, Skips, Penalised, Mean, Wave, Masks, FDFABlock, FDFAConv2d, FDFALinear]
NAMES = {"nn": nn, **{kind.__name__: kind for kind in KINDS}}


def make(code: str) -> Any:
    return eval(code, NAMES)


def shape_after(code: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Of what the module makes of a sample; None where that is nothing."""
    with torch.device("meta"):
        try:
            result = make(code).eval()(torch.empty(2, *shape))
        except (RuntimeError, ValueError):
            return None
    return tuple(result.shape[1:]) if result.numel() > 0 else None


def sometimes(draw: Draw, code: str, one_in: int = 2) -> list[str]:
    return [code] if draw(integers(1, one_in)) == 1 else []


def linear(draw: Draw, kind: str, inputs: int) -> str:
    bias = "" if draw(integers(0, 3)) else ", bias=False"
    activation = f", activation='{draw(sampled(ACTIVATIONS))}'" if kind == "FDFALinear" else ""
    return f"{kind}({inputs}, {draw(integers(1, 12))}{bias}{activation})"


def other_convolution(draw: Draw, shape: tuple[int, ...]) -> str:
    """Of sequences, with tokens for channels, or of volumes."""
    options = f", stride={draw(sampled([1, 1, 2]))}, padding={draw(sampled([0, 1]))}"
    options += draw(sampled(["", "", ", bias=False"]))
    kernel, outputs = draw(integers(1, 3)), draw(integers(1, 6))
    return f"nn.Conv{len(shape) - 1}d({shape[0]}, {outputs}, {kernel}{options})"


def convolution(draw: Draw, kind: str, channels: int, keeps_size: bool) -> str:
    kernel = draw(sampled([1, 3])) if keeps_size else draw(integers(1, 3))
    outputs, groups = draw(integers(1, 6)), 1
    if draw(integers(0, 4)) == 0:
        groups = channels
        outputs = channels * draw(integers(1, 2))
    options = "" if draw(integers(0, 3)) else ", bias=False"
    if keeps_size:
        options += f", padding={kernel // 2}"
    else:
        options += (
            f", stride={draw(sampled([1, 1, 2, (2, 1)]))}, dilation={draw(sampled([1, 1, 1, 2]))}"
        )
        options += f", padding={draw(sampled([0, 0, 1, 1, (1, 0)]))}"
        options += draw(sampled([*[""] * 6, ", padding_mode='circular'", ", padding_mode='reflect'"]))
    if kind == "FDFAConv2d":
        options += f", activation='{draw(sampled(ACTIVATIONS))}'"
    return (
        f"{kind}({channels}, {outputs}, {kernel}{f', groups={groups}' if groups > 1 else ''}{options})"
    )


def pool(draw: Draw) -> str:
    kernel = draw(sampled([2, 3, (2, 1)]))
    stride, padding = (
        draw(sampled(["", ", stride=1", ", stride=2"])),
        draw(sampled(["", ", padding=1"])),
    )
    padding = padding if kernel != (2, 1) else ""
    ceil = draw(sampled(["", "", ", ceil_mode=True"]))
    return draw(
        sampled(
            [
                *[f"nn.MaxPool2d({kernel}{stride}{padding}{ceil})"] * 3,
                f"nn.AvgPool2d({kernel}{stride}{padding}{ceil})",
                "nn.AdaptiveAvgPool2d(2)",
                "nn.AdaptiveMaxPool2d(2)",
            ]
        )
    )


def norm(draw: Draw, shape: tuple[int, ...]) -> list[str]:
    """For features of this shape; mostly none, since those of small batches are badly conditioned, and
    those of two features or less return signs."""
    if shape[-1] < 3:
        return []
    if len(shape) == 4:
        kinds = [f"nn.BatchNorm3d({shape[0]})", f"nn.GroupNorm(1, {shape[0]})"]
    elif len(shape) == 3:
        kinds = [f"nn.BatchNorm2d({shape[0]})", f"nn.GroupNorm(1, {shape[0]})"]
        kinds += [f"nn.BatchNorm2d({shape[0]}, affine=False)", f"nn.InstanceNorm2d({shape[0]})"]
    elif len(shape) == 2:
        kinds = [f"nn.LayerNorm({shape[1]})", f"nn.RMSNorm({shape[1]})", f"nn.BatchNorm1d({shape[0]})"]
    else:
        kinds = [
            f"nn.BatchNorm1d({shape[0]})",
            f"nn.LayerNorm({shape[0]})",
            f"nn.GroupNorm(1, {shape[0]})",
        ]
        kinds += [f"nn.BatchNorm1d({shape[0]}, track_running_stats=False)"]
    return [draw(sampled(kinds))] if draw(integers(0, 2)) == 0 and math.prod(shape) > 2 else []


def layer(draw: Draw, kind: str, shape: tuple[int, ...], keeps_size: bool) -> str:
    if len(shape) == 3:
        return convolution(draw, f"{kind}Conv2d", shape[0], keeps_size)
    return linear(draw, f"{kind}Linear", shape[-1])


def block(draw: Draw, shape: tuple[int, ...], keeps_size: bool = False) -> str:
    """FDFALinear, FDFAConv2d, or an FDFABlock of such a layer with norm, activation and pool."""
    is_other = len(shape) == 4 or (len(shape) == 2 and draw(integers(0, 5)) == 0)
    if not is_other and draw(booleans()):
        return layer(draw, "FDFA", shape, keeps_size)
    first = other_convolution(draw, shape) if is_other else layer(draw, "nn.", shape, keeps_size)
    after = shape_after(first, shape)
    if after is None:
        return first  # which does not fit
    modules = [first, *norm(draw, after)]
    if draw(integers(0, 5)) == 0:
        modules = [*norm(draw, shape), first]
    modules += [draw(sampled(FUNCTIONS))] if draw(integers(0, 3)) else []
    if len(shape) == 1:  # where the strides, in whose order masks are drawn, are those of the reference
        modules += sometimes(draw, "Masks(0.3)", 6)
    if is_other and draw(booleans()):
        modules.append(f"nn.{draw(sampled(['Max', 'Avg']))}Pool{len(shape) - 1}d(2)")
    if len(shape) == 3 and not keeps_size and draw(booleans()):
        modules.append(pool(draw))
    if len(shape) == 2 and draw(integers(0, 4)) == 0:
        d = shape[1]
        modules = [f"Residual(nn.LayerNorm({d}), nn.Linear({d}, {d}), nn.Tanh())"]
    return f"FDFABlock({', '.join(modules)})"


def between(draw: Draw, shape: tuple[int, ...], keeps_size: bool) -> list[str]:
    """Modules without parameters, or none."""
    if len(shape) == 3 and not keeps_size and draw(booleans()):
        return [pool(draw)]
    return sometimes(draw, draw(sampled(OUT_OF_PLACE)), 3)


def head(draw: Draw, inputs: int, outputs: int) -> list[str]:
    options = [
        [f"nn.Linear({inputs}, {outputs})"],
        [f"nn.Linear({inputs}, {outputs}, bias=False)"],
        [f"nn.Linear({inputs}, 4)", "nn.Tanh()", f"nn.Linear(4, {outputs})"],
        [f"nn.Linear({inputs}, {outputs})", "nn.Tanh()"],
    ]
    return draw(sampled([*options[:1] * 3, *options]))


def input_shape(draw: Draw, dimensions: int) -> tuple[int, ...]:
    if dimensions == 4:
        return draw(sampled([1, 2])), draw(integers(1, 4)), draw(integers(3, 5)), draw(integers(3, 5))
    if dimensions == 3:
        return draw(sampled([1, 1, 2, 3])), draw(integers(3, 12)), draw(integers(3, 12))
    if dimensions == 2:
        return draw(integers(1, 5)), draw(integers(2, 8))
    return (draw(integers(1, 12)),)


def chain(draw: Draw) -> Net:
    """A Sequential of blocks, with outputs of samples, tokens or pixels."""
    start = shape = input_shape(draw, draw(sampled([*[1, 1, 2, 3, 3] * 3, 4])))
    each = len(shape) in (2, 3) and draw(integers(0, 3)) == 0  # token or pixel has outputs
    modules: list[str] = []
    for i in range(draw(integers(1, 3))):
        for code in [block(draw, shape, each), *between(draw, shape, each)]:
            after = shape_after(code, shape)
            if after is not None:
                modules.append(code)
                shape = after
        if i == 0 and not modules:
            reject()
    outputs = draw(sampled([1, 2, 3, 3, 5]))
    if each and len(shape) == 3:
        modules.append(f"nn.Conv2d({shape[0]}, {outputs}, 1)")
    elif each:
        modules += head(draw, shape[-1], outputs)
    else:
        if len(shape) == 2 and draw(booleans()):
            modules.append("Mean()")
            shape = shape[1:]
        elif len(shape) > 1:
            modules.append("nn.Flatten()")
            shape = (math.prod(shape),)
            if draw(booleans()):
                code = block(draw, shape)
                modules.append(code)
                shape = shape_after(code, shape) or shape
        modules += head(draw, shape[0], outputs)
    return Net(f"nn.Sequential({', '.join(modules)})", start)


def own_forward(draw: Draw) -> Net:
    """Blocks of one width in a module with a forward of its own."""
    shape, width = input_shape(draw, draw(sampled([1, 1, 2]))), draw(integers(1, 8))
    kind = draw(sampled(["Skips", "Skips", "Penalised"]))
    first = f"FDFALinear({shape[-1]}, {width}, activation='{draw(sampled(ACTIVATIONS))}')"
    rest = [
        draw(
            sampled(
                [
                    f"FDFALinear({width}, {width}, activation='{draw(sampled(ACTIVATIONS))}')",
                    f"FDFABlock(nn.Linear({width}, {width}), {draw(sampled(FUNCTIONS))})",
                    f"FDFABlock(Residual(nn.Linear({width}, {width}), {draw(sampled(FUNCTIONS))}))",
                ]
            )
        )
        for _ in range(draw(integers(1, 3)))
    ]
    ends = head(draw, width, draw(integers(1, 3)))
    if len(shape) == 2:
        ends = ["Mean()", *ends] if draw(booleans()) else ends
    end = ends[0] if len(ends) == 1 else f"nn.Sequential({', '.join(ends)})"
    twice = ", twice=True" if kind == "Skips" and draw(booleans()) else ""
    return Net(f"{kind}({first}, {', '.join(rest)}, head={end}{twice})", shape)


def as_it_comes(draw: Draw) -> Net:
    """A net of torch's modules, with points."""
    shape = input_shape(draw, draw(sampled([1, 2, 3])))
    width = draw(sampled([4, 6, 8]))
    f = partial(draw, sampled(OUT_OF_PLACE))
    if len(shape) == 1:
        start = [f"nn.Linear({shape[0]}, {width})", f()]
        body = [f"nn.Linear({width}, {width})", *norm(draw, (width,)), f()]
        last: list[str] = []
    elif len(shape) == 2:
        start = [f"nn.Linear({shape[1]}, {width})"]
        first = draw(booleans())
        body = [
            f"nn.TransformerEncoderLayer({width}, 2, 8, dropout=0.0, batch_first=True, "
            f"norm_first={first}, activation='gelu')"
        ]
        last = draw(sampled([["Mean()"], []]))
    else:
        start = [f"nn.Conv2d({shape[0]}, {width}, 3, padding=1)", *norm(draw, (width, *shape[1:])), f()]
        body = [f"nn.Conv2d({width}, {width}, 3, padding=1)", *norm(draw, (width, *shape[1:])), f()]
        last = ["nn.AdaptiveAvgPool2d(1)", "nn.Flatten()"]
    residual = [f"Residual({', '.join(body)})"] if draw(booleans()) or len(shape) != 2 else body
    many = draw(integers(1, 2))
    modules = [*start, *residual * many, *last, f"nn.Linear({width}, {draw(integers(1, 4))})"]
    at = "'auto'"
    if draw(booleans()):
        places = range(len(start) + many)
        names = [name for i in places for name in (f"{i}", f"{i + 1}.input")]
        at = repr(sorted(draw(st.sets(sampled(names), min_size=1))))
    return Net(f"nn.Sequential({', '.join(modules)})", shape, at)


@st.composite
def nets(draw: Draw) -> Net:
    return draw(sampled([chain, chain, own_forward, as_it_comes]))(draw)


@dataclass(frozen=True)
class Options:
    """How the net is wrapped and trained."""

    method: str
    feedback: str
    noise: str
    patch: int
    example: bool
    dtype: torch.dtype
    adam: bool
    seed: int


options = st.builds(
    Options,
    method=sampled([*METHODS, "fdfa", "fdfa", "fdfa"]),
    feedback=sampled(["adam", "ema", "grad"]),
    noise=sampled(["gaussian", "rademacher"]),
    patch=sampled([1, 1, 1, 2, 3, 4]),
    example=sampled([True, True, False]),
    dtype=sampled([*[torch.float32] * 7, torch.bfloat16, torch.float16]),
    adam=booleans(),
    seed=integers(0, 1000),
)

LAYOUTS = [
    "contiguous",
    "samples apart",
    "features apart",
    "channels_last",
    "transposed",
    "expanded",
    "leaf",
]


@dataclass(frozen=True)
class Batch:
    n: int
    layout: str
    seed: int

    def input(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)

        def randn(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator).to(dtype)

        match self.layout:
            case "samples apart":
                return randn(2 * self.n, *shape)[::2]
            case "features apart":
                return randn(self.n, *shape[:-1], 2 * shape[-1])[..., ::2]
            case "channels_last" if len(shape) == 3:
                return randn(self.n, *shape).contiguous(memory_format=torch.channels_last)
            case "transposed":
                return randn(*shape[::-1], self.n).permute(*range(len(shape), -1, -1))
            case "expanded" if len(shape) > 1:
                return randn(self.n, *shape[:-1], 1).expand(self.n, *shape)
            case "leaf":
                return randn(self.n, *shape).requires_grad_()
        return randn(self.n, *shape)


batches = st.builds(Batch, sampled([2, 3, 4, 5, 8, 1]), sampled(LAYOUTS), integers(0, 1000))
# What norms of samples take.
several = batches.filter(lambda batch: batch.n > 1)

# Two models of the same net.


class Fault(AssertionError):
    """A property does not hold."""


class Planned(Exception):
    """What a module raises that the test has told to."""


@dataclass
class Twin:
    """A model and what trains it."""

    model: FDFA
    adam: bool

    def __post_init__(self) -> None:
        self.renew_optimizer()

    def renew_optimizer(self) -> None:
        # eps is far above roundings, of which 1e-8 would make steps of full size: a bias before a norm
        # has a gradient of nothing else.
        kind: Any = partial(torch.optim.Adam, eps=0.1) if self.adam else torch.optim.SGD
        self.optimizer = kind(self.model.parameters(), lr=0.02)

    def state(self) -> dict[str, Tensor]:
        """All that lives from step to step."""
        named = self.model.named_parameters()
        gradients = {f"gradient of {name}": p.grad for name, p in named if p.grad is not None}
        return {**self.model.state_dict(), **gradients}

    def has_diverged(self) -> bool:
        """Whether its numbers are so large that squares of them say nothing in float32."""
        return any(
            not t.detach().abs().max() < 1e4 for t in self.state().values() if t.is_floating_point()
        )

    def kept(self) -> dict[str, Tensor]:
        """A copy of it, but for the buffers of the net, which torch's norms move before others fail."""
        buffers = {f"module.{name}" for name, _ in self.model.module.named_buffers()}
        return {key: t.detach().clone() for key, t in self.state().items() if key not in buffers}

    def follow(self, other: "Twin") -> None:
        """Takes the state of the other one."""
        self.model.load_state_dict(other.model.state_dict())
        for mine, theirs in zip(self.model.parameters(), other.model.parameters(), strict=True):
            mine.grad = None if theirs.grad is None else theirs.grad.to(mine.dtype, copy=True)
        # A copy, since optimizers share what they load, as the number of steps.
        self.optimizer.load_state_dict(copy.deepcopy(other.optimizer.state_dict()))


def loss_of(model: FDFA, outputs: Tensor) -> Tensor:
    """Smooth, of all outputs; heads have a loss of their own. Its sums would overflow in float16."""
    wide = torch.promote_types(outputs.dtype, torch.float32)
    total = outputs.new_zeros((), dtype=wide)
    for output in (o.to(wide) for o in (outputs, *model.local_outputs)):
        wanted = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
        total = total + (output - wanted).square().sum() / max(len(output), 1)
        if output.dim() == 2 and output.shape[1] > 1:
            target = torch.arange(len(output)) % output.shape[1]
            total = total + F.cross_entropy(output, target, reduction="sum") / max(len(output), 1)
    penalty = getattr(model.module, "penalty", None)
    return total if penalty is None else total + penalty


Results = dict[str, Tensor]
Operation = Callable[..., Results]  # of a twin and the inputs
# Relative to the largest element: of sums of tens of terms, through a few layers and back.
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 0.1, torch.float16: 0.02}
INTERNAL = (AssertionError, AttributeError, LookupError, ArithmeticError, NameError, RecursionError)


def scale_of(key: str) -> str:
    """What may be compared in size: gradients with gradients, weights with weights."""
    if key.startswith("gradient"):
        return "feedback gradient" if ".feedback." in key or "feedback." in key else "gradient"
    return key.split(".")[0] if key.startswith(("module", "feedback", "exp", "heads")) else key


def errors(found: Results, expected: Results) -> dict[str, float]:
    """The largest difference of each tensor, relative to the largest element of all of its kind."""
    sizes: dict[str, float] = {}
    for key, t in expected.items():
        if t.numel() > 0:
            size = float(t.detach().abs().max())
            sizes[scale_of(key)] = max(sizes.get(scale_of(key), 0.0), size)
    result = {}
    for key, t in found.items():
        difference = (t.detach().double() - expected[key].detach().double()).abs()
        size = sizes.get(scale_of(key), 0.0)
        largest = float(difference.max()) if t.numel() > 0 else 0.0
        # Below this is what sums of terms near 1 leave where they cancel.
        least = 1e-5 if key.startswith("exp_avg_sq") else 1e-2
        result[key] = 0.0 if largest == 0 else largest / max(size, least)
    return result


def in_dtype(x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    return x.detach().to(dtype).requires_grad_(x.requires_grad) if x.is_floating_point() else x


def nudged(t: Tensor, by: float) -> Tensor:
    moved = t.detach() * (1 + by * torch.randn(t.shape, dtype=t.dtype))
    return moved.requires_grad_(t.requires_grad)


def quietly(operation: Operation, twin: Twin, inputs: Sequence[Tensor]) -> Results:
    torch.manual_seed(0)  # of what draws in a forward
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return operation(twin, *inputs)


def check_same(found: Results, before: Results, what: str) -> None:
    """Raises Fault if something changed by one bit."""
    if found.keys() != before.keys():
        raise Fault(f"{what} changed what is kept: {sorted(found.keys() ^ before.keys())}")
    for key, t in found.items():
        if not torch.equal(t, before[key]):
            raise Fault(f"{what} changed {key}")


def plainly(module: nn.Module, x: Tensor) -> Exception | None:
    """What torch says to an input."""
    try:
        copy.deepcopy(module)(x.detach())
    except Exception as error:
        return error
    return None


def definition(model: FDFA, x: Tensor) -> Results:
    """What a training step in float64 leaves, by the equations of docs/methods.md and torch's autograd
    alone: gradients and B. Empty for what these lines do not cover."""
    learns, names = model.method.feedback == "learned", model.block_names
    method = next(name for name, kind in METHODS.items() if type(model.method) is kind)
    is_covered = method in ("fdfa", "dfa", "dkp", "fg-a") and not hasattr(model.module, "penalty")
    if not is_covered:
        return {}
    kept: dict[str, Tensor] = {}
    uses: Counter[str] = Counter()
    zeros: dict[str, Tensor] = {}

    def perturb(name: str, y: Tensor) -> Tensor:
        zeros[name] = torch.zeros_like(y, requires_grad=True)
        return y + zeros[name]

    def cut(name: str, y: Tensor) -> Tensor:
        kept[name] = y
        uses[name] += 1
        # Of an input in channels_last that needs no gradient torch's backward of group_norm crashes.
        return y.detach().clone(memory_format=torch.contiguous_format)

    def forward(module: nn.Module, change: Callable[[str, Tensor], Tensor]) -> Tensor:
        for name in (name for name in names if ":" not in name):
            place, at_input = place_of(module, name)
            if at_input:
                place.register_forward_pre_hook(
                    partial(lambda name, _, args: change(name, args[0]), name)
                )
            else:
                place.register_forward_hook(partial(lambda name, _, __, y: change(name, y), name))
        return module(x.contiguous())

    plain = copy.deepcopy(model.module)
    output = forward(plain, cut)
    # `names` may lack those of second uses, which a forward counts anew where modules were exchanged.
    is_covered = output.dim() == 2 and max(uses.values()) == 1 and len(uses) == len(names)
    if not is_covered or (model.patch > 1 and any(y.dim() == 3 for y in kept.values())):
        return {}
    if not output.requires_grad:  # all is frozen, and B learns yet
        output.requires_grad_()
    (error,) = torch.autograd.grad(loss_of(model, output), output, retain_graph=True)
    noise = {
        name: perturbation(
            model.noise_state, i, model.noise, patch_shape(y.shape, model.patch), y.dim() == 4
        ).double()
        for i, (name, y) in enumerate((name, kept[name]) for name in names)
    }
    pixels = {
        name: patch_pixels(y.shape, model.patch, y.device) if y.dim() == 4 else 1
        for name, y in kept.items()
    }
    tangent = torch.zeros_like(output)
    if model.method.tangents == "network":
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            perturbed = forward(copy.deepcopy(model.module), perturb)
            direction = torch.zeros_like(output, requires_grad=True)
            pulled = torch.autograd.grad(perturbed, [*zeros.values()], direction, create_graph=True)
        spreads = [spread(noise[name], zeros[name].shape, model.patch) for name in zeros]
        slope = torch.stack([(g * u).sum() for g, u in zip(pulled, spreads, strict=True)]).sum()
        (tangent,) = torch.autograd.grad(slope, direction)
    found: Results = {}
    ends, deltas = [output], [error]
    for name in names:
        y, u, key = kept[name], noise[name], name.replace(".", "/")
        if method == "fg-a":
            patches = (error * tangent).sum(1).view(-1, *[1] * (u.dim() - 1)) * u / pixels[name]
        else:
            b = model.feedback[name].detach().double()
            if method == "fdfa":
                gradient = b - torch.einsum("nk,n...->k...", tangent, u) / len(output) / pixels[name]
            else:
                means = patch_means(y.detach(), model.patch)
                gradient = 1e-6 * b + torch.einsum("nk,n...->k...", error, means)
            if learns and model.rule != "grad":
                b = b - moved_by(model, name, gradient)
                found[f"feedback.{key}"] = b
            patches = torch.einsum("nk,k...->n...", error, b)
        if y.requires_grad:
            ends.append(y)
            # For a gradient whose stride between samples is 1, since there is one sample, torch's own
            # backward of batch and instance norms is wrong (2.13).
            deltas.append(spread(patches, y.shape, model.patch).contiguous())
    torch.autograd.backward(ends, deltas)
    gradients = ((name, p.grad) for name, p in plain.named_parameters())
    return found | {f"gradient of module.{name}": g for name, g in gradients if g is not None}


def moved_by(model: FDFA, name: str, gradient: Tensor) -> Tensor:
    """By what a rule of feedback moves B."""
    if model.rule == "ema":
        return model.feedback_lr * gradient
    beta1, beta2 = model.betas
    steps = int(model.updates) + 1
    mean = beta1 * model.exp_avg[name] + (1 - beta1) * gradient
    square = beta2 * model.exp_avg_sq[name] + (1 - beta2) * gradient.square()
    mean, square = mean / (1 - beta1**steps), square / (1 - beta2**steps)
    return model.feedback_lr * mean / (square.sqrt() + model.eps)


class Nets(RuleBasedStateMachine):
    """A net with the reference of it, and what a user may do with it."""

    fused: Twin
    precision: torch.dtype  # of what is being done
    is_compiled: bool = False

    @initialize(net=nets(), options=options, batch=batches)
    def wrap(self, net: Net, options: Options, batch: Batch) -> None:
        if options.dtype == torch.float16 and options.method == "fg-w":
            reject()  # torch's forward mode of norms takes 1/σ³, which overflows
        self.net, self.options, self.precision = net, options, options.dtype
        torch.manual_seed(options.seed)
        module = make(net.code)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        module.to(options.dtype)
        self.example = batch.input(net.shape, options.dtype).detach()
        if len(self.example) < 2 and net.at == "'auto'":  # as the guide says
            reject()
        if isinstance(plainly(module, self.example), NotImplementedError):  # torch has no such kernel
            reject()
        try:
            self.fused = Twin(self.wrapped(module, options.example or net.at == "'auto'"), options.adam)
        except Exception as error:
            self.check_kind(error, module, self.example)
            counts[f"refused: {str(error)[:40]}"] += 1
            reject()
        counts["nets"] += 1
        if not self.fused.model.prepared:
            # What a first forward draws would be another in float64.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    self.fused.model(self.example)
                except Exception as error:
                    self.check_kind(error, module, self.example)
                    reject()
        self.fused.renew_optimizer()
        self.reference = self.referring()
        self.before = self.fused.state()

    def wrapped(self, module: nn.Module, example: bool, backend: str = "fused") -> FDFA:
        o = self.options
        x = self.example.double() if backend == "reference" else self.example
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return FDFA(
                module,
                at=make(self.net.at),
                method=o.method,
                feedback=o.feedback,
                feedback_lr=0.1,
                eps=1e-2,
                noise=o.noise,
                patch=o.patch,
                backend=backend,
                example_input=x if example else None,
            )

    def referring(self) -> Twin:
        """The reference in the state that the other one has."""
        model = copy.deepcopy(self.fused.model)
        model.backend = "reference"
        twin = Twin(model.double(), self.options.adam)
        twin.follow(self.fused)
        return twin

    # Properties.

    def check_kind(self, error: Exception, module: nn.Module, *inputs: Tensor) -> None:
        """An error is one of the package's own, in words, or the one that torch has for this."""
        text = str(error)
        own = text.startswith(("FDFA: ", "fdfa::")) and isinstance(
            error, (ValueError, TypeError, RuntimeError)
        )
        if isinstance(error, Planned) or own:
            return
        torchs = [plainly(module, x) for x in inputs]
        if "INTERNAL ASSERT" in text or type(error) not in map(type, torchs):
            raise Fault(f"an error of no documented kind; torch's own would be {torchs!r}") from error

    def both(self, operation: Operation, *inputs: Tensor) -> bool:
        """Does this with both models and compares all that comes of it; whether they did it."""
        if self.fused.has_diverged():
            counts["operations left out, since the net has diverged"] += 1
            return False
        counts["operations"] += 1
        counts[operation.__name__] += 1
        before = [twin.kept() for twin in (self.fused, self.reference)]
        start = copy.deepcopy(self.reference)
        outcomes: list[Any] = []
        for twin, given in ((self.fused, inputs), (self.reference, [*map(in_dtype, inputs)])):
            try:
                outcomes.append(quietly(operation, twin, given))
            except Fault:
                raise
            except Exception as error:
                outcomes.append(error)
        found, expected = outcomes
        if isinstance(found, Exception) or isinstance(expected, Exception):
            cause = found if isinstance(found, Exception) else expected
            both = isinstance(found, Exception) and isinstance(expected, Exception)
            # Operators check their arguments by themselves, and torch those of the reference.
            if not both or (type(found) is not type(expected) and not str(found).startswith("fdfa::")):
                raise Fault(f"fused: {found!r}; reference: {expected!r}") from cause
            self.check_kind(found, self.fused.model.module, *inputs)
            for twin, kept in zip((self.fused, self.reference), before, strict=True):
                check_same(twin.kept(), kept, "an error")
            self.reference.follow(self.fused)
            return False
        self.compare(operation, inputs, start, {**found, **self.fused.state()}, expected)
        self.reference.follow(self.fused)
        return True

    def compare(
        self,
        operation: Operation,
        inputs: Sequence[Tensor],
        start: Twin,
        found: Results,
        outputs: Results,
    ) -> None:
        expected = {**outputs, **self.reference.state()}
        if found.keys() != expected.keys():
            raise Fault(f"one back-end alone has {sorted(found.keys() ^ expected.keys())}")
        for key, t in found.items():
            if t.shape != expected[key].shape:
                raise Fault(
                    f"{key} is {list(t.shape)}, and of the reference {list(expected[key].shape)}"
                )
            if not t.is_floating_point() and not torch.equal(t, expected[key]):
                raise Fault(f"{key} is {t.tolist()}, and of the reference {expected[key].tolist()}")
            if expected[key].isfinite().all() and not t.isfinite().all():
                raise Fault(f"{key} is not finite, that of the reference is")
        tolerance = TOLERANCE[self.precision]
        wrong = {key: e for key, e in errors(found, expected).items() if not e < tolerance}
        if not wrong:
            return
        moves = self.sensitivity(operation, inputs, start)
        worse = {key: (e, moves[key]) for key, e in wrong.items() if not e < tolerance + 2 * moves[key]}
        if worse:
            details = {key: (found[key], expected[key]) for key in worse}
            raise Fault(f"beyond rounding: (error, sensitivity) {worse}\n{details}")
        counts["ill-conditioned"] += 1

    def sensitivity(
        self, operation: Operation, inputs: Sequence[Tensor], start: Twin
    ) -> dict[str, float]:
        """How far the reference moves with its weights and inputs, if these do so by some roundings."""
        few = min(32 * torch.finfo(self.precision).eps, 2**-5)
        given = [*map(in_dtype, inputs)]

        def results(twin: Twin, given: Sequence[Tensor]) -> Results:
            found = {**quietly(operation, twin, given), **twin.state()}
            return {key: t.detach().clone() for key, t in found.items()}

        baseline = results(copy.deepcopy(start), given)
        largest = dict.fromkeys(baseline, 0.0)
        for seed in range(8):
            # Half of them by plain torch in the dtype itself: where all that is exact cancels, as in
            # a norm of one feature, the roundings alone are left. One of these at the same numbers.
            dtype = self.options.dtype if seed % 2 else torch.float64
            by = 0.0 if seed == 1 else few
            torch.manual_seed(seed)
            twin = copy.deepcopy(start)
            with torch.no_grad():
                for parameter in twin.model.module.parameters():
                    parameter.copy_(nudged(parameter, by))
            twin.model.to(dtype)
            optimizer_state = copy.deepcopy(start.optimizer.state_dict())
            twin.optimizer.load_state_dict(optimizer_state)
            moved = results(twin, [in_dtype(nudged(x, by), dtype) for x in given])
            for key, e in errors(moved, baseline).items():
                largest[key] = max(largest[key], e)
        return largest

    # What a user does.

    def input(self, batch: Batch) -> Tensor:
        return batch.input(self.net.shape, self.options.dtype)

    @rule(batch=batches, steps=booleans(), clears=booleans())
    def train(self, batch: Batch, steps: bool, clears: bool) -> None:
        """A step, or a backward that accumulates."""
        x = self.input(batch)
        if clears:
            self.zero_grad(to_none=True)

        def trains(twin: Twin, x: Tensor) -> Results:
            defined = clears and twin is self.reference
            expected = definition(copy.deepcopy(twin.model), x.detach()) if defined else {}
            counts["compared with the definition"] += bool(expected)
            output = twin.model(x)
            loss = loss_of(twin.model, output)
            loss.backward()
            step = {key: t for key, t in twin.state().items() if key in expected}
            for key, e in errors(step, expected).items():
                if not e < 1e-5:  # noise and B are in float32
                    raise Fault(f"{key} is not the defined one, by {e}: {step[key]}, {expected[key]}")
            found = {"output": output.detach(), "loss": loss.detach()}
            found |= {f"local output {i}": t.detach() for i, t in enumerate(twin.model.local_outputs)}
            if steps:
                twin.optimizer.step()
            return found

        self.both(trains, x)

    @rule(batch=batches, dtype=sampled([torch.bfloat16, torch.float16]))
    def train_under_autocast(self, batch: Batch, dtype: torch.dtype) -> None:
        """Which leaves float64 alone, so that the reference is exact."""
        if self.options.dtype != torch.float32 or self.options.method == "fg-w":  # as in `wrap`
            return

        def trains_under_autocast(twin: Twin, x: Tensor) -> Results:
            with torch.autocast("cpu", dtype):
                output = twin.model(x)
            loss_of(twin.model, output).backward()
            return {"output": output.detach()}

        self.precision = dtype
        try:
            self.both(trains_under_autocast, self.input(batch))
        finally:
            self.precision = self.options.dtype
        # Sums of a backward for the next step of B, which `follow` does not see, would be of that precision.
        self.zero_grad(to_none=True)

    @rule(batch=batches)
    def train_compiled(self, batch: Batch) -> None:
        """A step without a compiler of kernels; of one net in twenty, since it takes seconds."""
        if self.options.seed % 20 or self.is_compiled:
            return
        self.is_compiled = True
        x = self.input(batch)

        def trains_compiled(twin: Twin, x: Tensor) -> Results:
            torch._dynamo.reset()
            is_compiled = twin.model.backend == "fused"
            output = (torch.compile(twin.model, backend="aot_eager") if is_compiled else twin.model)(x)
            loss = loss_of(twin.model, output)
            loss.backward()
            return {"output": output.detach(), "loss": loss.detach()}

        try:
            quietly(trains_compiled, copy.deepcopy(self.fused), [x])
        except Exception as error:
            # torch's fake batch-norm tells other strides of one channel in channels_last.
            is_torchs = isinstance(error, torch._dynamo.exc.TorchDynamoException)
            if not is_torchs and "view size is not compatible" not in str(error):
                self.check_kind(error, self.fused.model.module, x)
            counts[f"not compiled: {str(error)[:60]}"] += 1
        else:
            self.both(trains_compiled, x)

    @rule(batches=st.lists(batches, min_size=2, max_size=4))
    def train_on(self, batches: list[Batch]) -> None:
        """Several steps, of which the first ones move B away from zero."""
        for batch in batches:
            self.train(batch, steps=True, clears=True)

    @rule(batch=several, other=several, together=booleans())
    def two_forwards(self, batch: Batch, other: Batch, together: bool) -> None:
        """Two forwards and then the backward of both: each has its own noise."""

        def trains_twice(twin: Twin, x: Tensor, other: Tensor) -> Results:
            first = loss_of(twin.model, twin.model(x))
            second = loss_of(twin.model, twin.model(other))
            if together:
                (first + second).backward()
            else:
                second.backward()
                first.backward()
            return {"loss": first.detach(), "second loss": second.detach()}

        self.both(trains_twice, self.input(batch), self.input(other))

    @rule(batch=batches)
    def two_backwards(self, batch: Batch) -> None:
        """Of one forward, whose graph is retained."""

        def goes_back_twice(twin: Twin, x: Tensor) -> Results:
            loss = loss_of(twin.model, twin.model(x))
            loss.backward(retain_graph=True)
            loss.backward()
            return {"loss": loss.detach()}

        self.both(goes_back_twice, self.input(batch))

    @rule(batch=batches)
    def forward_alone(self, batch: Batch) -> None:
        def runs(twin: Twin, x: Tensor) -> Results:
            return {"output": twin.model(x).detach()}

        self.both(runs, self.input(batch))

    @rule(batch=batches, evaluates=booleans())
    def infer(self, batch: Batch, evaluates: bool) -> None:
        """In eval mode, or without gradients: the net itself, which leaves all as it was."""
        x = self.input(batch)
        before = self.fused.kept()

        def infers(twin: Twin, x: Tensor) -> Results:
            twin.model.train(not evaluates)
            with torch.set_grad_enabled(evaluates):
                plain = copy.deepcopy(twin.model.module)(x)
                output = twin.model(x)
            twin.model.train()
            if not torch.equal(output, plain):
                raise Fault("inference is not that of the net")
            return {"output": output.detach()}

        if self.both(infers, x):
            check_same(self.fused.kept(), before, "inference")
        self.fused.model.train()
        self.reference.model.train()

    @rule(to_none=booleans())
    def zero_grad(self, to_none: bool) -> None:
        def clears(twin: Twin) -> Results:
            twin.optimizer.zero_grad(set_to_none=to_none)
            return {}

        self.both(clears)

    @rule(way=sampled(["deepcopy", "pickle", "save", "state into fresh", "state with example"]))
    def copies(self, way: str) -> None:
        """A copy goes on in place of the model."""

        def copied(twin: Twin) -> Results:
            model = twin.model
            if way == "deepcopy":
                new = copy.deepcopy(model)
            elif way == "pickle":
                new = pickle.loads(pickle.dumps(model))
            else:
                file = io.BytesIO()
                torch.save(model if way == "save" else model.state_dict(), file)
                file.seek(0)
                saved = torch.load(file, weights_only=way != "save")
                new = saved
                if way.startswith("state"):
                    new = self.fresh(model, way.endswith("example"))
                    new.load_state_dict(saved)
            for p, old in zip(new.parameters(), model.parameters(), strict=True):
                p.grad = None if old.grad is None else old.grad.clone()
                p.requires_grad_(old.requires_grad)
            new.feedback_lr = model.feedback_lr
            other = Twin(new, twin.adam)
            other.optimizer.load_state_dict(copy.deepcopy(twin.optimizer.state_dict()))
            for key, t in twin.state().items():
                if not torch.equal(other.state()[key], t):
                    raise Fault(f"a copy by {way} has another {key}")
            twin.model, twin.optimizer = other.model, other.optimizer
            return {}

        self.both(copied)

    def fresh(self, model: FDFA, example: bool) -> FDFA:
        """A new model of the net as it is now, in other words a program that starts again."""
        net = copy.deepcopy(model.module)
        with torch.no_grad():
            for tensor in (*net.parameters(), *net.buffers()):
                tensor.zero_() if not tensor.is_floating_point() else tensor.normal_()
        return self.wrapped(net, example or self.net.at == "'auto'", model.backend)

    @rule(which=integers(0, 100), wants=booleans())
    def freeze(self, which: int, wants: bool) -> None:
        def freezes(twin: Twin) -> Results:
            parameters = [*twin.model.module.parameters()]
            parameters[which % len(parameters)].requires_grad_(wants)
            return {}

        self.both(freezes)

    @rule(rate=sampled([0.0, 0.01, 0.5]))
    def set_feedback_rate(self, rate: float) -> None:
        for twin in (self.fused, self.reference):
            twin.model.feedback_lr = rate

    @rule(which=integers(0, 100), code=sampled(OUT_OF_PLACE))
    def exchange_activation(self, which: int, code: str) -> None:
        named = [n for n, m in self.fused.model.module.named_modules() if isinstance(m, SHAPELESS)]
        if named:
            parent, _, name = named[which % len(named)].rpartition(".")
            for twin in (self.fused, self.reference):
                setattr(twin.model.module.get_submodule(parent), name, make(code))

    @rule(which=integers(0, 100), code=sampled(FUNCTIONS))
    def exchange_block(self, which: int, code: str) -> None:
        """An FDFALinear by an FDFABlock of the same features."""
        named = [n for n, m in self.fused.model.module.named_modules() if isinstance(m, FDFALinear)]
        if named:
            parent, _, name = named[which % len(named)].rpartition(".")
            for twin in (self.fused, self.reference):
                home = twin.model.module.get_submodule(parent)
                old = getattr(home, name)
                new: Any = nn.Linear(old.in_features, old.out_features, old.bias is not None)
                new.weight, new.bias = old.weight, old.bias
                setattr(home, name, FDFABlock(new, make(code)))
                twin.optimizer.zero_grad()
                twin.renew_optimizer()

    @rule(batch=batches, which=integers(0, 100), more=integers(1, 3))
    def exchange_width(self, batch: Batch, which: int, more: int) -> None:
        """Another width of a layer does not fit, which is said, and the old layer goes on."""
        names = [n for n, m in self.fused.model.module.named_modules() if type(m) is FDFALinear]
        if not names:
            return
        parent, _, name = names[which % len(names)].rpartition(".")

        def misfits(twin: Twin, x: Tensor) -> Results:
            home = twin.model.module.get_submodule(parent)
            old = getattr(home, name)
            wide = FDFALinear(old.in_features, old.out_features + more, activation=old.activation)
            setattr(home, name, wide.to(old.weight.dtype))
            before = twin.kept()
            fits = True
            try:
                twin.model(x)
            except (RuntimeError, ValueError) as error:
                fits = False
                self.check_kind(error, twin.model.module, x)
                check_same(twin.kept(), before, "an error")
            finally:
                setattr(home, name, old)
            return {"fits": torch.tensor(int(fits))}

        self.both(misfits, self.input(batch))

    @rule(batch=batches, which=integers(0, 100))
    def raise_once(self, batch: Batch, which: int) -> None:
        """In the middle of a forward."""

        def fails(twin: Twin, x: Tensor) -> Results:
            def refuse(*_: Any) -> None:
                raise Planned

            modules = [*twin.model.module.modules()]
            hook = modules[which % len(modules)].register_forward_pre_hook(refuse)
            try:
                return {"output": twin.model(x).detach()}
            finally:
                hook.remove()

        self.both(fails, self.input(batch))

    @rule(batch=batches, change=sampled(["narrow", "wide", "one more", "one less", "none", "int"]))
    def wrong_input(self, batch: Batch, change: str) -> None:
        x = self.input(batch).detach()
        bad = {
            "narrow": lambda: x[..., :-1],
            "wide": lambda: torch.cat([x, x], -1),
            "one more": lambda: x.unsqueeze(0),
            "one less": lambda: x[0],
            "none": lambda: x[:0],
            "int": lambda: x.long(),
        }[change]()

        def runs_on_wrong(twin: Twin, x: Tensor) -> Results:
            return {"output": twin.model(x).detach()}

        self.both(runs_on_wrong, bad)

    @rule(batch=batches, value=sampled([math.nan, math.inf]))
    def train_on_nan(self, batch: Batch, value: float) -> None:
        """No batch spoils the feedback; the rest of the state is put back."""
        if self.fused.has_diverged():
            return
        counts["operations"] += 1
        x = self.input(batch).detach().clone(memory_format=torch.contiguous_format)
        x.view(-1)[0] = value
        outcomes: list[Any] = []
        for twin, given in ((self.fused, x), (self.reference, x.double())):
            saved = copy.deepcopy(twin.model.state_dict())
            twin.optimizer.zero_grad()

            def trains(twin: Twin, x: Tensor) -> Results:
                loss_of(twin.model, twin.model(x)).backward()
                return {}

            try:
                quietly(trains, twin, [given])
            except Exception as error:
                self.check_kind(error, twin.model.module, given)
                outcomes.append(type(error))
            else:
                outcomes.append(twin.model.noise_state.tolist() + twin.model.updates.tolist())
            for bank in (twin.model.feedback, twin.model.exp_avg, twin.model.exp_avg_sq):
                for name, matrix in bank.items():
                    if not matrix.isfinite().all():
                        raise Fault(f"{value} in a batch is in the feedback of {name}")
            twin.optimizer.zero_grad()
            twin.model.load_state_dict(saved)
        if outcomes[0] != outcomes[1]:
            raise Fault(f"fused: {outcomes[0]}, reference: {outcomes[1]}")
        self.reference.follow(self.fused)


def run(cases: int, seed: int) -> None:
    """So many nets, 50 of each seed from this one on; `counts` says how much of what was done.

    Raises:
        Fault: a property does not hold; hypothesis prints the shortest program that it has found.
    """
    torch.set_num_threads(1)
    counts.clear()
    for first in range(0, cases, 50):
        run_state_machine_as_test(
            hypothesis.seed(seed)(type("Nets", (Nets,), {})),
            settings=settings(
                max_examples=min(50, cases - first),
                stateful_step_count=8,
                deadline=None,
                database=None,
                print_blob=True,
                phases=[Phase.generate, Phase.shrink],  # explaining takes longer than both
                suppress_health_check=list(HealthCheck),
            ),
        )
        counts["seeds"] += 1
        seed += 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        run(arguments.cases, arguments.seed)
    finally:  # a finding ends it
        for what, number in sorted(counts.items()):
            print(f"{number:8} {what}")

"""What is timed: one whole training step of a net, by each way to make it."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, cycle

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential

from fdfa_ext import FDFA, FDFABlock, FDFAConv2d, make_graphed_step
from fdfa_ext.arguments import UserError
from fdfa_ext.bench.plain import PlainFDFA, PublishedFDFA
from fdfa_ext.train.models import build_net

HIDDEN = {"mlp2": 1, "mlp4": 3}  # 784-800-10 and 784-800-800-800-10
MODELS = (*HIDDEN, "cnn", "cnn-two-pool", "alexnet", "other-ends")
SHAPES = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "cifar10": (3, 32, 32), "imagenet": (3, 224, 224)}
INPUTS = ("digits", "mnist", "cifar10")  # that one may ask for
_WIDTHS = {"digits": 128, "mnist": 800, "cifar10": 1000}
DTYPES = ("float32", "tf32", "bfloat16")
GRAPHED = ("fdfa-graphed", "bp-graphed", "bp-channels-last-graphed")
IN_PATCHES = "fdfa-patches"  # of PATCH pixels a side
PATCH = 4
RELATIVES = ("dfa", "dkp", "fg-a", "lg-fg-a", "fg-w")
BACKPROPAGATION = ("bp", "bp-channels-last", "bp-compiled", "bp-checkpointed")
DEFAULT = ("fdfa", "plain", "published", *BACKPROPAGATION, *GRAPHED)
METHODS = (*DEFAULT, IN_PATCHES, *RELATIVES)

_N_BATCHES = 16  # enough that none is learnt by heart, after which zeros would be computed with
_BATCH_BYTES = 2**28  # of them all at most


@dataclass(frozen=True)
class Case:
    """A net on a kind of input. hidden and width are for the mlps alone."""

    model: str
    shape: str
    batch_size: int
    outputs: int
    hidden: int = 1
    width: int = 800

    @staticmethod
    def of(model: str, shape: str, batch_size: int, outputs: int | None) -> "Case":
        """The paper's net on that input, a small mlp on digits; AlexNet has an input of its own."""
        if model == "alexnet":
            return Case(model, "imagenet", batch_size, outputs or 100)
        return Case(model, shape, batch_size, outputs or 10, HIDDEN.get(model, 1), _WIDTHS[shape])

    @property
    def is_mlp(self) -> bool:
        return self.model in HIDDEN

    @property
    def net(self) -> str:
        """Its name, for an mlp its layers' sizes."""
        if not self.is_mlp:
            return self.model
        inputs = torch.Size(SHAPES[self.shape]).numel()
        return "-".join(map(str, [inputs, *[self.width] * self.hidden, self.outputs]))

    def build(self, device: torch.device | None = None) -> nn.Sequential:
        """The net, with the same weights each time; initialised on the device, where that is fast."""
        torch.manual_seed(0)
        with torch.device(device or "cpu"):
            if self.model == "other-ends":
                return _other_ends(SHAPES[self.shape], self.outputs)
            family = "mlp" if self.is_mlp else self.model
            return build_net(family, SHAPES[self.shape], self.outputs, self.hidden, self.width)


def _other_ends(shape: tuple[int, int, int], outputs: int) -> nn.Sequential:
    """Blocks with the ends that none of the paper's nets has, for their operators to be timed."""
    channels, height, width = shape
    return nn.Sequential(
        FDFAConv2d(channels, 64, 5, padding=2, activation="relu"),  # and no pool after it
        FDFABlock(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        # An activation in the middle, and perturbed in a pass of its own.
        FDFABlock(nn.Conv2d(64, 64, 3, padding=1), nn.GELU(), nn.Softplus()),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (height // 4) * (width // 4), outputs),
    )


def methods_for(case: Case, methods: list[str], dtype: str, device: torch.device) -> list[str]:
    """Those that make sense for it.

    Memory order and patches make no difference to a net without images, torch's autocast does not
    reach the tangents of the plain forms, and only CUDA has graphs.
    """
    out = {"bp-channels-last", "bp-channels-last-graphed", IN_PATCHES} if case.is_mlp else set()
    if device.type != "cuda":
        out |= {*GRAPHED}
    if dtype == "bfloat16":
        out |= {"plain", "published"}
    left = [method for method in methods if method not in out]
    if not left:
        raise UserError(f"{case.net} in {dtype} on {device}: nothing to time with {', '.join(methods)}")
    return left


@dataclass
class TimedStep:
    """Forward, cross-entropy, backward, fused Adam on W and Adam on B, gradients let go."""

    run: Callable[[], None]
    resident_bytes: int  # weights, feedback, optimizer state and buffers, which outlive a step


def training_step(case: Case, method: str, device: torch.device, dtype: str) -> TimedStep:
    """dtype: "float32", "tf32" (which is a setting of torch and up to the caller) or "bfloat16"."""
    net = case.build(device)
    graphed = method in GRAPHED
    plain_order = case.is_mlp or method in ("bp", "bp-graphed", "bp-checkpointed", "published")
    order = torch.contiguous_format if plain_order else torch.channels_last
    net = net.to(memory_format=order)  # type: ignore[call-overload]
    batches = list(_batches(case, device, order))
    endless = cycle(batches)
    example = batches[0][0]

    model: nn.Module = net
    if method in ("fdfa", "fdfa-graphed", IN_PATCHES):
        patch = PATCH if method == IN_PATCHES else 1
        model = FDFA(net, feedback="adam", feedback_lr=1e-4, patch=patch, example_input=example)
    elif method in RELATIVES:
        model = FDFA(net, method=method, example_input=example)
    elif method == "plain":
        model = PlainFDFA(net, example)
    elif method == "published":
        model = PublishedFDFA(net, example)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True, capturable=graphed)
    forward: Callable[[Tensor], Tensor] = model
    if method == "bp-compiled":
        forward = torch.compile(model)
    elif method == "bp-checkpointed":  # with the segments that need the least memory
        segments = round(math.sqrt(len(net)))
        forward = partial(checkpoint_sequential, net, segments, use_reentrant=False)
    model.train()
    # A cast that was kept from before the capture would never see new weights.
    precision = torch.autocast(
        device.type, torch.bfloat16, enabled=dtype == "bfloat16", cache_enabled=not graphed
    )
    if graphed:
        with precision:
            replay = make_graphed_step(model, F.cross_entropy, optimizer, batches[0])

    def step() -> None:
        if graphed:
            replay(*next(endless))
            return
        images, labels = next(endless)
        with precision:
            loss = F.cross_entropy(forward(images), labels)
            for output in getattr(model, "local_outputs", ()):
                loss = loss + F.cross_entropy(output, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    state = chain.from_iterable(values.values() for values in optimizer.state.values())
    resident = sum(t.nbytes for t in chain(model.state_dict().values(), state))
    return TimedStep(step, resident)


def _batches(
    case: Case, device: torch.device, order: torch.memory_format
) -> Iterator[tuple[Tensor, Tensor]]:
    shape = (case.batch_size, *SHAPES[case.shape])
    n_bytes = 4 * torch.Size(shape).numel()
    for _ in range(max(2, min(_N_BATCHES, _BATCH_BYTES // n_bytes))):
        images = torch.randn(shape, device=device).contiguous(memory_format=order)
        yield images, torch.randint(case.outputs, (case.batch_size,), device=device)

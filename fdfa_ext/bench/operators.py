"""The operators of one training step, each timed alone: its share of the step and of the roofline."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from fdfa_ext import reference
from fdfa_ext._ops import fused
from fdfa_ext.bench.machine import Limits
from fdfa_ext.bench.timing import Implementation, Spread, attempt, take_turns

_SECONDS = 0.25  # of timing for each operator
_COLD_BYTES = 2**28  # several times a GPU's L2 cache
_MOST_COPIES = 64  # of an operator's arguments, to make them so many bytes
# Arguments that a schema says an operator changes: results, which it does not read; and the gradients
# of fused Adam, which it writes only where it unscales them.
_MOVED_ONCE = ("deltas", "bias_grads", "output_bias_grad", "ty", "grads")


@dataclass
class OperatorCall:
    """One operator with copies of the arguments that a training step gave it."""

    operator: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    calls: int = 1  # in one step

    @property
    def name(self) -> str:
        return str(self.operator.name())

    @property
    def is_ours(self) -> bool:
        return bool(self.operator.namespace == "fdfa")

    @property
    def given(self) -> dict[str, Any]:
        """The arguments by their names in the operator's schema."""
        names = (argument.name for argument in self.operator._schema.arguments)
        return dict(zip(names, self.args, strict=False)) | self.kwargs

    @property
    def shapes(self) -> str:
        """Of its two largest tensors."""
        found = sorted(_tensors((self.args, self.kwargs)), key=Tensor.numel, reverse=True)
        return ", ".join("×".join(map(str, t.shape)) for t in found[:2])

    def __call__(self) -> Any:
        return self.operator(*self.args, **self.kwargs)

    def copy(self) -> "OperatorCall":
        args, kwargs = _copied((self.args, self.kwargs))
        return OperatorCall(self.operator, args, kwargs, self.calls)


class Work(NamedTuple):
    """What one call of an operator cannot avoid."""

    name: str
    n_bytes: int  # each tensor that it reads or writes, once
    n_flops: int  # of matrix products alone

    def roof(self, limits: Limits) -> tuple[float, str]:
        """The seconds that it takes at least, and the limit that sets them: "bytes" or "products"."""
        if self.name.startswith("fdfa::feedback"):
            limits = limits._replace(flops=limits.feedback_flops)
        by_bytes = limits.seconds(self.n_bytes, 0) >= limits.seconds(0, self.n_flops)
        return limits.seconds(self.n_bytes, self.n_flops), "bytes" if by_bytes else "products"


@dataclass
class OperatorTime:
    """What `profile` prints of an operator; a time in milliseconds is one call's."""

    name: str
    shapes: str
    calls: int
    ms: Spread
    n_bytes: int  # its Work
    n_flops: int
    of_roofline: float
    bound: str  # which roof is the lower: "bytes" or "products"
    reference_ms: float | None = None


def record(step: Callable[[], None], device: str | None = None) -> list[OperatorCall]:
    """The operators that `step` calls, in order; equal calls are counted and not repeated.

    Their arguments are copied to `device`: "meta" keeps shapes alone, None means where they are.
    """
    recorder = _Recorder(device)
    with recorder:
        step()
    return list(recorder.calls.values())


class _Recorder(TorchDispatchMode):
    def __init__(self, device: str | None) -> None:
        super().__init__()
        self.device = device
        self.calls: dict[Any, OperatorCall] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        arguments = (args, kwargs or {})
        if _does_work(func):
            key = (func, str(tree_map(_looks, arguments)))
            if key in self.calls:
                self.calls[key].calls += 1
            else:
                self.calls[key] = OperatorCall(func, *_copied(arguments, self.device))
        return func(*arguments[0], **arguments[1])


def _does_work(operator: torch._ops.OpOverload) -> bool:
    """Not views, whose results alias an argument that they do not change; nor mere questions."""
    schema = operator._schema
    view = any(r.alias_info and not r.alias_info.is_write for r in schema.returns)
    changes = any(a.alias_info and a.alias_info.is_write for a in schema.arguments)
    return not view and (changes or any("Tensor" in str(r.type) for r in schema.returns))


def _looks(value: Any) -> Any:
    return (value.shape, value.stride(), value.dtype) if isinstance(value, Tensor) else value


def _copied(arguments: Any, device: str | None = None) -> Any:
    def copied(value: Any) -> Any:
        return value.detach().to(device, copy=True) if isinstance(value, Tensor) else value

    return tree_map(copied, arguments)


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def time_operators(
    calls: Sequence[OperatorCall], limits: Limits, device: torch.device
) -> list[OperatorTime]:
    """Each call alone, and with it the same operator in plain torch where it is one of this package."""
    return [row for call in calls for row in _time(call, limits, device)]


def _time(call: OperatorCall, limits: Limits, device: torch.device) -> Iterator[OperatorTime]:
    whole, *passes = works(call)
    copies = 1
    if device.type == "cuda":
        copies = min(_MOST_COPIES, math.ceil(_COLD_BYTES / max(whole.n_bytes, 1)))
    runs: dict[str, Callable[[OperatorCall], Any]] = {"itself": OperatorCall.__call__}
    if call.is_ours:
        runs["reference"] = _in_plain_torch
    products = _PRODUCTS.get(call.name)
    if products:
        runs["products"] = products
    # Plain torch makes so many passes of its own that it finds nothing in a cache.
    counts = {name: 1 if name == "reference" else copies for name in runs}
    implementations = []
    for name, run in runs.items():
        step, _ = attempt(partial(_repeated, run, call, counts[name], device))
        if step:
            implementations.append(Implementation(name, step))
    with torch.no_grad():
        take_turns(implementations, _SECONDS, device)
    ms = {
        c.name: Spread(*(q / counts[c.name] for q in c.spread)) for c in implementations if not c.error
    }

    def row(work: Work, spread: Spread, plain: float | None) -> OperatorTime:
        seconds, bound = work.roof(limits)
        amounts = (work.n_bytes, work.n_flops, 1e3 * seconds / spread.median, bound)
        return OperatorTime(work.name, call.shapes, call.calls, spread, *amounts, plain)

    if "itself" not in ms:
        raise RuntimeError(f"{call.name} could not be timed")
    plain = ms["reference"].median if "reference" in ms else None
    yield row(whole, ms["itself"], plain)
    # Where the products' time scatters by more than the pass takes, a difference says nothing.
    if products and "products" in ms and ms["products"].median < ms["itself"].lower:
        pass_ms = Spread(*(q - ms["products"].median for q in ms["itself"]))
        yield from (row(work, pass_ms, None) for work in passes)


def _repeated(
    run: Callable[[OperatorCall], Any], call: OperatorCall, copies: int, device: torch.device
) -> Callable[[], Any]:
    arguments = [call.copy() for _ in range(copies)]
    return _graphed(run, arguments) if device.type == "cuda" else partial(run, arguments[0])


def _graphed(run: Callable[[OperatorCall], Any], calls: list[OperatorCall]) -> Callable[[], None]:
    """All of them in a CUDA graph, which the CPU does not delay; none finds its data in a cache."""
    with torch.no_grad():
        run(calls[0])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = [run(call) for call in calls]  # kept, so that each writes to memory of its own
    del results

    def replay(_arguments: list[OperatorCall] = calls) -> None:  # whose memory the graph reads
        graph.replay()

    return replay


def _in_plain_torch(call: OperatorCall) -> Any:
    return getattr(reference, call.name.removeprefix("fdfa::"))(*call.args, **call.kwargs)


def _linear_products(call: OperatorCall) -> list[Tensor]:
    given = call.given
    factors = [t.flatten(0, -2) for t in (given["x"], given["tangent"]) if t is not None]
    return [fused.mm(t, given["weight"].t()) for t in factors]


def _conv2d_products(call: OperatorCall) -> list[Tensor]:
    given = call.given
    geometry = [given[name] for name in ("stride", "padding", "dilation", "groups")]
    images = [t for t in (given["x"], given["tangent"]) if t is not None]
    return [F.conv2d(t, given["weight"], None, *geometry) for t in images]


_PRODUCTS = {
    "fdfa::linear": _linear_products,
    "fdfa::conv2d": _conv2d_products,
}


def works(call: OperatorCall) -> list[Work]:
    """Of the call as a whole and, if it has products of a library in it, of the pass behind them."""
    found = [Work(call.name, necessary_bytes(call), _flops(call))]
    products = _PRODUCTS.get(call.name)
    if products:
        with torch.no_grad():
            # z and tz are read, y and ty, or what is pooled of them, written.
            results = sum(map(_held_bytes, _tensors(call.copy()())))
            moved = sum(t.nbytes for t in products(call)) + results
        found.append(Work(f"{call.name} less its products", moved, 0))
    return found


def _held_bytes(t: Tensor) -> int:
    """Of its memory, which is less than its elements' where strides are 0."""
    return min(t.nbytes, t.untyped_storage().nbytes())


def necessary_bytes(call: OperatorCall) -> int:
    """Each tensor read once and each result written once; what an operator changes counts as both."""
    schema = call.operator._schema
    given = call.given
    if "saved_activations" in given:
        both = zip(given["saved_activations"], given["activations"], strict=True)
        given["saved_activations"] = [saved for saved, f in both if f != "identity"]  # whose f' is one
    given.pop("anchor", None)  # a node of autograd's graph
    total = 0
    for argument in schema.arguments:
        changed = argument.alias_info is not None and argument.alias_info.is_write
        times = 2 if changed and argument.name not in _MOVED_ONCE else 1
        total += times * sum(t.nbytes for t in _tensors(given.get(argument.name)))
    with torch.no_grad():
        result = call.copy()()
    results = result if isinstance(result, tuple) else (result,)
    for returned, value in zip(schema.returns, results, strict=False):
        if returned.alias_info is None:
            total += sum(map(_held_bytes, _tensors(value)))
    return total


def _flops(call: OperatorCall) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call.copy()()
    return int(counter.get_total_flops())

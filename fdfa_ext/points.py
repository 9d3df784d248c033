"""Perturbation points: the modules of a model that are perturbed at their output.

A block brings its point along. `at` puts points on modules of any other kind, and "auto" finds them in
what a model calls on an example.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from fdfa_ext.duals import first_tensor
from fdfa_ext.layers import Block, FDFABlock, FDFAConv2d, FDFALinear

BLOCKS = (FDFALinear, FDFAConv2d, FDFABlock)
GRANULARITIES = ("block", "layer")

# Names, classes, or a function of name and module that says whether the module is meant.
At = Sequence[str | type[nn.Module]] | Callable[[str, nn.Module], Any] | None

_TRANSFORMER_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
# They change no value, so that a point before them has the shape that patches want.
_VIEWS = (nn.Flatten, nn.Unflatten, nn.Identity)


def check_at(at: Any) -> None:
    """Raises TypeError unless `at` is of a kind that find_points takes."""
    kinds = (str, type)
    if at is None or (callable(at) and not isinstance(at, type)):
        return
    if isinstance(at, (str, type)) or not isinstance(at, Sequence):
        raise TypeError(
            'FDFA: at must be "auto", a list of module names or classes, or a function of name and '
            f"module; got {at!r}"
        )
    for item in at:
        if not isinstance(item, kinds) or (isinstance(item, type) and not issubclass(item, nn.Module)):
            raise TypeError(f"FDFA: at lists names and classes of modules; got {item!r}")


def find_points(module: nn.Module, at: At = None) -> Iterator[tuple[str, Any]]:
    """Blocks, and the modules that `at` means, by qualified name, in the order of the module; none that
    is within a block.

    Raises:
        ValueError: there is none, or the module is one itself; `at` names something else.
        TypeError: a block is of an unknown kind.
    """
    if isinstance(module, Block):
        raise ValueError(
            f"FDFA: the module is itself a block ({type(module).__name__}); put it and an output layer "
            "into a torch.nn.Sequential"
        )
    inside: list[str] = []
    names = {item for item in at if isinstance(item, str)} if isinstance(at, Sequence) else set()
    found = False
    for name, candidate in module.named_modules():
        if any(name.startswith(outer + ".") for outer in inside):
            continue
        if isinstance(candidate, Block):
            if not isinstance(candidate, BLOCKS):
                raise TypeError(
                    f"FDFA: block '{name}' ({type(candidate).__name__}) must derive from FDFALinear, "
                    "FDFAConv2d or FDFABlock; put a module of another kind into an FDFABlock"
                )
            inside.append(name)
        elif not _is_meant(at, name, candidate):
            continue
        elif not name:
            raise ValueError(
                "FDFA: at means the model itself, whose output is not perturbed; name modules in it"
            )
        names.discard(name)
        found = True
        yield name, candidate
    if names:
        raise ValueError(_unknown_name(module, sorted(names)[0], inside))
    if not found and at is not None:
        raise ValueError(f"FDFA: at={_shown(at)} means no module of {type(module).__name__}")
    if not found:
        raise ValueError(
            'FDFA: the module has no block; give at="auto" and an example_input, or use FDFALinear, '
            "FDFAConv2d or FDFABlock for hidden layers"
        )


def _is_meant(at: At, name: str, module: nn.Module) -> bool:
    if at is None:
        return False
    if isinstance(at, Sequence):
        return any(name == item if isinstance(item, str) else isinstance(module, item) for item in at)
    return bool(at(name, module))


def _unknown_name(module: nn.Module, name: str, inside: Sequence[str]) -> str:
    known = dict(module.named_modules(remove_duplicate=False))
    if name not in known:
        return f"FDFA: at names '{name}', but the model has no such module"
    for outer in inside:
        if name.startswith(outer + "."):
            return f"FDFA: at names '{name}', which is within block '{outer}' and learns by its error"
    first = next(other for other, member in module.named_modules() if member is known[name])
    return f"FDFA: at names '{name}', which is '{first}' too; use that name"


def _shown(at: At) -> str:
    if not isinstance(at, Sequence):
        return getattr(at, "__name__", repr(at))
    return repr([item if isinstance(item, str) else item.__name__ for item in at])


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Within it the module is in eval mode; at its end, modes and buffers are what they were."""
    members = [*module.modules()]
    modes = [(member, member.training) for member in members]
    buffers = save_buffers(member._buffers for member in members)
    try:
        module.eval()
        yield
    finally:
        for member, mode in modes:
            member.training = mode
        restore_buffers(buffers)


SavedBuffers = list[tuple[dict[str, Any], str, Tensor, Tensor]]


def save_buffers(buffers: Iterable[dict[str, Any]]) -> SavedBuffers:
    """Each with the module's dictionary that it is in, its name there, and its values."""
    return [
        (entries, name, buffer, buffer.clone())
        for entries in buffers
        for name, buffer in entries.items()
        if buffer is not None and not is_lazy(buffer)
    ]


@torch.no_grad()
def restore_buffers(saved: SavedBuffers) -> None:
    for entries, name, buffer, values in saved:
        entries[name] = buffer.copy_(values)


@dataclass(slots=True)
class ModuleCall:
    """One call of a module, by the tensors that go in and out."""

    module: nn.Module
    inputs: list[Tensor]
    output: Tensor | None  # the first that it returns, or None

    @property
    def makes_features(self) -> bool:
        """Whether it returns what may be perturbed: [N, *features]."""
        return self.output is not None and self.output.is_floating_point() and self.output.dim() >= 2


@dataclass(slots=True)
class Trace:
    """One forward of a module in eval mode."""

    module: nn.Module
    calls: list[ModuleCall]  # each after those within it
    result: Any


@torch.no_grad()
def trace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
    calls: list[ModuleCall] = []
    members = {*module.modules()}

    def record(inner: nn.Module, inputs: Any, keywords: Any, result: Any) -> None:
        if inner in members:
            read = [t for t in tree_leaves((inputs, keywords)) if isinstance(t, Tensor)]
            calls.append(ModuleCall(inner, read, first_tensor(result)))

    hook = register_module_forward_hook(record, with_kwargs=True)
    try:
        with evaluating(module):
            result = module(*args, **kwargs)
    finally:
        hook.remove()
    return Trace(module, calls, result)


def has_matrices(module: nn.Module) -> bool:
    """Whether it is a layer: with weights of its own that map features, as no norm has. A module with
    others in it may hold bare parameters, such as positions."""
    if isinstance(module, _EMBEDDINGS) or (
        [*module.children()] and not isinstance(module, nn.MultiheadAttention)
    ):
        return False
    return any(p is not None and p.dim() >= 2 for p in module._parameters.values())


def default_output(traced: Trace) -> str | None:
    """Name of the module whose result is the network's output; None where that is the model's own."""
    if isinstance(traced.result, Tensor):
        return None
    names = {member: name for name, member in traced.module.named_modules()}
    with_parameters = [
        call.module for call in traced.calls if any(True for _ in call.module.parameters(recurse=False))
    ]
    return names[with_parameters[-1]] if with_parameters else None


def auto_points(traced: Trace, granularity: str) -> list[str]:
    """Names for `at`.

    A point stands after each layer with the norm, activation, pool and dropout that alone read its
    output, and none after the output layer, the last. Where a class of the model's repeats, each of
    several layers, a point stands after each of these instead, unless granularity is "layer". A layer
    called several times has none, and learns by the points after it.

    Raises:
        ValueError: no place is left for a point.
    """
    module, calls = traced.module, traced.calls
    times = Counter(call.module for call in calls)
    layers = [call for call in calls if has_matrices(call.module)]
    names = {member: name for name, member in module.named_modules()}
    points: list[str] = []
    if layers:
        output = layers[-1].module
        composites = [] if granularity == "layer" else _repeated(calls, times, output, names)
        points += [names[composite] for composite in composites]
        within = {inner for composite in composites for inner in composite.modules()}
        for call in layers:
            inner = call.module
            if inner not in within and inner is not output and times[inner] == 1:
                end = _end_of_group(calls, calls.index(call), times, within)
                if end.makes_features:
                    points.append(names[end.module])
    if not points:
        raise ValueError(
            f'FDFA: at="auto" finds no hidden layer in {type(module).__name__} that is called once in '
            'a forward; name modules, or train it by method="bp"'
        )
    return list(dict.fromkeys(points))


def _repeated(
    calls: Sequence[ModuleCall],
    times: Counter[nn.Module],
    output: nn.Module,
    names: dict[nn.Module, str],
) -> list[nn.Module]:
    """The outermost modules of classes that repeat, such as residual blocks and transformer layers."""
    called = {call.module: call for call in calls}

    def fits(member: nn.Module) -> bool:
        kind = type(member)
        own = not kind.__module__.startswith("torch.nn.") or isinstance(member, _TRANSFORMER_LAYERS)
        if not own or times[member] != 1 or not called[member].makes_features:
            return False
        inner = {*member.modules()}
        return output not in inner and sum(has_matrices(m) and times[m] > 0 for m in inner) > 1

    fitting = [member for member in names if fits(member)]
    kinds = Counter(type(member) for member in fitting)
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for member in fitting:
        if kinds[type(member)] > 1 and member not in inside:
            found.append(member)
            inside.update(member.modules())
    return found


def _end_of_group(
    calls: Sequence[ModuleCall], start: int, times: Counter[nn.Module], within: set[nn.Module]
) -> ModuleCall:
    """The last of the calls, from this layer's on, of modules that each alone read what the one before
    returns."""
    end = calls[start]
    while True:
        readers = [
            (i, call)
            for i, call in enumerate(calls)
            if i > start and not [*call.module.children()] and any(t is end.output for t in call.inputs)
        ]
        if not readers:
            return end
        start, reader = readers[0]
        changes_in_place = reader.output is end.output  # later readers are its own
        is_alone = (len(readers) == 1 or changes_in_place) and len(reader.inputs) == 1
        joins = not has_matrices(reader.module) and not isinstance(reader.module, _VIEWS)
        if not (is_alone and joins and times[reader.module] == 1 and reader.makes_features):
            return end
        if reader.module in within:
            return end
        end = reader

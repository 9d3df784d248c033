"""Perturbation points: the modules of a model that are perturbed at their output, or at their input.

A block brings its point along. `at` puts points on modules of any other kind: by "name" on what the
module returns, by "name.input" on what it is given.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fdfa_ext.fusion import channels_first
from fdfa_ext.layers import Block, FDFABlock, FDFAConv2d, FDFALinear

BLOCKS = (FDFALinear, FDFAConv2d, FDFABlock)

_INPUT = "input"  # the last part of such a name

# Names, classes, or a function of name and module that says whether the module is meant.
At = Sequence[str | type[nn.Module]] | Callable[[str, nn.Module], Any] | None


def check_module(module: Any) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"FDFA: module must be a torch.nn.Module; got {type(module).__name__}")
    for name, inner in module.named_modules():
        if isinstance(inner, DistributedDataParallel):
            raise ValueError(
                f"FDFA: module '{name}' is a DistributedDataParallel, whose processes would each learn "
                "feedback of their own; put FDFA into DistributedDataParallel instead"
            )


def check_at(at: Any) -> None:
    """Raises TypeError unless `at` is of a kind that find_points takes."""
    kinds = (str, type)
    if at is None or (callable(at) and not isinstance(at, (type, nn.Module))):
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
    """Blocks, and the modules that `at` means, by the names of their points, in the order of the
    module; none that is within a block.

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
        else:
            before = point_at_input(name, candidate)
            if before in names:
                names.discard(before)
                found = True
                yield before, candidate
            if not _is_meant(at, name, candidate):
                continue
            if not name:
                raise ValueError(
                    "FDFA: at means the model itself, whose output is not perturbed; name modules in it"
                )
        names.discard(name)
        found = True
        yield name, candidate
    if names:
        raise ValueError(_wrong_name("at", module, sorted(names)[0], inside))
    if not found and at is not None:
        raise ValueError(f"FDFA: no module of {type(module).__name__} is meant by at={_shown(at)}")
    if not found:
        raise ValueError(
            'FDFA: the module has no block; give at="auto" and an example_input, or use FDFALinear, '
            "FDFAConv2d or FDFABlock for hidden layers"
        )


def point_at_input(name: str, module: nn.Module) -> str | None:
    """Name of the point at the input of this module, or None where that means a module within."""
    return None if not name or _INPUT in module._modules else f"{name}.{_INPUT}"


def place_of(root: nn.Module, name: str) -> tuple[nn.Module, bool]:
    """The module that the name of a point means, and whether the point stands at its input.

    Raises:
        AttributeError: the name means none.
    """
    try:
        return root.get_submodule(name), False
    except AttributeError:
        owner, _, end = name.rpartition(".")
        if end != _INPUT or not owner:
            raise
        return root.get_submodule(owner), True


def channels_first_at(root: nn.Module, name: str) -> bool | None:
    """`channels_first` of the features at a point, or of what the module of this name returns. In a
    torch.nn.Sequential those before it may tell."""
    module, at_input = place_of(root, name)
    if at_input:
        while type(module) is nn.Sequential and len(module) > 0:
            module = module[0]
        return channels_first([module])
    if isinstance(module, Block):
        return module.returns_channels_first()
    parent = root.get_submodule(name.rpartition(".")[0])
    chain = [module]
    if name and type(parent) is nn.Sequential:
        chain = [*parent]
        chain = chain[: chain.index(module) + 1]
    return channels_first(chain)


def _is_meant(at: At, name: str, module: nn.Module) -> bool:
    if at is None:
        return False
    if isinstance(at, Sequence):
        return any(name == item if isinstance(item, str) else isinstance(module, item) for item in at)
    return bool(at(name, module))


def check_output_name(module: nn.Module, name: str) -> None:
    """Raises ValueError unless it is that of a module within."""
    if name not in dict(module.named_modules()):
        raise ValueError(_wrong_name("output", module, name, []))


def _wrong_name(argument: str, module: nn.Module, name: str, inside: Sequence[str]) -> str:
    known = dict(module.named_modules(remove_duplicate=False))
    owner = name.removesuffix(f".{_INPUT}")
    if name not in known and argument == "at" and owner in known:
        if owner in inside:
            return f"FDFA: {argument} names '{name}', but a block is perturbed at its output alone"
        name = owner
    if name not in known:
        return f"FDFA: {argument} names '{name}', but the model has no such module"
    for outer in inside:
        if name.startswith(outer + "."):
            where = f"within block '{outer}' and learns by its error"
            return f"FDFA: {argument} names '{name}', which is {where}"
    first = next(other for other, member in module.named_modules() if member is known[name])
    return f"FDFA: {argument} names '{name}', which is '{first}' too; use that name"


def _shown(at: At) -> str:
    if not isinstance(at, Sequence):
        return getattr(at, "__name__", repr(at))
    return repr([item if isinstance(item, str) else item.__name__ for item in at])

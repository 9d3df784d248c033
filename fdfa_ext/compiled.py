"""What torch.compile traces in place of a plan: the module's call, with hooks where points are."""

import weakref
from collections.abc import Callable
from functools import partial
from itertools import takewhile
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fdfa_ext.dual_pass import BlockPass, DualPass
from fdfa_ext.duals import forward_mode, only_tensor
from fdfa_ext.jvp import TracedRules
from fdfa_ext.layers import Block
from fdfa_ext.points import At, channels_first_at, find_points, place_of


class Passes(Protocol):
    """What a hook asks for the pass that runs."""

    at: At
    output: str | None
    passes: list[BlockPass]


def call_traced(
    module: nn.Module, dual: DualPass, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Tensor | None]:
    """The output and its tangent, or where the network ends within the module, whatever it returns."""
    if not dual.perturbs:
        result = module(*args, **kwargs)
        return (only_tensor(result) if dual.end is None else result), None
    with forward_mode(), TracedRules(), sdpa_kernel(SDPBackend.MATH):  # that which has a forward mode
        result = module(*args, **kwargs)
        if dual.end is not None:
            return result, None
        output, tangent = dual.unpack(only_tensor(result))
        return output, None if tangent is None else tangent.detach()


def hook_points(network: Passes, module: nn.Module) -> None:
    """Gives points that are no blocks, and the output, a hook for the compiler that traces now."""
    if network.at is None and network.output is None:
        return
    hooks: dict[nn.Module, list[_Hook]] = {}
    before: dict[nn.Module, list[_Hook]] = {}
    for name, inner in find_points(module, network.at):
        if not isinstance(inner, Block):
            kind, own = (_InputHook, before) if place_of(module, name)[1] else (_Hook, hooks)
            hook = kind(network, name, channels_first_at(module, name), is_output=False)
            own.setdefault(inner, []).append(hook)
    if network.output is not None:
        first = channels_first_at(module, network.output)
        end = _Hook(network, network.output, first, is_output=True)
        hooks.setdefault(module.get_submodule(network.output), []).append(end)
    for inner, wanted in hooks.items():
        # Before the user's, as a point is in an eager pass.
        _register(network, wanted, inner._forward_hooks, inner.register_forward_hook, first=True)
    for inner, wanted in before.items():
        register = partial(inner.register_forward_pre_hook, with_kwargs=True)
        _register(network, wanted, inner._forward_pre_hooks, register, first=False)


def _register(
    network: Passes,
    wanted: list["_Hook"],
    found: dict[int, Callable[..., Any]],
    register: Callable[["_Hook"], Any],
    first: bool,
) -> None:
    """Has a module's hooks of this network be these, the first that it has or else the last."""
    in_order = [*found.values()] if first else [*found.values()][::-1]
    at_end = [hook for hook in takewhile(_is_hook, in_order) if _is_of(network, hook)]
    if (at_end if first else at_end[::-1]) == wanted:
        return
    # Filled anew: torch 2.11 makes its guards by the order in which the dictionary was filled.
    others = {key: hook for key, hook in found.items() if not _is_of(network, hook)}
    found.clear()
    if not first:
        found.update(others)
    for hook in wanted:
        register(hook)
    if first:
        found.update(others)


def _is_hook(hook: Any) -> bool:
    return isinstance(hook, _Hook)


def _is_of(network: Passes, hook: Any) -> bool:
    """Whether it is a hook of this network, or of none any more."""
    return isinstance(hook, _Hook) and hook.network in (None, network)


def _none() -> None:
    """What is gone, as a reference to it."""


class _Hook:
    """What a compiler runs in place of the forward that a pass puts on a module at a point, or at the
    output: it cannot trace that. An eager pass leaves it idle, as any use of the module outside.

    A copy of the module has it without the network, so that it is idle for good, as it is once the
    model is gone.
    """

    __slots__ = ("_network", "channels_first", "is_output", "name")

    def __init__(
        self, network: Passes | None, name: str, channels_first: bool | None, is_output: bool
    ) -> None:
        self._network = _none if network is None else weakref.ref(network)
        self.name = name
        self.channels_first = channels_first
        self.is_output = is_output

    @property
    def network(self) -> Passes | None:
        return self._network()

    def __call__(self, module: nn.Module, inputs: Any, result: Any) -> Any:
        dual = self._traced_pass()
        if dual is None:
            return result
        if self.is_output:
            return dual.end_at(self.name, result, self.channels_first)
        own = self._pass_of_point()
        return result if own is None else own.perturb_result(self.channels_first, result)

    def _traced_pass(self) -> DualPass | None:
        network = self.network
        dual = None if network is None else network.passes[0].dual
        return dual if dual is not None and dual.compiling else None

    def _pass_of_point(self) -> BlockPass | None:
        network = self.network
        for own in () if network is None else network.passes:
            if own.name == self.name:
                return own
        return None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Hook) or type(self) is not type(other):
            return False
        return self._all == other._all and self.network is other.network

    __hash__ = None  # type: ignore[assignment]

    @property
    def _all(self) -> tuple[Any, ...]:
        return self.name, self.channels_first, self.is_output

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (None, *self._all)


class _InputHook(_Hook):
    """The same where the point is at the module's input."""

    __slots__ = ()

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        own = None if self._traced_pass() is None else self._pass_of_point()
        return None if own is None else own.perturb_input(self.channels_first, args, kwargs)

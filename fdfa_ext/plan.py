"""The plan of a training forward: which calls it makes for the module as it stands, and the guard,
which says at each step whether the module still stands so.

Whatever a user can change between two steps, and the plan was made by, is compared at each step: the
modules, their order and classes, the functions that these call, hooks, and the options that decide
between calls. Parameters, buffers and all other attributes are no part of a plan: each call reads them
anew. The comparison itself is in csrc/guard.h.
"""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fdfa_ext._ops import extension
from fdfa_ext._torch_internals import (
    CALL_NAMES,
    COMPILED_CALL,
    GLOBAL_HOOKS,
    MODULE_CONTENTS,
    hooks_of,
    is_compiled,
)
from fdfa_ext.chains import (
    ChainsToPoints,
    InPass,
    OnDualTensors,
    PointsOf,
    calls_of_blocks,
    is_called_plainly,
    is_overridden,
    is_sequence,
)
from fdfa_ext.dual_pass import BlockPass
from fdfa_ext.jvp import (
    CALLED_FUNCTIONS,
    FORWARD_FUNCTIONS,
    FORWARD_NAMES,
    MODULE_RULES,
    OPTIONS,
    Call,
    ModuleRule,
    call_by_rule,
    plain_type,
    registered_rule,
)
from fdfa_ext.layers import OVERRIDABLE, Block
from fdfa_ext.points import BLOCKS, At, channels_first_at, check_output_name, find_points, place_of

MakeForward = Callable[[Callable[..., Any]], Callable[..., Any]]
_ONCE: Mapping[str, int] = {}


class Plan:
    """What a training forward calls.

    Attributes:
        module: the one planned.
        guard: `holds()` says whether the module stands as it did.
        perturbed: by name, in the order of the module: its blocks and, where the model has points, the
            modules of other kinds that are perturbed at their output or input.
        blocks: the same for each of their uses in a forward, those after the first as "name:2".
        passes: those of the blocks, each with the block's calls.
        calls: the calls of a sequence, each given primal and tangent of what the one before returned.
            Blocks, chains to points and modules with a JVP rule take them apart; any other module gets
            a dual tensor, as one with a hook or another function put on it does, which may do
            anything. None for a net with a forward of its own, with points and such a module, or with
            a module in it that is compiled by itself, which are called as a whole.
        chains: those to points that the calls begin with, if there are any.
        output_layer: the last of those, if it is a linear layer: `calls` does not have it.
        output_weight: weight of the linear output layer that the pass before found in a forward of the
            user's; None if it found none.
        takes_output_weight: False once a pass has strayed; the layer then stays with autograd.
        own_code: the modules in it that call user code: a forward or a hook.
        has_unknown: whether `calls` has modules that are given dual tensors.
        buffers: each module's dictionary of them.
        exposes: whether user code keeps hidden activations, so that blocks return them with a graph.
        keeps_activations: whether a dry run saw that; a compiled pass then refuses the model.
        was_searched: whether a training pass through points has looked for activations that are kept.
        has_points: whether there are such modules, or the output is that of a module within. Autograd
            then goes from point to point.
        forwards: modules that have another forward in a pass, each with the function that makes it of
            the one it has: those at a point, the output, those with a registered JVP rule, and
            sequences that call chains to points.
        overriding: by name, the forward of each block that may leave out that of its base class.
        backward_hooked: names of the modules with a backward hook.
        has_global_hooks: whether there are hooks for all modules.
        is_compiled: whether a module within is compiled by itself.
    """

    calls: list[Call] | None
    output_layer: nn.Linear | None = None
    output_weight: Tensor | None = None
    takes_output_weight: bool = True
    exposes: bool = False
    keeps_activations: bool = False
    was_searched: bool = False

    def __init__(
        self,
        module: nn.Module,
        at: At = None,
        output: str | None = None,
        uses: Mapping[str, int] = _ONCE,
        first_index: int = 0,
    ) -> None:
        """uses: of blocks that a forward uses several times. first_index: the first block's place in
        the noise."""
        self.module = module
        self.perturbed = dict(find_points(module, at))
        named = dict(module.named_modules())
        self.blocks: dict[str, Any] = {}
        self.passes: list[BlockPass] = []
        points = []
        points_of = PointsOf()
        saved: set[str] = set()  # their names in a state, which have no dot
        for name, block in self.perturbed.items():
            first = None if isinstance(block, Block) else channels_first_at(module, name)
            for use in range(1, uses.get(name, 1) + 1):
                index = first_index + len(self.passes)
                own = BlockPass(name if use == 1 else f"{name}:{use}", index, name)
                if own.name in self.blocks or (use > 1 and own.name in self.perturbed):
                    raise ValueError(
                        f"FDFA: block or point '{own.name}' has the name of a use of '{name}'; rename "
                        "it"
                    )
                if own.name.replace(".", "/") in saved:
                    raise ValueError(
                        f"FDFA: the name of block or point '{own.name}' differs from another's in '/' "
                        "for '.' alone, and they would share feedback; rename it"
                    )
                saved.add(own.name.replace(".", "/"))
                self.blocks[own.name] = block
                self.passes.append(own)
                if isinstance(block, Block):
                    own.call = block.plan(own)
                if use > 1:
                    self.passes[-2].later = own
                elif isinstance(block, Block):
                    block.block_pass = own
                else:
                    at_input = place_of(module, name)[1]
                    point = own.point_at_input if at_input else own.point
                    points.append((block, partial(InPass, point, first)))
                    of_kind = points_of.at_inputs if at_input else points_of.at_outputs
                    of_kind[block] = own, first
        self.has_points = bool(points) or output is not None
        self.backward_hooked = [name for name, member in named.items() if any(hooks_of(member)[2:])]
        self.overriding = {
            name: (type(block).forward, vars(block).get("forward"))
            for name, block in self.perturbed.items()
            if isinstance(block, Block) and is_overridden(block)
        }
        self.is_compiled = any(map(is_compiled, named.values()))
        self.has_global_hooks = any(GLOBAL_HOOKS)
        self.own_code = [*filter(_is_own_code, _called_between_blocks(module))]
        self.buffers = [member._buffers for member in named.values()]
        running = self.passes[0]
        self.forwards: list[tuple[nn.Module, MakeForward]] = [
            (member, partial(_make_by_rule, running, member, rule))
            for member in named.values()
            if (rule := registered_rule(member)) is not None
        ]
        self.forwards += points
        if output is not None:
            check_output_name(module, output)
            first = channels_first_at(module, output)
            ends = partial(InPass, _end_at_output, running, output, first)
            self.forwards.append((named[output], ends))
        self.calls = None
        self.chains: ChainsToPoints | None = None
        chains: dict[nn.Module, ChainsToPoints] = {}
        end = None if output is None else named[output]
        if not (self.is_compiled or self.backward_hooked or self.has_global_hooks):
            chains = dict(self._chains_in(module, points_of, end))
        if module in chains and end in (None, _last_of(module)):
            own_chains = chains.pop(module)
            if all(uses.get(own.module, 1) >= times for own, times in own_chains.times.items()):
                self.chains, self.calls = own_chains, own_chains.calls()
        elif (
            isinstance(module, nn.Sequential)
            and is_sequence(module)
            and not (self.is_compiled or self.has_points)
        ):
            names = {member: name for name, member in named.items()}
            self.calls = calls_of_blocks(module, names, running)
        if self.calls is not None and isinstance(module, nn.Sequential):
            last: Any = module[-1]
            if plain_type(last) is nn.Linear:
                self.output_layer = last
                self.calls.pop()
        self.has_unknown = any(isinstance(call, OnDualTensors) for call in self.calls or ())
        self.forwards += [(sequence, partial(InPass, own.forward)) for sequence, own in chains.items()]
        self.guard = self._watch(named.values())

    def calls_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Call] | None:
        """The calls, where they take these arguments of the module."""
        if self.calls is None or kwargs or len(args) != 1:
            return None
        return self.calls if self.chains is None or self.chains.take(args, kwargs) else None

    def may_stray(self, perturbs: bool) -> bool:
        """Whether user code, or a module that is given dual tensors, may do what a pass did not expect:
        it is made anew then."""
        return bool(self.own_code) or (self.has_unknown and perturbs and not self.exposes)

    def _chains_in(
        self, module: nn.Module, points: PointsOf, end: nn.Module | None
    ) -> Iterator[tuple[nn.Module, ChainsToPoints]]:
        """The outermost sequences with chains to points. end: the module whose result is the output."""
        if isinstance(module, nn.Sequential) and is_sequence(module):
            replaced = {member for member, _ in self.forwards} | {module}
            watch = partial(self._watch, [*module.modules()], replaced)
            own = ChainsToPoints.of(module, points, watch, replaced)
            if own is not None and (end in own.rest or end not in {*module.modules()}):
                yield module, own
                return
        if not isinstance(module, Block):
            for child in module.children():
                yield from self._chains_in(child, points, end)

    def _watch(self, members: Iterable[nn.Module], replaced: Container[nn.Module] = ()) -> Any:
        """replaced: those whose forward is another in a pass, where the guard is asked."""
        guard = extension.Guard()
        for member in members:
            guard.watch_type(member)
            if isinstance(
                member, torch.jit.ScriptModule
            ):  # has a type of its own, and cannot be changed
                continue
            guard.watch_attribute(member, "__dict__")
            attributes = vars(member)
            for name in MODULE_CONTENTS:
                guard.watch_entry(attributes, name)
                guard.watch_contents(attributes[name])
            overridable = OVERRIDABLE if isinstance(member, Block) else FORWARD_NAMES
            for name in (*overridable, COMPILED_CALL, *OPTIONS.get(type(member), ())):
                if name != "forward" or member not in replaced:
                    guard.watch_entry(attributes, name)
        for hooks in (*GLOBAL_HOOKS, MODULE_RULES):
            guard.watch_contents(hooks)
        for kind in {kind for member in members for kind in type(member).__mro__}:
            if kind in FORWARD_FUNCTIONS or issubclass(kind, BLOCKS):
                for name in (*OVERRIDABLE, CALL_NAMES[0]):
                    if hasattr(kind, name):
                        guard.watch_attribute(kind, name)
            for home, name, _ in CALLED_FUNCTIONS.get(kind, ()):
                guard.watch_entry(home, name)
        guard.watch_attribute(nn.Module, CALL_NAMES[1])
        return guard


def _make_by_rule(
    running: BlockPass, module: nn.Module, rule: ModuleRule, forward: Callable[..., Any]
) -> Callable[..., Any]:
    return InPass(_forward_by_rule, running, module, rule)


def _end_at_output(
    running: BlockPass,
    name: str,
    channels_first: bool | None,
    forward: Any,
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The network ends with what this forward returns; what the model makes of it is autograd's."""
    result = forward(*args, **kwargs)
    dual = running.dual_here()
    return result if dual is None else dual.end_at(name, result, channels_first)


def _forward_by_rule(
    running: BlockPass, module: nn.Module, rule: ModuleRule, /, *args: Any, **kwargs: Any
) -> Any:
    """running: any block's pass."""
    result, is_dual = call_by_rule(module, rule, *args, **kwargs)
    dual = running.dual_here() if is_dual else None
    if dual is not None and dual.rules is not None:
        dual.rules.watch(result)
    return result


def _called_between_blocks(module: nn.Module) -> Iterator[nn.Module]:
    yield module
    if not isinstance(module, Block):
        for child in module.children():
            yield from _called_between_blocks(child)


def _is_own_code(module: nn.Module) -> bool:
    """Whether something else is called than a block's forward or torch's."""
    if isinstance(module, Block):
        return not is_called_plainly(module)
    return plain_type(module) is None or not type(module).__module__.startswith("torch.nn.")


def _last_of(module: nn.Module) -> nn.Module:
    """The module whose result a sequence returns."""
    while isinstance(module, nn.Sequential) and is_sequence(module) and len(module) > 0:
        module = module[-1]
    return module

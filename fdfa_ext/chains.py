"""The calls of a torch.nn.Sequential: those of its blocks, and of the chains that end at its points.

Where each module in it is torch's own, what lies between two points is called as an FDFABlock is:
primal and tangent apart, and its end by one operator. The results are those of calling the modules,
as is done where a module or a hook may do anything.
"""

import sys
from collections import Counter
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fdfa_ext._torch_internals import GLOBAL_HOOKS, function_modes, hooks_of
from fdfa_ext.dual_pass import BlockPass, DualPass
from fdfa_ext.duals import forward_mode, make_dual, refuse_unknown, unpack_dual
from fdfa_ext.fusion import Chain
from fdfa_ext.jvp import (
    Call,
    PrimalTangent,
    forward_mode_call,
    has_fused_pool,
    has_own_forward,
    is_patched,
    plain_type,
    rule_call,
)
from fdfa_ext.layers import Block, FDFABlock, FDFAConv2d
from fdfa_ext.own_code import OwnCodeRules
from fdfa_ext.points import BLOCKS


class InPass(partial[Any]):
    """The forward that a module has in a pass alone."""


@dataclass(frozen=True, slots=True)
class PointsOf:
    """By module the points that they have: the pass, and `channels_first` of the features there."""

    at_outputs: dict[nn.Module, tuple[BlockPass, bool | None]] = field(default_factory=dict)
    at_inputs: dict[nn.Module, tuple[BlockPass, bool | None]] = field(default_factory=dict)


_BLOCK_FORWARDS = [kind.forward for kind in BLOCKS]


def is_overridden(block: Any) -> bool:
    """Whether its call may leave out the forward of its base class, which perturbs."""
    return has_own_forward(block) or type(block).forward not in _BLOCK_FORWARDS


def is_called_plainly(block: Any) -> bool:
    """Whether it is its planned call and nothing else."""
    hooked = any(hooks_of(block)) or any(GLOBAL_HOOKS)
    return not (hooked or is_overridden(block) or is_patched(block.torch_type))


def is_sequence(module: nn.Module) -> bool:
    # torch lets a child be None, and has the words for its call.
    return plain_type(module) is nn.Sequential and None not in module._modules.values()


def calls_of_blocks(
    sequence: nn.Sequential, names: dict[nn.Module, str], running: BlockPass
) -> list[Call]:
    """running: any block's, which knows the pass while one runs."""
    calls: list[Call] = []
    block: Any = None  # whose call is the last
    for module in sequence:
        if block is not None and _pools(block, module):
            unpooled: Any = calls[-1]
            calls[-1] = partial(unpooled, pool=module)
            block = None
            continue
        block = module if isinstance(module, Block) and is_called_plainly(module) else None
        call: Call | None
        if block is not None:
            calls.append(block.block_pass.call)
        elif isinstance(module, nn.Sequential) and is_sequence(module):
            calls += calls_of_blocks(module, names, running)
        elif (call := rule_call(module)) is not None:
            calls.append(call)
        else:
            # Modules of unknown kind may hand each other more than one tensor.
            last = calls[-1] if calls else None
            if not isinstance(last, OnDualTensors):
                last = OnDualTensors(running)
                calls.append(last)
            last.add(module, names[module])
    return calls


class OnDualTensors:
    """Modules of unknown kind, one after the other."""

    def __init__(self, running: BlockPass) -> None:
        self.running = running
        self.modules: list[nn.Module] = []
        self.has_block = False

    def add(self, module: nn.Module, name: str) -> None:
        self.modules.append(module)
        self.last = f"module '{name}' ({type(module).__name__})"
        self.has_block = self.has_block or any(isinstance(inner, Block) for inner in module.modules())

    def __call__(self, x: Any, tangent: Tensor | None) -> PrimalTangent:
        dual = self.running.dual
        assert dual is not None, "a pass runs"
        if dual.rules is None:
            dual.rules = OwnCodeRules(None, dual.perturbs, exposes=False)
        if tangent is None and not (self.has_block and dual.perturbs):
            with dual.rules:
                return self._call(x), None
        with forward_mode():
            value = x if tangent is None else make_dual(x, tangent)
            dual.rules.watch(value)
            with dual.rules:
                try:
                    result = self._call(value)
                except NotImplementedError as error:
                    refuse_unknown(self.last, error)
                    raise
            dual.rules.last = None
            alone = object()
            if sys.getrefcount(result) == sys.getrefcount(alone):  # nobody else has it
                dual.rules.forget(result)
            dual.rules.watch_attributes(self.modules)
            if not isinstance(result, Tensor):
                raise TypeError(
                    f"FDFA: {self.last} must return one tensor; got {type(result).__name__}. Put it "
                    "and what takes its result into one module"
                )
            y, ty = unpack_dual(result)
            return y, None if ty is None else ty.detach()

    def _call(self, value: Any) -> Any:
        for module in self.modules:
            value = module(value)
        return value


def _pools(block: Any, module: Any) -> bool:
    """Whether it is a max-pool that the block before it can do."""
    is_block = type(block) is FDFAConv2d or type(block) is FDFABlock
    return is_block and plain_type(module) is nn.MaxPool2d and has_fused_pool(module)


class ChainsToPoints:
    """A sequence of torch's modules with points: the chains that end there, and what comes after.

    Attributes:
        chains: the calls up to the last point, each given primal and tangent.
        rest: the modules behind it.
        times: of the points' passes, how often the sequence comes to each.
    """

    def __init__(
        self,
        sequence: nn.Sequential,
        chains: list[Call],
        passes: list[BlockPass],
        rest: list[nn.Module],
        guard: Any,
        replaced: Container[nn.Module],
    ) -> None:
        self.sequence = sequence
        self.chains = chains
        self.rest = rest
        self.times = Counter(passes)
        self._guard = guard
        members = [*sequence.modules()]
        self._replaced = [vars(member) for member in members if member in replaced]
        self._parameters = [member._parameters for member in members if member._parameters]

    @classmethod
    def of(
        cls,
        sequence: nn.Sequential,
        points: PointsOf,
        watch: Callable[[], Any],
        replaced: Container[nn.Module],
    ) -> "ChainsToPoints | None":
        """None where it has no point, one at its own input, or a module that may do anything.

        watch: makes the guard, which says whether its modules are as they are now, but for the forward
            of those that are `replaced` in a pass.
        """
        chains: list[Call] = []
        passes: list[BlockPass] = []
        chain: list[nn.Module] = []

        def end(point: tuple[BlockPass, bool | None]) -> None:
            own, first = point
            chains.append(partial(_to_point, own, Chain.of(chain, first, from_point=True)))
            passes.append(own)
            chain.clear()

        for module, is_call in _members(sequence):
            at_input = points.at_inputs.get(module)
            # A point at the input of a module that may change it has its words for that.
            if at_input is not None and (not is_call or hasattr(module, "inplace")):
                return None
            if at_input is not None:
                end(at_input)
            if is_call and not _returns_one_tensor(module):
                return None
            if is_call:
                chain.append(module)
            if module in points.at_outputs:
                end(points.at_outputs[module])
        return cls(sequence, chains, passes, chain, watch(), replaced) if passes else None

    def calls(self) -> list[Call]:
        """Those of the whole sequence."""
        return self.chains + [rule_call(module) or forward_mode_call(module) for module in self.rest]

    def take(self, args: tuple[Any, ...], kwargs: dict[str, Any], modes: int = 0) -> bool:
        """Whether the calls take these arguments, and the parameters that the modules have now: what
        may have code of its own goes by the modules' calls.

        modes: torch function modes that are the pass's own.
        """
        if function_modes() > modes:
            return False
        if kwargs or len(args) != 1 or type(args[0]) is not Tensor or args[0].layout != torch.strided:
            return False
        plain = (nn.Parameter, type(None))
        return all([type(p) in plain for owned in self._parameters for p in owned.values()])

    def forward(self, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """What the sequence returns in the midst of user code. forward: its own, by its modules."""
        running = next(iter(self.times))
        dual = running.dual_here()
        if dual is None or not (
            self.take(args, kwargs, modes=1) and self._stands() and self._left(dual)
        ):
            # Its class may have another by now; that with a point of its own is the pass's.
            pointed = type(forward) is InPass
            return forward(*args, **kwargs) if pointed else self._plain_forward(*args, **kwargs)
        dual.refuse_checkpoint("block or point", running.name)
        dual.in_chain = True
        try:
            with dual.apart():
                x, tangent = unpack_dual(args[0]) if dual.perturbs else (args[0], None)
                if tangent is not None and tangent.requires_grad:
                    tangent = tangent.detach()
                for chain in self.chains:
                    x, tangent = chain(x, tangent)
                if tangent is not None:
                    x = make_dual(x, tangent)
            for module in self.rest:
                x = module(x)
            return x
        finally:
            dual.in_chain = False

    def _plain_forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.sequence).forward(self.sequence, *args, **kwargs)

    def _stands(self) -> bool:
        """Whether user code has left the modules as they were when the pass began."""
        in_pass = [type(attributes.get("forward")) is InPass for attributes in self._replaced]
        return all(in_pass) and self._guard.holds()

    def _left(self, dual: DualPass) -> bool:
        """Whether each point has as many uses left."""
        return all([own.uses_left(dual) >= times for own, times in self.times.items()])


def _to_point(own: BlockPass, chain: Chain, x: Tensor, tangent: Tensor | None) -> PrimalTangent:
    try:
        return own.chain(chain, x, tangent)
    except (RuntimeError, TypeError, ValueError) as error:
        error.add_note(f"FDFA: raised on the way to point '{own.name}'")
        raise


def _members(sequence: nn.Sequential) -> Iterator[tuple[nn.Module, bool]]:
    """The modules that sequences within each other call, and after its last one each sequence itself;
    whether it is a call."""
    for module in sequence:
        if isinstance(module, nn.Sequential) and is_sequence(module):
            yield from _members(module)
        else:
            yield module, True
    yield sequence, False


def _returns_one_tensor(module: nn.Module) -> bool:
    """Whether it is torch's own code, or has a rule, and is given one tensor and returns one."""
    kind = plain_type(module)
    if kind is None or module._modules:  # within which may be points
        return False
    if rule_call(module) is not None:
        return True
    other = isinstance(module, (nn.RNNBase, nn.RNNCellBase)) or getattr(module, "return_indices", False)
    return kind.__module__.startswith("torch.nn.modules.") and not other

"""The plan of a training forward: which calls it makes for the module as it stands, and the guard,
which says at each step whether the module still stands so.

Whatever a user can change between two steps, and the plan was made by, is compared at each step: the
modules, their order, classes and attributes, the functions that the classes call, and hooks. Parameters
and buffers are no part of a plan: each call reads them anew.
"""

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

from fdfa_ext.functional import BlockPass
from fdfa_ext.layers import Block, FDFABlock, FDFAConv2d, FDFALinear
from fdfa_ext.tangents import (
    FORWARD_FUNCTIONS,
    FORWARD_NAMES,
    GLOBAL_HOOKS,
    Step,
    has_fused_pool,
    has_own_forward,
    hooks_of,
    is_patched,
    plain_type,
    rule_step,
)

BLOCKS = (FDFALinear, FDFAConv2d, FDFABlock)
_BLOCK_FORWARDS = [kind.forward for kind in BLOCKS]
_CONTENTS = (
    "_modules",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_OPTION_TYPES = (bool, int, float, str, tuple, list, type(None))
_PLAIN_TYPES = (*_OPTION_TYPES, dict, set, BlockPass)
_FORWARD_AND_CALL = attrgetter("forward", "__call__")


def find_blocks(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Blocks by qualified name, in the order of the module; not the ones within a block.

    Raises:
        ValueError: there is none, or the module is one itself.
        TypeError: one is of an unknown kind.
    """
    if isinstance(module, Block):
        raise ValueError(
            f"FDFA: the module is itself a block ({type(module).__name__}); put it and an output layer "
            "into a torch.nn.Sequential"
        )
    inside: list[str] = []
    found = False
    for name, candidate in module.named_modules():
        if isinstance(candidate, Block) and not any(name.startswith(outer + ".") for outer in inside):
            if not isinstance(candidate, BLOCKS):
                raise TypeError(
                    f"FDFA: block '{name}' ({type(candidate).__name__}) must derive from FDFALinear, "
                    "FDFAConv2d or FDFABlock; put a module of another kind into an FDFABlock"
                )
            inside.append(name)
            found = True
            yield name, candidate
    if not found:
        raise ValueError(
            "FDFA: the module has no block; use FDFALinear, FDFAConv2d or FDFABlock for hidden layers"
        )


class Plan:
    """What a training forward calls.

    Attributes:
        blocks: by name, in the order of the module.
        passes: those of the blocks, each with the block's calls.
        steps: the calls of a net of blocks and modules with a JVP rule in sequence, which take primal
            and tangent side by side, without dual tensors; each is given what the one before returned.
            None for any other net, which needs dual tensors: for a forward of its own, for a hook or
            another function put on a module, which may do anything, for a module without a rule, or for
            one compiled by itself.
        output_layer: the last step of those, if it is a linear layer: `steps` does not have it.
        backward_hooked: names of the modules with a backward hook.
        has_global_hooks: whether there are hooks for all modules.
        is_compiled: whether a module within is compiled by itself.
    """

    steps: list[Step] | None
    output_layer: nn.Linear | None = None

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.blocks = dict(find_blocks(module))
        named = dict(module.named_modules())
        self.passes = [
            BlockPass(name, index, block.plan())
            for index, (name, block) in enumerate(self.blocks.items())
        ]
        for block, block_pass in zip(self.blocks.values(), self.passes, strict=True):
            block.block_pass = block_pass
        self.backward_hooked = [name for name, member in named.items() if any(hooks_of(member)[2:])]
        self.is_compiled = any(map(_is_compiled, named.values()))
        self.has_global_hooks = any(GLOBAL_HOOKS)
        self.steps = None if self.is_compiled else _steps_of(module)
        if self.steps and isinstance(module, nn.Sequential) and type(module[-1]) is nn.Linear:
            self.output_layer = module[-1]
            self.steps.pop()
        self._watch(list(named.values()))

    def holds(self, module: nn.Module) -> bool:
        """The guard: whether the plan is that of this module, unchanged."""
        try:
            return module is self.module and self._facts() == self._seen
        except (RuntimeError, TypeError, ValueError):
            return False  # an attribute became a tensor or an array, whose comparison has no one answer

    def _watch(self, everything: list[Any]) -> None:
        # What torch.jit has made cannot be changed.
        members = [member for member in everything if not isinstance(member, torch.jit.ScriptModule)]
        self._members = members
        self._plain = [member for member in members if _has_plain_attributes(member)]
        self._others = [
            (member, _watched_names(member)) for member in members if not _has_plain_attributes(member)
        ]
        self._sequences = [member for member in members if isinstance(member, nn.Sequential)]
        kinds = {
            kind for member in members for kind in type(member).__mro__ if kind in FORWARD_FUNCTIONS
        }
        kinds |= {type(block) for block in self.blocks.values()}
        self._kinds = list(kinds)
        self._convolutions = [kind for kind in kinds if hasattr(kind, "_conv_forward")]
        self._seen = _copy(self._facts())

    def _facts(self) -> list[Any]:
        return [
            [*map(type, self._members)],
            [*map(vars, self._plain)],
            [[*map(vars(member).get, names)] for member, names in self._others],
            [[*sequence._modules] for sequence in self._sequences],  # their order
            [*map(_FORWARD_AND_CALL, self._kinds)],
            [kind._conv_forward for kind in self._convolutions],
            nn.Module._call_impl,
            any(GLOBAL_HOOKS),
        ]


def _copy(facts: Any) -> Any:
    """With copies of what changes in place, which would be equal to itself."""
    if isinstance(facts, dict):
        return {
            key: _copy(value) if key in _CONTENTS or isinstance(value, list) else value
            for key, value in facts.items()
        }
    return [*map(_copy, facts)] if isinstance(facts, list) else facts


def _is_known(module: nn.Module) -> bool:
    return type(module) in BLOCKS or type(module).__module__.startswith("torch.nn.")


def _has_plain_attributes(module: nn.Module) -> bool:
    """Whether all attributes may be compared at once, which is faster than to look for some."""
    return _is_known(module) and all(isinstance(value, _PLAIN_TYPES) for value in vars(module).values())


def _watched_names(module: nn.Module) -> list[str]:
    """The attributes that a plan may depend on: options are those of known classes alone."""
    options = [name for name, value in vars(module).items() if isinstance(value, _OPTION_TYPES)]
    return [
        *_CONTENTS,
        *FORWARD_NAMES,
        "_compiled_call_impl",
        "block_pass",
        *options * _is_known(module),
    ]


def is_overridden(block: Any) -> bool:
    """Whether its call may leave out the forward of its base class, which perturbs."""
    return has_own_forward(block) or type(block).forward not in _BLOCK_FORWARDS


def _is_compiled(module: nn.Module) -> bool:
    return isinstance(module, OptimizedModule) or module._compiled_call_impl is not None


def _is_called_plainly(block: Any) -> bool:
    """Whether its call is that of `dual` alone."""
    hooked = any(hooks_of(block)) or any(GLOBAL_HOOKS)
    return not (hooked or is_overridden(block) or is_patched(block.torch_type))


def _steps_of(module: Any) -> list[Step] | None:
    if isinstance(module, Block):
        return [module.dual] if _is_called_plainly(module) else None
    if plain_type(module) is not nn.Sequential:
        step = rule_step(module)
        return None if step is None else [step]
    steps: list[Step] = []
    for before, inner in pairwise([None, *module]):
        if _pools(before, inner):
            steps[-1] = partial(before.dual, pool=inner)
            continue
        inner_steps = _steps_of(inner)
        if inner_steps is None:
            return None
        steps += inner_steps
    return steps


def _pools(before: Any, module: Any) -> bool:
    """Whether it is a max-pool that the block before it can do."""
    is_block = type(before) is FDFAConv2d or type(before) is FDFABlock
    return is_block and plain_type(module) is nn.MaxPool2d and has_fused_pool(module)

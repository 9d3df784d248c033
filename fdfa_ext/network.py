"""The user's module as FDFA runs it in training: by its plan, on primal and tangent."""

import inspect
import sys
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves, tree_map

from fdfa_ext._ops import fused
from fdfa_ext._torch_internals import GLOBAL_HOOKS, is_in_checkpoint
from fdfa_ext.chains import is_overridden
from fdfa_ext.compiled import call_traced
from fdfa_ext.dual_pass import BlockPass, DualPass
from fdfa_ext.duals import (
    forward_mode,
    has_tangent,
    make_dual,
    only_tensor,
    refuse_unknown,
    slow_attention,
    unpack_dual,
)
from fdfa_ext.evaluation import evaluating, restore_buffers, save_buffers
from fdfa_ext.jvp import point_rules
from fdfa_ext.layers import Block
from fdfa_ext.own_code import (
    OutputWalk,
    OwnCodeRules,
    cut_from_blocks,
    kept_activation,
    nodes_behind,
)
from fdfa_ext.plan import MakeForward, Plan
from fdfa_ext.points import BLOCKS, At, channels_first_at, check_module, find_points
from fdfa_ext.warning import warn


class StrayedError(Exception):
    """User code did otherwise than in the pass before; this one is void."""


class Network:
    """Plans and passes of one module.

    Attributes:
        plan: of the module when it was last looked at; None before, and in a copy.
        blocks: those of the plan, by name.
        passes: the blocks' own.
        checked: whether a dry run has seen these blocks.
        at: where the model has points beside its blocks.
        output: name of the module whose result is the network's output; None for the model's own.
        returning: name of the innermost module whose result the model returned as it is, in a dry run.
        sample_index: name of the argument that says of which sample each row of features is.
        uses: how often a forward uses a block, as a dry run found it, where that is more than once.
        dimensions: of the output, as a dry run found them: beyond two a token or pixel is a sample.
        forwards: training forwards to learn feedback by that ran without a compiler, but for those of
            metrics.
        first_index: the first block's place in the noise, in a stage of a larger model; None in a whole
            one.
    """

    def __init__(
        self, at: At, output: str | None, sample_index: str | None, first_index: int | None = None
    ) -> None:
        self.at = at
        self.output = output
        self.sample_index = sample_index
        self.first_index = first_index
        self.dimensions = 2
        self.uses: dict[str, int] = {}
        self.returning = ""
        self.plan: Plan | None = None
        self.blocks: dict[str, Any] = {}
        self.passes: list[BlockPass] = []
        self.checked = False
        self.forwards = 0
        self._perturbed: dict[str, Any] = {}
        self._overriding: dict[str, Any] = {}
        self._threads: dict[str, int] = {}  # that which runs a pass

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"plan": None, "_threads": {}}  # for copies, whose modules are others

    def look_at(self, module: Any) -> Plan:
        """The plan of the module as it is, made again where something has changed since."""
        plan = self.plan
        if plan is not None and module is plan.module and plan.guard.holds():
            return plan
        check_module(module)
        if any(isinstance(vars(inner).get("network"), Network) for inner in module.modules()):
            raise ValueError("FDFA: the module has an FDFA within it; wrap it once, as a whole")
        first_index = self.first_index or 0
        plan = Plan(module, self.at, self.output, self.uses, first_index)
        if plan.perturbed != self._perturbed or plan.overriding != self._overriding:
            self.checked = False
            if self.uses and plan.perturbed != self._perturbed:  # they may be used otherwise
                self.uses = {}
                plan = Plan(module, self.at, self.output, first_index=first_index)
        self._perturbed, self._overriding = plan.perturbed, plan.overriding
        self._use(plan)
        return plan

    def ends_within(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the output is known only in the midst of the module's forward."""
        if self.output is None:
            return False
        compiling = torch.compiler.is_compiling()
        return compiling or self.plan is None or self.plan.calls_for(args, kwargs) is None

    def channels_first(self, module: nn.Module) -> bool | None:
        """Of the output, as the module that returns it tells."""
        try:
            return channels_first_at(module, self.returning)
        except AttributeError:  # it is gone
            return None

    def count(self, unforeseen: Mapping[str, int]) -> None:
        """Adds uses, for which the module will be planned anew."""
        for name, count in unforeseen.items():
            self.uses[name] = self.uses.get(name, 1) + count
        self.plan = None

    def count_saved(self, names: Iterable[str]) -> None:
        """Adds those that a saved model has, by the names of its feedback."""
        for name in names:
            block, _, use = name.rpartition(":")
            if block in self._perturbed and use.isdecimal() and name not in self._perturbed:
                self.uses[block] = max(self.uses.get(block, 1), int(use))
                self.plan = None

    def forward(
        self, module: nn.Module, dual: DualPass, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Primal and tangent of the module's output; the blocks met on the way are in dual.records.

        Raises:
            StrayedError: the pass is to be made anew; everything is as before it.
        """
        if dual.compiling:
            self._check_compilable(module)
            return self._run(module, dual, args, kwargs)
        plan = self.plan
        assert plan is not None, "as in _run"
        if plan.has_points:
            dual.takes_biases = dual.takes_output_layer and dual.backend is fused
            return self._run(module, dual, args, kwargs)
        # Whether activations are kept is seen by their tangents.
        if plan.exposes if dual.perturbs else plan.own_code:
            dual.walk = OutputWalk()
        dual.takes_biases = dual.takes_output_layer and dual.backend is fused and not dual.exposes
        if not plan.may_stray(dual.perturbs):
            return self._run(module, dual, args, kwargs)
        # A pass may be made anew, but buffers, as running statistics, move once.
        buffers = save_buffers(plan.buffers)
        try:
            return self._run(module, dual, args, kwargs)
        except StrayedError:
            restore_buffers(buffers)
            raise

    def dry_run(
        self, module: nn.Module, dual: DualPass, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """The same in eval mode; buffers and modes stay as they are."""
        self.look_at(module)
        seeks = dual.dimensions == 3 and not self.checked
        with (
            evaluating(module),
            slow_attention(),
            self._seek_returning(module) if seeks else nullcontext(),
        ):
            return self._run(module, dual, args, kwargs)

    @contextmanager
    def _seek_returning(self, module: nn.Module) -> Iterator[None]:
        """Finds the innermost module whose result the model returns as it is."""
        names = {inner: name for name, inner in module.named_modules()}
        results: list[tuple[str, Any]] = []

        def keep(inner: nn.Module, inputs: Any, result: Any) -> None:
            if inner in names:
                results.append((names[inner], result))

        hook = register_module_forward_hook(keep)
        try:
            yield
        finally:
            hook.remove()
        _, returned = results[-1] if results else ("", None)
        self.returning = next((name for name, result in results if result is returned), "")

    @contextmanager
    def watch_droppers(self, module: nn.Module) -> Iterator[list[str]]:
        """Yields a list, to which modules are added that are given a tangent and return none, by name
        and type."""
        droppers: list[str] = []
        names = {inner: name for name, inner in module.named_modules() if name}

        def watch(inner: nn.Module, inputs: tuple[Any, ...], result: Any) -> None:
            dual = self.passes[0].dual
            if dual is not None and dual.end is not None and dual.end.reached:
                return  # the tangent has come to the output
            given, returned = _place_of_tangent(inputs), _place_of_tangent(result)
            if inner in names and given is not None and returned is None:
                droppers.append(f"'{names[inner]}' ({type(inner).__name__})")

        plan = self.look_at(module)
        # For all modules at once, so that no error can leave one on the user's.
        hook = register_module_forward_hook(watch)
        try:
            yield droppers
        finally:
            hook.remove()
            self._use(plan)  # with what it has learned

    def _use(self, plan: Plan) -> None:
        self.blocks, self.passes, self.plan = plan.blocks, plan.passes, plan

    def _run(
        self, module: nn.Module, dual: DualPass, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        if dual.micro_batch is None:
            self.refuse_stage()
        for value in (*args, *kwargs.values()) if kwargs else args:
            if not isinstance(value, Tensor) or value.requires_grad:
                args = tuple(map(_without_grad, args))
                kwargs = {name: _without_grad(value) for name, value in kwargs.items()}
                break
        if self.sample_index is not None:
            dual.sample_index = sample_index_of(module, self.sample_index, args, kwargs)
        if not dual.compiling:
            dual.thread = get_ident()
            if self._threads.setdefault("one", dual.thread) != dual.thread:  # one step for all threads
                raise RuntimeError(
                    "FDFA: another thread runs a training forward of this model; one thread at a time "
                    "may train it: take a lock around its steps, or give each thread a copy"
                )
        outer = self.passes[0].dual  # of a pass that computes itself again within, as a checkpoint does
        plan = self.plan
        replaced: list[tuple[nn.Module, Any]] = []
        try:
            for block, own in zip(self.blocks.values(), self.passes, strict=True):
                own.dual = dual
                if isinstance(block, Block) and block.block_pass is not own and own.name == own.module:
                    block.block_pass = own
            if dual.compiling:
                result = call_traced(module, dual, args, kwargs)
            else:
                assert plan is not None, "the model has looked at its module"
                within = dual.exposes or dual.end is not None
                calls = None if within else plan.calls_for(args, kwargs)
                if not plan.has_points or calls is None:  # else the calls perturb
                    _replace_forwards(plan.forwards, replaced)
                if plan.backward_hooked or plan.has_global_hooks:
                    calls = None
                    self.refuse_backward_hooks(None if dual.perturbs else self.blocks)
                if calls is None or plan.own_code:
                    dual.in_checkpoint = is_in_checkpoint()
                if calls is not None:
                    result = dual.run(calls, plan.output_layer, args[0])
                    if dual.rules is not None:
                        _look_for_activations(plan, dual.rules, result[0])
                else:
                    # A module compiled by itself has no forward mode, and its blocks see no pass.
                    eager = torch.compiler.set_stance("force_eager") if plan.is_compiled else None
                    with eager or nullcontext():
                        run = _through_points if plan.has_points else _on_dual_tensors
                        result = run(plan, module, dual, args, kwargs)
            if len(dual.records) < len(self.blocks):
                self._check_overridden(dual)
            return result
        finally:
            for own in self.passes:
                own.dual = outer
            for inner, forward in reversed(replaced):
                if forward is None:
                    inner.__dict__.pop("forward", None)  # user code may have taken it away
                else:
                    inner.__dict__["forward"] = forward
            if outer is None:
                self._threads.clear()

    def refuse_stage(self) -> None:
        """For what wants a whole model."""
        if self.first_index is not None:
            raise RuntimeError(
                "FDFA: this model is one stage of a Pipeline, and its output not that of the whole; "
                "train by pipeline.step(x, target), and evaluate by pipeline(x)"
            )

    def _check_compilable(self, module: nn.Module) -> None:
        """A compiler cannot plan: a block that came later would learn by backpropagation."""
        if dict(find_points(module, self.at)) != self._perturbed:
            raise RuntimeError(
                "FDFA: blocks were exchanged since the last training forward; run one without "
                "torch.compile, or wrap the module again"
            )
        if self.plan is not None and self.plan.keeps_activations:
            raise RuntimeError(
                "FDFA: the module keeps hidden activations, on which a loss has no gradient in a "
                "compiled step; run it without torch.compile, or keep none"
            )

    def _check_overridden(self, dual: DualPass) -> None:
        """A block may be left out of a forward, but not run by another function than perturbs it."""
        run = [record.name for record in dual.records]
        for name, block in self._perturbed.items():
            if name not in run and isinstance(block, Block) and is_overridden(block):
                base = next(kind for kind in BLOCKS if isinstance(block, kind))
                raise RuntimeError(
                    f"FDFA: block '{name}' ({type(block).__name__}) has a forward of its own that has "
                    f"not called {base.__name__}.forward, so it was not perturbed; call it, or put the "
                    "module into an FDFABlock"
                )

    def refuse_backward_hooks(self, of: Container[str] | None = None) -> None:
        """Those for all modules, and of these modules; of any, where no backward runs through them."""
        hooked = [] if self.plan is None else self.plan.backward_hooked
        if any(GLOBAL_HOOKS[2:]):
            raise _uncalled_hook("there is a global backward hook")
        for name in hooked:
            if of is None or name in of:
                raise _uncalled_hook(f"module '{name}' has a backward hook")


def sample_index_of(
    module: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """The tensor of sample indices [V] among these arguments of the module's forward."""
    try:
        value = inspect.signature(module.forward).bind(*args, **kwargs).arguments[name]
    except (KeyError, TypeError):
        raise ValueError(
            f"FDFA: sample_index names argument '{name}', which {type(module).__name__}.forward was "
            "not given"
        ) from None
    if not isinstance(value, Tensor) or value.dtype != torch.int64 or value.dim() != 1:
        got = (
            f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        )
        raise TypeError(f"FDFA: sample_index '{name}' must be an int64 tensor [V]; got {got}")
    return value


@contextmanager
def _backward_hooks_called(plan: Plan, dual: DualPass) -> Iterator[list[Tensor]]:
    """Raises at its end if no gradient will reach a module with a backward hook that was called within:
    from the outputs that are added to the list, or within a block.

    For a pass without tangents, where torch's forward mode does not stand in the way.
    """
    results: list[tuple[str, Tensor]] = []
    outputs: list[Tensor] = []
    checks = []
    for name in plan.backward_hooked:

        def keep(module: nn.Module, inputs: Any, result: Any, name: str = name) -> None:
            results.extend([(name, t) for t in tree_leaves(result) if isinstance(t, Tensor)])

        checks.append(plan.module.get_submodule(name).register_forward_hook(keep))
    try:
        yield outputs
    finally:
        for check in checks:
            check.remove()
    if results and torch.is_grad_enabled():
        anchors = [record.anchor for record in dual.records]
        reached = set().union(*map(nodes_behind, (*outputs, *anchors)))
        called = {name for name, t in results if t.grad_fn in reached}
        for name, _ in results:
            if name not in called:
                raise _uncalled_hook(f"module '{name}' has a backward hook")


def _uncalled_hook(whose: str) -> RuntimeError:
    return RuntimeError(
        f"FDFA: {whose}, which cannot be called: no gradient passes between blocks. Remove it, or "
        "register a hook on parameters"
    )


def _replace_forwards(
    forwards: Iterable[tuple[nn.Module, MakeForward]], replaced: list[tuple[nn.Module, Any]]
) -> None:
    """Adds each module with the forward of its own that it had, or None."""
    for inner, make in forwards:
        own = inner.__dict__.get("forward")
        forward: Any = inner.forward
        inner.__dict__["forward"] = make(forward)
        replaced.append((inner, own))


def _raising(module: nn.Module, error: BaseException, otherwise: str) -> str:
    """The innermost module within this one whose code raised the error, if there is one."""
    names = {member: name for name, member in module.named_modules() if name}
    found, traceback = otherwise, error.__traceback__
    while traceback is not None:
        inner = traceback.tb_frame.f_locals.get("self")
        if isinstance(inner, nn.Module) and inner in names:
            found = f"module '{names[inner]}' ({type(inner).__name__})"
        traceback = traceback.tb_next
    return found


def _through_points(
    plan: Plan, module: nn.Module, dual: DualPass, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Tensor | None]:
    """The call of a module with points: its output and tangent, or where the network ends within the
    module, whatever it returns."""
    hooks: AbstractContextManager[list[Tensor]] = nullcontext([])
    if plan.backward_hooked:
        hooks = _backward_hooks_called(plan, dual)
    with forward_mode() if dual.perturbs else nullcontext(), hooks as outputs:
        args = _with_tangent(args, dual)
        with point_rules():
            try:
                result = module(*args, **kwargs)
            except NotImplementedError as error:
                refuse_unknown(_raising(module, error, "a function in the model's forward"), error)
                raise
        if module.training and not plan.was_searched:  # no dry run
            plan.was_searched = True
            _warn_of_activations(plan, None if dual.end is None else result)
        if dual.end is not None:
            if dual.end.output is not None:
                outputs.append(dual.end.output)
            return result, None
        output, tangent = unpack_dual(only_tensor(result))
        outputs.append(output)
    return output, None if tangent is None else tangent.detach()


def _with_tangent(args: tuple[Any, ...], dual: DualPass) -> tuple[Any, ...]:
    """The inputs of a forward, of which a stage's has a tangent."""
    if dual.input_tangent is None:
        return args
    return (make_dual(args[0], dual.input_tangent),)


def _warn_of_activations(plan: Plan, result: Any) -> None:
    """Of hidden activations on which user code may have a loss: kept by a module, or in the result
    beside the output."""
    kept = kept_activation(plan.own_code)
    if kept is None and (place := _place_of_tangent(result)) is not None:
        kept = f"{place} of the model's result, a {type(result).__name__},"
    if kept is not None:
        warn(
            f"FDFA: {kept} keeps a hidden activation; a loss on it trains no parameter but those "
            "between it and the points before it, which cut autograd, so that training may diverge. "
            "Return in one tensor what has a loss, and split it there",
        )


def _on_dual_tensors(
    plan: Plan, module: nn.Module, dual: DualPass, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """The module's call with a forward of its own."""
    weight = plan.output_weight if dual.takes_output_layer else None
    dual.rules = rules = OwnCodeRules(weight, dual.perturbs, dual.exposes)
    hooks: AbstractContextManager[list[Tensor]] = nullcontext([])
    if plan.backward_hooked:
        hooks = _backward_hooks_called(plan, dual)
    with forward_mode() if dual.perturbs else nullcontext(), hooks as outputs:
        args = _with_tangent(args, dual)
        with rules:
            try:
                output = only_tensor(module(*args, **kwargs))
            except NotImplementedError as error:
                refuse_unknown(_raising(module, error, "a function in the module's forward"), error)
                raise
        # It has one holder more than `rules`, rules.last, unless user code keeps it too. The
        # pass holds `rules` as well.
        kept = sys.getrefcount(output) - sys.getrefcount(rules) > 0
        last, rules.last = rules.last, None
        weight = None if last is None or last[0] is not output or kept else last[1]
        del last
        if rules.layer is not None and (rules.strayed or weight is None):
            plan.output_weight, plan.takes_output_weight = None, False
            raise StrayedError
        rules.watch_attributes(plan.own_code)
        _look_for_activations(plan, rules, output, kept)
        dual.output_layer = rules.layer
        if plan.takes_output_weight and not dual.in_checkpoint:  # which does the same twice
            plan.output_weight = weight
        result, tangent = unpack_dual(output)
        outputs.append(result)
    if dual.walk is not None and rules.layer is None:
        result = cut_from_blocks(result, [t for t in dual.exposed if t.requires_grad], dual.walk)
    return result, None if tangent is None else tangent.detach()


def _look_for_activations(
    plan: Plan, rules: OwnCodeRules, output: Any, keeps_output: bool = False
) -> None:
    """Marks the plan if user code keeps some, which need a graph; a training pass is void then."""
    rules.last = None  # which would keep one itself
    if not plan.exposes and rules.perturbs and (keeps_output or rules.keeps_activations(output)):
        plan.exposes = True
        if torch.is_grad_enabled():
            raise StrayedError
        plan.keeps_activations = True  # in a dry run


def _without_grad(value: Any) -> Any:
    """An input of the whole model, which gets no gradient. Others are the caller's own, untouched."""
    if isinstance(value, Tensor):
        return value.detach() if _wants_gradient(value) else value
    if any(map(_wants_gradient, tree_leaves(value))):
        return tree_map(lambda t: t.detach() if _wants_gradient(t) else t, value)
    return value


def _wants_gradient(value: Any) -> bool:
    """Whether it is a leaf that does. A parameter is refused by the block that it reaches."""
    is_tensor = isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
    return is_tensor and value.requires_grad and value.is_leaf


def _place_of_tangent(value: Any) -> str | None:
    """Where the first tensor with a tangent is, as Python writes it: [1] in a tuple, ['key'] in a dict,
    .name in a dataclass. None where no tensor has one."""
    if isinstance(value, Tensor):
        return "" if has_tangent(value) else None
    items: Iterable[tuple[str, Any]] = ()
    if isinstance(value, (tuple, list)):
        items = ((f"[{i}]", item) for i, item in enumerate(value))
    elif isinstance(value, dict):
        items = ((f"[{key!r}]", item) for key, item in value.items())
    elif is_dataclass(value):
        items = ((f".{field.name}", getattr(value, field.name)) for field in fields(value))
    for place, item in items:
        if (within := _place_of_tangent(item)) is not None:
            return place + within
    return None

"""One forward of a model, as the module calls that it consists of and the tensors between them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from fdfa_ext._torch_internals import hooks_of, is_compiled, remove_global_hook
from fdfa_ext.duals import first_tensor, slow_attention
from fdfa_ext.evaluation import evaluating


@dataclass(slots=True, eq=False)
class ModuleCall:
    """One call of a module, by the tensors that go in and out."""

    module: nn.Module
    inputs: list[Tensor]
    output: Tensor | None  # the first that it returns, or None
    # Of autograd, where they were then: a tensor that is changed in place moves on.
    read: list[GradientEdge | None]
    made: GradientEdge | None
    results: list[Any]  # of autograd, the nodes of all tensors that it returns
    first: Tensor | None  # its first argument, where that is a tensor

    @property
    def node(self) -> Any:
        """Of autograd, that made the output."""
        return None if self.made is None else self.made.node

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

    def names(self) -> dict[nn.Module, str]:
        return {member: name for name, member in self.module.named_modules()}


@contextmanager
def trace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Trace]:
    """Within it the module stays as in that forward, so that autograd may go through its graph."""
    calls: list[ModuleCall] = []
    members = {*module.modules()}

    def record(inner: nn.Module, inputs: Any, keywords: Any, result: Any) -> None:
        if inner in members:
            read = [t for t in tree_leaves((inputs, keywords)) if isinstance(t, Tensor)]
            output = first_tensor(result)
            results = [t.grad_fn for t in tree_leaves(result) if isinstance(t, Tensor) and t.grad_fn]
            edges = [*map(_edge, read)]
            first = next(iter((*inputs, *keywords.values())), None)
            first = first if isinstance(first, Tensor) else None
            calls.append(ModuleCall(inner, read, output, edges, _edge(output), results, first))

    # A compiled module would show no calls.
    compiled = any(map(is_compiled, members))
    eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    with (
        torch.enable_grad(),
        evaluating(module),
        slow_attention(),
        eager,
        _without_backward_hooks(members),
    ):
        hook = register_module_forward_hook(record, with_kwargs=True)
        try:
            with _all_learning(module):
                result = module(*args, **kwargs)
        finally:
            remove_global_hook(hook)
        yield Trace(module, calls, result)


def _edge(t: Tensor | None) -> GradientEdge | None:
    return None if t is None or t.grad_fn is None else GradientEdge(t.grad_fn, t.output_nr)


@contextmanager
def _without_backward_hooks(members: Iterable[nn.Module]) -> Iterator[None]:
    """Within it no backward hook of a module is called."""
    hooks = [hooks for member in members for hooks in hooks_of(member)[2:] if hooks]
    saved = [dict(own) for own in hooks]
    for own in hooks:
        own.clear()
    try:
        yield
    finally:
        for own, before in zip(hooks, saved, strict=True):
            own.update(before)


@contextmanager
def _all_learning(module: nn.Module) -> Iterator[None]:
    """Within it frozen parameters have gradients too, so that the graph shows all ways."""
    frozen = [
        p
        for p in module.parameters()
        if not (p.requires_grad or is_lazy(p) or p.is_inference()) and p.is_floating_point()
    ]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)

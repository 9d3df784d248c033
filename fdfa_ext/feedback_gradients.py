"""∇B of feedback="grad": kept from what a loop does to gradients, until an optimizer takes its step.

B - G has no part in the scale of a loss. Loss scaling, clipping and the sum over accumulated batches,
which all are for gradients that have, would make it wrong, and its norm would make clipping shrink the
gradients of the weights.
"""

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from fdfa_ext._torch_internals import when_backward_ends
from fdfa_ext.data_parallel import Ranks
from fdfa_ext.warning import warn

_MOST_WAITING = 100  # backwards


class _Waiting:
    """Gradients of one B that no optimizer has taken."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count: Tensor | int = 0  # of those that were finite
        self.backwards = 0
        self.are_averaged = False  # over processes, at the end of the backward

    def add(self, gradient: Tensor) -> None:
        if type(gradient) is Tensor:  # parts of a DTensor's are elsewhere
            finite = gradient.sum().isfinite()  # as in FeedbackStep.move
            if gradient.is_cpu and not finite:
                self.count -= 1
                return
            if not gradient.is_cpu:  # which does not wait
                gradient = torch.where(finite, gradient, 0)
                self.count = self.count + finite - 1
        self.total = gradient if self.total is None else self.total + gradient

    def take(self) -> Tensor | None:
        """The mean; None if there is none."""
        total, count = self.total, self.count
        self.total, self.count, self.backwards = None, 0, 0
        if total is None or isinstance(count, int):
            return total if total is None or count == 1 else total / count
        return total / count.clamp(min=1)


_waiting: Any = WeakIdKeyDictionary()  # parameter → _Waiting


def withhold(parameters: Iterable[nn.Parameter], are_averaged: bool = False) -> None:
    """From now on these have `.grad` only in the step of an optimizer, and after it.

    are_averaged: whether processes will average those of the next backward.
    """
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        waiting = _waiting.get(parameter)
        if waiting is None:
            waiting = _waiting[parameter] = _Waiting()
            parameter.register_post_accumulate_grad_hook(_keep_own)
            _give_before_steps()
        waiting.are_averaged = are_averaged


def keep_averaged(parameters: Callable[[], Iterable[Any]], ranks: Ranks) -> None:
    """Within a backward, which processes share: withholds its gradients when they are averaged.

    parameters: those of then. fully_shard has others in their place while the backward runs.
    """

    def end() -> None:
        for parameter in parameters():
            withhold([parameter], are_averaged=True)
            # Those that the processes have not averaged yet are, with later ones, where they lie.
            _keep(parameter, ranks.averages_gradients)

    when_backward_ends(end)


def give(parameters: Iterable[Tensor], scale: Tensor | None = None) -> None:
    """Sets `.grad` of those that wait for it to the mean over the backwards since it was last set.

    scale: by which the optimizer will divide it.
    """
    for parameter in parameters:
        waiting = _waiting.get(parameter)
        gradient = None if waiting is None else waiting.take()
        if gradient is not None:
            parameter.grad = gradient if scale is None else gradient * scale


def drop(parameters: Iterable[Tensor]) -> None:
    """Forgets those that wait."""
    for parameter in parameters:
        if parameter in _waiting:
            _waiting[parameter].take()


def waiting_gradients(parameters: Iterable[nn.Parameter]) -> Callable[[], None]:
    """What puts back those that wait now."""
    found = [(w, {**vars(w)}) for p in parameters if (w := _waiting.get(p)) is not None]

    def restore() -> None:
        for waiting, values in found:
            vars(waiting).update(values)

    return restore


def _keep_own(parameter: Any) -> None:
    if not _waiting[parameter].are_averaged:
        _keep(parameter, True)


def _keep(parameter: nn.Parameter, is_whole: bool) -> None:
    waiting = _waiting.get(parameter)
    if waiting is None:  # frozen
        return
    waiting.count = waiting.count + 1
    waiting.backwards += 1
    if is_whole and parameter.grad is not None:
        waiting.add(parameter.grad)
        parameter.grad = None
    if waiting.backwards == _MOST_WAITING:
        warn(
            f"FDFA: the gradients of feedback have waited for {_MOST_WAITING} backwards, in which no "
            'optimizer of torch.optim took a step. With feedback="grad" give one model.parameters(); '
            "in a loop without, call model.give_feedback_gradients() before B is moved"
        )


def _give_before_steps() -> None:
    global _is_hooked
    if not _is_hooked:
        register_optimizer_step_pre_hook(_before_step)
        _is_hooked = True


_is_hooked = False


def _before_step(optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
    """Gives the optimizer's parameters their gradients; after its closure if it has one, as that may
    run the backward and what a loop does to gradients."""
    mine = [p for group in optimizer.param_groups for p in group["params"] if p in _waiting]
    if not mine:
        return None
    # torch's fused optimizers divide by this one themselves, where a GradScaler has left it to them.
    scale = getattr(optimizer, "grad_scale", None)
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        give(mine, scale)
        return None

    @wraps(closure)
    def then_give() -> Any:
        result = closure()
        give(mine, scale)
        return result

    if len(args) > 1:
        return (args[0], then_give, *args[2:]), kwargs
    return args, kwargs | {"closure": then_give}

"""∇B of feedback="grad": kept from what a loop does to gradients, until an optimizer takes its step.

B - G has no part in the scale of a loss. Loss scaling, clipping and the sum over accumulated batches,
which all are for gradients that have, would make it wrong, and its norm would make clipping shrink the
gradients of the weights. Between the backward and the step `.grad` of B is therefore zero.
"""

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from fdfa_ext._torch_internals import running_backward, when_backward_ends
from fdfa_ext.data_parallel import Ranks
from fdfa_ext.warning import warn

# Of a parameter. What keeps tensors by weak references, torch does not let change its device.
_WITHHELD = "_fdfa_withheld"
_MOST_WAITING = 100  # backwards


class _Withheld:
    """The gradients of one B that no optimizer has taken."""

    def __init__(self) -> None:
        self.is_hooked = False
        self.total: Tensor | None = None
        self.count: Tensor | int = 0  # of the gradients in it
        self.not_averaged = 0  # backwards whose gradients lie where processes will average them
        self.backwards = 0
        self.are_averaged = False  # at the end of the backward, by processes
        self.last_backward: int | None = None

    def __reduce__(self) -> Any:
        return _Withheld, ()  # a copy waits for its own, and has no hook

    def drop(self) -> None:
        self.total, self.count, self.not_averaged = None, 0, 0

    def add(self, gradient: Tensor, backwards: int) -> None:
        total = vector_norm(gradient)
        # As in FeedbackStep.move; what is zero throughout is of a batch without rows.
        if gradient.is_cpu:
            if not total.isfinite() or (total == 0 and not gradient.any()):
                return
            self.count += backwards
            self.total = gradient.clone() if self.total is None else self.total + gradient
            return
        counts = total.isfinite() & gradient.any()  # which does not wait
        self.count = self.count + backwards * counts
        own = torch.where(counts, gradient, 0)
        self.total = own if self.total is None else self.total + own

    def mean(self) -> Tensor | None:
        if self.total is None or isinstance(self.count, int):
            return self.total if self.total is None or self.count == 1 else self.total / self.count
        return self.total / self.count.clamp(min=1)


def withhold(parameters: Iterable[nn.Parameter]) -> None:
    """From now on optimizers alone see the gradients of these."""
    for parameter in parameters:
        if not parameter.is_leaf or type(parameter.data) is not Tensor or _is_hooked(parameter):
            continue
        withheld = _Withheld()
        setattr(parameter, _WITHHELD, withheld)
        requires_grad = parameter.requires_grad
        parameter.requires_grad_(True)  # without which torch refuses hooks
        parameter.register_hook(_drop_unless_accumulated(parameter))
        parameter.register_post_accumulate_grad_hook(_keep_own)
        parameter.requires_grad_(requires_grad)
        withheld.is_hooked = True
        _give_before_steps()


def _is_hooked(parameter: nn.Parameter) -> bool:
    withheld = getattr(parameter, _WITHHELD, None)
    return withheld is not None and withheld.is_hooked


def share(parameters: Iterable[nn.Parameter], are_averaged: bool) -> None:
    """Says whether processes average the gradients of the next backward."""
    for parameter in parameters:
        withheld = getattr(parameter, _WITHHELD, None)
        if withheld is not None:
            withheld.are_averaged = are_averaged


def keep_averaged(parameters: Iterable[Any], ranks: Ranks) -> None:
    """Within a backward, which processes share: withholds its gradients when they are averaged."""
    backward, kept = running_backward(), []
    for parameter in parameters:
        if _is_hooked(parameter):
            withheld = getattr(parameter, _WITHHELD)
            if withheld.last_backward != backward:
                withheld.last_backward = backward
                kept.append((parameter, withheld))

    def end() -> None:
        for parameter, withheld in kept:
            if ranks.averages_gradients:
                _keep(parameter, withheld, 1 + withheld.not_averaged)
                withheld.not_averaged = 0
            else:
                withheld.not_averaged += 1

    when_backward_ends(end)


def give(parameters: Iterable[Tensor], scale: Tensor | None = None) -> None:
    """Sets `.grad` of those that wait for it to the mean over the backwards since it was last set.

    scale: by which the optimizer will divide it.
    """
    for parameter in parameters:
        withheld = getattr(parameter, _WITHHELD, None)
        if withheld is None:
            continue
        gradient = withheld.mean()
        if gradient is not None and parameter.grad is not None:  # as after zero_grad
            parameter.grad.copy_(gradient if scale is None else gradient * scale)
        withheld.drop()
        withheld.backwards = 0


def put_back_later(parameters: Iterable[nn.Parameter]) -> Callable[[], None]:
    """What puts back those that wait now."""
    found = [getattr(p, _WITHHELD) for p in parameters if hasattr(p, _WITHHELD)]
    values = [{**vars(withheld)} for withheld in found]

    def restore() -> None:
        for withheld, before in zip(found, values, strict=True):
            vars(withheld).update(before)

    return restore


class _drop_unless_accumulated:
    """Drops what waits where a loop has called zero_grad since; before a gradient is accumulated."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter

    def __call__(self, gradient: Tensor) -> None:
        if self.parameter.grad is None:
            getattr(self.parameter, _WITHHELD).drop()


def _keep_own(parameter: Any) -> None:
    withheld = getattr(parameter, _WITHHELD, None)
    if withheld is not None and not withheld.are_averaged:
        _keep(parameter, withheld, 1)


def _keep(parameter: nn.Parameter, withheld: _Withheld, backwards: int) -> None:
    if parameter.grad is None:
        return
    withheld.add(parameter.grad, backwards)
    parameter.grad.zero_()
    withheld.backwards += 1
    if withheld.backwards == _MOST_WAITING:
        warn(
            f"FDFA: the gradients of feedback have waited for {_MOST_WAITING} backwards, in which no "
            'optimizer of torch.optim took a step. With feedback="grad" give one model.parameters(); '
            "in a loop without, call model.give_feedback_gradients() before B is moved"
        )


def _give_before_steps() -> None:
    global _are_optimizers_hooked
    if not _are_optimizers_hooked:
        register_optimizer_step_pre_hook(_before_step)
        _are_optimizers_hooked = True


_are_optimizers_hooked = False


def _before_step(optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
    """Gives the optimizer's parameters their gradients; after its closure if it has one, as that may
    run the backward and what a loop does to gradients."""
    mine = [p for group in optimizer.param_groups for p in group["params"] if hasattr(p, _WITHHELD)]
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

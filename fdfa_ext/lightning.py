"""A callback of Lightning. Needs the package `lightning`."""

import inspect
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from fdfa_ext.model import FDFA
from fdfa_ext.monitor import scalars

_EXACT = 0.01  # degrees, which rounding makes


class FeedbackMonitor(Callback):
    """Shows how feedback grows and how well gradients align, for the FDFA models in a LightningModule.

    The progress bar has `feedback_norm`, of all B, and `gradient_angle`, in degrees, the mean over the
    weights, of two dimensions or more, whose gradient is not exact. The logger has them too, and those
    of fdfa_ext.monitor.scalars for each block and parameter. With several models their names come
    first: `encoder/feedback_norm`.

    The angles are those of the batch and the loss of the training step that they follow, for the first
    training forward of the model in it. They cost a step of the method and one of backpropagation.
    Methods with local heads have none, whose loss is not the model's alone.

    Args:
        every_n_steps: training steps from one measurement to the next, 50 by default.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(f"FeedbackMonitor: every_n_steps must be 1 or more; got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._watched: list[_Watched] = []
        self._last_step = 0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step + 1  # as loggers count, which write after it
        if step % self.every_n_steps == 0 and step != self._last_step:
            self._last_step = step
            named = pl_module.named_modules()
            self._watched = [_Watched(name, m) for name, m in named if isinstance(m, FDFA)]

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        watched, self._watched = self._watched, []
        for each in watched:
            prefix = f"{each.name}/" if len(watched) > 1 else ""
            found = each.measured()
            norms = [v for tag, v in found.items() if tag.startswith("feedback_norm/")]
            weights = [name for name, p in each.model.module.named_parameters() if p.dim() > 1]
            angles = [found.get(f"gradient_angle/{name}", 0.0) for name in weights]
            angles = [angle for angle in angles if angle > _EXACT]
            shown = {}
            if norms:
                shown["feedback_norm"] = float(torch.tensor(norms).norm())
            if angles:
                shown["gradient_angle"] = sum(angles) / len(angles)
            for values, in_bar in ((shown, True), (found, False)):
                named = {prefix + tag: value for tag, value in values.items()}
                pl_module.log_dict(named, prog_bar=in_bar, on_step=True, on_epoch=False, batch_size=1)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        for each in self._watched:
            each.hook.remove()


class _Watched:
    """A model in one training step: what goes in, and the gradients at what comes out."""

    def __init__(self, name: str, model: FDFA) -> None:
        self.name, self.model = name, model
        self.input: Any = None
        self.gradients: dict[int, Tensor] = {}  # by place among the tensors that it returns
        self.hook: RemovableHandle = model.register_forward_hook(self._see, with_kwargs=True)

    def measured(self) -> dict[str, float]:
        self.hook.remove()
        if not self.gradients or self.model.method.local_heads:
            return scalars(self.model)
        return scalars(self.model, (self.input, self.gradients), _linear)

    def _see(self, model: FDFA, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if not (model.training and torch.is_grad_enabled()):
            return
        self.hook.remove()
        bound = inspect.signature(model.module.forward).bind(*args, **kwargs)
        self.input = dict(bound.arguments) if kwargs else args
        for place, leaf in enumerate(tree_leaves(result)):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(lambda gradient, place=place: self._keep(place, gradient))

    def _keep(self, place: int, gradient: Tensor) -> None:
        self.gradients[place] = gradient.detach().clone()


def _linear(result: Any, gradients: dict[int, Tensor]) -> Tensor:
    """A loss that has these gradients at what the model returns."""
    leaves = tree_leaves(result)
    return torch.stack([(leaves[place] * g).sum() for place, g in gradients.items()]).sum()

"""What to watch of a model in training, by the names under which loggers show it."""

from typing import Any

import torch.nn.functional as F

from fdfa_ext.metrics import Batch, Loss, feedback_norm, gradient_alignment
from fdfa_ext.model import FDFA


def scalars(
    model: FDFA, batch: Batch | None = None, loss_fn: Loss = F.cross_entropy
) -> dict[str, float]:
    """`feedback_norm/NAME`, the Frobenius norm of a block's B, and with a batch `gradient_angle/NAME`,
    in degrees, of a parameter's gradient to the exact one.

    The angles take a step of the method and one of backpropagation, and leave no trace of them.

    Args:
        model: an FDFA of any method.
        batch: (input, target), as gradient_alignment has it.
        loss_fn: loss_fn(model(input), target), a scalar.
    """
    found = {f"feedback_norm/{name}": norm for name, norm in feedback_norm(model).items()}
    if batch is not None:
        angles = gradient_alignment(model, batch, loss_fn)
        found |= {f"gradient_angle/{name}": angle for name, angle in angles.items()}
    return found


def write_tensorboard(
    writer: Any,
    model: FDFA,
    step: int,
    batch: Batch | None = None,
    loss_fn: Loss = F.cross_entropy,
) -> None:
    """Writes `scalars`, and histograms `feedback/NAME` of the elements of B.

    Args:
        writer: a torch.utils.tensorboard.SummaryWriter.
        step: the number under which they stand.
    """
    for tag, value in scalars(model, batch, loss_fn).items():
        writer.add_scalar(tag, value, step)
    for name, matrix in model.feedback.items():
        values: Any = matrix.detach()
        values = values.full_tensor() if hasattr(values, "full_tensor") else values  # of a DTensor
        if values.isfinite().all():  # of others there is no histogram, and the norm tells
            writer.add_histogram(f"feedback/{name}", values, step)

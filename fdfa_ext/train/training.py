"""One training run: the net, its optimizers, the epoch loop and checkpoints that continue exactly."""

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fdfa_ext import FDFA
from fdfa_ext.arguments import UserError
from fdfa_ext.methods import METHODS, KolenPollack
from fdfa_ext.train.data import Dataset, batches
from fdfa_ext.train.models import IMAGE_SIDES, NORMALISED, build_net
from fdfa_ext.train.processes import count, own_part, total

LR_DECAY = 0.95  # of the weights' rate, each epoch; the feedback's rate stays (Appendix A)
_WITH_TANGENTS = [name for name, method in METHODS.items() if method().tangents != "none"]
EVAL_BATCH = 1000  # fits small memories and is as fast as any larger one


@dataclass(frozen=True)
class Config:
    """What decides a run's numbers. The defaults are the paper's Appendix A on the small data set.

    ``hidden`` and ``width`` are for the mlp alone, where None means 1 and 800 (1000 for cifar10).
    ``method``, ``feedback``, ``feedback_lr``, ``noise``, ``patch`` and ``backend`` are FDFA's
    arguments, of which each method takes what it has a use for. ``weights`` are those at the start,
    "random" or "zero".
    """

    model: str = "mlp"
    hidden: int | None = None
    width: int | None = None
    dataset: str = "digits"
    method: str = "fdfa"
    feedback: str = "adam"
    feedback_lr: float = 1e-4
    noise: str = "gaussian"
    patch: int = 1
    backend: str = "fused"
    weights: str = "random"
    epochs: int = 100
    batch_size: int = 64
    lr: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.model != "mlp" and (self.hidden, self.width) != (None, None):
            raise UserError(f"--hidden and --width are for --model mlp, not for {self.model}")
        if self.weights == "zero" and self.model in NORMALISED:
            raise UserError(
                f"--weights zero cannot train {self.model}: what batch normalisation makes of it "
                "is zero for every image, and opens no ReLU"
            )
        if self.weights == "zero" and self.method in _WITH_TANGENTS:
            raise UserError(f"--weights zero is not for {self.method}: no tangent passes such weights")
        if self.feedback == "ema" and not self.feedback_lr < 1:
            raise UserError(f"--feedback ema needs a --feedback-lr below 1; got {self.feedback_lr:g}")


@dataclass(frozen=True)
class EpochResult:
    """One epoch: losses are mean cross-entropies in nats, accuracies are fractions.

    ``train_loss`` and ``train_accuracy`` are means over the training batches as they were trained on;
    ``seconds`` is the wall-clock time of the training part, without the evaluation.
    """

    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    seconds: float


class Run:
    """A net in training. The same seed gives the same initial weights and data order for every method.

    Several processes train it together, each with its part of every batch.

    Args:
        config: the settings; ``config.epochs`` is for the caller, who calls :meth:`train_epoch`.
        data: the images, on any device; they are moved to ``device`` as a whole.
        device: where to train.

    Raises:
        UserError: the model does not fit the images.
    """

    def __init__(self, config: Config, data: Dataset, device: torch.device | None = None) -> None:
        device = device or torch.device("cpu")
        self.config = config
        self.data = data.to(device)
        self.history: list[EpochResult] = []
        self._order = torch.Generator().manual_seed(config.seed)
        # Convolutions are fastest with the channels last.
        self._format = torch.contiguous_format if config.model == "mlp" else torch.channels_last

        torch.manual_seed(config.seed)
        width = config.width or (1000 if config.dataset == "cifar10" else 800)
        channels, *sides = data.image_shape
        # Nets made for larger images get them enlarged, batch by batch.
        self._side = IMAGE_SIDES.get(config.model)
        height, breadth = [self._side] * 2 if self._side else sides
        net = build_net(
            *(config.model, (channels, height, breadth), data.n_classes),
            *(config.hidden or 1, width, config.weights),
        )
        # torch's stubs lack this overload, which its documentation has.
        net = net.to(device=device, memory_format=self._format)  # type: ignore[call-overload]
        self.model = FDFA(
            net,
            method=config.method,
            feedback=config.feedback,
            feedback_lr=config.feedback_lr,
            noise=config.noise,
            patch=config.patch,
            backend=config.backend,
            example_input=self._prepared(self.data.train_images[: config.batch_size]),
        )
        self._trained = DistributedDataParallel(self.model) if count() > 1 else self.model
        method = self.model.method
        parameters = [self.model.forward_parameters()]
        if config.feedback == "grad" and method.feedback == "learned":
            parameters.append(self.model.feedback_parameters())
        rates = (config.lr, config.feedback_lr)  # the second only counts where B has an optimizer
        # The decay has to be the same on both sides for B to become like the weights.
        decay = method.decay if isinstance(method, KolenPollack) else 0.0
        self._optimizers = [
            torch.optim.Adam(
                group, lr=lr, weight_decay=decay if group is parameters[0] else 0, fused=True
            )
            for group, lr in zip(parameters, rates, strict=False)
        ]
        self._scheduler = torch.optim.lr_scheduler.ExponentialLR(self._optimizers[0], LR_DECAY)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one epoch, the last and smaller one included."""
        return -(-len(self.data.train_images) // self.config.batch_size)

    def train_epoch(self, on_step: Callable[[], Any] = lambda: None) -> EpochResult:
        """Train one epoch, evaluate, append the result to ``history`` and return it.

        ``on_step`` is called after each step.
        """
        started = time.perf_counter()
        self.model.train()
        lr = float(self._scheduler.get_last_lr()[0])
        # Sums stay on the device: reading them each step would make it wait.
        totals = torch.zeros(2, device=self.data.train_images.device)
        for images, labels in batches(
            self.data.train_images, self.data.train_labels, self.config.batch_size, self._order
        ):
            n, images, labels = len(labels), own_part(images), own_part(labels)
            for optimizer in self._optimizers:
                optimizer.zero_grad()
            logits = self._trained(self._prepared(images))
            loss = _mean_loss(logits, labels, n)
            local = [_mean_loss(output, labels, n) for output in self.model.local_outputs]
            sum(local, loss).backward()
            for optimizer in self._optimizers:
                optimizer.step()
            correct = (logits.detach().argmax(1) == labels).sum()
            totals += torch.stack([loss.detach() * (n / count()), correct])
            on_step()
        self._scheduler.step()
        train_loss, train_accuracy = (total(totals) / len(self.data.train_images)).tolist()
        seconds = time.perf_counter() - started
        test_loss, test_accuracy = self.evaluate()
        result = EpochResult(
            len(self.history) + 1, lr, train_loss, train_accuracy, test_loss, test_accuracy, seconds
        )
        self.history.append(result)
        return result

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """(Mean cross-entropy, accuracy) on the test images."""
        self.model.eval()
        totals = torch.zeros(2, device=self.data.test_images.device)
        image_batches = torch.split(self.data.test_images, EVAL_BATCH)
        label_batches = torch.split(self.data.test_labels, EVAL_BATCH)
        for images, labels in zip(image_batches, label_batches, strict=True):
            images, labels = own_part(images), own_part(labels)
            logits = self.model(self._prepared(images))
            loss = F.cross_entropy(logits, labels, reduction="sum")
            totals += torch.stack([loss, (logits.argmax(1) == labels).sum()])
        loss, accuracy = (total(totals) / len(self.data.test_images)).tolist()
        return loss, accuracy

    def save(self, file: Path) -> None:
        """Write all that :meth:`load` needs. A crash leaves the old file or the new one, whole."""
        state = {
            "config": asdict(self.config),
            "history": [asdict(result) for result in self.history],
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "scheduler": self._scheduler.state_dict(),
            "data_order": self._order.get_state(),
            "torch_rng": torch.get_rng_state(),
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f"{file.name}.part")
        torch.save(state, unfinished)
        os.replace(unfinished, file)

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Continue from what :func:`read_checkpoint` returned, exactly as if never interrupted."""
        self.model.load_state_dict(checkpoint["model"])
        for optimizer, state in zip(self._optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self._scheduler.load_state_dict(checkpoint["scheduler"])
        self._order.set_state(checkpoint["data_order"])
        torch.set_rng_state(checkpoint["torch_rng"])
        self.history = [EpochResult(**result) for result in checkpoint["history"]]

    def _prepared(self, images: torch.Tensor) -> torch.Tensor:
        if self._side:
            images = F.interpolate(images, (self._side, self._side), mode="bilinear", antialias=True)
        return images.contiguous(memory_format=self._format)


def _mean_loss(logits: Tensor, labels: Tensor, n: int) -> Tensor:
    """The cross-entropy of a part of a batch of n, whose mean over the processes is the batch's."""
    if count() == 1:
        return F.cross_entropy(logits, labels)
    return F.cross_entropy(logits, labels, reduction="sum") * (count() / n)


def read_checkpoint(file: Path) -> tuple[Config, dict[str, Any]]:
    """The settings of a run that :meth:`Run.save` wrote, and its state for :meth:`Run.load`.

    Raises:
        UserError: the file is missing or no such checkpoint.
    """
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        return Config(**checkpoint["config"]), checkpoint
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {file}: {error.strerror}") from None
    except Exception:  # torch.load raises nearly anything on foreign bytes
        raise UserError(f"{file} is not a checkpoint of fdfa_ext train") from None

"""One training run: the net, its optimizers, the epoch loop and checkpoints that continue exactly."""

import sys
import time
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fdfa_ext import FDFA, build_info
from fdfa_ext.arguments import UserError
from fdfa_ext.dual_pass import BACKENDS
from fdfa_ext.feedback import RULES
from fdfa_ext.methods import METHODS, KolenPollack
from fdfa_ext.noise import NOISES
from fdfa_ext.train.data import DATASETS, Dataset, batches
from fdfa_ext.train.files import check_regular, replacing
from fdfa_ext.train.models import IMAGE_SIDES, MODELS, NORMALISED, WEIGHTS, build_net
from fdfa_ext.train.processes import count, is_first, own_part, total

LR_DECAY = 0.95  # of the weights' rate, each epoch; the feedback's rate stays (Appendix A)
_WITH_TANGENTS = [name for name, method in METHODS.items() if method().tangents != "none"]
EVAL_BATCH = 1000  # fits small memories and is as fast as any larger one
_KNOWN: dict[str, Iterable[str]] = {  # values of the settings that have names
    "model": MODELS,
    "dataset": DATASETS,
    "method": METHODS,
    "feedback": RULES,
    "noise": NOISES,
    "backend": BACKENDS,
    "weights": WEIGHTS,
}
_FORMAT = 2  # of checkpoints; 1 had no number


@dataclass(frozen=True)
class Config:
    """What decides a run's numbers. The defaults are the paper's Appendix A on the small data set.

    ``hidden`` and ``width`` are for the mlp alone, where None means 1 and 800 (1000 for cifar10).
    ``method``, ``feedback``, ``feedback_lr``, ``noise``, ``patch`` and ``backend`` are FDFA's
    arguments, of which each method takes what it has a use for. ``feedback_every`` is the number of
    steps of which the first learns feedback. ``weights`` are those at the start, "random" or "zero".
    """

    model: str = "mlp"
    hidden: int | None = None
    width: int | None = None
    dataset: str = "digits"
    method: str = "fdfa"
    feedback: str = "adam"
    feedback_lr: float = 1e-4
    feedback_every: int = 1
    noise: str = "gaussian"
    patch: int = 1
    backend: str = "fused"
    weights: str = "random"
    epochs: int = 100
    batch_size: int = 64
    lr: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in _KNOWN.items():
            if getattr(self, name) not in known:
                raise UserError(f"{name} is one of {', '.join(known)}; got {getattr(self, name)!r}")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in _KNOWN and not (value is field.default is None):
                _check_number(field.name, value, whole=not isinstance(field.default, float))
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
        if self.feedback == "grad" and self.feedback_every > 1:
            raise UserError("--feedback-every is not for --feedback grad, whose B has an optimizer")


def _check_number(name: str, value: object, whole: bool) -> None:
    least = 0 if name == "seed" else 1
    if whole and not (isinstance(value, int) and type(value) is not bool and least <= value < 2**63):
        raise UserError(f"{name} is a whole number from {least} to 2^63 - 1; got {value!r}")
    if not whole and not (isinstance(value, int | float) and 0 < value <= sys.float_info.max):
        raise UserError(f"{name} is a number above 0; got {value!r}")


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


@dataclass
class _Epoch:
    """How far an epoch has come."""

    order: Tensor  # the state from which the order of its batches is drawn
    totals: Tensor  # [2]: sums of losses and of correct answers
    steps: int = 0
    seconds: float = 0.0


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
        self._epoch: _Epoch | None = None  # the one that has begun
        self._saved: Path | None = None  # what holds a state of this run
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
    def steps(self) -> int:
        """That have been trained, of all epochs."""
        return len(self.history) * self.steps_per_epoch + (self._epoch.steps if self._epoch else 0)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one epoch, the last and smaller one included."""
        return -(-len(self.data.train_images) // self.config.batch_size)

    def train_epoch(self, on_step: Callable[[], Any] = lambda: None) -> EpochResult:
        """Train one epoch, evaluate, append the result to ``history`` and return it.

        ``on_step`` is called after each step. What it raises leaves the run between two steps: it can
        be saved, and the next call goes on within the epoch.
        """
        self.model.train()
        lr = float(self._scheduler.get_last_lr()[0])
        if self._epoch is None:
            # Sums stay on the device: reading them each step would make it wait.
            totals = torch.zeros(2, device=self.data.train_images.device)
            self._epoch = _Epoch(self._order.get_state(), totals)
        epoch = self._epoch
        self._order.set_state(epoch.order)
        started = time.perf_counter() - epoch.seconds
        data = (self.data.train_images, self.data.train_labels, self.config.batch_size, self._order)
        for images, labels in islice(batches(*data), epoch.steps, None):
            n, images, labels = len(labels), own_part(images), own_part(labels)
            if self.config.feedback_every > 1 and self.model.method.feedback == "learned":
                self.model.learns_feedback = self.steps % self.config.feedback_every == 0
            for optimizer in self._optimizers:
                optimizer.zero_grad()
            logits = self._trained(self._prepared(images))
            loss = _mean_loss(logits, labels, n)
            local = [_mean_loss(output, labels, n) for output in self.model.local_outputs]
            sum(local, loss).backward()
            for optimizer in self._optimizers:
                optimizer.step()
            correct = (logits.detach().argmax(1) == labels).sum()
            epoch.totals += torch.stack([loss.detach() * (n / count()), correct])
            epoch.steps += 1
            epoch.seconds = time.perf_counter() - started
            on_step()
        self._epoch = None
        self._scheduler.step()
        train_loss, train_accuracy = (total(epoch.totals) / len(self.data.train_images)).tolist()
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
        """Write all that :meth:`load` needs.

        A crash leaves the old file or the new one, whole. The old one is kept beside it, with
        ``.previous`` at the end of its name.

        Raises:
            UserError: the file cannot be written. The old one is as it was.
        """
        state = {
            "format": _FORMAT,
            "fdfa_ext": build_info()["fdfa_ext"],
            "config": asdict(self.config),
            "history": [asdict(result) for result in self.history],
            "epoch": vars(self._epoch) if self._epoch else None,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "scheduler": self._scheduler.state_dict(),
            "data_order": self._order.get_state(),
            "torch_rng": torch.get_rng_state(),
            "data": self.data.digest(),
        }
        # What is damaged or of others does not take the place of the checkpoint before.
        keeps = file == self._saved or _is_whole(file)
        try:
            with replacing(file, previous=previous_of(file) if keeps else None) as stream:
                torch.save(state, stream)
            self._saved = file
        except (OSError, RuntimeError) as error:  # torch's own writer raises the second
            raise UserError(f"cannot write the checkpoint {file}: {error}") from None

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Continue from what :func:`read_checkpoint` returned, exactly as if never interrupted.

        Raises:
            UserError: it is of another net, or of other images.
        """
        digest = self.data.digest()
        if checkpoint.get("data", digest) != digest:
            raise UserError(
                f"the checkpoint is of other images than those of {self.config.dataset} here: give the "
                "folder of its data set by --data-dir"
            )
        try:
            self.model.load_state_dict(checkpoint["model"])
            for optimizer, state in zip(self._optimizers, checkpoint["optimizers"], strict=True):
                _load_adam(optimizer, state)
            self._scheduler.load_state_dict(checkpoint["scheduler"])
            self._order.set_state(checkpoint["data_order"])
            torch.set_rng_state(checkpoint["torch_rng"])
            self.history = _history(checkpoint["history"])
            self._epoch = self._epoch_of(checkpoint["epoch"]) if checkpoint["epoch"] else None
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            why = str(error).replace("\n", " ")
            raise UserError(f"the checkpoint does not fit the net that it names: {why}") from None
        if self._epoch:
            # One process has the sums so far, where a run of one goes on in several.
            totals = self._epoch.totals if is_first() else torch.zeros(2)
            self._epoch.totals = totals.to(self.data.train_images.device)

    def _epoch_of(self, saved: dict[str, Any]) -> _Epoch:
        epoch, order = _Epoch(**saved), self._order.get_state()
        fits = epoch.totals.shape == (2,) and epoch.totals.dtype == torch.float32
        fits &= epoch.order.shape == order.shape and epoch.order.dtype == order.dtype
        fits &= type(epoch.steps) is int and 0 <= epoch.steps <= self.steps_per_epoch
        if not fits or type(epoch.seconds) is not float:
            raise ValueError("its epoch is not one of this data set")
        return epoch

    def _prepared(self, images: torch.Tensor) -> torch.Tensor:
        if self._side:
            images = F.interpolate(images, (self._side, self._side), mode="bilinear", antialias=True)
        return images.contiguous(memory_format=self._format)


def _load_adam(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Checks what torch does not, whose fused step reads moments of any size as if they fitted."""
    settings = [{**group, "params": None, "lr": None} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, expected in zip(optimizer.param_groups, settings, strict=True):
        # The rates before a decay have a name of their own, which the scheduler gives them.
        if {**group, "params": None, "lr": None} != expected or not isinstance(group["lr"], float):
            raise ValueError("its optimizer has other settings")
        for p in group["params"]:
            if p not in optimizer.state:  # it had no gradient yet
                continue
            moments = {key: t for key, t in optimizer.state[p].items() if key != "step"}
            if moments.keys() != {"exp_avg", "exp_avg_sq"}:
                raise ValueError("its optimizer lacks moments")
            for t in moments.values():
                if (t.shape, t.stride(), t.dtype) != (p.shape, p.stride(), p.dtype):
                    raise ValueError(f"its optimizer has moments {list(t.shape)} of {list(p.shape)}")


def _history(saved: list[dict[str, Any]]) -> list[EpochResult]:
    history = [EpochResult(**result) for result in saved]
    for i, result in enumerate(history, 1):
        if result.epoch != i or not all(type(value) in (int, float) for value in vars(result).values()):
            raise ValueError("its history is none of a run")
    return history


def _mean_loss(logits: Tensor, labels: Tensor, n: int) -> Tensor:
    """The cross-entropy of a part of a batch of n, whose mean over the processes is the batch's."""
    if count() == 1:
        return F.cross_entropy(logits, labels)
    return F.cross_entropy(logits, labels, reduction="sum") * (count() / n)


class DamagedCheckpoint(UserError):
    """A checkpoint that has changed since it was written."""


def read_checkpoint(file: Path) -> tuple[Config, dict[str, Any]]:
    """The settings of a run that :meth:`Run.save` wrote, and its state for :meth:`Run.load`.

    Raises:
        UserError: the file is missing, damaged, or no such checkpoint.
    """
    check_regular(file)
    try:
        with file.open("rb") as stream:
            start = stream.read(len(_ZIP))
            archive = zipfile.ZipFile(stream)
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("torch compresses nothing")
            # torch.load does not compare the sums over the tensors' bytes, which the archive holds.
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} has changed")
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {file}: {error.strerror}{_older(file)}") from None
    except Exception as error:  # zipfile and torch.load raise nearly anything on foreign bytes
        if start in (b"", _ZIP) and isinstance(error, zipfile.BadZipFile | EOFError):
            raise DamagedCheckpoint(
                f"the checkpoint {file} is damaged: {error}{_older(file)}"
            ) from None
        raise UserError(f"{file} is not a checkpoint of fdfa_ext train{_older(file)}") from None
    if not isinstance(checkpoint, dict) or not checkpoint.keys() >= {"config", "history"}:
        raise UserError(f"{file} is not a checkpoint of fdfa_ext train")
    if (found := checkpoint.get("format", 1)) != _FORMAT:
        writer, reader = checkpoint.get("fdfa_ext", "0.1.0 or older"), build_info()["fdfa_ext"]
        raise UserError(
            f"{file} is of format {found}, and this fdfa_ext ({reader}) reads format {_FORMAT}: "
            f"continue it with the one that wrote it ({writer})"
        )
    try:
        return Config(**checkpoint["config"]), checkpoint
    except (TypeError, UserError) as error:
        raise UserError(f"{file} holds settings that this fdfa_ext does not know: {error}") from None


def remove_checkpoint(file: Path) -> None:
    """Together with the one before it."""
    for each in (file, previous_of(file)):
        each.unlink(missing_ok=True)


_ZIP = b"PK\x03\x04"  # what the archive that torch.save writes starts with


def previous_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.previous")


def _is_whole(file: Path) -> bool:
    if not file.exists():
        return False
    try:
        read_checkpoint(file)
    except UserError:
        return False
    return True


def _older(file: Path) -> str:
    """The end of a sentence on a checkpoint that cannot be read: the remedy, where there is one."""
    previous = previous_of(file)
    return f"; the one before it is {previous}" if previous.exists() else ""

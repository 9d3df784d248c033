"""Digits by Lightning: the loop clips gradients, logs, saves and validates as it does for any module.

FeedbackMonitor adds the norm of the feedback and the angle to the exact gradient. Needs lightning.
"""

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fdfa_ext import FDFA
from fdfa_ext.lightning import FeedbackMonitor

digits = load_digits()
x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1  # [1797, 1, 8, 8]
y = torch.tensor(digits.target)


class Digits(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(256, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )
        self.model = FDFA(net, at="auto", feedback_lr=1e-3, example_input=x[:2])

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("accuracy", (self.model(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


L.seed_everything(0)
train, test = (TensorDataset(x[part], y[part]) for part in torch.randperm(len(x)).split([1400, 397]))
trainer = L.Trainer(
    max_epochs=10,
    accelerator="cpu",
    gradient_clip_val=1.0,
    logger=CSVLogger("logs"),
    log_every_n_steps=10,
    callbacks=[FeedbackMonitor(every_n_steps=10)],
)
trainer.fit(Digits(), DataLoader(train, 64, shuffle=True), DataLoader(test, 397))
metrics = trainer.callback_metrics
print(f"angle to the exact gradient {metrics['gradient_angle']:.0f} degrees")
print(f"test accuracy {metrics['accuracy']:.1%}")

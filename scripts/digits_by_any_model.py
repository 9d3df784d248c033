"""Test accuracy in percent of models as they come on scikit-learn's digits, by FDFA and by backprop.

Needs requirements-zoo.txt. 20 epochs of batches of 32 by Adam at 1e-3, x 0.95 each epoch, seed 0.

    PYTHONPATH=.:python_tests python scripts/digits_by_any_model.py [NAME ...]
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from libraries import library
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fdfa_ext import FDFA

EPOCHS, BATCH, TRAINING = 20, 32, 1437


class Recurrent(nn.Module):
    """Over the rows of an image."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.layers = kind(8, 64, 2, batch_first=True)
        self.norm, self.output = nn.LayerNorm(64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.norm(self.layers(x.squeeze(1))[0][:, -1]))


class Functional(nn.Module):
    """Two convolutions and a hidden dense layer, all else by functions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.hidden, self.output = nn.Linear(128, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        x = F.max_pool2d(F.relu(self.second(x)), 2).flatten(1)
        return self.output(F.dropout(F.relu(self.hidden(x)), 0.5, self.training))


class LastState(nn.Module):
    """What a recurrent layer has in mind at the end of an image's rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.output = nn.LSTM(8, 64, 2, batch_first=True), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        _, (state, _) = self.layers(x.squeeze(1))
        return self.output(state[-1])


class Attention(nn.Module):
    """One of four heads over the rows of an image, by functions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.positions = nn.Linear(8, 64), nn.Parameter(torch.randn(8, 64) * 0.1)
        self.query, self.key, self.value = (nn.Linear(64, 64) for _ in range(3))
        self.mix, self.output = nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x.squeeze(1)) + self.positions)
        heads = [m(x).unflatten(2, (4, 16)).transpose(1, 2) for m in (self.query, self.key, self.value)]
        x = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return self.output(torch.relu(self.mix(x)).mean(1))


class Gated(nn.Module):
    """Four gated convolutions along the rows of an image, with skips, without a class of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(8, 64, 1)
        self.layers = nn.ModuleList(nn.Conv1d(64, 128, 3, padding=1) for _ in range(4))
        self.output = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.squeeze(1).transpose(1, 2))
        for layer in self.layers:
            x = (x + F.glu(layer(x), 1)) * 0.5**0.5
        return self.output(x.amax(2))


class WaveNet(nn.Module):
    """Over the pixels of an image, without a class of its own for the four layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, 32, 1)
        dilated = (nn.Conv1d(32, 64, 3, padding=2**i, dilation=2**i) for i in range(4))
        self.dilated = nn.ModuleList(dilated)
        self.residual = nn.ModuleList(nn.Conv1d(32, 32, 1) for _ in range(3))
        self.skip = nn.ModuleList(nn.Conv1d(32, 32, 1) for _ in range(4))
        self.mix, self.output = nn.Conv1d(32, 32, 1), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(2))
        skips = []
        for i, layer in enumerate(self.dilated):
            value, gate = layer(x).chunk(2, 1)
            gated = torch.tanh(value) * torch.sigmoid(gate)
            skips.append(self.skip[i](gated))
            if i < len(self.residual):
                x = x + self.residual[i](gated)
        total = skips[0] + skips[1] + skips[2] + skips[3]
        return self.output(torch.relu(self.mix(torch.relu(total))).mean(2))


class Dense(nn.Module):
    """Six convolutions that read all before them, without a class of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 24, 3, 1, 1)
        counts = range(24, 96, 12)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, 12, 3, 1, 1)) for c in counts
        )
        self.norm, self.output = nn.BatchNorm2d(96), nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.output(torch.relu(self.norm(x)).mean((2, 3)))


def _torchvision(name: str, *arguments: Any, **options: Any) -> nn.Module:
    net: nn.Module = getattr(library("torchvision.models"), name)(*arguments, num_classes=10, **options)
    return net


def _convnext() -> nn.Module:
    config = library("torchvision.models.convnext").CNBlockConfig
    return _torchvision("ConvNeXt", [config(48, 96, 2), config(96, None, 2)])


# Each with the side of its images in pixels; of 8 they have one channel.
NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (lambda: _torchvision("resnet18"), 32),
    "convnext": (_convnext, 32),
    "densenet": (lambda: _torchvision("DenseNet", 12, (3, 3, 3), 24), 32),
    "shufflenet": (lambda: _torchvision("shufflenet_v2_x0_5"), 32),
    "swin": (lambda: _torchvision("SwinTransformer", [2, 2], 48, [2, 2], [2, 4], [4, 4], 0.0), 16),
    "dense": (Dense, 8),
    "lstm": (lambda: Recurrent(nn.LSTM), 8),
    "gru": (lambda: Recurrent(nn.GRU), 8),
    "functional": (Functional, 8),
    "last state": (LastState, 8),
    "attention": (Attention, 8),
    "gated": (Gated, 8),
    "wavenet": (WaveNet, 8),
}


def images(side: int) -> tuple[Tensor, Tensor]:
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    if side > 8:
        x = F.interpolate(x, size=(side, side), mode="bilinear").repeat(1, 3, 1, 1)
    return x[order], torch.tensor(digits.target)[order]


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """On the test images, after training on the others."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
    for _ in range(EPOCHS):
        for batch in torch.randperm(TRAINING).split(BATCH)[:-1]:
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        right = [model(part).argmax(1) for part in x[TRAINING:].split(60)]
    return 100 * (torch.cat(right) == y[TRAINING:]).float().mean().item()


def main() -> None:
    torch.set_num_threads(1)
    print("| net | FDFA | backpropagation |\n|---|---|---|")
    for name in sys.argv[1:] or NETS:
        make, side = NETS[name]
        x, y = images(side)
        found = []
        for is_fdfa in (True, False):
            torch.manual_seed(0)
            net = make()
            model = FDFA(net, at="auto", example_input=x[:8]) if is_fdfa else net
            found.append(f"{accuracy(model, x, y):.1f}")
        print(f"| {name} | {' | '.join(found)} |", flush=True)


if __name__ == "__main__":
    main()

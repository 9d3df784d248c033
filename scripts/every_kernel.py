"""Runs every kernel with each activation, noise, rule and storage type on a few small odd shapes.

For compute-sanitizer, under which the test suite with its references would take too long. Right numbers
are the tests' business. The argument is a device (default cuda).
"""

import sys
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdfa_ext import FDFA, FDFABlock, FDFAConv2d, FDFALinear
from fdfa_ext.feedback import RULES
from fdfa_ext.layers import ACTIVATIONS
from fdfa_ext.noise import NOISES

DEVICE = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda")
FEW, MANY = 3, 70  # outputs, for either kernel of the feedback step
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def dense(outputs: int) -> nn.Sequential:
    """A block for each activation; rows of whole and of broken quads."""
    widths = [7, *(151, 132) * len(ACTIVATIONS)]
    blocks = [
        FDFALinear(before, after, activation=activation)
        for (before, after), activation in zip(pairwise(widths), ACTIVATIONS, strict=False)
    ]
    return nn.Sequential(*blocks, nn.Linear(widths[len(blocks)], outputs))


def images(outputs: int) -> nn.Sequential:
    """Blocks with a pool after them, one within them, and none; with and without normalisation."""
    return nn.Sequential(
        FDFAConv2d(1, 15, 3, activation="relu"),
        nn.MaxPool2d(3, stride=2, padding=1),
        FDFABlock(nn.Conv2d(15, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)),
        FDFAConv2d(6, 6, 1, activation="gelu"),
        FDFABlock(nn.Conv2d(6, 8, 1), nn.MaxPool2d(3, stride=1, padding=1)),  # whole quads of channels
        FDFABlock(nn.Conv2d(8, 5, 2), nn.BatchNorm2d(5)),
        nn.MaxPool2d(2),
        FDFABlock(nn.Conv2d(5, 5, 1), nn.Tanh(), nn.Conv2d(5, 5, 1), nn.Softplus()),
        nn.MaxPool2d(1),
        nn.Flatten(),
        FDFABlock(nn.LazyLinear(8), nn.BatchNorm1d(8), nn.GELU()),
        nn.Linear(8, outputs),
    )


def train(net: nn.Module, x: Tensor, outputs: int, **options: Any) -> None:
    net(x)  # which gives lazy modules their shapes
    model = FDFA(net, example_input=x, **options)
    y = torch.randint(outputs, (len(x),), device=DEVICE)
    F.cross_entropy(model(x).float(), y).backward()
    model.eval()(x)


def main() -> None:
    for i, dtype in enumerate(DTYPES):
        for j, (outputs, samples) in enumerate(((FEW, 5), (MANY, 5), (MANY, 200))):
            x = torch.randn(samples + 1, 7, device=DEVICE, dtype=dtype)[1:]  # not aligned
            net = dense(outputs).to(DEVICE, dtype)
            # So that each shape meets each rule and noise.
            options = {"feedback": RULES[(i + j) % len(RULES)], "noise": NOISES[(i + j) % len(NOISES)]}
            train(net, x, outputs, **options)
    x = torch.randn(4, 1, 19, 19, device=DEVICE)
    for method, noise, patch in (
        ("fdfa", "gaussian", 1),
        ("fdfa", "rademacher", 3),
        ("dfa", "gaussian", 1),
        ("dkp", "gaussian", 2),
    ):
        train(images(MANY).to(DEVICE), x, MANY, method=method, noise=noise, patch=patch)
    for dtype in DTYPES:
        net = nn.Sequential(
            FDFAConv2d(1, 6, 3, activation="tanh"), nn.Flatten(), nn.Linear(6 * 17 * 17, FEW)
        )
        train(net.to(DEVICE, dtype), x.to(dtype), FEW, patch=4)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    print("every kernel has run")


if __name__ == "__main__":
    main()

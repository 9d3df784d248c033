"""Runs every kernel with every activation, noise, rule and storage type once, on small odd shapes.

For compute-sanitizer, under which the test suite with its references would take too long. Right numbers
are the tests' business. The argument is a device (default cuda).
"""

import sys
from itertools import cycle, product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdfa_ext import FDFA, FDFABlock, FDFAConv2d, FDFALinear
from fdfa_ext.functional import ACTIVATIONS, NOISES
from fdfa_ext.wrapper import RULES

DEVICE = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda")
FEW, MANY = 3, 70  # outputs, for either kernel of the feedback step
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def dense(activation: str, outputs: int) -> nn.Sequential:
    """Rows of whole and of broken quads."""
    return nn.Sequential(
        FDFALinear(7, 151, activation=activation),
        FDFALinear(151, 132, activation=activation),
        nn.Linear(132, outputs),
    )


def images(activation: str, outputs: int) -> nn.Sequential:
    """Blocks with a pool after them, one within them, and none; with and without normalisation."""
    return nn.Sequential(
        FDFAConv2d(1, 15, 3, activation=activation),
        nn.MaxPool2d(3, stride=2, padding=1),
        FDFABlock(nn.Conv2d(15, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)),
        FDFABlock(nn.Conv2d(6, 8, 1), nn.MaxPool2d(3, stride=1, padding=1)),  # whole quads of channels
        FDFABlock(nn.Conv2d(8, 5, 2), nn.BatchNorm2d(5)),
        nn.MaxPool2d(2),
        nn.Flatten(),
        FDFABlock(nn.LazyLinear(8), nn.BatchNorm1d(8), nn.GELU()),
        nn.Linear(8, outputs),
    )


def train(net: nn.Module, x: Tensor, outputs: int, **options: str) -> None:
    net(x)  # which gives lazy modules their shapes
    model = FDFA(net, example_input=x, **options)
    y = torch.randint(outputs, (len(x),), device=DEVICE)
    for _ in range(2):
        F.cross_entropy(model(x).float(), y).backward()
    model.eval()(x)


def main() -> None:
    sizes = ((FEW, 5), (MANY, 5), (MANY, 200))
    # Nine nets for each type and noise: enough for all seven activations.
    activations = cycle(ACTIVATIONS)
    for dtype, noise, rule, (outputs, samples) in product(DTYPES, NOISES, RULES, sizes):
        x = torch.randn(samples + 1, 7, device=DEVICE, dtype=dtype)[1:]  # not aligned
        net = dense(next(activations), outputs).to(DEVICE, dtype)
        train(net, x, outputs, noise=noise, feedback=rule)
    for activation, noise in zip(ACTIVATIONS, cycle(NOISES), strict=False):
        x = torch.randn(4, 1, 19, 19, device=DEVICE)
        train(images(activation, FEW).to(DEVICE), x, FEW, noise=noise)
        for method in ("dfa", "dkp"):
            train(images(activation, MANY).to(DEVICE), x, MANY, method=method)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    print("every kernel has run")


if __name__ == "__main__":
    main()

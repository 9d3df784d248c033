"""Small nets and training steps that several tests share."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdfa_ext import FDFABlock, FDFAConv2d, FDFALinear


def mlp(activation: str = "relu") -> nn.Sequential:
    """[N, 6] → [N, 3] over blocks '0' and '1'."""
    return nn.Sequential(
        FDFALinear(6, 8, activation=activation),
        FDFALinear(8, 7, activation=activation),
        nn.Linear(7, 3),
    )


def conv_net() -> nn.Sequential:
    """The README's kind of net on images [N, 1, 12, 12] → [N, 3]."""
    return nn.Sequential(
        FDFAConv2d(1, 4, 3, activation="relu"),
        nn.MaxPool2d(2),
        FDFAConv2d(4, 6, 3, padding=1, activation="relu"),
        nn.Flatten(),
        FDFALinear(150, 8, activation="relu"),
        nn.Linear(8, 3),
    )


def block_net() -> nn.Sequential:
    """Blocks of Conv → BatchNorm → ReLU → MaxPool, one pool outside; [N, 1, 12, 12] → [N, 3]."""
    return nn.Sequential(
        FDFABlock(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
        FDFABlock(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
        nn.MaxPool2d(2, stride=1),
        nn.Flatten(),
        FDFABlock(nn.Linear(24, 8), nn.BatchNorm1d(8), nn.GELU()),
        nn.Linear(8, 3),
    )


class Residue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(x)


NETS = {"mlp": (mlp, (6,)), "conv_net": (conv_net, (1, 12, 12)), "block_net": (block_net, (1, 12, 12))}


def batch(name: str, device: torch.device | str = "cpu", n: int = 5) -> tuple[Tensor, Tensor]:
    shape = NETS[name][1]
    return torch.randn(n, *shape, device=device), torch.randint(3, (n,), device=device)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()

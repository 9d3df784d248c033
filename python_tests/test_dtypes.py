"""16-bit training of blocks with normalisation: gradients as those of float32, tangents of one dtype."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from marks import slow_but
from torch import Tensor, nn

from fdfa_ext import FDFA, FDFABlock, FDFAConv2d, FDFALinear
from fdfa_ext.dual_pass import BACKENDS

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "group": lambda c: nn.GroupNorm(2, c),
    "batch": nn.BatchNorm2d,
    "instance": lambda c: nn.InstanceNorm2d(c, affine=True),
    "layer": lambda c: _LayerNorm(c),
}


class _LayerNorm(nn.LayerNorm):
    """Over the channels of images."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _Residual(nn.Module):
    def __init__(self, c: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=1)
        self.norms = nn.ModuleList([norm(c), norm(c)])

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[0](self.first(x)))
        return F.relu(x + self.norms[1](self.second(y)))


class _Own(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def images(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    """[N, 3, 10, 10] → [N, 3]: the norm within a branch, at the start, middle and end of a block."""
    return nn.Sequential(
        FDFAConv2d(3, 8, 3, activation="relu"),
        FDFABlock(_Residual(8, norm)),
        FDFABlock(nn.Conv2d(8, 8, 3), norm(8), nn.ReLU(), nn.MaxPool2d(2)),
        FDFABlock(norm(8), nn.Conv2d(8, 8, 1)),
        FDFABlock(nn.Conv2d(8, 8, 1), norm(8)),
        nn.Flatten(),
        nn.Linear(72, 3),
    )


def tokens(norm: Any = None) -> nn.Sequential:
    """[N, 3, 10, 10] → [N, 3], of its rows as tokens; ends in parameters beyond the blocks."""
    return nn.Sequential(
        nn.Flatten(2),
        FDFALinear(100, 8, activation="relu"),
        FDFABlock(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)),
        nn.Flatten(),
        FDFABlock(nn.LayerNorm(24), nn.Linear(24, 8), nn.BatchNorm1d(8), nn.GELU()),
        nn.LayerNorm(8),
        nn.Linear(8, 3),
    )


def cast(net: nn.Module, mode: str) -> nn.Module:
    if mode.startswith("bfloat16"):
        net.bfloat16()
    if mode.endswith("float32 norms"):
        for module in net.modules():
            if "Norm" in type(module).__name__:
                module.float()
    return net


def gradients(model: FDFA, x: Tensor, y: Tensor, dtype: torch.dtype | None) -> Tensor:
    for _ in range(2):  # the second of a feedback that has moved
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            output = model(x)
        F.cross_entropy(output.float(), y).backward()
    return torch.cat([p.grad.flatten().float() for p in model.module.parameters()])


@pytest.mark.parametrize("example", slow_but([False, True], True), ids=["late", "example"])
@pytest.mark.parametrize(
    "mode",
    slow_but(
        ["autocast", "autocast float16", "bfloat16", "bfloat16, float32 norms"],
        "autocast",
        "bfloat16, float32 norms",
    ),
)
@pytest.mark.parametrize("own", [False, True], ids=["sequence", "own forward"])
@pytest.mark.parametrize("norm", slow_but([*NORMS, "tokens"], "group", "batch", "tokens"))
@pytest.mark.parametrize(
    ("method", "backend"),
    slow_but(
        [*(("fdfa", b) for b in BACKENDS), ("dfa", "fused"), ("fg-w", "fused")],
        ("fdfa", "fused"),
        ("dfa", "fused"),
    ),
)
def test_normalised_blocks_train_in_16_bits(
    method: str, backend: str, norm: str, own: bool, mode: str, example: bool
) -> None:
    if own and method != "fdfa":
        pytest.skip("the same passes")
    x, y = torch.randn(16, 3, 10, 10), torch.randint(3, (16,))
    net: nn.Module = tokens() if norm == "tokens" else images(NORMS[norm])
    net = _Own(net) if own else net
    dtype = torch.bfloat16 if mode.startswith("bfloat16") else torch.float32
    low = torch.float16 if mode.endswith("float16") else torch.bfloat16
    found = []
    for each, given, autocast in (
        (copy.deepcopy(net), x, None),
        (cast(net, mode), x.to(dtype), low if mode.startswith("autocast") else None),
    ):
        torch.manual_seed(1)
        options = {"method": method, "backend": backend, "feedback": "ema", "feedback_lr": 0.3}
        model = FDFA(each, **options, example_input=given if example else None)
        torch.manual_seed(2)
        found.append(gradients(model, given, y, autocast))
    # Roundings of 2⁻⁹ in some twenty operations; a tangent in the wrong place leaves less than 0.6.
    assert F.cosine_similarity(*found, dim=0) > 0.95

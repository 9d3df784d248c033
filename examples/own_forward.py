"""A residual model with a forward of its own, trained by FDFA on scikit-learn's digits.

The skip connections lead around the blocks, and tangents take both ways. The angle between each
block's B and the mean Jacobian of the output falls far below the 90 degrees of a random matrix.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fdfa_ext import FDFA, FDFABlock, FDFALinear
from fdfa_ext.metrics import feedback_alignment


class Residual(nn.Module):
    """x [N, 64] → logits [N, 10]."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.first = FDFALinear(64, width, activation="relu")
        self.branches = nn.ModuleList(
            FDFABlock(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU()) for _ in range(3)
        )
        self.output = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for branch in self.branches:
            x = x + branch(x)
        return self.output(x)


torch.manual_seed(0)
digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 8 - 1  # [1797, 64]
y = torch.tensor(digits.target)
train, test = torch.randperm(len(x)).split([1400, 397])

model = FDFA(Residual(), feedback_lr=1e-3, example_input=x[:1])
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
for _ in range(20):
    for batch in train[torch.randperm(len(train))].split(64):
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()

for name, angle in feedback_alignment(model, x[test]).items():
    print(f"{name}: {angle:.0f} degrees between B and the mean Jacobian")
model.eval()
with torch.no_grad():
    accuracy = (model(x[test]).argmax(1) == y[test]).float().mean().item()
print(f"test accuracy {accuracy:.1%}")

"""A residual net in plain torch, trained by FDFA on scikit-learn's digits as it comes.

`at="auto"` finds the points where it is perturbed, and the summary lists them. The net returns a dict,
as models of other libraries do.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fdfa_ext import FDFA


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(x + self.norm2(self.conv2(y)))


class ResidualNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU())
        self.blocks = nn.Sequential(Residual(16), nn.MaxPool2d(2), Residual(16))
        self.head = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.blocks(self.stem(images)).mean((2, 3)))}


torch.manual_seed(0)
digits = load_digits()
x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1  # [1797, 1, 8, 8]
y = torch.tensor(digits.target)
train, test = torch.randperm(len(x)).split([1400, 397])

model = FDFA(ResidualNet(), at="auto", feedback_lr=1e-3, patch=2, example_input=x[:2])
print(model.summary(x[:2]))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
for _ in range(20):
    for batch in train[torch.randperm(len(train))].split(64):
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch])["logits"], y[batch]).backward()
        optimizer.step()

model.eval()
with torch.no_grad():
    accuracy = (model(x[test])["logits"].argmax(1) == y[test]).float().mean().item()
print(f"test accuracy {accuracy:.1%}")

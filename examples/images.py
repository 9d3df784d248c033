"""A convolutional network on scikit-learn's digits (8 x 8 pixels), trained by FDFA.

Each Conv-BatchNorm-ReLU-MaxPool is one block, perturbed after its pool, with one feedback matrix.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from fdfa_ext import FDFA, FDFABlock, FDFALinear


def conv_block(in_channels: int, out_channels: int) -> FDFABlock:
    """[N, in_channels, H, W] → [N, out_channels, H/2, W/2]."""
    return FDFABlock(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )


torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1  # [1797, 1, 8, 8]
labels = torch.tensor(digits.target)
train, test = torch.randperm(len(images)).split([1400, 397])

net = nn.Sequential(
    conv_block(1, 16),
    conv_block(16, 32),
    nn.Flatten(),
    FDFALinear(128, 64, activation="relu"),
    nn.Linear(64, 10),
)
model = FDFA(net, feedback_lr=1e-3, example_input=images[:1])
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

for epoch in range(1, 11):
    model.train()
    for batch in train[torch.randperm(len(train))].split(64):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean().item()
    print(f"epoch {epoch}: loss {loss.item():.3f}, test accuracy {accuracy:.1%}")

for name, feedback in model.feedback.items():
    print(f"block {name}: B {list(feedback.shape)}")

"""torchvision's ResNet-18, trained by FDFA on scikit-learn's digits as it comes. Needs torchvision."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torchvision.models import resnet18

from fdfa_ext import FDFA

torch.manual_seed(0)
digits = load_digits()
x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
x = F.interpolate(x, scale_factor=2, mode="bilinear").expand(-1, 3, -1, -1)  # [1797, 3, 16, 16]
y = torch.tensor(digits.target)
train, test = torch.randperm(len(x)).split([1400, 397])

net = resnet18(num_classes=10)
model = FDFA(net, at="auto", feedback_lr=1e-3, example_input=x[:2])
print(model.summary(x[:2]))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
for _ in range(5):
    for batch in train[torch.randperm(len(train))].split(64):
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()

net.eval()  # the same weights: net has trained
with torch.no_grad():
    accuracy = (net(x[test]).argmax(1) == y[test]).float().mean().item()
print(f"test accuracy {accuracy:.1%}")

"""Digits by Accelerate, with accumulated batches, clipped gradients and a checkpoint. Needs accelerate.

`accelerate launch --num-processes 2 examples/loop_accelerate.py` divides the batches among processes.
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fdfa_ext import FDFA

accelerator = Accelerator(gradient_accumulation_steps=2)
digits = load_digits()
x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1  # [1797, 1, 8, 8]
y = torch.tensor(digits.target)

torch.manual_seed(0)
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
model = FDFA(net, at="auto", feedback_lr=1e-3, example_input=x[:2])
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
data = DataLoader(TensorDataset(x[:1400], y[:1400]), 32, shuffle=True)
model, optimizer, data = accelerator.prepare(model, optimizer, data)
for _ in range(12):
    for images, labels in data:
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(images), labels))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
accelerator.save_state("checkpoint")

model.eval()
with torch.no_grad():
    output = model(x[1400:].to(accelerator.device)).cpu()
accelerator.print(f"test accuracy {(output.argmax(1) == y[1400:]).float().mean():.1%}")

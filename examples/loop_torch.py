"""Digits by a loop of one's own: mixed precision with a GradScaler, clipped gradients, an average of
the weights, and TensorBoard. B is a parameter here, which the optimizer moves. Needs tensorboard.

`tensorboard --logdir runs` shows norms and histograms of B, and the angles to the exact gradients.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter

from fdfa_ext import FDFA
from fdfa_ext.monitor import write_tensorboard

device = "cuda" if torch.cuda.is_available() else "cpu"
digits = load_digits()
x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1).to(device) / 8 - 1  # [1797, 1, 8, 8]
y = torch.tensor(digits.target).to(device)

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
).to(device)
model = FDFA(net, at="auto", feedback="grad", example_input=x[:2])
average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95), use_buffers=True)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
scaler = torch.amp.GradScaler(device)
writer = SummaryWriter("runs")
step = 0
for _ in range(12):
    for batch in torch.randperm(1400, device=device).split(64):
        with torch.autocast(device, torch.float16):
            loss = F.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        average.update_parameters(model)
        if step % 20 == 0:
            writer.add_scalar("loss", loss, step)
            write_tensorboard(writer, model, step, (x[batch], y[batch]))
        step += 1
writer.close()

average.eval()
with torch.no_grad():
    accuracy = (average(x[1400:]).argmax(1) == y[1400:]).float().mean().item()
print(f"test accuracy {accuracy:.1%}")

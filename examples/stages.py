"""Digits by a model in stages, one in each process:

torchrun --nproc-per-node 2 examples/stages.py
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from fdfa_ext import FDFA, FDFALinear, Pipeline

dist.init_process_group("gloo")  # on GPUs "nccl", and a device for each process
rank, stages = dist.get_rank(), dist.get_world_size()
torch.set_num_threads(1)
digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 8 - 1  # [1797, 64]
y = torch.tensor(digits.target)

torch.manual_seed(0)  # the same weights and the same batches in all processes
layers: list[nn.Module] = [FDFALinear(64, 256, activation="relu")]
layers += [FDFALinear(256, 256, activation="relu") for _ in range(3)]
model = FDFA(nn.Sequential(*layers, nn.Linear(256, 10)), feedback_lr=1e-3, example_input=x[:2])
split_before = [str(4 * stage // stages) for stage in range(1, stages)]
pipeline = Pipeline(model, split_before, n_microbatches=2 * stages, loss_fn=F.cross_entropy)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)  # of this process's stage
for _ in range(15):
    for batch in torch.randperm(1400).split(64):
        optimizer.zero_grad()
        loss = pipeline.step(x[batch], y[batch])
        optimizer.step()

model.eval()
output = pipeline(x[1400:])  # in the last stage's process; None in the others
if output is not None:
    accuracy = (output.argmax(1) == y[1400:]).float().mean().item()
    print(f"loss {loss:.3f}, test accuracy {accuracy:.1%}")
dist.destroy_process_group()

"""Whether training gives the same bits on other numbers of threads and instruction sets.

    PYTHONPATH=. python scripts/determinism.py

Each process trains a net for 20 steps and prints its final state: weights, B and moments. The table has
the largest difference from one thread with the processor's best instructions, relative to the largest
element of the tensor. ATEN_CPU_CAPABILITY chooses the instructions of torch's kernels and of these.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from fdfa_ext import FDFA, FDFABlock, FDFALinear
from fdfa_ext._ops import extension

INSTRUCTIONS = ("avx512", "avx2", "default")
NETS = ("mlp", "cnn", "transformer layer")


def make(net: str) -> tuple[nn.Module, torch.Tensor]:
    if net == "mlp":
        layers = [FDFALinear(784, 800, activation="relu"), FDFALinear(800, 800, activation="relu")]
        return nn.Sequential(*layers, nn.Linear(800, 10)), torch.randn(64, 784)
    if net == "cnn":
        blocks = [
            FDFABlock(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
            for a, b in ((3, 32), (32, 64))
        ]
        return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(4096, 10)), torch.randn(32, 3, 32, 32)
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(64 * 12, 10)), torch.randn(32, 12, 64)


def train(net: str, method: str, threads: int, file: Path) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    module, x = make(net)
    y = torch.randint(10, (len(x),))
    model = FDFA(
        module, method=method, example_input=x, at="auto" if net not in ("mlp", "cnn") else None
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    torch.save(model.state_dict(), file)


def differs(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> str:
    found = 0.0
    for key, a in one.items():
        b = other[key]
        if a.is_floating_point() and not torch.equal(a, b):
            found = max(found, ((a - b).abs().max() / a.abs().max().clamp_min(1e-30)).item())
    return f"{found:.0e}" if found else "equal"


def main() -> None:
    best = extension.cpu_isa().replace("baseline", "default")
    sets = INSTRUCTIONS[INSTRUCTIONS.index(best) :]
    others = [
        ("again", 1, best),
        *((f"{n} threads", n, best) for n in (2, 4)),
        *((s, 1, s) for s in sets[1:]),
    ]
    print(f"| net | method | {' | '.join(name for name, *_ in others)} |")
    print(f"|---|---|{'---|' * len(others)}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "state.pt"
        for net in NETS:
            for method in ("fdfa", "bp"):
                states = []
                for _, threads, instructions in [("", 1, best), *others]:
                    environment = {**os.environ, "ATEN_CPU_CAPABILITY": instructions}
                    words = [sys.executable, __file__, net, method, str(threads), str(file)]
                    subprocess.run(words, check=True, env=environment)
                    states.append(torch.load(file))
                found = [differs(states[0], other) for other in states[1:]]
                print(f"| {net} | {method} | {' | '.join(found)} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        train(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()

"""Whether a step gives the same bits on other numbers of threads and with other instruction sets.

    PYTHONPATH=. python scripts/determinism.py

Each process computes operators, or trains a net for one step, and saves the result. The table has the
largest difference from one thread with the processor's best instructions, relative to the largest
element of its tensor. ATEN_CPU_CAPABILITY chooses the instructions of torch's kernels and of these.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from fdfa_ext import FDFA, FDFABlock, FDFALinear
from fdfa_ext._ops import extension, fused

INSTRUCTIONS = ("avx512", "avx2", "default")
CASES = ("gaussian noise", "rademacher noise", "feedback step", "mlp", "cnn", "transformer layer")


def compute(case: str) -> list[Tensor]:
    torch.manual_seed(0)
    # torch's own normal numbers depend on the instructions too.
    error, saved = (torch.randint(-99, 99, (40, size)) / 64 for size in (10, 5000))
    noise_state = torch.tensor([1, 2, 3])
    if case.endswith("noise"):
        return [fused.perturb(saved, saved, noise_state, 1, case.split()[0])]
    if case == "feedback step":
        feedback, first, second = torch.zeros(3, 10, 5000).unbind()
        updates, rate, delta = (
            torch.tensor([0]),
            torch.tensor(1e-3, dtype=torch.float64),
            torch.empty(40, 5000),
        )
        fused.feedback_step(
            *(
                [feedback],
                [first],
                [second],
                updates,
                error,
                error,
                [saved],
                [],
                noise_state,
                [1],
                ["relu"],
            ),
            *("gaussian", 1.0, rate, 0.9, 0.999, 1e-8, [delta], []),
        )
        return [feedback, first, second, delta]
    net, shape = make(case)
    x = torch.randint(-99, 99, shape) / 64
    model = FDFA(net, example_input=x, at=None if case in ("mlp", "cnn") else "auto")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    nn.functional.cross_entropy(model(x), torch.randint(10, (len(x),))).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    optimizer.step()
    return [*gradients, *(t for t in model.state_dict().values() if t.is_floating_point())]


def make(net: str) -> tuple[nn.Module, tuple[int, ...]]:
    """And the shape of its input."""
    if net == "mlp":
        layers = [FDFALinear(784, 800, activation="relu"), FDFALinear(800, 800, activation="relu")]
        return nn.Sequential(*layers, nn.Linear(800, 10)), (64, 784)
    if net == "cnn":
        blocks = [
            FDFABlock(
                nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)
            )
            for a, b in ((3, 32), (32, 64))
        ]
        return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(4096, 10)), (32, 3, 32, 32)
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(64 * 12, 10)), (32, 12, 64)


def difference(one: list[Tensor], other: list[Tensor]) -> str:
    if all(torch.equal(a, b) for a, b in zip(one, other, strict=True)):
        return "equal"
    scaled = [(a - b).abs().max() / a.abs().max() for a, b in zip(one, other, strict=True) if a.any()]
    return f"{max(scaled).item():.0e}"


def main() -> None:
    best = extension.cpu_isa().replace("baseline", "default")
    settings = [("", 1, best), ("again", 1, best), ("2 threads", 2, best), ("4 threads", 4, best)]
    settings += [(name, 1, name) for name in INSTRUCTIONS[INSTRUCTIONS.index(best) + 1 :]]
    print(f"| beside one thread with {best} | {' | '.join(name for name, *_ in settings[1:])} |")
    print(f"|---|{'---|' * (len(settings) - 1)}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "results.pt")
        for case in CASES:
            found = []
            for _, threads, instructions in settings:
                environment = {**os.environ, "ATEN_CPU_CAPABILITY": instructions}
                words = [sys.executable, __file__, case, str(threads), str(file)]
                subprocess.run(words, check=True, env=environment)
                found.append(torch.load(file))
            cells = [difference(found[0], other) for other in found[1:]]
            print(f"| {case} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        torch.set_num_threads(int(sys.argv[2]))
        torch.save(compute(sys.argv[1]), sys.argv[3])
    else:
        main()

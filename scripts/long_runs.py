"""Feedback after 10^5 steps beside the same equations in float64: what rounding has added up to.

    PYTHONPATH=. python scripts/long_runs.py [STEPS]

The tangents are those of one linear layer, d = u Jᵀ, so that B learns J; in bfloat16 they and the
errors are rounded, before both ways take them. Differences are relative to the largest element.
"""

import sys

import torch
from torch import Tensor

from fdfa_ext._ops import fused

N, K, D = 16, 5, 64
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


def exact_step(state: list[Tensor], gradient: Tensor, rate: float, i: int) -> None:
    """Equation 8, or a step of Adam, in place. state: B and, for Adam, its moments."""
    feedback, *moments = state
    if not moments:
        feedback -= rate * gradient
        return
    first, second = moments
    first += (1 - BETA1) * (gradient - first)
    second += (1 - BETA2) * (gradient**2 - second)
    corrected = (second / (1 - BETA2 ** (i + 1))).sqrt()
    feedback -= rate / (1 - BETA1 ** (i + 1)) * first / (corrected + EPS)


def differences(adam: bool, dtype: torch.dtype, rate: float, steps: int) -> list[float]:
    """Of B and the moments, relative to their largest element, after these steps."""
    generator = torch.Generator().manual_seed(0)
    jacobian = torch.randn(K, D, generator=generator, dtype=torch.float64)
    fast, exact = (
        [torch.zeros(K, D, dtype=kind) for _ in range(1 + 2 * adam)]
        for kind in (torch.float32, torch.float64)
    )
    updates, lr = torch.zeros(1, dtype=torch.int64), torch.tensor(rate, dtype=torch.float64)
    zeros = torch.zeros(N, D)
    for i in range(steps):
        noise_state = torch.tensor([1, i, 0])
        u = fused.perturb(zeros, None, noise_state, 0, "gaussian").double()
        tangent = (u @ jacobian.T).to(dtype)
        error = torch.randn(N, K, generator=generator).to(dtype)
        moments = [[moment] for moment in fast[1:]] or [[], []]
        fused.feedback_step(
            *([fast[0]], *moments, updates if adam else None, error, tangent, [zeros.to(dtype)], []),
            *(noise_state, [0], ["identity"], "gaussian", 1.0, lr, BETA1, BETA2, EPS),
            *([torch.empty(N, D, dtype=dtype)], []),
        )
        exact_step(exact, exact[0] - tangent.double().T @ u / N, rate, i)
    return [
        ((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(fast, exact, strict=True)
    ]


def main(steps: int = 100_000) -> None:
    torch.set_num_threads(1)
    print(f"| rule, {steps:,} steps | rate | dtype | B | first moment | second moment |")
    print("|---|---|---|---|---|---|")
    for adam in (False, True):
        for rate in (1e-2, 1e-4):
            for dtype in (torch.float32, torch.bfloat16):
                found = [f"{x:.1e}" for x in differences(adam, dtype, rate, steps)]
                name = "Adam" if adam else "running average"
                cells = [name, f"{rate:g}", str(dtype).split(".")[1], *found, "", ""][:6]
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

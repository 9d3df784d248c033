"""Operands and tolerances that the tests of operators share."""

import torch
from torch import Tensor

# Against the reference in float32 on the same rounded inputs. A 16-bit result is off by its own
# rounding (half a unit in the last place of bfloat16 is 2⁻⁹ of the value); where the derivative is
# taken from a rounded activation, that adds as much again.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
DTYPES = list(TOLERANCE)
RATE = torch.tensor(0.1, dtype=torch.double)


def noise_state(device: torch.device, step: int = 5, first_sample: int = 3) -> Tensor:
    return torch.tensor([-7_777_777_777_777, step, first_sample], device=device)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
    """|actual - expected| ≤ tolerance · (|expected| + scale)."""
    assert actual.shape == expected.shape
    assert actual.dtype == dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=tolerance, atol=tolerance * scale, check_stride=False
    )


def rand(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def as_double(*values: Tensor | None) -> list[Tensor | None]:
    return [None if value is None else value.double() for value in values]

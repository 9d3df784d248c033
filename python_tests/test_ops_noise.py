"""Noise is a function of seed, step, block, sample and feature, the same in every implementation, and of the stated moments."""

import pytest
import torch
from operands import DTYPES, as_double, assert_close, noise_state, rand

from fdfa_ext import reference
from fdfa_ext._ops import fused
from fdfa_ext.noise import NOISES


def test_philox_words_are_the_published_vectors() -> None:
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]
    for counter_and_key, expected in (
        ([0] * 6, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 6, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (pi, [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ):
        words = [torch.tensor([w]) for w in counter_and_key]
        assert [int(w) for w in reference.philox(words[:4], words[4:])] == expected


def test_signs_come_from_the_reference_words_exactly(device: torch.device) -> None:
    """Rademacher noise shows the top bit of every Philox word: fused and reference make the same integers."""
    y = torch.zeros(7, 1003, device=device)
    for block in (0, 1, 17):
        fused_signs = fused.perturb(y, None, noise_state(device), block, "rademacher")
        assert torch.equal(
            fused_signs, reference.perturb(y, None, noise_state(device), block, "rademacher")
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("shape", [(3, 7), (2, 5, 6), (2, 3, 4, 5), (0, 3), (2, 4099)])
def test_perturb_is_the_reference(
    device: torch.device, dtype: torch.dtype, noise: str, shape: tuple[int, ...]
) -> None:
    y = rand(*shape, dtype=dtype, device=device)
    for tangent in (None, rand(*shape, dtype=dtype, device=device)):
        actual = fused.perturb(y, tangent, noise_state(device), 1, noise)
        expected = reference.perturb(*as_double(y, tangent), noise_state(device), 1, noise)
        assert_close(actual, expected, dtype)


@pytest.mark.parametrize("noise", NOISES)
def test_noise_has_zero_mean_unit_variance_and_is_independent(device: torch.device, noise: str) -> None:
    n, d = 512, 2048
    y = torch.zeros(n, d, device=device)
    streams = [
        fused.perturb(y, None, noise_state(device, step), block, noise).double()
        for step, block in ((0, 0), (0, 1), (1, 0))
    ]
    u = streams[0]
    error = (n * d) ** -0.5
    kurtosis, kurtosis_error = (3.0, 96**0.5 * error) if noise == "gaussian" else (1.0, 1e-12)
    assert abs(u.mean()) < 5 * error
    assert abs(u.pow(2).mean() - 1) < 5 * 2**0.5 * error
    assert abs(u.pow(4).mean() - kurtosis) < 5 * kurtosis_error
    pairs = [
        (u, streams[1]),  # blocks
        (u, streams[2]),  # steps
        (u[1:], u[:-1]),  # samples
        *((u[:, k:], u[:, :-k]) for k in (1, 2, 3, 4)),  # features, within a Philox quad and across
    ]
    for a, b in pairs:
        assert abs((a * b).mean()) < 5 * a.numel() ** -0.5
        # Box-Muller's pairs share a radius: their squares must not be related either.
        assert abs(((a**2 - 1) * (b**2 - 1)).mean()) < 5 * 2 * a.numel() ** -0.5


def test_two_half_batches_are_perturbed_as_one_whole(device: torch.device) -> None:
    y = torch.zeros(6, 11, device=device)
    whole = fused.perturb(y, None, noise_state(device, first_sample=0), 1, "gaussian")
    halves = [
        fused.perturb(y[:3], None, noise_state(device, first_sample=i), 1, "gaussian") for i in (0, 3)
    ]
    assert torch.equal(whole, torch.cat(halves))


def test_next_noise_returns_the_state_and_advances_it(device: torch.device) -> None:
    for ops in (fused, reference):
        state = noise_state(device, step=41)
        assert ops.next_noise(state).tolist() == [-7_777_777_777_777, 41, 3]
        assert state.tolist() == [-7_777_777_777_777, 42, 3]

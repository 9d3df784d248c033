"""Statistical tests of the noise, in every order in which training uses it, as a table.

    PYTHONPATH=. python scripts/noise_battery.py [LOG2_VALUES] [SEED]

Each test gives the probability of a statistic at least as far from what independent values give. The
values are read along features, samples, blocks, steps and seeds, the four words of the generator's
counter and its key: 2^24 of them for each order, and 2^30 for the tails. A probability below 10^-6 is a
failure. So is a set of probabilities that is not uniform.
"""

import itertools
import math
import sys
from collections.abc import Iterator

import numpy as np
import torch
from scipy import special, stats

from fdfa_ext._ops import fused
from fdfa_ext.noise import NOISES

LEAST = 1e-6
WIDTH = 64  # values of one place before the next sample, block, step or seed


def draw(noise: str, seed: int, step: int, block: int, shape: tuple[int, ...]) -> np.ndarray:
    state = torch.tensor([seed, step, 0])
    return fused.perturb(torch.zeros(shape), None, state, block, noise).numpy()


def orders(noise: str, n: int, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """n values one after the other, with what changes the fastest but for WIDTH features."""
    places = n // WIDTH
    yield "features", draw(noise, seed, 0, 0, (1, n)).ravel()
    yield "samples", draw(noise, seed, 0, 0, (places, WIDTH)).ravel()
    for name, at in (
        ("blocks", lambda i: (seed, 0, i)),
        ("steps", lambda i: (seed, i, 0)),
        ("seeds", lambda i: (seed + i, 0, 0)),
    ):
        yield name, np.concatenate([draw(noise, *at(i), (1, WIDTH)).ravel() for i in range(places)])


def chi_square(counts: np.ndarray, probabilities: np.ndarray | float) -> float:
    expected = counts.sum() * np.broadcast_to(probabilities, counts.shape)
    statistic = ((counts - expected) ** 2 / expected).sum()
    return two_sided(stats.chi2(counts.size - 1), statistic)


def two_sided(distribution: object, statistic: float) -> float:
    return min(1.0, 2 * min(distribution.cdf(statistic), distribution.sf(statistic)))  # type: ignore[attr-defined]


def normal(z: float) -> float:
    return two_sided(stats.norm, float(z))


def cells(uniform: np.ndarray, side: int, dimensions: int) -> np.ndarray:
    """How many of the successive tuples are in each cell of a grid."""
    digits = np.minimum((uniform * side).astype(np.int64), side - 1).reshape(-1, dimensions)
    places = digits @ side ** np.arange(dimensions)
    return np.bincount(places, minlength=side**dimensions)


def spacings(uniform: np.ndarray, days: int, birthdays: int) -> np.ndarray:
    """Of each year, how many spacings between sorted birthdays come twice or more."""
    dates = np.sort((uniform * days).astype(np.int64).reshape(-1, birthdays), axis=1)
    gaps = np.sort(np.diff(dates, axis=1), axis=1)
    return (np.diff(gaps, axis=1) == 0).sum(axis=1)


def rank_classes(words: np.ndarray) -> np.ndarray:
    """How many matrices [32, 32] of bits, words [n, 32], have rank 32, 31, 30 and less."""
    rows, rank = words.astype(np.uint32).copy(), np.zeros(len(words), np.int64)
    index = np.arange(len(rows))
    for bit in range(32):
        has = (rows >> np.uint32(bit)) & np.uint32(1)
        pivot = has.argmax(axis=1)
        found = has.any(axis=1)
        rank += found
        row = rows[index, pivot]
        rows ^= (has * row[:, None]) * found[:, None].astype(np.uint32)
    return np.bincount(np.clip(32 - rank, 0, 2), minlength=3)


RANKS = np.array([0.2887880952, 0.5775761902])  # of 32 and 31


def tests_of_bits(signs: np.ndarray) -> Iterator[tuple[str, float]]:
    bits = (signs > 0).reshape(-1, 32)
    weights = bits.sum(axis=1)
    binomial = stats.binom(32, 0.5).pmf(np.arange(33))
    merged = np.concatenate([[binomial[:9].sum()], binomial[9:24], [binomial[24:].sum()]])
    classes = np.clip(weights, 8, 24) - 8
    yield "weights of 32 signs", chi_square(np.bincount(classes, minlength=17), merged)
    pairs = classes.reshape(-1, 2) @ [17, 1]
    yield (
        "weights of pairs",
        chi_square(np.bincount(pairs, minlength=17**2), np.outer(merged, merged).ravel()),
    )
    words = np.packbits(bits, axis=1).view(">u4").reshape(-1, 32)
    yield "ranks of 32 x 32 signs", chi_square(rank_classes(words), np.append(RANKS, 1 - RANKS.sum()))
    flat = bits.ravel()
    changes = np.count_nonzero(flat[1:] != flat[:-1])
    yield "runs of signs", normal((2 * changes - (flat.size - 1)) / math.sqrt(flat.size - 1))


def tests_of_values(u: np.ndarray, seed: int) -> Iterator[tuple[str, float]]:
    """Of a standard normal."""
    n, uniform = u.size, special.ndtr(u.astype(np.float64))
    yield "distribution (Kolmogorov)", float(stats.kstest(uniform[: 2**22], "uniform").pvalue)
    yield "frequencies in 1,000 cells", chi_square(cells(uniform, 1000, 1), 1e-3)
    yield "pairs in 128^2 cells", chi_square(cells(uniform, 128, 2), 128.0**-2)
    yield "quads in 16^4 cells", chi_square(cells(uniform, 16, 4), 16.0**-4)
    yield "octets in 4^8 cells", chi_square(cells(uniform, 4, 8), 4.0**-8)
    largest = uniform.reshape(-1, 8).max(axis=1) ** 8
    yield "largest of 8", float(stats.kstest(largest, "uniform").pvalue)
    # The number's exact distribution is not known: two samples, the other one of numpy's generator.
    other = special.ndtr(np.random.default_rng(seed).standard_normal(n, np.float32).astype(np.float64))
    both = [np.bincount(np.minimum(spacings(x, 2**20, 256), 9), minlength=10) for x in (uniform, other)]
    yield "birthday spacings", float(stats.chi2_contingency(both).pvalue)
    for power in range(1, 9):
        moment = special.factorial2(power - 1) if power % 2 == 0 else 0.0
        variance = special.factorial2(2 * power - 1) - moment**2
        yield (
            f"moment {power}",
            normal(((u.astype(np.float64) ** power).mean() - moment) / math.sqrt(variance / n)),
        )
    for name, values in (("values", u), ("squares", (u.astype(np.float64) ** 2 - 1) / math.sqrt(2))):
        spectrum = np.fft.rfft(values, 2 * n)
        lags = np.fft.irfft(np.abs(spectrum) ** 2)[1:257] / math.sqrt(n)
        yield (
            f"correlations of {name} at lags 1 to 256",
            two_sided(stats.chi2(256), float((lags**2).sum())),
        )


def tests_of_streams(noise: str, seed: int) -> Iterator[tuple[str, float]]:
    """Correlations of each pair of 4^3 streams: neighbours in sample, block and step."""
    features = 2**18
    streams = [
        draw(noise, seed, step, block, (4, features))
        for step, block in itertools.product(range(4), range(4))
    ]
    values = np.concatenate(streams).astype(np.float64)
    n = len(values)
    correlations = (values @ values.T / math.sqrt(features))[np.triu_indices(n, 1)]
    yield (
        "correlations of 64 streams",
        two_sided(stats.chi2(correlations.size), float((correlations**2).sum())),
    )


def tails(n: int, seed: int) -> Iterator[tuple[str, float]]:
    """Beyond 3, 4, 4.5 and 5 sigma, on both sides."""
    limits, counts, width = (3.0, 4.0, 4.5, 5.0), np.zeros((2, 4), np.int64), 2**22
    for step in range(n // width):
        u = draw("gaussian", seed, step, 1, (1, width))
        counts += [[np.count_nonzero(side * u > limit) for limit in limits] for side in (1, -1)]
    for i, limit in enumerate(limits):
        expected = n * stats.norm.sf(limit)
        for count, name in zip(counts[:, i], ("above", "below minus"), strict=True):
            p = normal((count - expected) / math.sqrt(expected))
            yield f"{count:,} values {name} {limit:g} sigma, of {expected:,.0f}", p


def main(log2_values: int = 24, seed: int = 1) -> int:
    found: list[tuple[str, str, str, float]] = []
    for noise in NOISES:
        if noise == "none":
            continue
        for order, u in orders(noise, 2**log2_values, seed):
            tests = list(tests_of_bits(u))
            if noise == "gaussian":
                tests += tests_of_values(u, seed)
            found += [(noise, order, *test) for test in tests]
        found += [(noise, "all", *test) for test in tests_of_streams(noise, seed)]
    found += [("gaussian", "steps", *test) for test in tails(2 ** (log2_values + 6), seed)]
    print("| noise | along | test | p |\n|---|---|---|---|")
    for noise, order, name, p in found:
        print(f"| {noise} | {order} | {name} | {p:.3g} |")
    probabilities = [p for *_, p in found]
    uniform = float(stats.kstest(probabilities, "uniform").pvalue)
    print(f"\n{len(found)} tests, the least p {min(probabilities):.2g}; all p uniform: {uniform:.2g}")
    return int(min(*probabilities, uniform) < LEAST)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))

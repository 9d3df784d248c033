"""Positions: the tokens or pixels of a sample, where the output has a row of K values for each.

An output [N, K] has none, [N, T, K] or [N, K, T] has tokens, and [N, K, *grid] pixels. Each counts as a
sample then, and what has features of each position has them in rows, [N · positions, *features].

Rows of features need not be those of the output. A `Source` says which of its rows each has its error
from, δ = Σ e J over these, and its tangent, the mean, so that B estimates the mean of J.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Positions:
    """Where a tensor has its positions: [n, *grid, *features], or with channels first [n, C, *grid]."""

    n: int
    grid: tuple[int, ...]
    channels_first: bool

    @classmethod
    def of(
        cls, shape: Sequence[int], dimensions: int, channels_first: bool | None
    ) -> "Positions | None":
        """Those of a tensor of this shape; None where it has too few dimensions.

        channels_first: None where nothing tells, as of code of the user's own. A sequence has them last
        then, and an image first.
        """
        first = dimensions > 1 if channels_first is None else channels_first
        if len(shape) < dimensions + 2 or (first and len(shape) > dimensions + 2):
            return None
        start = 2 if first else 1
        return cls(shape[0], tuple(shape[start : start + dimensions]), first)

    def rows(self, t: Tensor) -> Tensor:
        """[n · positions, *features]."""
        return (t.movedim(1, -1) if self.channels_first else t).flatten(0, len(self.grid))

    def of_rows(self, rows: Tensor) -> Tensor:
        """The tensor whose rows these are."""
        t = rows.unflatten(0, (self.n, *self.grid))
        return t.movedim(-1, 1) if self.channels_first else t

    def fits(self, output: "Positions") -> bool:
        """Whether each position has one, or several, of the output's.

        A strided convolution makes fewer of them and keeps their order. Nothing says so of tokens.
        """
        if self.n != output.n or len(self.grid) != len(output.grid):
            return False
        pairs = zip(self.grid, output.grid, strict=True)
        return self.grid == output.grid or (self.channels_first and all(_strided(*p) for p in pairs))

    def __str__(self) -> str:
        kind = "pixels"
        if len(self.grid) == 1:
            kind = f"tokens, as [N, {'D, T' if self.channels_first else 'T, D'}]"
        return f"{' x '.join(map(str, (self.n, *self.grid)))} {kind}"


class Source(Protocol):
    """Where rows of features have their errors and tangents from."""

    @property
    def rows(self) -> int:
        """How many there are."""

    def errors(self, rows: Tensor) -> Tensor:
        """[rows, K] of the output's [*, K]: sums, where a row has several."""

    def tangents(self, rows: Tensor) -> Tensor:
        """The same with means."""


@dataclass(frozen=True, slots=True)
class Same:
    """The output's own rows."""

    rows: int

    def errors(self, rows: Tensor) -> Tensor:
        return rows

    def tangents(self, rows: Tensor) -> Tensor:
        return rows


@dataclass(frozen=True, slots=True)
class Members:
    """Rows that are parts of a sample, as a graph's nodes are."""

    index: Tensor  # int64 [rows]: the sample of each

    @property
    def rows(self) -> int:
        return len(self.index)

    def errors(self, rows: Tensor) -> Tensor:
        return rows.index_select(0, self.index)

    def tangents(self, rows: Tensor) -> Tensor:
        return self.errors(rows)


@dataclass(frozen=True, slots=True)
class Cells:
    """Positions of another grid than the output's: cells of several of its positions where this is
    coarser, parts of one where it is finer."""

    output: Positions
    grid: tuple[int, ...]

    @property
    def rows(self) -> int:
        return self.output.n * math.prod(self.grid)

    def errors(self, rows: Tensor) -> Tensor:
        return self._resampled(rows, means=False)

    def tangents(self, rows: Tensor) -> Tensor:
        return self._resampled(rows, means=True)

    def _resampled(self, rows: Tensor, means: bool) -> Tensor:
        before = self.output.grid
        values = rows.unflatten(0, (self.output.n, *before))
        for dimension, (old, new) in enumerate(zip(before, self.grid, strict=True), 1):
            cells = torch.arange(new, device=rows.device)
            if new > old:
                around = (cells // _stride(new, old)).clamp(max=old - 1)
                values = values.index_select(dimension, around)
            elif new < old:
                # Not by index_add, which on CUDA adds in no fixed order. The last cell has the rest.
                stride = _stride(old, new)
                start = cells * stride
                size = torch.full_like(start, stride)
                size[-1:] = old - start[-1:]
                place = torch.arange(max(stride, old - stride * (new - 1)), device=rows.device)
                members = (start.unsqueeze(1) + place).clamp(max=old - 1)
                spread = values.index_select(dimension, members.flatten())
                spread = spread.unflatten(dimension, members.shape)
                weight = (place < size.unsqueeze(1)).to(values.dtype)
                if means:
                    weight /= size.unsqueeze(1)
                shape = [*weight.shape, *[1] * (values.dim() - dimension - 1)]
                values = (spread * weight.view(shape)).sum(dimension + 1)
        return values.flatten(0, len(self.grid))


def _stride(large: int, small: int) -> int:
    return round(large / small)


def _strided(side: int, other: int) -> bool:
    """Whether a stride leads from one of two sides to the other, but for what is cut at the edges."""
    small, large = min(side, other), max(side, other)
    if small == 0 or small == large:
        return small == large
    stride = _stride(large, small)
    return stride > 1 and abs(large - stride * small) < stride

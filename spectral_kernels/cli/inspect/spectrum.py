"""What ``--values`` adds to a row: the largest singular values, and numbers of all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...diagnostics.all_values import all_singular_values
from ...diagnostics.singular_values import effective_rank
from ...diagnostics.tails import marchenko_pastur_edge, tail_exponent
from ...tables.schema import N_VECTORS

MOST_VALUES = max(N_VECTORS)
# A square matrix of this size takes about a second on one core, one twice as wide eight times it.
SIDE_LIMIT = 2048
_AS_LONG = 200  # rows of a Gram matrix with which all values take as long as sigma_1


@dataclass(frozen=True)
class SpectrumOptions:
    """How many singular values are measured, and of which matrices all of them."""

    n_values: int
    """From 1 to 16."""
    side_limit: int = SIDE_LIMIT
    """All singular values are computed if min(M, N) is at most this."""

    @property
    def n_vectors(self) -> int:
        """The number that the block method takes: the next of 1, 2, 4, 8, 16."""
        return next(r for r in N_VECTORS if r >= self.n_values)

    def cost(self, rows: int, cols: int) -> float:
        """Return about how many elements' sigma_1 would take as long as this matrix."""
        if self.is_full(rows, cols):
            return rows * cols * max(1.0, min(rows, cols) / _AS_LONG)
        return float(rows * cols * self.n_vectors)

    def is_full(self, rows: int, cols: int) -> bool:
        """Return whether all singular values of a matrix of this shape are computed."""
        return 0 < min(rows, cols) <= self.side_limit


@dataclass(frozen=True)
class FullSpectrum:
    """Numbers of all singular values of a matrix."""

    sigma_min: float
    """The min(M, N)-th."""
    condition: float
    """sigma_1 / sigma_min: inf without full rank, nan for a matrix of zeros."""
    effective_rank: float
    """See ``diagnostics.effective_rank``."""
    alpha: float
    """Exponent of the tail, see ``diagnostics.tail_exponent``; nan if there is none."""
    alpha_distance: float
    """Kolmogorov-Smirnov distance of its fit."""
    mp_edge: float
    """See ``diagnostics.marchenko_pastur_edge``."""
    n_above_edge: int
    """Number of singular values above the edge."""


def full_spectrum(weight: torch.Tensor, n_values: int) -> tuple[tuple[float, ...], FullSpectrum]:
    """Return the largest ``n_values`` singular values, and numbers of all of them.

    Args:
        weight: [M, N], finite and not empty.
        n_values: how many; all if there are fewer.
    """
    shape = weight.shape[0], weight.shape[1]
    return summarized(all_singular_values(weight), shape, n_values)


def summarized(
    values: torch.Tensor, shape: tuple[int, int], n_values: int
) -> tuple[tuple[float, ...], FullSpectrum]:
    """Return the largest ``n_values`` of all singular values, and numbers of all of them.

    Args:
        values: [min(M, N)], largest first, at least one.
        shape: (M, N).
        n_values: how many; all if there are fewer.
    """
    largest, least = float(values[0]), float(values[-1])
    condition = math.nan if largest == 0 else math.inf if least == 0 else largest / least
    fit = tail_exponent(values)
    edge = marchenko_pastur_edge(values, shape)
    return tuple(values[:n_values].tolist()), FullSpectrum(
        least, condition, float(effective_rank(values)), fit.alpha, fit.distance, edge,
        int((values > edge).sum()),
    )  # fmt: skip

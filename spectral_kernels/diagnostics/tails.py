"""The tail of a spectrum: its power law, and what lies above the bulk of a matrix of noise."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from ..selection.arguments import check_number, expected
from ..tables.device import wide

# As in WeightWatcher: eigenvalues up to LEAST_EIGENVALUE are left out of a fit, fewer than
# LEAST_COUNT are not fitted, and fewer than SMALL_COUNT are fitted as a small sample.
LEAST_EIGENVALUE = 1e-5
LEAST_COUNT, SMALL_COUNT = 8, 20

_PIECE = 1 << 20  # numbers of a matrix of candidates by values that are computed at a time
_NODES = 1 << 14  # of the integral of the Marchenko-Pastur law


class TailFit(NamedTuple):
    """The power law p(x) ~ x^-alpha, x >= xmin, that fits the tail of a spectrum best.

    nan, and no values in the tail, where there is nothing to fit.
    """

    alpha: float
    distance: float
    """Kolmogorov-Smirnov distance between the tail and the law; below about 0.1 the fit is good."""
    xmin: float
    """The smallest eigenvalue of the tail."""
    n_tail: int
    """Number of eigenvalues in the tail, from ``xmin`` on."""


def tail_exponent(values: torch.Tensor, least: float = LEAST_EIGENVALUE) -> TailFit:
    """Return the exponent alpha of the tail of the eigenvalues sigma^2 of W^T W.

    As in WeightWatcher 0.7: each eigenvalue but the largest is tried as xmin, and the one whose fit
    has the smallest Kolmogorov-Smirnov distance D is taken (Clauset, Shalizi and Newman, "Power-law
    distributions in empirical data", SIAM Review 51, 2009; for weights Martin and Mahoney,
    "Implicit self-regularization in deep neural networks", JMLR 22, 2021). With the n values
    x_0 <= ... of the tail, alpha = 1 + n / sum log(x_j / xmin), the maximum of the likelihood,
    and D = max_j |1 - (x_j / xmin)^(1 - alpha) - j / n|. Fewer than 20 eigenvalues are a small
    sample: n - 1 instead of n in alpha, which removes its bias, and tails of 8 values or more.

    The computation takes about n^2 exponentials, 0.2 s for 4096 values.

    Args:
        values: singular values >= 0 [n], in any order.
        least: eigenvalues up to this are left out; WeightWatcher's 1e-5 suits weights whose
            singular values are near one.

    Raises:
        TypeError, ValueError: ``values`` has another number of dimensions, ``least`` is negative.
    """
    _check_values(values)
    least = check_number("least", least)
    eigenvalues = wide(values.detach()).square().sort().values
    eigenvalues = eigenvalues[~(eigenvalues <= least)]  # nan stays
    total = len(eigenvalues)
    if total < LEAST_COUNT or not bool(torch.isfinite(eigenvalues).all()):
        return TailFit(math.nan, math.nan, math.nan, 0)
    is_small = total < SMALL_COUNT
    n_candidates = total - (LEAST_COUNT - 1 if is_small else 1)
    logs = eigenvalues.log()
    counts = total - torch.arange(n_candidates, dtype=logs.dtype, device=logs.device)
    above = logs.flip(0).cumsum(0).flip(0)[:n_candidates] - counts * logs[:n_candidates]
    exponents = (counts - 1 if is_small else counts) / above  # alpha - 1
    # Rounding makes the sum of a tail of equal values any small number; its law has no exponent.
    exponents = exponents.masked_fill(logs[-1] - logs[:n_candidates] <= 1e-12, math.nan)
    distances = _distances(logs, exponents, counts).nan_to_num(nan=math.inf)
    best = int(distances.argmin())
    distance = float(distances[best])
    if not math.isfinite(distance):
        return TailFit(math.nan, math.nan, math.nan, 0)
    return TailFit(1 + float(exponents[best]), distance, float(eigenvalues[best]), total - best)


def _distances(logs: torch.Tensor, exponents: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Return the Kolmogorov-Smirnov distance of every candidate, nan where it has no exponent.

    Args:
        logs: of the eigenvalues, ascending [n].
        exponents: alpha - 1 of the tails that begin at each of the first values [m].
        counts: numbers of values in these tails [m].
    """
    found, length = [], max(1, _PIECE // len(logs))
    for first in range(0, len(exponents), length):
        piece, later = slice(first, first + length), logs[first:]
        index = torch.arange(len(later), dtype=logs.dtype, device=logs.device)
        before = index - index[: len(exponents[piece]), None]  # values of the tail below each value
        laws = -torch.expm1((later[: len(before), None] - later) * exponents[piece, None])
        gaps = (laws - before / counts[piece, None]).abs()
        found.append(gaps.masked_fill(before < 0, -math.inf).amax(1))
    return torch.cat(found)


def marchenko_pastur_edge(values: torch.Tensor, shape: tuple[int, int]) -> float:
    """Return where the singular values of a matrix would end if all of it were noise.

    The upper edge s (sqrt(M) + sqrt(N)) of the Marchenko-Pastur law for a matrix with independent
    elements of variance s^2. That s comes from the median, which the few large values of a signal
    do not move: median(sigma) / sqrt(max(M, N) mu), where mu is the median of the law of aspect
    ratio min(M, N) / max(M, N) (Gavish and Donoho, "The optimal hard threshold for singular values
    is 4/sqrt(3)", IEEE Trans. Inf. Theory 60, 2014, section III.E). Of a matrix of pure noise none
    or one of the values lies above the edge.

    Args:
        values: all min(M, N) singular values, in any order.
        shape: (M, N) of the matrix.

    Returns:
        The edge, as a singular value; 0 if half of the values are zero, nan if one is not finite,
        or if there is none.

    Raises:
        TypeError, ValueError: ``values`` has another number of dimensions or of values.
    """
    _check_values(values)
    short, long = sorted(shape)
    if len(values) != short:
        raise ValueError(
            f"values: expected all {short} of a matrix of shape {shape}, got {len(values)}"
        )
    if short == 0 or not bool(torch.isfinite(values).all()):
        return math.nan
    ordered = wide(values.detach()).sort().values
    median = float(ordered[(short - 1) // 2] + ordered[short // 2]) / 2
    spread = median / (math.sqrt(long) * _median_of_law(short / long))
    return spread * (math.sqrt(short) + math.sqrt(long))


@functools.lru_cache(maxsize=1024)
def _median_of_law(ratio: float) -> float:
    """Return the square root of the median of the Marchenko-Pastur law.

    Args:
        ratio: of the shorter to the longer side, 0 < ratio <= 1.
    """
    # With x = y^2 and y = 1 - sqrt(ratio) cos(t), the law's density in t, from 0 to pi, is smooth.
    step = math.pi / _NODES
    t = (torch.arange(_NODES, dtype=torch.float64, device="cpu") + 0.5) * step
    half = math.sqrt(ratio)
    y = 1 - half * t.cos()
    room = ((1 + half) ** 2 - y.square()) * (y.square() - (1 - half) ** 2)
    weights = room.clamp(min=0).sqrt() / y * half * t.sin()
    upto = weights.cumsum(0) / weights.sum()
    after = int(torch.searchsorted(upto, 0.5))
    before = float(upto[after - 1])
    # cumsum up to a node counts the whole of its step.
    fraction = (0.5 - before) / (float(upto[after]) - before)
    return 1 - half * math.cos((after + fraction) * step)


def _check_values(values: torch.Tensor) -> None:
    if not isinstance(values, torch.Tensor):
        raise TypeError(expected("values", "a tensor", values))
    if values.dim() != 1:
        raise ValueError(f"values: expected one dimension, got {values.dim()}")

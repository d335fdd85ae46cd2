"""The taps of convolutions that are taken as operators, as kernels read them.

A kernel [rows, channels, taps...] lies in memory as a matrix whose columns are channels and taps.
Its taps are listed phase by phase; see ``selection.convolutions`` for phases.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from ..selection.convolutions import MOST_DIMENSIONS
from ..selection.matrices import Matrix
from .layout import Layout
from .schema import OPERATOR, TAP


class OperatorTables:
    """Rows of OPERATOR, one per matrix, and of TAP, which operators share that are alike.

    Attributes:
        operators: see csrc/table.h.
        taps: likewise.
        most_taps: the largest number of taps of an operator.
    """

    def __init__(self, matrices: Sequence[Matrix], layouts: Sequence[Layout]):
        self.operators = np.zeros(len(matrices), OPERATOR)
        taps: list[tuple[int, ...]] = []
        first_of: dict[tuple, int] = {}
        self.most_taps = 0
        for i, (matrix, layout) in enumerate(zip(matrices, layouts, strict=True)):
            sizes, strides = _dimensions(layout, len(matrix.periods))
            kind = sizes[1:], strides[1:], matrix.periods
            if kind not in first_of:
                first_of[kind] = len(taps)
                taps += _taps(*kind)
            n_taps, counts = math.prod(sizes[1:]), counts_of(sizes[1:], matrix.periods)
            self.operators[i] = (
                sizes[0], strides[0], first_of[kind], n_taps, *_padded(counts, 1)
            )  # fmt: skip
            self.most_taps = max(self.most_taps, n_taps)
        self.taps = np.array(taps, TAP)


def counts_of(sizes: Sequence[int], periods: Sequence[int]) -> list[int]:
    """Return the largest number of taps of a phase along each dimension."""
    return [-(-size // period) for size, period in zip(sizes, periods, strict=True)]


def _dimensions(layout: Layout, n: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return sizes and strides, in columns, of the channels and the ``n`` dimensions of taps."""
    sizes, strides, step = [1] * (n + 2), [0] * (n + 2), 1  # by dimension of the kernel
    if not layout.column_dims:  # without elements, or with one column
        sizes[1], strides[1] = layout.cols, 1
        return tuple(sizes[1:]), tuple(strides[1:])
    for d, size in zip(layout.column_dims[::-1], layout.column_sizes[::-1], strict=True):
        sizes[d], strides[d] = size, step
        step *= size
    return tuple(sizes[1:]), tuple(strides[1:])


def _taps(sizes: Sequence[int], strides: Sequence[int], periods: Sequence[int]) -> list[tuple]:
    """Return rows of TAP, phase by phase."""
    found = []
    dims = range(len(sizes))
    for phase in itertools.product(*(range(min(sizes[d], periods[d])) for d in dims)):
        own = [range(phase[d], sizes[d], periods[d]) for d in dims]
        for place in itertools.product(*own):
            column = sum(place[d] * strides[d] for d in dims)
            numbers = [place[d] // periods[d] for d in dims]
            following = [
                periods[d] * strides[d] if place[d] + periods[d] < sizes[d] else 0 for d in dims
            ]
            is_last = place == tuple(one[-1] for one in own)
            found.append((column, is_last, *_padded(numbers, 0), *_padded(following, 0)))
    return found


def _padded(numbers: Sequence[int], value: int) -> tuple[int, ...]:
    """Return ``numbers`` with ``value`` for the dimensions that there are not."""
    return (*numbers, *[value] * (MOST_DIMENSIONS - len(numbers)))

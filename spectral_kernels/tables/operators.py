"""The taps of convolutions that are taken as operators, as kernels read them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..selection.convolutions import MOST_DIMENSIONS
from ..selection.matrices import Matrix
from .layout import Layout
from .schema import OPERATOR


def operator_table(matrices: Sequence[Matrix], layouts: Sequence[Layout]) -> np.ndarray | None:
    """Return the OPERATOR of every matrix, or None if they are no operators.

    Strides are between columns of the matrix, in memory order.
    """
    if not any(matrix.periods for matrix in matrices):
        return None
    table = np.zeros(len(matrices), OPERATOR)
    for i, (matrix, layout) in enumerate(zip(matrices, layouts, strict=True)):
        n = len(matrix.periods)
        sizes, strides, step = [1] * (n + 2), [0] * (n + 2), 1  # by dimension of the kernel
        for d, size in zip(layout.column_dims[::-1], layout.column_sizes[::-1], strict=True):
            sizes[d], strides[d] = size, step
            step *= size
        if not layout.column_dims:  # without elements
            sizes[1], strides[1] = layout.cols, 1
        absent = MOST_DIMENSIONS - n
        ones, zeros = (1,) * absent, (0,) * absent
        table[i] = (
            sizes[1], strides[1], *sizes[2:], *ones, *strides[2:], *zeros, *matrix.periods, *ones,
        )  # fmt: skip
    return table


def most_taps(table: np.ndarray | None) -> int:
    """Return the largest number of taps of an operator; 0 if there are none."""
    if table is None or not len(table):
        return 0
    return int(np.prod([table[f"size_{d}"] for d in range(MOST_DIMENSIONS)], axis=0).max())

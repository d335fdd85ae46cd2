"""gram_matvec for rows too long for its programs: more threads take one row at a time.

A separate launch, since all programs of a launch have the same number of threads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tables import (
    ALIGNED,
    INNER,
    MATRIX_FIELDS,
    OUTER,
    OUTER_STRIDE,
    ROW_STRIDE,
    TILE_FIELDS,
    TILE_MATRIX,
    WEIGHT,
    elements_of,
    factors_of,
    inverse_power_of_two,
    is_aligned,
    parts_of,
    takes_part,
)


@triton.jit
def _rows(
    m, tile, v, s, t_partial, scale, DTYPE: tl.constexpr, WITH_T: tl.constexpr, BN: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """Take rows of n <= BN columns one after the other; return the sum of squares of s.

    AHEAD, if registers suffice: v stays in them, and the next row is loaded meanwhile.
    """
    w, row_stride, _, _, n = elements_of(m, WEIGHT, ROW_STRIDE, OUTER_STRIDE, DTYPE, ALIGNED)
    v, s, t, row_begin, row_end = parts_of(m, tile, v, s, t_partial, ALIGNED)
    half, other_half = factors_of(scale)
    c, n = tl.arange(0, BN), n.to(tl.int32)
    inside = c < n
    w += row_begin * row_stride
    if AHEAD:
        raw = tl.load(w + c, mask=inside, other=0.0)
        x = tl.load(v + c, mask=inside, other=0.0)
    total = tl.zeros([BN], tl.float32)
    squares = tl.full([], 0.0, tl.float64)
    for row in range(row_begin, row_end):
        if AHEAD:
            elements = raw.to(tl.float32)
            w += row_stride
            raw = tl.load(w + c, mask=c < tl.where(row + 1 < row_end, n, 0), other=0.0)
        else:
            elements = tl.load(w + c, mask=inside, other=0.0).to(tl.float32)
            x = tl.load(v + c, mask=inside, other=0.0)
            w += row_stride
        product = tl.sum(elements * x, 0)
        tl.store(s + row, product)
        wide = product.to(tl.float64)
        squares += wide * wide
        if WITH_T:
            total += elements * (product * half * other_half)
    if WITH_T:
        tl.store(t + c, total, mask=inside)
    return squares


@triton.jit(
    do_not_specialize=["n_matrices"],
    do_not_specialize_on_alignment=["matrices", "tiles", "gram_partial", "s", "scalars"],
)
def gram_matvec_long(
    matrices, tiles, t_partial, gram_partial, v, s, scalars, n_matrices,
    DTYPE: tl.constexpr, WITH_T: tl.constexpr, TOLERANCE: tl.constexpr,
    SHORTEST: tl.constexpr, WIDTHS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Program i takes tile i if its rows are aligned and longer than SHORTEST, or does nothing.

    They have at most twice as many columns, or four times and so on for WIDTHS; AHEAD of up to so
    many.
    """
    program = tl.program_id(0)
    tile = tiles + program.to(tl.int64) * TILE_FIELDS
    index = tl.load(tile + TILE_MATRIX)
    m = matrices + index * MATRIX_FIELDS
    n = tl.load(m + OUTER) * tl.load(m + INNER)
    here = (n > SHORTEST) & (n <= SHORTEST * 2**WIDTHS) & is_aligned(m, WEIGHT, ROW_STRIDE, DTYPE)
    if here and takes_part(scalars, n_matrices, index, 1, TOLERANCE):
        scale = inverse_power_of_two(tl.load(scalars + index))
        squares = tl.full([], 0.0, tl.float64)
        for i in tl.static_range(1, WIDTHS + 1):
            if (n > SHORTEST * 2**i // 2) & (n <= SHORTEST * 2**i):
                squares = _rows(m, tile, v, s, t_partial, scale, DTYPE, WITH_T, SHORTEST * 2**i,
                                SHORTEST * 2**i <= AHEAD)  # fmt: skip
        tl.store(gram_partial + program, squares)

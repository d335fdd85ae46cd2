"""s = W v, t = W^T s per tile and the squares of s, with one read of W from memory.

A program takes a tile: some rows of one matrix. Where a row fits into the registers of a program,
a block of rows is loaded once, multiplied by v, and added to t while it is still there. Of longer
rows the second read finds the block in the second-level cache. The last programs take the vectors.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .penalty import store_norm
from .tables import (
    GAIN,
    INNER,
    KIND,
    MATRIX_FIELDS,
    OUTER,
    OUTER_STRIDE,
    ROW_STRIDE,
    SIZE,
    TILE_FIELDS,
    TILE_MATRIX,
    VECTOR_FIELDS,
    WEIGHT,
    column_offsets,
    elements_of,
    inverse_power_of_two,
    is_aligned,
    parts_of,
    power,
    takes_part,
)


@triton.jit
def products(rows, x, s, r, row_end, scale, WITH_T: tl.constexpr):
    """Write s = rows x; return it as float64 [R], and its part of t [BN]."""
    product = tl.sum(rows * x[None, :], 1)
    tl.store(s + r, product, mask=r < row_end)
    wide = product.to(tl.float64)
    part = tl.zeros_like(x)
    if WITH_T:
        part = tl.sum(rows * (wide * scale).to(tl.float32)[:, None], 0)
    return wide, part


@triton.jit
def add_long_rows(
    w, row_stride, inner, outer_stride, n, r, row_end, scaled, t, is_first,
    ALIGNED: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Add scaled^T W of the rows ``r``, read once more, to t, or write it where they are first."""
    for first in range(0, n, BN):
        c = first + tl.arange(0, BN)
        columns = c if ALIGNED else column_offsets(c, inner, outer_stride)
        mask = (r < row_end)[:, None] & (c < n)[None, :]
        block = w + (r[:, None] * row_stride + columns[None, :])
        rows = tl.load(block, mask=mask, other=0.0).to(tl.float32)
        part = tl.sum(rows * scaled[:, None], 0)
        if not is_first:  # each thread finds what it wrote itself
            part += tl.load(t + c, mask=c < n, other=0.0)
        tl.store(t + c, part, mask=c < n)


@triton.jit
def _short_rows(
    m, tile, v, s, t_partial, scale,
    DTYPE: tl.constexpr, WITH_T: tl.constexpr, ALIGNED: tl.constexpr, R: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Take blocks of R rows of n <= BN columns; return the sum of squares of s."""
    w, row_stride, inner, outer_stride, n = elements_of(
        m, WEIGHT, ROW_STRIDE, OUTER_STRIDE, DTYPE, ALIGNED
    )
    v, s, t, row_begin, row_end = parts_of(m, tile, v, s, t_partial)
    c = tl.arange(0, BN)
    inside = c < n
    columns = c if ALIGNED else column_offsets(c, inner, outer_stride)
    x = tl.load(v + c, mask=inside, other=0.0)
    total = tl.zeros([BN], tl.float32)
    squares = tl.zeros([R], tl.float64)
    for row in range(row_begin, row_end, R):
        r = row + tl.arange(0, R)
        block = w + (r[:, None] * row_stride + columns[None, :])
        mask = (r < row_end)[:, None] & inside[None, :]
        rows = tl.load(block, mask=mask, other=0.0).to(tl.float32)
        wide, part = products(rows, x, s, r, row_end, scale, WITH_T)
        squares += wide * wide
        total += part
    if WITH_T:
        tl.store(t + c, total, mask=inside)
    return tl.sum(squares, 0)


@triton.jit
def _long_rows(
    m, tile, v, s, t_partial, scale,
    DTYPE: tl.constexpr, WITH_T: tl.constexpr, ALIGNED: tl.constexpr, R: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Take blocks of R rows, BN columns at a time, twice; return the sum of squares of s."""
    w, row_stride, inner, outer_stride, n = elements_of(
        m, WEIGHT, ROW_STRIDE, OUTER_STRIDE, DTYPE, ALIGNED
    )
    v, s, t, row_begin, row_end = parts_of(m, tile, v, s, t_partial)
    squares = tl.zeros([R], tl.float64)
    for row in range(row_begin, row_end, R):
        r = row + tl.arange(0, R)
        product = tl.zeros([R], tl.float32)
        for first in range(0, n, BN):
            c = first + tl.arange(0, BN)
            columns = c if ALIGNED else column_offsets(c, inner, outer_stride)
            mask = (r < row_end)[:, None] & (c < n)[None, :]
            block = w + (r[:, None] * row_stride + columns[None, :])
            rows = tl.load(block, mask=mask, other=0.0).to(tl.float32)
            product += tl.sum(rows * tl.load(v + c, mask=c < n, other=0.0)[None, :], 1)
        tl.store(s + r, product, mask=r < row_end)
        wide = product.to(tl.float64)
        squares += wide * wide
        if WITH_T:
            add_long_rows(
                w, row_stride, inner, outer_stride, n, r, row_end, (wide * scale).to(tl.float32), t,
                row == row_begin, ALIGNED, BN,
            )  # fmt: skip
    return tl.sum(squares, 0)


@triton.jit
def vector_norm(vector, norm, penalty, k, DTYPE: tl.constexpr, K: tl.constexpr, BN: tl.constexpr):
    """Write norm and penalty of the vector that a row of the table describes."""
    x = tl.load(vector + WEIGHT).to(tl.pointer_type(DTYPE))
    size, gain = tl.load(vector + SIZE), tl.load(vector + KIND) == GAIN
    squares = tl.zeros([BN], tl.float64)
    excesses = tl.zeros([BN], tl.float64)
    for first in range(0, size, BN):
        c = first + tl.arange(0, BN)
        value = tl.load(x + c, mask=c < size, other=0.0).to(tl.float64)
        squares += value * value
        excess = tl.where(c < size, power(tl.abs(value), k, K) - 1, 0.0)
        excesses += excess * excess
    store_norm(norm, penalty, squares, excesses, gain, k, K)


@triton.jit(do_not_specialize=["n_matrices", "n_tiles", "n_vectors", "k"])
def gram_matvec(
    matrices, tiles, vectors, t_partial, gram_partial, v, s, scalars,
    n_matrices, n_tiles, n_vectors, k,
    DTYPE: tl.constexpr, K: tl.constexpr, WITH_T: tl.constexpr, TOLERANCE: tl.constexpr,
    R0: tl.constexpr, BN0: tl.constexpr, R1: tl.constexpr, BN1: tl.constexpr,
    R2: tl.constexpr, BN2: tl.constexpr, R3: tl.constexpr, BN3: tl.constexpr,
    R_LONG: tl.constexpr, BN_LONG: tl.constexpr, R_ODD: tl.constexpr, BN_ODD: tl.constexpr,
):  # fmt: skip
    """Program i < n_tiles takes tile i, the following n_vectors programs a vector each.

    R rows at a time of at most BN columns: 0 to 3 for aligned rows by length, LONG for longer ones,
    ODD for rows that are not aligned.
    """
    program = tl.program_id(0)
    if program >= n_tiles:
        i = program - n_tiles
        norm = scalars + 2 * n_matrices + i
        penalty = scalars + 3 * n_matrices + n_vectors + i
        vector_norm(vectors + i * VECTOR_FIELDS, norm, penalty, k, DTYPE, K, BN0)
    else:
        tile = tiles + program.to(tl.int64) * TILE_FIELDS
        index = tl.load(tile + TILE_MATRIX)
        if takes_part(scalars, n_matrices, index, 1, TOLERANCE):
            m = matrices + index * MATRIX_FIELDS
            scale = inverse_power_of_two(tl.load(scalars + index))
            n = tl.load(m + OUTER) * tl.load(m + INNER)
            if not is_aligned(m, WEIGHT, ROW_STRIDE, DTYPE):
                if n <= BN_ODD:
                    squares = _short_rows(m, tile, v, s, t_partial, scale, DTYPE, WITH_T, False,
                                          R_ODD, BN_ODD)  # fmt: skip
                else:
                    squares = _long_rows(m, tile, v, s, t_partial, scale, DTYPE, WITH_T, False,
                                         R_ODD, BN_ODD)  # fmt: skip
            elif n <= BN0:
                squares = _short_rows(m, tile, v, s, t_partial, scale, DTYPE, WITH_T, True, R0, BN0)
            elif n <= BN1:
                squares = _short_rows(m, tile, v, s, t_partial, scale, DTYPE, WITH_T, True, R1, BN1)
            elif n <= BN2:
                squares = _short_rows(m, tile, v, s, t_partial, scale, DTYPE, WITH_T, True, R2, BN2)
            elif n <= BN3:
                squares = _short_rows(m, tile, v, s, t_partial, scale, DTYPE, WITH_T, True, R3, BN3)
            else:
                squares = _long_rows(m, tile, v, s, t_partial, scale, DTYPE, WITH_T, True,
                                     R_LONG, BN_LONG)  # fmt: skip
            tl.store(gram_partial + program, squares)

"""s = W v, t = W^T s per tile and the squares of s, with one read of W from memory.

A program takes a tile: some rows of one matrix. If a row fits into the registers of a program, a
block of rows is loaded once, multiplied by v, and added to t from registers, while the next block
is being loaded. Longer rows are read twice, the second time from a cache. The last programs take
elementwise parameters.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .elementwise import elementwise_norm
from .tables import (
    ALIGNED,
    ELEMENTWISE_FIELDS,
    IN_PIECES,
    INNER,
    MATRIX_FIELDS,
    OUTER,
    OUTER_STRIDE,
    PLAIN,
    ROW_STRIDE,
    S_OFFSET,
    TILE_FIELDS,
    TILE_MATRIX,
    V_OFFSET,
    WEIGHT,
    columns_of,
    elements_of,
    factors_of,
    inverse_power_of_two,
    is_aligned,
    load_block,
    norms_of,
    parts_at,
    parts_of,
    penalties_of,
    takes_part,
)


@triton.jit
def add_long_rows(
    elements, r, row_end, scaled, t, is_first, LAYOUT: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Read rows ``r`` again and add scaled^T W to t, or write it for the first rows."""
    n = elements[4]
    for first in range(0, n, BN):
        c = first + tl.arange(0, BN)
        rows = load_block(elements, r, row_end, c, LAYOUT)
        part = tl.sum(rows * scaled[:, None], 0)
        if not is_first:  # each thread reads what it wrote itself
            part += tl.load(t + c, mask=c < n, other=0.0)
        tl.store(t + c, part, mask=c < n)


@triton.jit
def _pipelined_rows(
    m, tile, v, s, t_partial, v_offset, s_offset, scale,
    DTYPE: tl.constexpr, WITH_T: tl.constexpr, LAYOUT: tl.constexpr, R: tl.constexpr,
    BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Take blocks of R rows of n <= BN columns; return the sum of squares of s.

    The following blocks are copied to shared memory meanwhile. t is summed up per row of a block,
    so that threads exchange numbers once, at the end.
    """
    elements = elements_of(m, WEIGHT, ROW_STRIDE, OUTER_STRIDE, DTYPE, LAYOUT)
    v, s, t, row_begin, row_end = parts_at(tile, v, s, t_partial, v_offset, s_offset, LAYOUT)
    half, other_half = factors_of(scale)
    c = tl.arange(0, BN)
    inside = c < elements[4]
    x = tl.load(v + c, mask=inside, other=0.0)
    total = tl.zeros([R, BN], tl.float32)
    squares = tl.zeros([R], tl.float64)
    for row in tl.range(row_begin, row_end, R, num_stages=STAGES):
        r = row + tl.arange(0, R)
        rows = load_block(elements, r, row_end, c, LAYOUT)
        product = tl.sum(rows * x[None, :], 1)
        tl.store(s + r, product, mask=r < row_end)
        wide = product.to(tl.float64)
        squares += wide * wide
        if WITH_T:
            total += rows * (product * half * other_half)[:, None]
    if WITH_T:
        tl.store(t + c, tl.sum(total, 0), mask=inside)
    return tl.sum(squares, 0)


@triton.jit
def _store_rows(s, product, mask, R: tl.constexpr):
    """Store a number per row: one lane of each warp stores those of the warp's rows.

    Null pointers for the other lanes keep the compiler from redistributing the numbers.
    """
    lane = tl.arange(0, 32)[None, :]
    place = s + (tl.arange(0, R)[:, None] + lane)
    tl.store(place, tl.broadcast_to(product[:, None], [R, 32]), mask=mask[:, None] & (lane == 0))


@triton.jit
def _rows_ahead(
    m, tile, v, s, t_partial, v_offset, s_offset, scale,
    DTYPE: tl.constexpr, WITH_T: tl.constexpr, LAYOUT: tl.constexpr, R: tl.constexpr,
    BN: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Take blocks of R rows of n <= BN columns; return the sum of squares of s.

    The next block is loaded to registers meanwhile. A block is [R, BN / PIECE, PIECE], which makes
    the compiler give its rows to warps before it gives them columns: sums of rows that are not too
    long need no barrier. t is summed up per row of a block, so that warps exchange it once, at the
    end, which takes long: this is for tiles of many rows.
    """
    w, row_stride, inner, outer_stride, n = elements_of(
        m, WEIGHT, ROW_STRIDE, OUTER_STRIDE, DTYPE, LAYOUT
    )
    v, s, t, row_begin, row_end = parts_at(tile, v, s, t_partial, v_offset, s_offset, LAYOUT)
    w, s, count = w + row_begin * row_stride, s + row_begin, (row_end - row_begin).to(tl.int32)
    c = (tl.arange(0, BN // PIECE) * PIECE)[None, :, None] + tl.arange(0, PIECE)[None, None, :]
    inside = c < n.to(tl.int32)
    r = tl.arange(0, R)
    offsets = r[:, None, None] * row_stride + columns_of(c, inner, outer_stride, LAYOUT)
    raw = tl.load(w + offsets, mask=inside & (r < count)[:, None, None], other=0.0)
    x = tl.load(v + c, mask=inside, other=0.0)
    half, other_half = factors_of(scale)
    total = tl.zeros([R, BN // PIECE, PIECE], tl.float32)
    squares = tl.zeros([R], tl.float64)
    for row in range(0, count, R):
        rows = raw.to(tl.float32)
        w += R * row_stride
        raw = tl.load(w + offsets, mask=inside & (r < count - row - R)[:, None, None], other=0.0)
        product = tl.sum(tl.reshape(rows * x, [R, BN]), 1)
        _store_rows(s + row, product, r < count - row, R)
        wide = product.to(tl.float64)
        squares += wide * wide
        if WITH_T:
            total += rows * (product * half * other_half)[:, None, None]
    if WITH_T:
        tl.store(t + c, tl.sum(total, 0, keep_dims=True), mask=inside)
    return tl.sum(squares, 0)


@triton.jit
def _long_rows(
    m, tile, v, s, t_partial, scale,
    DTYPE: tl.constexpr, WITH_T: tl.constexpr, LAYOUT: tl.constexpr, R: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Take blocks of R rows, BN columns at a time, twice; return the sum of squares of s."""
    elements = elements_of(m, WEIGHT, ROW_STRIDE, OUTER_STRIDE, DTYPE, LAYOUT)
    n = elements[4]
    v, s, t, row_begin, row_end = parts_of(m, tile, v, s, t_partial, LAYOUT)
    half, other_half = factors_of(scale)
    squares = tl.zeros([R], tl.float64)
    for row in range(row_begin, row_end, R):
        r = row + tl.arange(0, R)
        products = tl.zeros([R, BN], tl.float32)
        for first in range(0, n, BN):
            c = first + tl.arange(0, BN)
            rows = load_block(elements, r, row_end, c, LAYOUT)
            products += rows * tl.load(v + c, mask=c < n, other=0.0)[None, :]
        product = tl.sum(products, 1)
        tl.store(s + r, product, mask=r < row_end)
        wide = product.to(tl.float64)
        squares += wide * wide
        if WITH_T:
            scaled = product * half * other_half
            add_long_rows(elements, r, row_end, scaled, t, row == row_begin, LAYOUT, BN)
    return tl.sum(squares, 0)


@triton.jit(
    do_not_specialize=["n_matrices", "n_tiles", "n_elementwise", "k", "integer", "above"],
    do_not_specialize_on_alignment=[
        "matrices", "tiles", "elementwise", "gram_partial", "s", "scalars",
    ],
)  # fmt: skip
def gram_matvec(
    matrices, tiles, elementwise, t_partial, gram_partial, v, s, scalars,
    n_matrices, n_tiles, n_elementwise, k, integer, above,
    DTYPE: tl.constexpr, WITH_T: tl.constexpr, TOLERANCE: tl.constexpr,
    BLOCK: tl.constexpr, WIDTHS: tl.constexpr, STAGES: tl.constexpr, PIECE: tl.constexpr,
    SHORTEST: tl.constexpr, LONGEST: tl.constexpr,
    R_LONG: tl.constexpr, BN_LONG: tl.constexpr, R_PLAIN: tl.constexpr, BN_PLAIN: tl.constexpr,
    R_PIECES: tl.constexpr, BN_PIECES: tl.constexpr,
):  # fmt: skip
    """Program i < n_tiles takes tile i, each of the others an elementwise parameter.

    Aligned rows of up to 128 columns, or twice as many and so on WIDTHS - 1 times, are taken BLOCK
    elements at a time; longer ones R_LONG rows at a time, BN_LONG columns at a time, and rows that
    are not aligned likewise, by PLAIN or PIECES. gram_matvec_long takes
    those of more than SHORTEST and up to LONGEST columns.
    """
    program = tl.program_id(0)
    if program >= n_tiles:
        i = program - n_tiles
        norm = norms_of(scalars, n_matrices) + i
        penalty = penalties_of(scalars, n_matrices, n_elementwise) + n_matrices + i
        elementwise_norm(
            elementwise + i * ELEMENTWISE_FIELDS, norm, penalty, k, integer, above, DTYPE, 128
        )
    else:
        tile = tiles + program.to(tl.int64) * TILE_FIELDS
        index = tl.load(tile + TILE_MATRIX)
        if takes_part(scalars, n_matrices, index, 1, TOLERANCE):
            m = matrices + index * MATRIX_FIELDS
            # Loaded together, since the address of the first rows depends on them.
            sigma, outer = tl.load(scalars + index), tl.load(m + OUTER)
            v_offset, s_offset = tl.load(m + V_OFFSET), tl.load(m + S_OFFSET)
            scale = inverse_power_of_two(sigma)
            n = outer * tl.load(m + INNER)
            squares = tl.full([], 0.0, tl.float64)
            if not is_aligned(m, WEIGHT, ROW_STRIDE, DTYPE):
                if outer > 1:
                    squares = _long_rows(m, tile, v, s, t_partial, scale, DTYPE, WITH_T, IN_PIECES,
                                         R_PIECES, BN_PIECES)  # fmt: skip
                elif n <= BN_PLAIN:
                    squares = _pipelined_rows(
                        m, tile, v, s, t_partial, v_offset, s_offset, scale, DTYPE, WITH_T, PLAIN,
                        R_PLAIN, BN_PLAIN, 1,
                    )  # fmt: skip
                else:
                    squares = _long_rows(m, tile, v, s, t_partial, scale, DTYPE, WITH_T, PLAIN,
                                         R_PLAIN, BN_PLAIN)  # fmt: skip
            elif n > 64 * 2**WIDTHS:
                if (n <= SHORTEST) | (n > LONGEST):  # the others are gram_matvec_long's
                    squares = _long_rows(m, tile, v, s, t_partial, scale, DTYPE, WITH_T, ALIGNED,
                                         R_LONG, BN_LONG)  # fmt: skip
            else:
                for i in tl.static_range(WIDTHS):
                    if (n <= 128 * 2**i) & ((n > 64 * 2**i) | (i == 0)):
                        if STAGES > 0:
                            squares = _pipelined_rows(
                                m, tile, v, s, t_partial, v_offset, s_offset, scale, DTYPE, WITH_T,
                                ALIGNED, BLOCK // (128 * 2**i), 128 * 2**i, STAGES,
                            )  # fmt: skip
                        else:
                            squares = _rows_ahead(
                                m, tile, v, s, t_partial, v_offset, s_offset, scale, DTYPE, WITH_T,
                                ALIGNED, max(BLOCK // (128 * 2**i), 1), 128 * 2**i,
                                min(PIECE, 128 * 2**i),
                            )  # fmt: skip
            tl.store(gram_partial + program, squares)

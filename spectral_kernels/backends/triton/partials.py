"""Partial results of tiles without s = W v: computed from a given s, and summed over tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from .subspace_products import operands, store_gram
from .tables import (
    ALIGNED,
    FIRST_TILE,
    IN_PIECES,
    INNER,
    MATRIX_FIELDS,
    N_TILES,
    OUTER,
    PLAIN,
    ROW_STRIDE,
    T_OFFSET,
    TILE_FIELDS,
    TILE_MATRIX,
    V_OFFSET,
    WEIGHT,
    inverse_power_of_two,
    is_aligned,
    load_block,
    takes_part,
    whole_loads,
)


@triton.jit
def _add_rows(
    m, tile, first_vector, s, t_partial, scale,
    DTYPE: tl.constexpr, GROUP: tl.constexpr, LAYOUT: tl.constexpr, R: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Write t of the vectors of a group: BN columns at a time of all rows, R at a time."""
    elements, n, n_rows, _v, s, t, row_begin, row_end = operands(
        m, tile, first_vector, s, s, t_partial, DTYPE, LAYOUT
    )
    for first in range(0, n, BN):
        c = first + tl.arange(0, BN)
        totals = ()
        for _ in tl.static_range(GROUP):
            totals += (tl.zeros([BN], tl.float32),)
        for row in range(row_begin, row_end, R):
            r = row + tl.arange(0, R)
            rows = load_block(elements, r, row_end, c, LAYOUT)
            sums = ()
            for j in tl.static_range(GROUP):
                own = tl.load(s + j * n_rows + r, mask=r < row_end, other=0.0)
                scaled = (own.to(tl.float64) * scale).to(tl.float32)
                sums += (totals[j] + tl.sum(rows * scaled[:, None], 0),)
            totals = sums
        for j in tl.static_range(GROUP):
            tl.store(t + j * n + c, totals[j], mask=c < n)


@triton.jit(
    do_not_specialize=["n_matrices"],
    do_not_specialize_on_alignment=["matrices", "tiles", "gram_partial", "s", "scalars"],
)
def transposed(
    matrices, tiles, t_partial, gram_partial, s, scalars, n_matrices,
    DTYPE: tl.constexpr, VECTORS: tl.constexpr, WITH_T: tl.constexpr, TOLERANCE: tl.constexpr,
    GROUP: tl.constexpr, R0: tl.constexpr, BN0: tl.constexpr, R1: tl.constexpr, BN1: tl.constexpr,
    R2: tl.constexpr, BN2: tl.constexpr, R_ODD: tl.constexpr, BN_ODD: tl.constexpr,
    BN_GRAM: tl.constexpr,
):  # fmt: skip
    """A program takes a tile and a group of vectors; the first of a tile also takes S S^T.

    R rows at a time of BN columns: 0 and 1 for aligned rows of at most BN columns, 2 for longer
    ones, ODD for rows that are not aligned.
    """
    groups: tl.constexpr = VECTORS // GROUP
    program = tl.program_id(0)
    tile_index = (program // groups).to(tl.int64)
    first = program % groups * GROUP
    tile = tiles + tile_index * TILE_FIELDS
    index = tl.load(tile + TILE_MATRIX)
    if takes_part(scalars, n_matrices, index, VECTORS, TOLERANCE):
        m = matrices + index * MATRIX_FIELDS
        if first == 0:
            store_gram(m, tile, s, gram_partial, tile_index, VECTORS, BN_GRAM)
        if WITH_T:
            scale = inverse_power_of_two(tl.load(scalars + index))
            outer = tl.load(m + OUTER)
            n = outer * tl.load(m + INNER)
            if not is_aligned(m, WEIGHT, ROW_STRIDE, DTYPE):
                if outer > 1:
                    _add_rows(m, tile, first, s, t_partial, scale, DTYPE, GROUP, IN_PIECES,
                              R_ODD, BN_ODD)  # fmt: skip
                else:
                    _add_rows(m, tile, first, s, t_partial, scale, DTYPE, GROUP, PLAIN,
                              R_ODD, BN_ODD)  # fmt: skip
            elif n <= BN0:
                _add_rows(m, tile, first, s, t_partial, scale, DTYPE, GROUP, ALIGNED, R0, BN0)
            elif n <= BN1:
                _add_rows(m, tile, first, s, t_partial, scale, DTYPE, GROUP, ALIGNED, R1, BN1)
            else:
                _add_rows(m, tile, first, s, t_partial, scale, DTYPE, GROUP, ALIGNED, R2, BN2)


@triton.jit
def _collect_columns(
    matrices, tiles, tile_index, t_partial, t, VECTORS: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Sum t over the tiles of a matrix, for the columns that this tile is responsible for."""
    m = matrices + tl.load(tiles + tile_index * TILE_FIELDS + TILE_MATRIX) * MATRIX_FIELDS
    first, n_tiles = tl.load(m + FIRST_TILE), tl.load(m + N_TILES)
    v_offset, t_offset = tl.load(m + V_OFFSET), tl.load(tiles + first * TILE_FIELDS + T_OFFSET)
    size = VECTORS * tl.load(m + OUTER) * tl.load(m + INNER)
    if VECTORS % 4 == 0:  # they are multiples of four elements: loads may be wide
        v_offset, t_offset = whole_loads(v_offset, tl.float32), whole_loads(t_offset, tl.float32)
        size = whole_loads(size, tl.float32)
    share = tl.cdiv(size, 4 * n_tiles) * 4
    begin = (tile_index - first) * share
    end = tl.minimum(begin + share, size)
    for column in range(begin, end, BN):
        c = column + tl.arange(0, BN)
        total = tl.zeros([BN], tl.float32)
        for i in range(0, n_tiles):
            total += tl.load(t_partial + t_offset + i * size + c, mask=c < end, other=0.0)
        tl.store(t + v_offset + c, total, mask=c < end)


@triton.jit
def _collect_products(
    m, index, gram_partial, t, gram, VECTORS: tl.constexpr, WITH_T: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Sum the products of a matrix over its tiles; write zeros to t if it has no tile."""
    size: tl.constexpr = VECTORS * VECTORS
    first, n_tiles = tl.load(m + FIRST_TILE), tl.load(m + N_TILES)
    j = tl.arange(0, size)
    total = tl.zeros([size], tl.float64)
    for i in range(first, first + n_tiles):
        total += tl.load(gram_partial + i * size + j)
    tl.store(gram + index * size + j, total)
    if WITH_T:
        n = tl.load(m + OUTER) * tl.load(m + INNER)
        n = tl.where(n_tiles == 0, VECTORS * n, 0)
        t += tl.load(m + V_OFFSET)
        for column in range(0, n, BN):
            c = column + tl.arange(0, BN)
            tl.store(t + c, tl.zeros([BN], tl.float32), mask=c < n)


@triton.jit(
    do_not_specialize=["n_tiles"],
    do_not_specialize_on_alignment=["matrices", "tiles", "gram_partial", "gram"],
)
def collect(
    matrices, tiles, t_partial, gram_partial, t, gram, n_tiles,
    VECTORS: tl.constexpr, WITH_T: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Program i < n_tiles sums a part of the columns of t, the following ones the products.

    For several vectors; for one, see chunks.py.
    """
    program = tl.program_id(0).to(tl.int64)
    if program < n_tiles:
        if WITH_T:
            _collect_columns(matrices, tiles, program, t_partial, t, VECTORS, BN)
    else:
        index = program - n_tiles
        m = matrices + index * MATRIX_FIELDS
        _collect_products(m, index, gram_partial, t, gram, VECTORS, WITH_T, BN)

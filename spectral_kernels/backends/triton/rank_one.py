"""The penalty's gradient, and the stage that computes sigma and the next v from sums over tiles.

Both in one launch: programs take a tile each and add 2 k (sigma^k - tau^k) sigma^(k-1) u v^T to the
gradient, half of them before and half of them after those that take a chunk of columns of a matrix
each and sum t over its tiles; the last ones take elementwise parameters. Programs of tiles do not
wait for those of chunks: they add up the few squares themselves. Programs of chunks do not wait for
each other: they count, and the last one divides v by its norm. Sums have a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .chunks import ordered_sum, sum_chunk, sum_of_squares
from .elementwise import elementwise_gradient, lanes_of, row_factors, row_squares, shift_of
from .penalty import excess_of, matrix_factor, residual_of
from .tables import (
    ALIGNED,
    CHUNK_BEGIN,
    CHUNK_COLUMNS,
    CHUNK_FIELDS,
    CHUNK_MATRIX,
    ELEMENTWISE_FIELDS,
    GAIN,
    GRAD,
    GRAD_DTYPE,
    GRAD_OUTER_STRIDE,
    GRAD_ROW_STRIDE,
    IN_PIECES,
    INFINITY,
    INNER,
    KIND,
    MATRIX_FIELDS,
    OUTER,
    PLAIN,
    ROWS,
    ROWS_KIND,
    SIZE,
    TILE_FIELDS,
    TILE_MATRIX,
    V_OFFSET,
    WEIGHT,
    block_of,
    elements_of,
    inverse_power_of_two,
    is_aligned,
    norms_of,
    parts_of,
    penalties_of,
    residuals_of,
    strengths_of,
    takes_part,
    targets_of,
)


@triton.jit
def _finish_chunk(
    chunk_index, index, matrices, tiles, chunks, t_partial, gram_partial, chunk_squares, arrivals,
    v, v_next, sigma, residual, penalty, target, k, integer, above,
    WITH_T: tl.constexpr, TOLERANCE: tl.constexpr, TILES: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Sum t of a chunk; the last program of a matrix writes its sigma, residual, penalty, v_next.

    Without t the first chunk's program writes sigma and penalty.
    """
    m = matrices + index * MATRIX_FIELDS
    begin = tl.load(chunks + chunk_index * CHUNK_FIELDS + CHUNK_BEGIN)
    is_last = begin == 0
    if WITH_T:
        n, v_offset = tl.load(m + OUTER) * tl.load(m + INNER), tl.load(m + V_OFFSET)
        c, total = sum_chunk(m, tiles, t_partial, begin, TILES)
        v, v_next = v + v_offset, v_next + v_offset
        if TOLERANCE > 0:  # the products were taken with it
            tl.store(v + c, tl.load(v_next + c, mask=c < n, other=0.0), mask=c < n)
            tl.debug_barrier()  # another thread may write what one reads
        tl.store(v_next + c, total, mask=c < n)
        wide = total.to(tl.float64)
        tl.store(chunk_squares + chunk_index, tl.sum(wide * wide, 0))
        n_chunks = tl.maximum(tl.cdiv(n, CHUNK_COLUMNS), 1)
        tl.debug_barrier()  # all threads have written before one says so
        is_last = tl.atomic_add(arrivals + index, 1, sem="acq_rel") == n_chunks - 1
    if is_last:
        value = tl.sqrt(sum_of_squares(m, gram_partial))
        scale = inverse_power_of_two(tl.load(sigma))
        if WITH_T:
            tl.store(arrivals + index, 0)
            first_chunk = chunk_index - begin // CHUNK_COLUMNS
            t_norm = tl.sqrt(ordered_sum(chunk_squares, first_chunk, n_chunks))
            finite = (t_norm < INFINITY) & (value < INFINITY)  # false for NaN
            good = finite & (t_norm > 0)
            inverse = 1 / tl.where(good, t_norm, 1.0)
            for column in range(0, n, BN):
                all_c = column + tl.arange(0, BN)
                unit = tl.load(v_next + all_c, mask=all_c < n, other=0.0).to(tl.float64) * inverse
                old = tl.load(v + all_c, mask=all_c < n, other=0.0)
                tl.store(v_next + all_c, tl.where(good, unit.to(tl.float32), old), mask=all_c < n)
            tl.store(residual, residual_of(value, t_norm, scale).to(tl.float32))
            tl.debug_barrier()  # all threads have read the sigma before this one
        excess = excess_of(value, target, k, integer, above)
        tl.store(sigma, value.to(tl.float32))
        tl.store(penalty, (excess * excess).to(tl.float32))


@triton.jit
def _factor(
    m, index, gram_partial, scalars, strengths, targets, multiplier, k, integer, above,
    FINISH: tl.constexpr,
):  # fmt: skip
    """Return what u v^T of a matrix is multiplied by, over sigma."""
    if FINISH:
        # Rounded as stored, so that the gradient has the same bits as with two launches.
        sigma = tl.sqrt(sum_of_squares(m, gram_partial)).to(tl.float32)
    else:
        sigma = tl.load(scalars + index)
    strength = multiplier * tl.load(strengths + index).to(tl.float64)
    return matrix_factor(sigma, tl.load(targets + index), strength, k, integer, above)


@triton.jit
def _tile_gradient(
    m, tile, v, s, index, gram_partial, scalars, strengths, targets, multiplier, k, integer, above,
    DTYPE: tl.constexpr, ACCUMULATE: tl.constexpr, FINISH: tl.constexpr, LAYOUT: tl.constexpr,
    TERMS: tl.constexpr, R: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Add factor * s v^T to the rows of a tile, or write it over them.

    Of an operator, whose s and v have two parts, the sum of two such TERMS. Blocks of R rows and BN
    columns follow each other along the rows; the next one is loaded before this one is stored, and
    the first one while the factor is not yet known.
    """
    elements = elements_of(m, GRAD, GRAD_ROW_STRIDE, GRAD_OUTER_STRIDE, DTYPE, LAYOUT)
    grad, n = elements[0], elements[4]
    n_rows = tl.load(m + ROWS)
    v, s, _, row_begin, row_end = parts_of(m, tile, v, s, s, LAYOUT)
    r, j = tl.arange(0, R), tl.arange(0, BN)
    row, first = row_begin, row_begin * 0
    offsets, mask = block_of(elements, row + r, row_end, first + j, LAYOUT)
    block = grad + offsets
    if ACCUMULATE:
        old = tl.load(block, mask=mask, other=0.0)
    factor = _factor(m, index, gram_partial, scalars, strengths, targets, multiplier, k, integer,
                     above, FINISH)  # fmt: skip
    for _ in range(tl.cdiv(row_end - row_begin, R) * tl.cdiv(n, BN)):
        x = tl.load(v + first + j, mask=first + j < n, other=0.0)
        a = tl.load(s + row + r, mask=row + r < row_end, other=0.0).to(tl.float64) * factor
        value = a.to(tl.float32)[:, None] * x[None, :]
        if TERMS == 2:
            x = tl.load(v + n + first + j, mask=first + j < n, other=0.0)
            a = tl.load(s + n_rows + row + r, mask=row + r < row_end, other=0.0).to(tl.float64)
            value += (a * factor).to(tl.float32)[:, None] * x[None, :]
        this, inside = block, mask
        first += BN
        row = tl.where(first < n, row, row + R)
        first = tl.where(first < n, first, 0)
        offsets, mask = block_of(elements, row + r, row_end, first + j, LAYOUT)
        block = grad + offsets
        if ACCUMULATE:
            value += old.to(tl.float32)
            old = tl.load(block, mask=mask, other=0.0)
        tl.store(this, value.to(DTYPE), mask=inside)


@triton.jit
def _elementwise_gradient(
    vector, norm, strength, k, integer, above, DTYPE: tl.constexpr, GRAD_TYPE: tl.constexpr,
    ACCUMULATE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Do the same for the elementwise parameter in a row of the table."""
    x = tl.load(vector + WEIGHT).to(tl.pointer_type(DTYPE))
    grad = tl.load(vector + GRAD).to(tl.pointer_type(GRAD_TYPE))
    size, gain = tl.load(vector + SIZE), tl.load(vector + KIND) == GAIN
    factor, _ = shift_of(vector, tl.load(norm), strength, k, integer, above)
    for first in range(0, size, BN):
        c = first + tl.arange(0, BN)
        value = tl.load(x + c, mask=c < size, other=0.0).to(tl.float64)
        result = elementwise_gradient(
            vector, value, c, c < size, gain, factor, strength, k, integer, above
        )
        _put(grad, c, c < size, result, GRAD_TYPE, ACCUMULATE)


@triton.jit
def _put(grad, c, mask, result, GRAD_TYPE: tl.constexpr, ACCUMULATE: tl.constexpr):
    """Add ``result`` to elements ``c`` of a gradient, or write it over them."""
    result = result.to(tl.float32)
    if ACCUMULATE:
        result += tl.load(grad + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad + c, result.to(GRAD_TYPE), mask=mask)


@triton.jit
def _rows_gradient(
    vector, strength, k, integer, above, DTYPE: tl.constexpr, GRAD_TYPE: tl.constexpr,
    ACCUMULATE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Do the same for rows."""
    x = tl.load(vector + WEIGHT).to(tl.pointer_type(DTYPE))
    grad = tl.load(vector + GRAD).to(tl.pointer_type(GRAD_TYPE))
    n_rows, length, row, column, row_step, column_step = lanes_of(vector, BN)
    for first_row in range(0, n_rows, row_step):
        r = first_row + row
        squares = row_squares(x, r, column, column_step, n_rows, length, BN)
        factor = row_factors(vector, squares, r, n_rows, strength, k, integer, above, 0.0, False)
        for first in range(0, length, column_step):
            c = first + column
            place, mask = r * length + c, (r < n_rows) & (c < length)
            value = tl.load(x + place, mask=mask, other=0.0).to(tl.float64)
            _put(grad, place, mask, factor * value, GRAD_TYPE, ACCUMULATE)


@triton.jit(
    do_not_specialize=[
        "n_matrices", "n_chunks", "n_tiles", "n_elementwise", "n_sigmas", "grad_dtype", "k",
        "integer",
    ],
    do_not_specialize_on_alignment=[
        "matrices", "tiles", "elementwise", "chunks", "gram_partial", "chunk_squares", "arrivals",
        "s", "scalars", "scale",
    ],
)  # fmt: skip
def rank_one(
    matrices, tiles, elementwise, chunks, t_partial, gram_partial, chunk_squares, arrivals, v,
    v_next, s, scalars, scale,
    n_matrices, n_chunks, n_tiles, n_elementwise, n_sigmas, grad_dtype, k, integer, above,
    DTYPE: tl.constexpr, GRAD_TYPE: tl.constexpr,
    FINISH: tl.constexpr, WITH_T: tl.constexpr, GRADIENT: tl.constexpr,
    ACCUMULATE: tl.constexpr, TOLERANCE: tl.constexpr, TERMS: tl.constexpr,
    TILES: tl.constexpr, BN_SUM: tl.constexpr, R: tl.constexpr, BN: tl.constexpr,
    R_NARROW: tl.constexpr, BN_NARROW: tl.constexpr, R_PLAIN: tl.constexpr, BN_PLAIN: tl.constexpr,
    R_PIECES: tl.constexpr, BN_PIECES: tl.constexpr,
):  # fmt: skip
    """FINISH, for one vector: n_chunks programs; GRADIENT: n_tiles around them, then n_elementwise.

    Gradients of other types than GRAD_TYPE (grad_dtype in the tables) are left to other launches.
    Scalars are n_sigmas estimates, as many residuals, and the rest as in schema.SCALARS.
    """
    program = tl.program_id(0)
    norms = norms_of(scalars, n_sigmas)
    penalties = penalties_of(scalars, n_sigmas, n_elementwise)
    strengths = strengths_of(scalars, n_sigmas, n_matrices, n_elementwise)
    targets = targets_of(scalars, n_sigmas, n_matrices, n_elementwise)
    tile_index = program
    if FINISH:
        # Chunks are bound by memory latency, the programs of tiles beside them by bandwidth.
        first_chunk = n_tiles // 2 if GRADIENT else 0
        chunk = program - first_chunk
        if (chunk >= 0) & (chunk < n_chunks):
            chunk_index = chunk.to(tl.int64)
            index = tl.load(chunks + chunk_index * CHUNK_FIELDS + CHUNK_MATRIX)
            if takes_part(scalars, n_matrices, index, 1, TOLERANCE):
                _finish_chunk(chunk_index, index, matrices, tiles, chunks, t_partial, gram_partial,
                              chunk_squares, arrivals, v, v_next, scalars + index,
                              residuals_of(scalars, n_sigmas) + index, penalties + index,
                              targets + index, k, integer, above, WITH_T, TOLERANCE, TILES,
                              BN_SUM)  # fmt: skip
            tile_index = -1
        elif chunk >= 0:
            tile_index = program - n_chunks
    if GRADIENT and tile_index >= 0:
        multiplier = tl.load(scale).to(tl.float64)
        if tile_index < n_tiles:
            tile = tiles + tile_index.to(tl.int64) * TILE_FIELDS
            index = tl.load(tile + TILE_MATRIX)
            m = matrices + index * MATRIX_FIELDS
            outer, aligned = tl.load(m + OUTER), is_aligned(m, GRAD, GRAD_ROW_STRIDE, GRAD_TYPE)
            if (tl.load(m + GRAD) != 0) & (tl.load(m + GRAD_DTYPE) == grad_dtype):
                if not aligned:
                    if outer > 1:
                        _tile_gradient(m, tile, v, s, index, gram_partial, scalars, strengths,
                                   targets, multiplier, k, integer, above, GRAD_TYPE, ACCUMULATE,
                                   FINISH, IN_PIECES, TERMS, R_PIECES, BN_PIECES)  # fmt: skip
                    else:
                        _tile_gradient(m, tile, v, s, index, gram_partial, scalars, strengths,
                                   targets, multiplier, k, integer, above, GRAD_TYPE, ACCUMULATE,
                                   FINISH, PLAIN, TERMS, R_PLAIN, BN_PLAIN)  # fmt: skip
                elif outer * tl.load(m + INNER) <= BN_NARROW:
                    _tile_gradient(m, tile, v, s, index, gram_partial, scalars, strengths,
                                   targets, multiplier, k, integer, above, GRAD_TYPE, ACCUMULATE,
                                   FINISH, ALIGNED, TERMS, R_NARROW, BN_NARROW)  # fmt: skip
                else:
                    _tile_gradient(m, tile, v, s, index, gram_partial, scalars, strengths,
                                   targets, multiplier, k, integer, above, GRAD_TYPE, ACCUMULATE,
                                   FINISH, ALIGNED, TERMS, R, BN)  # fmt: skip
        else:
            i = tile_index - n_tiles
            vector = elementwise + i * ELEMENTWISE_FIELDS
            present = tl.load(vector + GRAD) != 0
            if present & (tl.load(vector + GRAD_DTYPE) == grad_dtype):
                strength = multiplier * tl.load(strengths + n_matrices + i).to(tl.float64)
                if tl.load(vector + KIND) == ROWS_KIND:
                    _rows_gradient(
                        vector, strength, k, integer, above, DTYPE, GRAD_TYPE, ACCUMULATE, BN_NARROW
                    )
                else:
                    _elementwise_gradient(vector, norms + i, strength, k, integer, above, DTYPE,
                                          GRAD_TYPE, ACCUMULATE, BN)  # fmt: skip

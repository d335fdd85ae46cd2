"""The penalty's gradient, and the stage that makes sigma and the next v of the sums over tiles.

Both in one launch: the first programs take a matrix each and finish its sums, the next take a tile
each and add 2 k (sigma^k - tau^k) sigma^(k-1) u v^T to the gradient, the last ones the vectors. The
programs of tiles do not wait for those of matrices: they add the few squares up themselves.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .penalty import excess_of, matrix_factor, residual_of, shift_factor, vector_gradient
from .tables import (
    FIRST_TILE,
    GAIN,
    GRAD,
    GRAD_DTYPE,
    GRAD_OUTER_STRIDE,
    GRAD_ROW_STRIDE,
    INFINITY,
    INNER,
    KIND,
    MATRIX_FIELDS,
    N_TILES,
    OUTER,
    SIZE,
    T_OFFSET,
    TILE_FIELDS,
    TILE_MATRIX,
    V_OFFSET,
    VECTOR_FIELDS,
    WEIGHT,
    column_offsets,
    elements_of,
    inverse_power_of_two,
    is_aligned,
    parts_of,
    takes_part,
)


@triton.jit
def _sum_of_squares(gram_partial, first, n_tiles, MAX_TILES: tl.constexpr):
    i = tl.arange(0, MAX_TILES)
    return tl.sum(tl.load(gram_partial + first + i, mask=i < n_tiles, other=0.0), 0)


@triton.jit
def _finish_matrix(
    m, tiles, t_partial, gram_partial, v, v_next, sigma, residual, penalty, target, k,
    K: tl.constexpr, WITH_T: tl.constexpr, TOLERANCE: tl.constexpr, MAX_TILES: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Write sigma, penalty, and with t the residual and v_next of one matrix."""
    first, n_tiles = tl.load(m + FIRST_TILE), tl.load(m + N_TILES)
    value = tl.sqrt(_sum_of_squares(gram_partial, first, n_tiles, MAX_TILES))
    excess = excess_of(value, target, k, K)
    scale = inverse_power_of_two(tl.load(sigma))
    tl.store(sigma, value.to(tl.float32))
    tl.store(penalty, (excess * excess).to(tl.float32))
    if WITH_T:
        n = tl.load(m + OUTER) * tl.load(m + INNER)
        v += tl.load(m + V_OFFSET)
        v_next += tl.load(m + V_OFFSET)
        # A matrix without rows or columns has no tile, and tiles may be an empty table.
        t = t_partial + tl.load(tiles + first * TILE_FIELDS + T_OFFSET, mask=n_tiles > 0, other=0)
        squares = tl.zeros([BN], tl.float64)
        for begin in range(0, n, BN):
            c = begin + tl.arange(0, BN)
            total = tl.zeros([BN], tl.float32)
            for i in range(0, n_tiles):
                total += tl.load(t + i * n + c, mask=c < n, other=0.0)
            if TOLERANCE > 0:  # it is what the products were taken with
                tl.store(v + c, tl.load(v_next + c, mask=c < n, other=0.0), mask=c < n)
            tl.store(v_next + c, total, mask=c < n)
            wide = total.to(tl.float64)
            squares += wide * wide
        t_norm = tl.sqrt(tl.sum(squares, 0))
        finite = (t_norm < INFINITY) & (value < INFINITY)  # false for NaN
        good = finite & (t_norm > 0)
        inverse = 1 / tl.where(good, t_norm, 1.0)
        for begin in range(0, n, BN):
            c = begin + tl.arange(0, BN)
            # Each thread finds what it wrote itself.
            unit = tl.load(v_next + c, mask=c < n, other=0.0).to(tl.float64) * inverse
            old = tl.load(v + c, mask=c < n, other=0.0)
            tl.store(v_next + c, tl.where(good, unit.to(tl.float32), old), mask=c < n)
        tl.store(residual, residual_of(value, t_norm, scale).to(tl.float32))


@triton.jit
def _tile_gradient(
    m, tile, v, s, factor,
    DTYPE: tl.constexpr, ACCUMULATE: tl.constexpr, ALIGNED: tl.constexpr, R: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Add factor * s v^T to the rows of a tile, or write it over them."""
    grad, row_stride, inner, outer_stride, n = elements_of(
        m, GRAD, GRAD_ROW_STRIDE, GRAD_OUTER_STRIDE, DTYPE, ALIGNED
    )
    v, s, _, row_begin, row_end = parts_of(m, tile, v, s, s)
    for first in range(0, n, BN):
        c = first + tl.arange(0, BN)
        columns = c if ALIGNED else column_offsets(c, inner, outer_stride)
        x = tl.load(v + c, mask=c < n, other=0.0)
        for row in range(row_begin, row_end, R):
            r = row + tl.arange(0, R)
            a = (tl.load(s + r, mask=r < row_end, other=0.0).to(tl.float64) * factor).to(tl.float32)
            mask = (r < row_end)[:, None] & (c < n)[None, :]
            block = grad + (r[:, None] * row_stride + columns[None, :])
            value = a[:, None] * x[None, :]
            if ACCUMULATE:
                value += tl.load(block, mask=mask, other=0.0).to(tl.float32)
            tl.store(block, value.to(DTYPE), mask=mask)


@triton.jit
def _vector_gradient(
    vector, norm, strength, k, DTYPE: tl.constexpr, GRAD_TYPE: tl.constexpr, K: tl.constexpr,
    ACCUMULATE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Do the same for the vector that a row of the table describes."""
    x = tl.load(vector + WEIGHT).to(tl.pointer_type(DTYPE))
    grad = tl.load(vector + GRAD).to(tl.pointer_type(GRAD_TYPE))
    size, gain = tl.load(vector + SIZE), tl.load(vector + KIND) == GAIN
    factor = shift_factor(tl.load(norm), strength, k, K)
    for first in range(0, size, BN):
        c = first + tl.arange(0, BN)
        value = tl.load(x + c, mask=c < size, other=0.0).to(tl.float64)
        result = vector_gradient(value, gain, factor, strength, k, K)
        if ACCUMULATE:
            result += tl.load(grad + c, mask=c < size, other=0.0).to(tl.float32)
        tl.store(grad + c, result.to(GRAD_TYPE), mask=c < size)


@triton.jit(do_not_specialize=["n_matrices", "n_tiles", "n_vectors", "grad_dtype", "k"])
def rank_one(
    matrices, tiles, vectors, t_partial, gram_partial, v, v_next, s, scalars, scale,
    n_matrices, n_tiles, n_vectors, grad_dtype, k,
    DTYPE: tl.constexpr, GRAD_TYPE: tl.constexpr, K: tl.constexpr,
    FINISH: tl.constexpr, WITH_T: tl.constexpr, GRADIENT: tl.constexpr,
    ACCUMULATE: tl.constexpr, WITH_SCALE: tl.constexpr, VECTORS: tl.constexpr,
    TOLERANCE: tl.constexpr, MAX_TILES: tl.constexpr,
    BN_SUM: tl.constexpr, R: tl.constexpr, BN: tl.constexpr,
    R_NARROW: tl.constexpr, BN_NARROW: tl.constexpr,
):  # fmt: skip
    """FINISH, of one vector: n_matrices programs; GRADIENT: n_tiles and then n_vectors more.

    Gradients of other types than GRAD_TYPE (grad_dtype in the tables) are left to other launches.
    """
    program = tl.program_id(0)
    sigmas, norms = scalars, scalars + 2 * VECTORS * n_matrices
    penalties = norms + n_vectors
    strengths = penalties + n_matrices + n_vectors
    targets = strengths + n_matrices + n_vectors
    tile_index = program
    if FINISH:
        if program < n_matrices:
            begins = takes_part(scalars, n_matrices, program, 1, TOLERANCE)
            if TOLERANCE > 0:
                tl.debug_barrier()  # all threads know before one writes the new sigma
            if begins:
                m = matrices + program.to(tl.int64) * MATRIX_FIELDS
                _finish_matrix(m, tiles, t_partial, gram_partial, v, v_next, sigmas + program,
                               sigmas + n_matrices + program, penalties + program,
                               targets + program, k, K, WITH_T, TOLERANCE, MAX_TILES,
                               BN_SUM)  # fmt: skip
        tile_index = program - n_matrices
    if GRADIENT and tile_index >= 0:
        multiplier = tl.full([], 1.0, tl.float64)
        if WITH_SCALE:
            multiplier = tl.load(scale).to(tl.float64)
        if tile_index < n_tiles:
            tile = tiles + tile_index.to(tl.int64) * TILE_FIELDS
            index = tl.load(tile + TILE_MATRIX)
            m = matrices + index * MATRIX_FIELDS
            if (tl.load(m + GRAD) != 0) & (tl.load(m + GRAD_DTYPE) == grad_dtype):
                if FINISH:
                    first, count = tl.load(m + FIRST_TILE), tl.load(m + N_TILES)
                    squares = _sum_of_squares(gram_partial, first, count, MAX_TILES)
                    # As it is stored, so that the gradient is the same bits in two launches.
                    sigma = tl.sqrt(squares).to(tl.float32)
                else:
                    sigma = tl.load(sigmas + index)
                strength = multiplier * tl.load(strengths + index).to(tl.float64)
                factor = matrix_factor(sigma, tl.load(targets + index), strength, k, K)
                n = tl.load(m + OUTER) * tl.load(m + INNER)
                if not is_aligned(m, GRAD, GRAD_ROW_STRIDE, GRAD_TYPE):
                    _tile_gradient(m, tile, v, s, factor, GRAD_TYPE, ACCUMULATE, False,
                                   R_NARROW, BN_NARROW)  # fmt: skip
                elif n <= BN_NARROW:
                    _tile_gradient(m, tile, v, s, factor, GRAD_TYPE, ACCUMULATE, True,
                                   R_NARROW, BN_NARROW)  # fmt: skip
                else:
                    _tile_gradient(m, tile, v, s, factor, GRAD_TYPE, ACCUMULATE, True, R, BN)
        else:
            i = tile_index - n_tiles
            vector = vectors + i * VECTOR_FIELDS
            present = tl.load(vector + GRAD) != 0
            if present & (tl.load(vector + GRAD_DTYPE) == grad_dtype):
                strength = multiplier * tl.load(strengths + n_matrices + i).to(tl.float64)
                _vector_gradient(vector, norms + i, strength, k, DTYPE, GRAD_TYPE, K,
                                 ACCUMULATE, BN_SUM)  # fmt: skip

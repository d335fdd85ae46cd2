"""Rayleigh-Ritz and a new basis, for several vectors per matrix.

A program takes a matrix. Its small matrices [VECTORS, VECTORS] are float64; arrays of vectors lie
in memory as [VECTORS, n], one vector after the other, and are walked through BN columns at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .penalty import excess_of, residual_of
from .tables import (
    FIRST_TILE,
    INFINITY,
    INNER,
    MATRIX_FIELDS,
    N_TILES,
    OUTER,
    ROWS,
    S_OFFSET,
    T_OFFSET,
    TILE_FIELDS,
    V_OFFSET,
    inverse_power_of_two,
    penalties_of,
    takes_part,
    targets_of,
    whole_loads,
)

MAX_SWEEPS: tl.constexpr = tl.constexpr(20)
NEGLIGIBLE: tl.constexpr = tl.constexpr(
    1e-32
)  # square of an off-diagonal element, relative to the diagonal
ZERO: tl.constexpr = tl.constexpr(1e-12)  # of the largest eigenvalue: a smaller one is rounding
MAX_AMPLIFIED: tl.constexpr = tl.constexpr(1e5)  # of the rounding errors of a sum of vectors
SMALLEST_PIVOT: tl.constexpr = tl.constexpr(1e-10)  # of a unit vector's square


@triton.jit
def gram_of(x, stride, begin, end, VECTORS: tl.constexpr, BN: tl.constexpr):
    """Return x x^T in float64 over the columns from ``begin`` to ``end`` of vectors ``x``."""
    i = tl.arange(0, VECTORS)
    sums = tl.zeros([VECTORS, VECTORS, BN], tl.float64)
    for first in range(begin, end, BN):
        c = first + tl.arange(0, BN)
        block = x + (i[:, None] * stride + c[None, :])
        values = tl.load(block, mask=(c < end)[None, :], other=0.0).to(tl.float64)
        sums += values[:, None, :] * values[None, :, :]
    return tl.sum(sums, 2)


@triton.jit
def _product(a, b):
    """Return a b of small matrices."""
    return tl.sum(a[:, :, None] * b[None, :, :], 1)


@triton.jit
def _eigen(h, VECTORS: tl.constexpr):
    """Return eigenvalues of a symmetric ``h`` >= 0, largest first, and eigenvectors as rows.

    Jacobi rotations (Golub and Van Loan, "Matrix Computations", section 8.5), half as many as there
    are vectors at once: at step p those of i and i ^ p. Products that are zero are never rotated:
    vectors of zeros stay apart from others.
    """
    i = tl.arange(0, VECTORS)
    row, col = i[:, None], i[None, :]
    q = tl.where(row == col, 1.0, 0.0).to(tl.float64)
    values = tl.sum(tl.where(row == col, h, 0.0), 1)
    n_rotated = tl.full([], 1, tl.int32)
    sweep = tl.full([], 0, tl.int32)
    while (n_rotated > 0) & (sweep < MAX_SWEEPS):
        rotated = tl.full([VECTORS], 0, tl.int32)
        for p in range(1, VECTORS):
            other = i ^ p
            partner_row = tl.broadcast_to(other[:, None], h.shape)
            partner_col = tl.broadcast_to(other[None, :], h.shape)
            x = tl.sum(tl.where(partner_row == col, h, 0.0), 1)
            # The same number for both, whatever rounding has done to the two halves.
            x = tl.where(i < other, x, tl.gather(x, other, 0))
            theirs = tl.gather(values, other, 0)
            acts = (x != 0) & (x * x > tl.abs(values * theirs) * NEGLIGIBLE)
            rotated |= acts.to(tl.int32)
            theta = (theirs - values) / (2 * tl.where(acts, x, 1.0))
            sign = tl.where((theta > 0) | ((theta == 0) & (i < other)), 1.0, -1.0)
            tangent = sign / (tl.abs(theta) + tl.sqrt(theta * theta + 1))
            tangent = tl.where(acts, tangent, 0.0)
            cosine = 1 / tl.sqrt(tangent * tangent + 1)
            sine = tangent * cosine
            values -= tangent * x  # the diagonal of h, which is not kept there
            h = cosine[:, None] * h - sine[:, None] * tl.gather(h, partner_row, 0)
            h = cosine[None, :] * h - sine[None, :] * tl.gather(h, partner_col, 1)
            h = tl.where((partner_row == col) & acts[:, None], 0.0, h)
            q = cosine[:, None] * q - sine[:, None] * tl.gather(q, partner_row, 0)
        n_rotated = tl.sum(rotated, 0)
        sweep += 1
    is_before = (values[None, :] > values[:, None]) | (
        (values[None, :] == values[:, None]) & (col < row)
    )
    place = tl.sum(is_before.to(tl.int32), 1)
    sort = tl.where(place[None, :] == row, 1.0, 0.0).to(tl.float64)
    return tl.sum(sort * values[None, :], 1), _product(sort, q)


@triton.jit
def _basis(gram, mixed, VECTORS: tl.constexpr, WITH_SPARE: tl.constexpr):
    """Return coefficients over candidates of an orthonormal basis of them, by Gram-Schmidt.

    The candidates, unit vectors or zero, are given by their products ``gram`` alone. WITH_SPARE: if
    one of them depends on those before it, one of as many orthonormal spare vectors takes its
    place, if possible; ``mixed`` are the products of candidate and spare j, all others zero. If
    nothing is left, a row is zero. Also return the coefficients over spares.

    A basis is off by up to 1e-16 / SMALLEST_PIVOT; one of what it makes is off by rounding alone.
    """
    i = tl.arange(0, VECTORS)
    c = tl.zeros([VECTORS, VECTORS], tl.float64)
    products = tl.zeros([VECTORS, VECTORS], tl.float64)  # of the basis with the candidates
    c_spare = tl.zeros([VECTORS, VECTORS], tl.float64)
    products_spare = tl.zeros([VECTORS, VECTORS], tl.float64)
    for j in range(0, VECTORS):
        here = (i == j)[:, None]
        unit = tl.where(i == j, 1.0, 0.0).to(tl.float64)
        missing = tl.full([], 1, tl.int32)
        for turn in tl.static_range(2 if WITH_SPARE else 1):
            if missing > 0:
                tried = products if turn == 0 else products_spare
                along = tl.sum(tried * unit[None, :], 1)
                x = -tl.sum(along[:, None] * c, 0)
                y = tl.zeros_like(x)
                if WITH_SPARE:
                    y = -tl.sum(along[:, None] * c_spare, 0)
                if turn == 0:
                    x += unit
                else:
                    y += unit
                x_products = tl.sum(gram * x[None, :], 1) + mixed * y
                y_products = mixed * x + y
                pivot = tl.sum(x * x_products + y * y_products, 0)
                found = pivot > SMALLEST_PIVOT
                inverse = tl.where(found, 1 / tl.sqrt(tl.where(found, pivot, 1.0)), 0.0)
                c = tl.where(here, (x * inverse)[None, :], c)
                products = tl.where(here, (x_products * inverse)[None, :], products)
                if WITH_SPARE:
                    c_spare = tl.where(here, (y * inverse)[None, :], c_spare)
                    products_spare = tl.where(here, (y_products * inverse)[None, :], products_spare)
                missing = tl.where(found, 0, 1)
    return c, c_spare


@triton.jit
def _combine(c, x, n, VECTORS: tl.constexpr, BN: tl.constexpr):
    """Replace vectors ``x`` by c x."""
    i = tl.arange(0, VECTORS)
    for first in range(0, n, BN):
        column = first + tl.arange(0, BN)
        block = x + (i[:, None] * n + column[None, :])
        mask = tl.broadcast_to((column < n)[None, :], block.shape)
        old = tl.load(block, mask=mask, other=0.0).to(tl.float64)
        values = tl.sum(c[:, :, None] * old[None, :, :], 1)
        tl.debug_barrier()  # a thread may write what another one reads
        tl.store(block, values.to(tl.float32), mask=mask)


@triton.jit
def reduce_tiles(
    t, n_tiles, v, v_next, n, VECTORS: tl.constexpr, TOLERANCE: tl.constexpr, BN: tl.constexpr
):
    """Write the sum over tiles of t to v_next; with a tolerance, copy v_next to v first."""
    size = VECTORS * n
    if VECTORS % 4 == 0:
        size = whole_loads(size, tl.float32)
    for first in range(0, size, BN):
        c = first + tl.arange(0, BN)
        if TOLERANCE > 0:
            tl.store(v + c, tl.load(v_next + c, mask=c < size, other=0.0), mask=c < size)
        total = tl.zeros([BN], tl.float32)
        for i in range(0, n_tiles):
            total += tl.load(t + i * size + c, mask=c < size, other=0.0)
        tl.store(v_next + c, total, mask=c < size)
    tl.debug_barrier()  # another thread may have written what is read next


@triton.jit
def _new_vectors(ct, cv, q, v, v_next, n, good, VECTORS: tl.constexpr, BN: tl.constexpr):
    """Replace v_next by ct v_next + cv v if ``good``, else by q v; and v by q v."""
    i = tl.arange(0, VECTORS)
    n_sound = tl.where(good, n, 0)
    for first in range(0, n, BN):
        c = first + tl.arange(0, BN)
        offsets = i[:, None] * n + c[None, :]
        mask = tl.broadcast_to((c < n)[None, :], offsets.shape)
        x = tl.load(v + offsets, mask=mask, other=0.0).to(tl.float64)
        sound = tl.broadcast_to((c < n_sound)[None, :], offsets.shape)
        t = tl.load(v_next + offsets, mask=sound, other=0.0).to(tl.float64)
        turned = tl.sum(q[:, :, None] * x[None, :, :], 1)
        following = tl.sum(ct[:, :, None] * t[None, :, :] + cv[:, :, None] * x[None, :, :], 1)
        tl.debug_barrier()  # a thread may write what another one reads
        tl.store(v + offsets, turned.to(tl.float32), mask=mask)
        tl.store(v_next + offsets, tl.where(good, following, turned).to(tl.float32), mask=mask)
    tl.debug_barrier()


@triton.jit
def _iterate(
    m, tiles, first, n_tiles, t_partial, v, v_next, s, squares, q, scale, finite,
    VECTORS: tl.constexpr, TOLERANCE: tl.constexpr, BN_SUM: tl.constexpr, BN: tl.constexpr,
    BN_GRAM: tl.constexpr,
):  # fmt: skip
    """Turn v and s by ``q``, write the new basis to v_next; return the norms of the turned t."""
    i = tl.arange(0, VECTORS)
    eye = tl.where(i[:, None] == i[None, :], 1.0, 0.0).to(tl.float64)
    n = tl.load(m + OUTER) * tl.load(m + INNER)
    v_offset = tl.load(m + V_OFFSET)
    # A matrix without rows or columns has no tile; the table of tiles may be empty.
    t_offset = tl.load(tiles + first * TILE_FIELDS + T_OFFSET, mask=n_tiles > 0, other=0)
    if VECTORS % 4 == 0:  # they are multiples of four elements: loads may be wide
        v_offset, t_offset = whole_loads(v_offset, tl.float32), whole_loads(t_offset, tl.float32)
    v, v_next, t = v + v_offset, v_next + v_offset, t_partial + t_offset
    reduce_tiles(t, n_tiles, v, v_next, n, VECTORS, TOLERANCE, BN_SUM)
    gram = gram_of(v_next, n, 0, n, VECTORS, BN_GRAM)
    half = _product(q, gram)
    t_squares = tl.sum(half * q, 1)
    t_norms = tl.where(t_squares <= 0, 0.0, tl.sqrt(tl.where(t_squares <= 0, 0.0, t_squares)))
    # False for NaN.
    good = finite & (tl.sum(tl.where(tl.abs(t_squares) < INFINITY, 0, 1), 0) == 0)
    good &= tl.max(tl.where(i == 0, t_norms, 0.0), 0) > 0
    ct, cv = eye, eye
    if good:
        lengths = tl.sqrt(tl.sum(eye * gram, 1))
        reach = tl.sum(tl.abs(q) * lengths[None, :], 1)
        usable = (squares > tl.max(squares, 0) * ZERO) & (reach <= t_norms * MAX_AMPLIFIED)
        inverse = tl.where(usable, 1 / tl.where(usable, t_norms, 1.0), 0.0)
        products = tl.sum(half[:, None, :] * q[None, :, :], 2)
        products = products * inverse[:, None] * inverse[None, :]
        ct, cv = _basis(products, scale * squares * inverse, VECTORS, True)
        ct = _product(ct * inverse[None, :], q)
        cv = _product(cv, q)
    _new_vectors(ct, cv, q, v, v_next, n, good, VECTORS, BN)
    if finite:
        _combine(q, s + tl.load(m + S_OFFSET), tl.load(m + ROWS), VECTORS, BN)
        if good:
            # Rounded to float32, and where t was a small difference, they are not quite orthogonal.
            gram = gram_of(v_next, n, 0, n, VECTORS, BN_GRAM)
            c, _ = _basis(gram, tl.zeros_like(squares), VECTORS, False)
            _combine(c, v_next, n, VECTORS, BN)
    return t_norms


@triton.jit(
    do_not_specialize=["n_matrices", "n_elementwise", "k", "integer", "above"],
    do_not_specialize_on_alignment=["matrices", "tiles", "gram_partial", "s", "scalars"],
)
def ritz(
    matrices, tiles, t_partial, gram_partial, v, v_next, s, scalars, n_matrices, n_elementwise, k,
    integer, above,
    VECTORS: tl.constexpr, WITH_T: tl.constexpr, TOLERANCE: tl.constexpr,
    BN_SUM: tl.constexpr, BN: tl.constexpr, BN_GRAM: tl.constexpr,
):  # fmt: skip
    """Write sigmas and penalty of a matrix; with t its residuals, and turn v, s and v_next."""
    index = tl.program_id(0).to(tl.int64)
    m = matrices + index * MATRIX_FIELDS
    n_sigmas = VECTORS * n_matrices
    penalties = penalties_of(scalars, n_sigmas, n_elementwise)
    targets = targets_of(scalars, n_sigmas, n_matrices, n_elementwise)
    i = tl.arange(0, VECTORS)
    if takes_part(scalars, n_matrices, index, VECTORS, TOLERANCE):
        first, n_tiles = tl.load(m + FIRST_TILE), tl.load(m + N_TILES)
        part = gram_partial + first * VECTORS * VECTORS + i[:, None] * VECTORS + i[None, :]
        h = tl.zeros([VECTORS, VECTORS], tl.float64)
        for tile in range(0, n_tiles):
            h += tl.load(part + tile * VECTORS * VECTORS)
        trace = tl.sum(tl.sum(tl.where(i[:, None] == i[None, :], h, 0.0), 1), 0)
        finite = trace < INFINITY  # false for NaN
        # Nothing is turned where it is not.
        squares, q = _eigen(tl.where(finite, h, 0.0), VECTORS)
        known = squares > tl.max(squares, 0) * ZERO
        sigma = tl.where(known, tl.sqrt(tl.where(known, squares, 0.0)), 0.0)
        sigma = tl.where(finite, sigma, tl.sqrt(trace))
        scale = inverse_power_of_two(tl.load(scalars + index))
        tl.debug_barrier()  # a thread may write the new sigma where another one reads the old
        where = scalars + index + i * n_matrices
        tl.store(where, sigma.to(tl.float32))
        largest = tl.sum(tl.where(i == 0, sigma, 0.0), 0)
        excess = excess_of(largest, targets + index, k, integer, above)
        tl.store(penalties + index, (excess * excess).to(tl.float32))
        if WITH_T:
            t_norms = _iterate(m, tiles, first, n_tiles, t_partial, v, v_next, s, squares, q, scale,
                               finite, VECTORS, TOLERANCE, BN_SUM, BN, BN_GRAM)  # fmt: skip
            residual = residual_of(sigma, t_norms, scale)
            tl.store(where + VECTORS * n_matrices, residual.to(tl.float32))

"""S = V W^T and T = S W per tile for several vectors V, and the products S S^T.

As in gram_matvec.py, with one read of W from memory: if a row with the vectors and their t fits
into the registers of a program, a block of rows is loaded once; longer rows are read twice, the
second time from the second-level cache. A program takes GROUP of the VECTORS; the programs of a
tile's other vectors run beside it, so that they find its rows in that cache too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .elementwise import elementwise_norm
from .ritz import gram_of
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
    ROWS,
    TILE_FIELDS,
    TILE_MATRIX,
    WEIGHT,
    elements_of,
    inverse_power_of_two,
    is_aligned,
    load_block,
    norms_of,
    parts_of,
    penalties_of,
    takes_part,
)


@triton.jit
def operands(
    m, tile, first_vector, v, s, t_partial, DTYPE: tl.constexpr, LAYOUT: tl.constexpr
):  # fmt: skip
    """Return what elements_of and parts_of tell, from the first vector of a group on, and M."""
    elements = elements_of(m, WEIGHT, ROW_STRIDE, OUTER_STRIDE, DTYPE, LAYOUT)
    n = elements[4]
    v, s, t, row_begin, row_end = parts_of(m, tile, v, s, t_partial, LAYOUT)
    n_rows = tl.load(m + ROWS)
    v, t, s = v + first_vector * n, t + first_vector * n, s + first_vector * n_rows
    return elements, n, n_rows, v, s, t, row_begin, row_end


@triton.jit
def _short_rows(
    m, tile, first_vector, v, s, t_partial, scale,
    DTYPE: tl.constexpr, WITH_T: tl.constexpr, GROUP: tl.constexpr, LAYOUT: tl.constexpr,
    R: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Take blocks of R rows of n <= BN columns."""
    elements, n, n_rows, v, s, t, row_begin, row_end = operands(
        m, tile, first_vector, v, s, t_partial, DTYPE, LAYOUT
    )
    c = tl.arange(0, BN)
    inside = c < n
    x, totals = (), ()
    for j in tl.static_range(GROUP):
        x += (tl.load(v + j * n + c, mask=inside, other=0.0),)
        totals += (tl.zeros([BN], tl.float32),)
    for row in range(row_begin, row_end, R):
        r = row + tl.arange(0, R)
        rows = load_block(elements, r, row_end, c, LAYOUT)
        sums = ()
        for j in tl.static_range(GROUP):
            product = tl.sum(rows * x[j][None, :], 1)
            tl.store(s + j * n_rows + r, product, mask=r < row_end)
            total = totals[j]
            if WITH_T:
                scaled = (product.to(tl.float64) * scale).to(tl.float32)
                total += tl.sum(rows * scaled[:, None], 0)
            sums += (total,)
        totals = sums
    if WITH_T:
        for j in tl.static_range(GROUP):
            tl.store(t + j * n + c, totals[j], mask=inside)


@triton.jit
def _long_rows(
    m, tile, first_vector, v, s, t_partial, scale,
    DTYPE: tl.constexpr, WITH_T: tl.constexpr, GROUP: tl.constexpr, LAYOUT: tl.constexpr,
    R: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Take blocks of R rows, BN columns at a time, twice."""
    elements, n, n_rows, v, s, t, row_begin, row_end = operands(
        m, tile, first_vector, v, s, t_partial, DTYPE, LAYOUT
    )
    for row in range(row_begin, row_end, R):
        r = row + tl.arange(0, R)
        products = ()
        for _ in tl.static_range(GROUP):
            products += (tl.zeros([R], tl.float32),)
        for first in range(0, n, BN):
            c = first + tl.arange(0, BN)
            rows = load_block(elements, r, row_end, c, LAYOUT)
            sums = ()
            for j in tl.static_range(GROUP):
                x = tl.load(v + j * n + c, mask=c < n, other=0.0)
                sums += (products[j] + tl.sum(rows * x[None, :], 1),)
            products = sums
        scaled = ()
        for j in tl.static_range(GROUP):
            tl.store(s + j * n_rows + r, products[j], mask=r < row_end)
            scaled += ((products[j].to(tl.float64) * scale).to(tl.float32),)
        if WITH_T:
            for first in range(0, n, BN):
                c = first + tl.arange(0, BN)
                rows = load_block(elements, r, row_end, c, LAYOUT)
                for j in tl.static_range(GROUP):
                    part = tl.sum(rows * scaled[j][:, None], 0)
                    if row != row_begin:  # each thread reads what it wrote itself
                        part += tl.load(t + j * n + c, mask=c < n, other=0.0)
                    tl.store(t + j * n + c, part, mask=c < n)


@triton.jit
def store_gram(
    m, tile, s, gram_partial, tile_index, VECTORS: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Write S S^T of a tile."""
    _, s, _, row_begin, row_end = parts_of(m, tile, s, s, s, PLAIN)
    gram = gram_of(s, tl.load(m + ROWS), row_begin, row_end, VECTORS, BN)
    i, j = tl.arange(0, VECTORS)[:, None], tl.arange(0, VECTORS)[None, :]
    tl.store(gram_partial + (tile_index * VECTORS + i) * VECTORS + j, gram)


@triton.jit(
    do_not_specialize=["n_matrices", "n_tiles", "n_elementwise", "k", "integer", "above"],
    do_not_specialize_on_alignment=[
        "matrices", "tiles", "elementwise", "gram_partial", "s", "scalars",
    ],
)  # fmt: skip
def subspace_products(
    matrices, tiles, elementwise, t_partial, gram_partial, v, s, scalars,
    n_matrices, n_tiles, n_elementwise, k, integer, above,
    DTYPE: tl.constexpr, VECTORS: tl.constexpr, WITH_T: tl.constexpr,
    TOLERANCE: tl.constexpr, GROUP: tl.constexpr,
    R0: tl.constexpr, BN0: tl.constexpr, R1: tl.constexpr, BN1: tl.constexpr,
    R2: tl.constexpr, BN2: tl.constexpr, R_LONG: tl.constexpr, BN_LONG: tl.constexpr,
    R_ODD: tl.constexpr, BN_ODD: tl.constexpr, BN_GRAM: tl.constexpr, BN_VECTOR: tl.constexpr,
):  # fmt: skip
    """A program takes a tile and a group of vectors; the last ones take elementwise parameters.

    Sizes of blocks as in gram_matvec.
    """
    groups: tl.constexpr = VECTORS // GROUP
    program = tl.program_id(0)
    if program >= n_tiles * groups:
        i = program - n_tiles * groups
        n_sigmas = VECTORS * n_matrices
        norm = norms_of(scalars, n_sigmas) + i
        penalty = penalties_of(scalars, n_sigmas, n_elementwise) + n_matrices + i
        one = elementwise + i * ELEMENTWISE_FIELDS
        elementwise_norm(one, norm, penalty, k, integer, above, DTYPE, BN_VECTOR)
    else:
        tile_index = (program // groups).to(tl.int64)
        first = program % groups * GROUP
        tile = tiles + tile_index * TILE_FIELDS
        index = tl.load(tile + TILE_MATRIX)
        if takes_part(scalars, n_matrices, index, VECTORS, TOLERANCE):
            m = matrices + index * MATRIX_FIELDS
            scale = inverse_power_of_two(tl.load(scalars + index))
            outer = tl.load(m + OUTER)
            n = outer * tl.load(m + INNER)
            if not is_aligned(m, WEIGHT, ROW_STRIDE, DTYPE):
                if outer > 1:
                    _long_rows(m, tile, first, v, s, t_partial, scale, DTYPE, WITH_T, GROUP,
                               IN_PIECES, R_ODD, BN_ODD)  # fmt: skip
                else:
                    _long_rows(m, tile, first, v, s, t_partial, scale, DTYPE, WITH_T, GROUP,
                               PLAIN, R_ODD, BN_ODD)  # fmt: skip
            elif n <= BN0:
                _short_rows(
                    m, tile, first, v, s, t_partial, scale, DTYPE, WITH_T, GROUP, ALIGNED, R0, BN0
                )
            elif n <= BN1:
                _short_rows(
                    m, tile, first, v, s, t_partial, scale, DTYPE, WITH_T, GROUP, ALIGNED, R1, BN1
                )
            elif n <= BN2:
                _short_rows(
                    m, tile, first, v, s, t_partial, scale, DTYPE, WITH_T, GROUP, ALIGNED, R2, BN2
                )
            else:
                _long_rows(m, tile, first, v, s, t_partial, scale, DTYPE, WITH_T, GROUP, ALIGNED,
                           R_LONG, BN_LONG)  # fmt: skip
            if GROUP == VECTORS:
                tl.debug_barrier()  # another thread may have written what is read next
                store_gram(m, tile, s, gram_partial, tile_index, VECTORS, BN_GRAM)


@triton.jit(
    do_not_specialize=["n_matrices"],
    do_not_specialize_on_alignment=["matrices", "tiles", "gram_partial", "s", "scalars"],
)
def subspace_grams(
    matrices, tiles, gram_partial, s, scalars, n_matrices,
    VECTORS: tl.constexpr, TOLERANCE: tl.constexpr, BN_GRAM: tl.constexpr,
):  # fmt: skip
    """Write S S^T of each tile, whose S several programs have written."""
    tile_index = tl.program_id(0).to(tl.int64)
    tile = tiles + tile_index * TILE_FIELDS
    index = tl.load(tile + TILE_MATRIX)
    if takes_part(scalars, n_matrices, index, VECTORS, TOLERANCE):
        m = matrices + index * MATRIX_FIELDS
        store_gram(m, tile, s, gram_partial, tile_index, VECTORS, BN_GRAM)

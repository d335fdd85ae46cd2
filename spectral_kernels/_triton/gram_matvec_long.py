"""What gram_matvec does, of rows too long for its programs: more threads take one at a time.

A launch of its own, since the number of threads is one for all programs of a launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gram_matvec import short_rows
from .tables import (
    ALIGNED,
    INNER,
    MATRIX_FIELDS,
    OUTER,
    ROW_STRIDE,
    S_OFFSET,
    TILE_FIELDS,
    TILE_MATRIX,
    V_OFFSET,
    WEIGHT,
    inverse_power_of_two,
    is_aligned,
    takes_part,
)


@triton.jit(
    do_not_specialize=["n_matrices"],
    do_not_specialize_on_alignment=["matrices", "tiles", "gram_partial", "s", "scalars"],
)
def gram_matvec_long(
    matrices, tiles, t_partial, gram_partial, v, s, scalars, n_matrices,
    DTYPE: tl.constexpr, WITH_T: tl.constexpr, TOLERANCE: tl.constexpr,
    SHORTEST: tl.constexpr, BN: tl.constexpr, WIDTHS: tl.constexpr, AHEAD: tl.constexpr,
    PIECE: tl.constexpr,
):  # fmt: skip
    """Program i takes tile i if its rows are aligned and longer than SHORTEST, or does nothing.

    They have at most BN columns, or twice as many and so on WIDTHS - 1 times; AHEAD is for those of
    up to AHEAD columns.
    """
    program = tl.program_id(0)
    tile = tiles + program.to(tl.int64) * TILE_FIELDS
    index = tl.load(tile + TILE_MATRIX)
    m = matrices + index * MATRIX_FIELDS
    n = tl.load(m + OUTER) * tl.load(m + INNER)
    here = (n > SHORTEST) & (n <= BN * 2 ** (WIDTHS - 1)) & is_aligned(m, WEIGHT, ROW_STRIDE, DTYPE)
    if here and takes_part(scalars, n_matrices, index, 1, TOLERANCE):
        v_offset, s_offset = tl.load(m + V_OFFSET), tl.load(m + S_OFFSET)
        scale = inverse_power_of_two(tl.load(scalars + index))
        squares = tl.full([], 0.0, tl.float64)
        for i in tl.static_range(WIDTHS):
            if (n <= BN * 2**i) & ((n > BN * 2**i // 2) | (i == 0)):
                squares = short_rows(
                    m, tile, v, s, t_partial, v_offset, s_offset, scale, DTYPE, WITH_T, ALIGNED,
                    1, BN * 2**i, PIECE, BN * 2**i <= AHEAD,
                )  # fmt: skip
        tl.store(gram_partial + program, squares)

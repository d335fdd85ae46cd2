"""Sums over the tiles of a matrix with one vector, a chunk of its columns at a time.

There may be thousands of tiles, so many programs share a matrix. Every sum has a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tables import (
    CHUNK_BEGIN,
    CHUNK_COLUMNS,
    CHUNK_FIELDS,
    CHUNK_MATRIX,
    FIRST_TILE,
    INNER,
    MATRIX_FIELDS,
    N_TILES,
    OUTER,
    T_OFFSET,
    TILE_FIELDS,
    V_OFFSET,
    whole_loads,
)


@triton.jit
def ordered_sum(x, first, n):
    """Return the sum of ``n`` float64 numbers from x[first] on."""
    total = tl.zeros([256], tl.float64)
    for begin in range(0, n, 256):
        i = begin + tl.arange(0, 256)
        total += tl.load(x + first + i, mask=i < n, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def sum_of_squares(m, gram_partial):
    """Return the sum of the squares of s over the tiles of a matrix."""
    return ordered_sum(gram_partial, tl.load(m + FIRST_TILE), tl.load(m + N_TILES))


@triton.jit
def _sum_tiles(t, n, n_tiles, c, TILES: tl.constexpr):
    """Return columns ``c`` of t summed over the tiles, TILES at a time."""
    total = tl.zeros([TILES, CHUNK_COLUMNS], tl.float32)
    for first in range(0, n_tiles, TILES):
        i = first + tl.arange(0, TILES)
        mask = (i < n_tiles)[:, None] & (c < n)[None, :]
        total += tl.load(t + (i[:, None] * n + c[None, :]), mask=mask, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def sum_chunk(m, tiles, t_partial, begin, TILES: tl.constexpr):
    """Return the columns of the chunk that begins at ``begin``, and t summed over the tiles."""
    first, n_tiles = tl.load(m + FIRST_TILE), tl.load(m + N_TILES)
    n = tl.load(m + OUTER) * tl.load(m + INNER)
    # A matrix without rows or columns has no tile; the table of tiles may be empty.
    t_offset = tl.load(tiles + first * TILE_FIELDS + T_OFFSET, mask=n_tiles > 0, other=0)
    c = whole_loads(begin, tl.float32) + tl.arange(0, CHUNK_COLUMNS)
    if n % 4 == 0:
        t = t_partial + whole_loads(t_offset, tl.float32)
        total = _sum_tiles(t, whole_loads(n, tl.float32), n_tiles, c, TILES)
    else:
        total = _sum_tiles(t_partial + t_offset, n, n_tiles, c, TILES)
    return c, total


@triton.jit(
    do_not_specialize_on_alignment=["matrices", "tiles", "chunks", "gram_partial", "gram"],
)
def collect_chunks(
    matrices, tiles, chunks, t_partial, gram_partial, t, gram,
    WITH_T: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Each program sums t of a chunk; the first one of a matrix also sums the squares of s."""
    chunk = chunks + tl.program_id(0).to(tl.int64) * CHUNK_FIELDS
    index, begin = tl.load(chunk + CHUNK_MATRIX), tl.load(chunk + CHUNK_BEGIN)
    m = matrices + index * MATRIX_FIELDS
    if WITH_T:
        c, total = sum_chunk(m, tiles, t_partial, begin, TILES)
        n = tl.load(m + OUTER) * tl.load(m + INNER)
        tl.store(t + tl.load(m + V_OFFSET) + c, total, mask=c < n)
    if begin == 0:
        tl.store(gram + index, sum_of_squares(m, gram_partial))

"""Fields of the tables, parts of the scalars, and arithmetic that the kernels share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...tables import schema

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _field(struct, name: str) -> tl.constexpr:
    """Return the place of a field among those of a row."""
    return tl.constexpr(struct.names.index(name))


WEIGHT: tl.constexpr = _field(schema.MATRIX, "weight")
GRAD: tl.constexpr = _field(schema.MATRIX, "grad")
GRAD_DTYPE: tl.constexpr = _field(schema.MATRIX, "grad_dtype")
ROWS: tl.constexpr = _field(schema.MATRIX, "rows")
OUTER: tl.constexpr = _field(schema.MATRIX, "outer")
INNER: tl.constexpr = _field(schema.MATRIX, "inner")
ROW_STRIDE: tl.constexpr = _field(schema.MATRIX, "row_stride")
OUTER_STRIDE: tl.constexpr = _field(schema.MATRIX, "outer_stride")
GRAD_ROW_STRIDE: tl.constexpr = _field(schema.MATRIX, "grad_row_stride")
GRAD_OUTER_STRIDE: tl.constexpr = _field(schema.MATRIX, "grad_outer_stride")
V_OFFSET: tl.constexpr = _field(schema.MATRIX, "v_offset")
S_OFFSET: tl.constexpr = _field(schema.MATRIX, "s_offset")
FIRST_TILE: tl.constexpr = _field(schema.MATRIX, "first_tile")
N_TILES: tl.constexpr = _field(schema.MATRIX, "n_tiles")
REACH: tl.constexpr = _field(schema.MATRIX, "reach")
MATRIX_FIELDS: tl.constexpr = tl.constexpr(len(schema.MATRIX))
TILE_MATRIX: tl.constexpr = _field(schema.TILE, "matrix")
ROW_BEGIN: tl.constexpr = _field(schema.TILE, "row_begin")
ROW_END: tl.constexpr = _field(schema.TILE, "row_end")
T_OFFSET: tl.constexpr = _field(schema.TILE, "t_offset")
TILE_FIELDS: tl.constexpr = tl.constexpr(len(schema.TILE))
CHUNK_MATRIX: tl.constexpr = _field(schema.CHUNK, "matrix")
CHUNK_BEGIN: tl.constexpr = _field(schema.CHUNK, "begin")
CHUNK_FIELDS: tl.constexpr = tl.constexpr(len(schema.CHUNK))
CHUNK_COLUMNS: tl.constexpr = tl.constexpr(schema.CHUNK_COLUMNS)
CHANNELS: tl.constexpr = _field(schema.OPERATOR, "channels")
CHANNEL_STRIDE: tl.constexpr = _field(schema.OPERATOR, "channel_stride")
FIRST_TAP: tl.constexpr = _field(schema.OPERATOR, "first_tap")
N_TAPS: tl.constexpr = _field(schema.OPERATOR, "n_taps")
COUNT_0: tl.constexpr = _field(schema.OPERATOR, "count_0")
OPERATOR_FIELDS: tl.constexpr = tl.constexpr(len(schema.OPERATOR))
COLUMN: tl.constexpr = _field(schema.TAP, "column")
IS_LAST: tl.constexpr = _field(schema.TAP, "is_last")
NUMBER_0: tl.constexpr = _field(schema.TAP, "number_0")
NEXT_0: tl.constexpr = _field(schema.TAP, "next_0")
TAP_FIELDS: tl.constexpr = tl.constexpr(len(schema.TAP))
# WEIGHT, GRAD and GRAD_DTYPE are the same of a matrix and of what is elementwise.
SIZE: tl.constexpr = _field(schema.ELEMENTWISE, "size")
KIND: tl.constexpr = _field(schema.ELEMENTWISE, "kind")
LENGTH: tl.constexpr = _field(schema.ELEMENTWISE, "length")
TARGETS: tl.constexpr = _field(schema.ELEMENTWISE, "targets")
ELEMENTWISE_FIELDS: tl.constexpr = tl.constexpr(len(schema.ELEMENTWISE))
GAIN: tl.constexpr = tl.constexpr(schema.KINDS["gain"])
ROWS_KIND: tl.constexpr = tl.constexpr(schema.KINDS["rows"])
FIRST: tl.constexpr = _field(schema.MOMENT, "first")
SECOND: tl.constexpr = _field(schema.MOMENT, "second")
PARAMETER: tl.constexpr = _field(schema.MOMENT, "parameter")
GROUP: tl.constexpr = _field(schema.MOMENT, "group")
MOMENT_FIELDS: tl.constexpr = tl.constexpr(len(schema.MOMENT))
LR: tl.constexpr = _field(schema.GROUP, "lr")
WEIGHT_DECAY: tl.constexpr = _field(schema.GROUP, "weight_decay")
OPTION_1: tl.constexpr = _field(schema.GROUP, "option_1")  # beta1 or momentum
OPTION_2: tl.constexpr = _field(schema.GROUP, "option_2")  # beta2 or dampening
EPS: tl.constexpr = _field(schema.GROUP, "eps")
NESTEROV: tl.constexpr = _field(schema.GROUP, "nesterov")
GROUP_FIELDS: tl.constexpr = tl.constexpr(len(schema.GROUP))
ADAMW: tl.constexpr = tl.constexpr(schema.RULES["adamw"])
# DECOUPLED: 0, the penalty is in the gradient; or it pulls the weights; or a constraint holds them.
PULLED: tl.constexpr = tl.constexpr(1)
CAP: tl.constexpr = tl.constexpr(1 + schema.CONSTRAINTS["cap"])
SPHERE: tl.constexpr = tl.constexpr(1 + schema.CONSTRAINTS["sphere"])

# How the elements of a row lie: in pieces, one after the other, or so that loads may be wide.
IN_PIECES: tl.constexpr = tl.constexpr(0)
PLAIN: tl.constexpr = tl.constexpr(1)
ALIGNED: tl.constexpr = tl.constexpr(2)

ALIGNMENT: tl.constexpr = tl.constexpr(16)  # maximum bytes of one load
INFINITY: tl.constexpr = tl.constexpr(float("inf"))


@triton.jit
def power(x, k, n):
    """Return x^k in float64 for x >= 0; n = k where that is a small integer, else below zero."""
    if n >= 0:
        result = tl.where(n > 0, x, 1.0).to(tl.float64)
        for _ in range(1, n):
            result = result * x
    else:
        result = tl.exp2(tl.log2(x) * k)
    return result


@triton.jit
def inverse_power_of_two(sigma):
    """Return 2^-e for sigma = m * 2^e in float64; 1 where sigma is zero or not finite.

    s is multiplied by it before it goes into t, so that t neither overflows nor vanishes.
    """
    wide = sigma.to(tl.float64)
    exponent = ((wide.to(tl.int64, bitcast=True) >> 52) & 0x7FF) - 1023
    scale = ((1023 - exponent) << 52).to(tl.float64, bitcast=True)
    known = (wide > 0) & (wide < INFINITY) & (exponent > -1022)
    return tl.where(known, scale, 1.0)


@triton.jit
def factors_of(scale):
    """Return two float32 numbers whose product is ``scale``, a power of two from 2^-128 to 2^149.

    The product itself may not be a float32 number.
    """
    exponent = (scale.to(tl.int64, bitcast=True) >> 52) - 1023
    first = exponent // 2
    second = exponent - first
    return (
        ((first + 1023) << 52).to(tl.float64, bitcast=True).to(tl.float32),
        ((second + 1023) << 52).to(tl.float64, bitcast=True).to(tl.float32),
    )


# Parts of the scalars of a state, in the order of schema.SCALARS, after the sigmas. With r vectors,
# n_sigmas is r times the number of matrices.


@triton.jit
def residuals_of(scalars, n_sigmas):
    """Return where the residuals start, [n_sigmas]."""
    return scalars + n_sigmas


@triton.jit
def norms_of(scalars, n_sigmas):
    """Return where the norms of what is elementwise start, [n_elementwise]."""
    return scalars + 2 * n_sigmas


@triton.jit
def penalties_of(scalars, n_sigmas, n_elementwise):
    """Return where the raw penalties start, [n_matrices + n_elementwise]."""
    return scalars + 2 * n_sigmas + n_elementwise


@triton.jit
def strengths_of(scalars, n_sigmas, n_matrices, n_elementwise):
    """Return where the strengths start, [n_matrices + n_elementwise]."""
    return scalars + 2 * n_sigmas + n_elementwise + n_matrices + n_elementwise


@triton.jit
def targets_of(scalars, n_sigmas, n_matrices, n_elementwise):
    """Return where the targets start, [n_matrices]."""
    n_entries = n_matrices + n_elementwise
    return scalars + 2 * n_sigmas + n_elementwise + 2 * n_entries


@triton.jit
def takes_part(scalars, n_matrices, index, VECTORS: tl.constexpr, TOLERANCE: tl.constexpr):
    """Return whether a call is about a matrix: always without a tolerance, else if it is stale."""
    stale = TOLERANCE == 0
    if TOLERANCE > 0:
        sigma = tl.load(scalars + index).to(tl.float64)
        stale = (
            tl.load(residuals_of(scalars, VECTORS * n_matrices) + index).to(tl.float64)
            > TOLERANCE * sigma
        )
    return stale


@triton.jit
def columns_of(c, inner, outer_stride, LAYOUT: tl.constexpr):
    """Return where columns ``c`` lie in a row, which may consist of pieces of ``inner`` elements.

    Contiguous columns are returned unchanged: the compiler sees that loads can be coalesced.
    """
    columns = c
    if LAYOUT == IN_PIECES:
        columns = (c // inner) * outer_stride + c % inner
    return columns


@triton.jit
def elements_of(
    m, ADDRESS: tl.constexpr, ROW_STRIDE_FIELD: tl.constexpr, OUTER_STRIDE_FIELD: tl.constexpr,
    DTYPE: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Return pointer, row stride, inner size, outer stride and number of columns of a matrix.

    Of ALIGNED rows (see is_aligned) in a form that shows the compiler that loads may be wide.
    """
    first = tl.load(m + ADDRESS).to(tl.pointer_type(DTYPE))
    row_stride, inner = tl.load(m + ROW_STRIDE_FIELD), tl.load(m + INNER)
    n = tl.load(m + OUTER) * inner
    if LAYOUT == ALIGNED:
        first = tl.multiple_of(first, ALIGNMENT)
        row_stride = whole_loads(row_stride, DTYPE)
        n = whole_loads(n, DTYPE)
    return first, row_stride, inner, tl.load(m + OUTER_STRIDE_FIELD), n


@triton.jit
def block_of(elements, r, row_end, c, LAYOUT: tl.constexpr):
    """Return offsets from the first element for rows ``r`` and columns ``c``, and which exist.

    ``elements`` is what elements_of returned; the tile ends before row ``row_end``.
    """
    _, row_stride, inner, outer_stride, n = elements
    columns = columns_of(c, inner, outer_stride, LAYOUT)
    mask = (r < row_end)[:, None] & (c < n)[None, :]
    offsets = r[:, None] * row_stride + columns[None, :]
    return offsets, mask


@triton.jit
def load_block(elements, r, row_end, c, LAYOUT: tl.constexpr):
    """Return the elements in rows ``r`` and columns ``c``, float32, zero where there are none."""
    offsets, mask = block_of(elements, r, row_end, c, LAYOUT)
    return tl.load(elements[0] + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def parts_at(tile, v, s, t_partial, v_offset, s_offset, LAYOUT: tl.constexpr):
    """Return v and s of a matrix from its offsets, t, first row and end of a tile of it."""
    t_offset = tl.load(tile + T_OFFSET)
    if LAYOUT == ALIGNED:  # those of rows that are a multiple of four numbers are that too
        v_offset, t_offset = whole_loads(v_offset, tl.float32), whole_loads(t_offset, tl.float32)
    begin, end = tl.load(tile + ROW_BEGIN), tl.load(tile + ROW_END)
    return v + v_offset, s + s_offset, t_partial + t_offset, begin, end


@triton.jit
def parts_of(m, tile, v, s, t_partial, LAYOUT: tl.constexpr):
    """Return v and s of a matrix, t, first row and end of a tile of it."""
    v_offset, s_offset = tl.load(m + V_OFFSET), tl.load(m + S_OFFSET)
    return parts_at(tile, v, s, t_partial, v_offset, s_offset, LAYOUT)


@triton.jit
def is_aligned(m, ADDRESS: tl.constexpr, ROW_STRIDE_FIELD: tl.constexpr, DTYPE: tl.constexpr):
    """Return whether every row starts and ends at a multiple of ALIGNMENT bytes."""
    per_load: tl.constexpr = ALIGNMENT // (DTYPE.primitive_bitwidth // 8)
    outer = tl.load(m + OUTER)
    whole = (tl.load(m + ROW_STRIDE_FIELD) % per_load == 0) & (
        outer * tl.load(m + INNER) % per_load == 0
    )
    return (outer == 1) & (tl.load(m + ADDRESS) % ALIGNMENT == 0) & whole


@triton.jit
def whole_loads(n, DTYPE: tl.constexpr):
    """Return ``n``, a multiple of the elements of one load, in a form that shows it is one.

    A hint of tl.multiple_of is lost on arguments of inlined functions.
    """
    per_load: tl.constexpr = ALIGNMENT // (DTYPE.primitive_bitwidth // 8)
    return n // per_load * per_load

"""Norm, penalty and gradient of elementwise parameters, a program for each.

Rows are taken BN at a time, a lane for each, if they are short, and else one after the other, with
BN lanes along the row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .penalty import capped_factor, held_factor, matrix_factor, pulled, shift_factor
from .tables import CAP, GAIN, KIND, LENGTH, PULLED, ROWS_KIND, SIZE, TARGETS, WEIGHT, power

SHORT_ROW: tl.constexpr = tl.constexpr(256)  # elements of a row that one lane takes


@triton.jit
def targets_at(vector):
    """Return where the targets of an elementwise parameter are, and whether it has any."""
    address = tl.load(vector + TARGETS)
    return address.to(tl.pointer_type(tl.float32)), (address != 0) & (tl.load(vector + SIZE) > 0)


@triton.jit
def gain_targets(vector, c, mask):
    """Return the targets of elements ``c`` of a gain, float64."""
    targets, present = targets_at(vector)
    mask = tl.where(present, mask, False)
    return tl.load(targets + c, mask=mask, other=1.0).to(tl.float64)


@triton.jit
def elementwise_gradient(vector, value, c, mask, gain, factor, strength, k, integer, above):
    """Return the gradient at elements ``c`` of a gain or of a shift, ``value``, float64."""
    result = factor * value
    if gain:
        magnitude = tl.abs(value)
        least = power(gain_targets(vector, c, mask), k, integer)
        slope = pulled(power(magnitude, k, integer) - least, above)
        slope = slope * power(magnitude, k - 1, integer - 1)
        pull = 2 * k * strength * slope * tl.where(value > 0, 1.0, -1.0)
        result = tl.where(value == 0, 0.0, pull)
    return result


@triton.jit
def shift_of(vector, norm, strength, k, integer, above):
    """Return the factor of a shift of that norm, and by what the step may shorten it at most."""
    targets, present = targets_at(vector)
    target = tl.load(targets, mask=present, other=0.0)
    factor = tl.where(
        present,
        matrix_factor(norm, target, strength, k, integer, above),
        shift_factor(norm, strength, k, integer),
    )
    wide = norm.to(tl.float64)
    most = tl.abs(wide - target.to(tl.float64)) / tl.where(wide == 0, 1.0, wide)
    return factor, tl.where(present, most, 1.0)


@triton.jit
def held_elements(vector, value, norm, c, mask, gain, strength, above, DECOUPLED: tl.constexpr):
    """Return what a constraint takes from elements ``c`` of a gain or of a shift, ``value``."""
    targets, present = targets_at(vector)
    target = tl.load(targets, mask=present, other=0.0)
    factor = tl.where(present, held_factor(norm, target, strength, above | 1), 0.0)
    result = tl.where(factor == 0, 0.0, factor * value)
    if gain:
        bound = gain_targets(vector, c, mask)
        own = held_factor(tl.abs(value), bound, strength, above | (DECOUPLED == CAP))
        result = tl.where(own == 0, 0.0, own * value)
    return result


@triton.jit
def lanes_of(vector, BN: tl.constexpr):
    """Return number and length of rows, row and column of each lane, and the steps of both."""
    length = tl.load(vector + LENGTH)
    n_rows = tl.load(vector + SIZE) // tl.maximum(length, 1)
    lane, short = tl.arange(0, BN), length <= SHORT_ROW
    row, column = tl.where(short, lane, 0), tl.where(short, 0, lane)
    return n_rows, length, row, column, tl.where(short, BN, 1), tl.where(short, 1, BN)


@triton.jit
def row_squares(x, r, column, column_step, n_rows, length, BN: tl.constexpr):
    """Return the sums of squares of rows ``r``, float64, one per lane."""
    squares = tl.zeros([BN], tl.float64)
    for first in range(0, length, column_step):
        c = first + column
        mask = (r < n_rows) & (c < length)
        value = tl.load(x + r * length + c, mask=mask, other=0.0).to(tl.float64)
        squares += value * value
    return tl.where(column_step == 1, squares, tl.sum(squares, 0))


@triton.jit
def row_factors(
    vector, squares, r, n_rows, strength, k, integer, above, lr, DECOUPLED: tl.constexpr
):
    """Return what rows ``r`` are multiplied by, capped for steps of ``lr`` (0: not), or held."""
    targets, _ = targets_at(vector)
    target = tl.load(targets + r, mask=r < n_rows, other=0.0)
    norm = tl.sqrt(squares)
    if DECOUPLED > PULLED:
        held = held_factor(norm, target, strength, above | (DECOUPLED == CAP))
        return tl.where(target == 0, 0.0, held)  # biases, which have no bound
    factor = matrix_factor(norm, target, strength, k, integer, above)
    return capped_factor(factor, norm, target, lr, 1)


@triton.jit
def rows_norm(vector, norm, penalty, k, integer, above, DTYPE: tl.constexpr, BN: tl.constexpr):
    """Write the largest norm of a row, and the raw penalty of all rows."""
    x = tl.load(vector + WEIGHT).to(tl.pointer_type(DTYPE))
    targets, _ = targets_at(vector)
    n_rows, length, row, column, row_step, column_step = lanes_of(vector, BN)
    # Of a long row, which all lanes have, the first one counts.
    counts = (column_step == 1) | (tl.arange(0, BN) == 0)
    largest = tl.zeros([BN], tl.float64)
    excesses = tl.zeros([BN], tl.float64)
    for first in range(0, n_rows, row_step):
        r = first + row
        own = tl.sqrt(row_squares(x, r, column, column_step, n_rows, length, BN))
        target = tl.load(targets + r, mask=r < n_rows, other=0.0).to(tl.float64)
        excess = pulled(power(own, k, integer) - power(target, k, integer), above)
        excesses += tl.where(counts & (r < n_rows), excess * excess, 0.0)
        largest = tl.where((own > largest) | (own != own), own, largest)
    is_nan = largest != largest
    # NaN if one of them is.
    most = tl.max(tl.where(is_nan, 0.0, largest), 0) + tl.sum(tl.where(is_nan, largest, 0.0), 0)
    tl.store(norm, most.to(tl.float32))
    tl.store(penalty, tl.sum(excesses, 0).to(tl.float32))


@triton.jit
def elementwise_norm(
    vector, norm, penalty, k, integer, above, DTYPE: tl.constexpr, BN: tl.constexpr
):
    """Write norm and raw penalty of the elementwise parameter in a row of the table."""
    if tl.load(vector + KIND) == ROWS_KIND:
        rows_norm(vector, norm, penalty, k, integer, above, DTYPE, BN)
    else:
        x = tl.load(vector + WEIGHT).to(tl.pointer_type(DTYPE))
        size, gain = tl.load(vector + SIZE), tl.load(vector + KIND) == GAIN
        squares = tl.zeros([BN], tl.float64)
        excesses = tl.zeros([BN], tl.float64)
        for first in range(0, size, BN):
            c = first + tl.arange(0, BN)
            value = tl.load(x + c, mask=c < size, other=0.0).to(tl.float64)
            squares += value * value
            if gain:
                excesses += gain_excesses(vector, value, c, c < size, k, integer, above)
        store_norm(vector, norm, penalty, squares, excesses, k, integer, above)


@triton.jit
def gain_excesses(vector, value, c, mask, k, integer, above):
    """Return (|g|^k - tau^k)^2 of elements ``c`` of a gain, which are ``value``."""
    least = power(gain_targets(vector, c, mask), k, integer)
    excess = tl.where(mask, pulled(power(tl.abs(value), k, integer) - least, above), 0.0)
    return excess * excess


@triton.jit
def store_norm(vector, norm, penalty, squares, excesses, k, integer, above):
    """Write norm and raw penalty from sums of x^2 and, for gains, of the excesses."""
    total = tl.sum(squares, 0)
    root = tl.sqrt(total)
    tl.store(norm, root.to(tl.float32))
    targets, present = targets_at(vector)
    target = tl.load(targets, mask=present, other=0.0).to(tl.float64)
    excess = pulled(power(root, k, integer) - power(target, k, integer), above)
    shift = tl.where(present, excess * excess, power(total, k, integer))
    gain = tl.load(vector + KIND) == GAIN
    tl.store(penalty, tl.where(gain, tl.sum(excesses, 0), shift).to(tl.float32))

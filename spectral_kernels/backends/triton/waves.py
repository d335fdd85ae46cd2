"""The next v of convolutions as operators; see backends/operators.py for the mathematics.

A program takes an operator: it sums t over the tiles, then passes over the channels, BC at a time,
and their taps: for the frequency of v, for ||A||^2 and its derivatives, up to twice for ||A||^2
after a step of Newton's, and to write v_next. A frequency is a complex number of length one per
dimension, whose powers are the waves of the taps. Sums are float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .penalty import excess_of, residual_of
from .ritz import reduce_tiles
from .tables import (
    CHANNEL_STRIDE,
    CHANNELS,
    COLUMN,
    COUNT_0,
    FIRST_TAP,
    FIRST_TILE,
    INFINITY,
    INNER,
    IS_LAST,
    MATRIX_FIELDS,
    N_TAPS,
    N_TILES,
    NEXT_0,
    NUMBER_0,
    OPERATOR_FIELDS,
    OUTER,
    T_OFFSET,
    TAP_FIELDS,
    TILE_FIELDS,
    V_OFFSET,
    inverse_power_of_two,
    penalties_of,
    takes_part,
    targets_of,
)

HALF_PI: tl.constexpr = tl.constexpr(1.57079632679489661923)


@triton.jit
def _power(re, im, n):
    """Return the n-th power of a complex number, n >= 0."""
    x, y = re * 0 + 1, im * 0
    while n > 0:
        is_odd = n % 2 == 1
        x, y = tl.where(is_odd, x * re - y * im, x), tl.where(is_odd, x * im + y * re, y)
        re, im = re * re - im * im, 2 * re * im
        n = n // 2
    return x, y


@triton.jit
def _wave(tap, theta):
    """Return the wave of a tap, e^(i q theta)."""
    x, y = _power(theta[0], theta[1], tl.load(tap + NUMBER_0))
    for d in tl.static_range(1, 3):
        re, im = _power(theta[2 * d], theta[2 * d + 1], tl.load(tap + NUMBER_0 + d))
        x, y = x * re - y * im, x * im + y * re
    return x, y


@triton.jit
def _numbers(x, n, tap, c, channels, stride):
    """Return real and imaginary parts at a tap of channels ``c``, float64."""
    place = x + c * stride + tl.load(tap + COLUMN)
    re = tl.load(place, mask=c < channels, other=0.0).to(tl.float64)
    return re, tl.load(place + n, mask=c < channels, other=0.0).to(tl.float64)


@triton.jit
def _turned(x, n, tap, theta, c, channels, stride):
    """Return the numbers at a tap times the conjugate of its wave."""
    re, im = _numbers(x, n, tap, c, channels, stride)
    wave_re, wave_im = _wave(tap, theta)
    return re * wave_re + im * wave_im, im * wave_re - re * wave_im


@triton.jit
def _along(x, n, taps, n_taps, channels, stride, D: tl.constexpr, BC: tl.constexpr):
    """Return e^(i theta) of vector ``x`` along a dimension, 1 where it does not depend on it."""
    sum_re = tl.zeros([BC], tl.float64)
    sum_im = tl.zeros([BC], tl.float64)
    for first in range(0, channels, BC):
        c = first + tl.arange(0, BC)
        for i in range(0, n_taps):
            tap = taps + i * TAP_FIELDS
            step = tl.load(tap + NEXT_0 + D)
            if step > 0:
                a, b = _numbers(x, n, tap, c, channels, stride)
                re, im = _numbers(x + step, n, tap, c, channels, stride)
                sum_re += a * re + b * im
                sum_im += a * im - b * re
    re, im = tl.sum(sum_re, 0), tl.sum(sum_im, 0)
    length = tl.sqrt(re * re + im * im)
    known = length > 0
    length = tl.where(known, length, 1.0)
    return tl.where(known, re / length, 1.0), tl.where(known, im / length, 0.0)


@triton.jit
def _square(t, n, taps, n_taps, channels, stride, theta, BC: tl.constexpr):
    """Return ||A||^2."""
    total = tl.zeros([BC], tl.float64)
    for first in range(0, channels, BC):
        c = first + tl.arange(0, BC)
        re = tl.zeros([BC], tl.float64)
        im = tl.zeros([BC], tl.float64)
        for i in range(0, n_taps):
            tap = taps + i * TAP_FIELDS
            x, y = _turned(t, n, tap, theta, c, channels, stride)
            re += x
            im += y
            if tl.load(tap + IS_LAST) != 0:
                total += re * re + im * im
                re = tl.zeros([BC], tl.float64)
                im = tl.zeros([BC], tl.float64)
    return tl.sum(total, 0)


@triton.jit
def _derivatives(
    t, n, taps, n_taps, channels, stride, theta, J: tl.constexpr, K: tl.constexpr, BC: tl.constexpr
):
    """Return the derivatives of ||A||^2 by dimension J, and by J and K.

    A is a sum of y over the taps of a phase: its derivatives are -i sum of q y and -sum of q q y.
    """
    gradient = tl.zeros([BC], tl.float64)
    hessian = tl.zeros([BC], tl.float64)
    for first in range(0, channels, BC):
        c = first + tl.arange(0, BC)
        re = tl.zeros([BC], tl.float64)
        im = tl.zeros([BC], tl.float64)
        re_j = tl.zeros([BC], tl.float64)
        im_j = tl.zeros([BC], tl.float64)
        re_k = tl.zeros([BC], tl.float64)
        im_k = tl.zeros([BC], tl.float64)
        re_jk = tl.zeros([BC], tl.float64)
        im_jk = tl.zeros([BC], tl.float64)
        for i in range(0, n_taps):
            tap = taps + i * TAP_FIELDS
            x, y = _turned(t, n, tap, theta, c, channels, stride)
            j = tl.load(tap + NUMBER_0 + J).to(tl.float64)
            k = tl.load(tap + NUMBER_0 + K).to(tl.float64)
            re += x
            im += y
            re_j += j * x
            im_j += j * y
            re_k += k * x
            im_k += k * y
            re_jk += j * k * x
            im_jk += j * k * y
            if tl.load(tap + IS_LAST) != 0:
                gradient += 2 * (re * im_j - im * re_j)
                hessian += 2 * (re_j * re_k + im_j * im_k - re * re_jk - im * im_jk)
                re = tl.zeros([BC], tl.float64)
                im = tl.zeros([BC], tl.float64)
                re_j = tl.zeros([BC], tl.float64)
                im_j = tl.zeros([BC], tl.float64)
                re_k = tl.zeros([BC], tl.float64)
                im_k = tl.zeros([BC], tl.float64)
                re_jk = tl.zeros([BC], tl.float64)
                im_jk = tl.zeros([BC], tl.float64)
    return tl.sum(gradient, 0), tl.sum(hessian, 0)


@triton.jit
def _root(square):
    """Return the root of a pivot and whether it is positive; 1 where it is not."""
    good = square > 0
    return tl.sqrt(tl.where(good, square, 1.0)), good


@triton.jit
def _solved(g0, g1, g2, h00, h10, h11, h20, h21, h22, one_0, one_1, one_2, shift):
    """Return x with (shift - H) x = g by Cholesky's method, and whether that is positive definite.

    Where a dimension has one tap (``one``), x is 0.
    """
    l00, good_0 = _root(tl.where(one_0, 1.0, shift - h00))
    l10, l20 = -h10 / l00, -h20 / l00
    l11, good_1 = _root(tl.where(one_1, 1.0, shift - h11) - l10 * l10)
    l21 = (-h21 - l20 * l10) / l11
    l22, good_2 = _root(tl.where(one_2, 1.0, shift - h22) - l20 * l20 - l21 * l21)
    x0 = g0 / l00
    x1 = (g1 - l10 * x0) / l11
    x2 = (g2 - l20 * x0 - l21 * x1) / l22
    x2 = x2 / l22
    x1 = (x1 - l21 * x2) / l11
    x0 = (x0 - l10 * x1 - l20 * x2) / l00
    return x0, x1, x2, good_0 & good_1 & good_2


@triton.jit
def _newton_step(t, n, taps, n_taps, channels, stride, theta, operator, BC: tl.constexpr):
    """Return a step towards a maximum, at most pi / (2 taps) along each dimension.

    Where the Hessian is not negative definite, a multiple of the identity makes it so.
    """
    n_0, n_1 = tl.load(operator + COUNT_0), tl.load(operator + COUNT_0 + 1)
    n_2 = tl.load(operator + COUNT_0 + 2)
    g0, h00 = _derivatives(t, n, taps, n_taps, channels, stride, theta, 0, 0, BC)
    g1, h11 = g0 * 0, g0 * 0
    g2, h22, h10, h20, h21 = g1, g1, g1, g1, g1
    if n_1 > 1:
        g1, h11 = _derivatives(t, n, taps, n_taps, channels, stride, theta, 1, 1, BC)
        _, h10 = _derivatives(t, n, taps, n_taps, channels, stride, theta, 1, 0, BC)
    if n_2 > 1:
        g2, h22 = _derivatives(t, n, taps, n_taps, channels, stride, theta, 2, 2, BC)
        _, h20 = _derivatives(t, n, taps, n_taps, channels, stride, theta, 2, 0, BC)
        _, h21 = _derivatives(t, n, taps, n_taps, channels, stride, theta, 2, 1, BC)
    norm = h00 * h00 + h11 * h11 + h22 * h22 + 2 * (h10 * h10 + h20 * h20 + h21 * h21)
    x0, x1, x2, good = _solved(g0, g1, g2, h00, h10, h11, h20, h21, h22,
                               n_0 == 1, n_1 == 1, n_2 == 1, 0.0)  # fmt: skip
    y0, y1, y2, shifted_good = _solved(g0, g1, g2, h00, h10, h11, h20, h21, h22,
                                       n_0 == 1, n_1 == 1, n_2 == 1,
                                       2 * tl.sqrt(norm))  # fmt: skip
    x0, x1, x2 = tl.where(good, x0, y0), tl.where(good, x1, y1), tl.where(good, x2, y2)
    relative = tl.maximum(tl.maximum(tl.abs(x0) * n_0, tl.abs(x1) * n_1), tl.abs(x2) * n_2)
    most = tl.maximum(relative / HALF_PI, 1.0)
    return x0 / most, x1 / most, x2 / most, good | shifted_good


@triton.jit
def _moved(re, im, angle):
    """Return a number of length one, turned by an angle."""
    x, y = tl.cos(angle), tl.sin(angle)
    re, im = re * x - im * y, re * y + im * x
    length = tl.sqrt(re * re + im * im)
    return re / length, im / length


@triton.jit
def _write(x, n, taps, n_taps, channels, stride, theta, inverse, BC: tl.constexpr):
    """Overwrite t by v: in every channel and phase, inverse * A times the waves."""
    for first in range(0, channels, BC):
        c = first + tl.arange(0, BC)
        re = tl.zeros([BC], tl.float64)
        im = tl.zeros([BC], tl.float64)
        begin = n_taps * 0
        for i in range(0, n_taps):
            tap = taps + i * TAP_FIELDS
            a, b = _turned(x, n, tap, theta, c, channels, stride)
            re += a * inverse
            im += b * inverse
            if tl.load(tap + IS_LAST) != 0:
                tl.debug_barrier()  # a thread may write what another one reads
                for j in range(begin, i + 1):
                    to = taps + j * TAP_FIELDS
                    wave_re, wave_im = _wave(to, theta)
                    place = x + c * stride + tl.load(to + COLUMN)
                    tl.store(place, (re * wave_re - im * wave_im).to(tl.float32), c < channels)
                    tl.store(place + n, (re * wave_im + im * wave_re).to(tl.float32), c < channels)
                re = tl.zeros([BC], tl.float64)
                im = tl.zeros([BC], tl.float64)
                begin = i + 1


@triton.jit
def _next(v, v_next, n, operator, taps, BC: tl.constexpr):
    """Write the vector after ``v`` to v_next, which holds t.

    Return the norm of A at the frequency of v, and whether the vector is finite; it is not written
    then.
    """
    channels, stride = tl.load(operator + CHANNELS), tl.load(operator + CHANNEL_STRIDE)
    taps += tl.load(operator + FIRST_TAP) * TAP_FIELDS
    n_taps = tl.load(operator + N_TAPS)
    re_0, im_0 = _along(v, n, taps, n_taps, channels, stride, 0, BC)
    re_1, im_1 = _along(v, n, taps, n_taps, channels, stride, 1, BC)
    re_2, im_2 = _along(v, n, taps, n_taps, channels, stride, 2, BC)
    theta = (re_0, im_0, re_1, im_1, re_2, im_2)
    before = _square(v_next, n, taps, n_taps, channels, stride, theta, BC)
    x0, x1, x2, good = _newton_step(v_next, n, taps, n_taps, channels, stride, theta, operator, BC)
    square, is_better = before, good & False
    for _ in tl.static_range(2):  # the second step that is tried is a quarter of the first
        if good & (is_better == 0):
            a, b = _moved(theta[0], theta[1], x0)
            c, d = _moved(theta[2], theta[3], x1)
            e, f = _moved(theta[4], theta[5], x2)
            found = _square(v_next, n, taps, n_taps, channels, stride, (a, b, c, d, e, f), BC)
            is_better = found > before
            square = tl.where(is_better, found, square)
            re_0, im_0 = tl.where(is_better, a, re_0), tl.where(is_better, b, im_0)
            re_1, im_1 = tl.where(is_better, c, re_1), tl.where(is_better, d, im_1)
            re_2, im_2 = tl.where(is_better, e, re_2), tl.where(is_better, f, im_2)
            x0, x1, x2 = x0 / 4, x1 / 4, x2 / 4
    sound = (square > 0) & (square < INFINITY)
    if sound:
        theta = (re_0, im_0, re_1, im_1, re_2, im_2)
        inverse = 1 / tl.sqrt(square)
        _write(v_next, n, taps, n_taps, channels, stride, theta, inverse, BC)
    return tl.sqrt(before), sound


@triton.jit(
    do_not_specialize=["n_matrices", "n_elementwise", "k", "integer", "above"],
    do_not_specialize_on_alignment=[
        "matrices", "tiles", "operators", "taps", "gram_partial", "scalars",
    ],
)  # fmt: skip
def waves(
    matrices, tiles, operators, taps, t_partial, gram_partial, v, v_next, scalars, n_matrices,
    n_elementwise, k, integer, above,
    WITH_T: tl.constexpr, TOLERANCE: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write sigma and penalty of an operator; with t its residual and v_next."""
    index = tl.program_id(0).to(tl.int64)
    m = matrices + index * MATRIX_FIELDS
    n_sigmas = 2 * n_matrices
    penalties = penalties_of(scalars, n_sigmas, n_elementwise)
    targets = targets_of(scalars, n_sigmas, n_matrices, n_elementwise)
    if takes_part(scalars, n_matrices, index, 2, TOLERANCE):
        first, n_tiles = tl.load(m + FIRST_TILE), tl.load(m + N_TILES)
        squares = tl.full([], 0.0, tl.float64)
        for tile in range(first, first + n_tiles):
            squares += tl.load(gram_partial + 4 * tile) + tl.load(gram_partial + 4 * tile + 3)
        sigma = tl.sqrt(squares)
        scale = inverse_power_of_two(tl.load(scalars + index))
        tl.debug_barrier()  # a thread may write the new sigma where another one reads the old
        tl.store(scalars + index, sigma.to(tl.float32))
        excess = excess_of(sigma, targets + index, k, integer, above)
        tl.store(penalties + index, (excess * excess).to(tl.float32))
        if WITH_T:
            n, v_offset = tl.load(m + OUTER) * tl.load(m + INNER), tl.load(m + V_OFFSET)
            # A matrix without rows has no tile; the table of tiles may be empty.
            t_offset = tl.load(tiles + first * TILE_FIELDS + T_OFFSET, mask=n_tiles > 0, other=0)
            own, following = v + v_offset, v_next + v_offset
            reduce_tiles(t_partial + t_offset, n_tiles, own, following, n, 2, TOLERANCE, BN)
            operator = operators + index * OPERATOR_FIELDS
            t_norm, sound = _next(own, following, n, operator, taps, BC)
            if (sound & (sigma < INFINITY)) == 0:
                tl.debug_barrier()
                for column in range(0, 2 * n, BN):
                    c = column + tl.arange(0, BN)
                    old = tl.load(own + c, mask=c < 2 * n, other=0.0)
                    tl.store(following + c, old, mask=c < 2 * n)
            residual = residual_of(sigma, t_norm, scale)
            tl.store(scalars + n_sigmas + index, residual.to(tl.float32))

"""An optimizer's step that contains the penalty, and the products of what it makes, in one pass.

A program takes a tile as in gram_matvec.py: what is loaded there goes here through the optimizer's
rule, with the penalty's gradient at the s and v of the step before, and is stored before it is
multiplied by v_next. The last programs take vectors and parts of parameters without a penalty.
With several vectors per matrix the products have a launch of their own, subspace_products.py: the
weights are read once more, a seventh more memory traffic for AdamW.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gram_matvec import add_long_rows, products
from .penalty import matrix_factor, shift_factor, store_norm, vector_gradient
from .tables import (
    ADAMW,
    ALIGNMENT,
    EPS,
    FIRST,
    GAIN,
    GRAD,
    GROUP,
    GROUP_FIELDS,
    INNER,
    KIND,
    LR,
    MATRIX_FIELDS,
    MOMENT_FIELDS,
    NESTEROV,
    OPTION_1,
    OPTION_2,
    OUTER,
    OUTER_STRIDE,
    OWNER,
    ROW_BEGIN,
    ROW_STRIDE,
    SECOND,
    SIZE,
    TILE_FIELDS,
    TILE_MATRIX,
    V_OFFSET,
    VECTOR_FIELDS,
    WEIGHT,
    WEIGHT_DECAY,
    column_offsets,
    elements_of,
    inverse_power_of_two,
    is_aligned,
    parts_of,
    power,
)


@triton.jit
def _options(moment, groups, steps, RULE: tl.constexpr):
    """Return the numbers that the rule needs, float32, in the order of _next."""
    group = groups + tl.maximum(tl.load(moment + GROUP), 0) * GROUP_FIELDS
    step = tl.maximum(tl.load(steps + tl.load(moment + OWNER)), 1.0).to(tl.float64)
    lr, weight_decay = tl.load(group + LR), tl.load(group + WEIGHT_DECAY)
    first, second = tl.load(group + OPTION_1), tl.load(group + OPTION_2)
    if RULE == ADAMW:
        numbers = (
            lr, 1 - lr * weight_decay, 1 - first, second, 1 - second,
            lr / (1 - tl.exp2(tl.log2(first) * step)),
            1 / tl.sqrt(1 - tl.exp2(tl.log2(second) * step)), tl.load(group + EPS),
        )  # fmt: skip
    else:
        undamped = tl.where((step > 1) & (first != 0), 1 - second, 1.0)
        zero = lr * 0
        numbers = (lr, weight_decay, first, undamped, tl.load(group + NESTEROV), zero, zero, zero)
    a, b, c, d, e, f, g, h = numbers
    return (
        a.to(tl.float32), b.to(tl.float32), c.to(tl.float32), d.to(tl.float32),
        e.to(tl.float32), f.to(tl.float32), g.to(tl.float32), h.to(tl.float32),
    )  # fmt: skip


@triton.jit
def _next(
    weight, grad, first, second, offsets, mask, acts, has_grad, x, inverse_scale, options,
    DTYPE: tl.constexpr, RULE: tl.constexpr, WITH_MOMENT: tl.constexpr, DECOUPLED: tl.constexpr,
):  # fmt: skip
    """Step elements of weight and moments; return them as they are stored, in float32.

    The penalty's gradient is ``x``. Where not ``acts``, nothing is stored.
    """
    active = tl.where(acts, mask, False)
    old = tl.load(weight + offsets, mask=mask, other=0.0).to(tl.float32)
    given = tl.where(has_grad, active, False)
    g = tl.load(grad + offsets, mask=given, other=0.0).to(tl.float32) * inverse_scale
    if not DECOUPLED:
        g += x
    if RULE == ADAMW:
        lr, keep, weight1, beta2, weight2, step_size, inverse_root, eps = options
        m1 = tl.load(first + offsets, mask=active, other=0.0).to(tl.float32)
        m2 = tl.load(second + offsets, mask=active, other=0.0).to(tl.float32)
        m1 += weight1 * (g - m1)
        m2 = beta2 * m2 + weight2 * g * g
        tl.store(first + offsets, m1.to(first.dtype.element_ty), mask=active)
        tl.store(second + offsets, m2.to(second.dtype.element_ty), mask=active)
        new = keep * old - step_size * m1 / (tl.sqrt(m2) * inverse_root + eps)
    else:
        lr, weight_decay, momentum, undamped, nesterov, _, _, _ = options
        g += weight_decay * old
        direction = g
        if WITH_MOMENT:
            m1 = tl.load(first + offsets, mask=active, other=0.0).to(tl.float32)
            m1 = momentum * m1 + undamped * g
            tl.store(first + offsets, m1.to(first.dtype.element_ty), mask=active)
            direction = tl.where(nesterov != 0, g + momentum * m1, m1)
        new = old - lr * direction
    if DECOUPLED:
        new -= lr * x
    new = new.to(DTYPE)
    tl.store(weight + offsets, new, mask=active)
    return tl.where(acts, new.to(tl.float32), old)


@triton.jit
def _rows(
    m, tile, moment, groups, steps, v, x, s, t_partial, scale, factor, acts, inverse_scale,
    DTYPE: tl.constexpr, MOMENT_TYPE: tl.constexpr, RULE: tl.constexpr,
    WITH_MOMENT: tl.constexpr, DECOUPLED: tl.constexpr, VECTORS: tl.constexpr,
    ALIGNED: tl.constexpr, LONG: tl.constexpr, R: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Take blocks of R rows, BN columns at a time (all of them if not LONG); return sum of s^2.

    The products are taken of one vector; several have a launch of their own.
    """
    w, row_stride, inner, outer_stride, n = elements_of(
        m, WEIGHT, ROW_STRIDE, OUTER_STRIDE, DTYPE, ALIGNED
    )
    grad = tl.load(m + GRAD).to(tl.pointer_type(DTYPE))
    first = tl.load(moment + FIRST).to(tl.pointer_type(MOMENT_TYPE))
    second = tl.load(moment + SECOND).to(tl.pointer_type(MOMENT_TYPE))
    has_grad = tl.load(m + GRAD) != 0
    if ALIGNED:
        grad = tl.multiple_of(grad, ALIGNMENT)
        first = tl.multiple_of(first, ALIGNMENT)
        second = tl.multiple_of(second, ALIGNMENT)
    options = _options(moment, groups, steps, RULE)
    v, s, t, row_begin, row_end = parts_of(m, tile, v, s, t_partial)
    x += tl.load(m + V_OFFSET)
    total = tl.zeros([BN], tl.float32)
    squares = tl.zeros([R], tl.float64)
    for row in range(row_begin, row_end, R):
        r = row + tl.arange(0, R)
        old_s = tl.load(s + r, mask=r < row_end, other=0.0).to(tl.float64)
        a = tl.where(factor == 0, 0.0, old_s * factor).to(tl.float32)
        if VECTORS == 1:
            tl.debug_barrier()  # a thread may write the new s where another one reads the old
        if LONG:
            product = tl.zeros([R], tl.float32)
            for begin in range(0, n, BN):
                c = begin + tl.arange(0, BN)
                columns = c if ALIGNED else column_offsets(c, inner, outer_stride)
                mask = (r < row_end)[:, None] & (c < n)[None, :]
                penalty = a[:, None] * tl.load(v + c, mask=c < n, other=0.0)[None, :]
                offsets = r[:, None] * row_stride + columns[None, :]
                rows = _next(w, grad, first, second, offsets, mask, acts, has_grad, penalty,
                             inverse_scale, options, DTYPE, RULE, WITH_MOMENT,
                             DECOUPLED)  # fmt: skip
                if VECTORS == 1:
                    product += tl.sum(rows * tl.load(x + c, mask=c < n, other=0.0)[None, :], 1)
            if VECTORS == 1:
                tl.store(s + r, product, mask=r < row_end)
                wide = product.to(tl.float64)
                tl.debug_barrier()  # what is read next, another thread may have written
                add_long_rows(
                    w, row_stride, inner, outer_stride, n, r, row_end,
                    (wide * scale).to(tl.float32), t, row == row_begin, ALIGNED, BN,
                )  # fmt: skip
                squares += wide * wide
        else:
            c = tl.arange(0, BN)
            columns = c if ALIGNED else column_offsets(c, inner, outer_stride)
            mask = (r < row_end)[:, None] & (c < n)[None, :]
            penalty = a[:, None] * tl.load(v + c, mask=c < n, other=0.0)[None, :]
            offsets = r[:, None] * row_stride + columns[None, :]
            rows = _next(w, grad, first, second, offsets, mask, acts, has_grad, penalty,
                         inverse_scale, options, DTYPE, RULE, WITH_MOMENT, DECOUPLED)  # fmt: skip
            if VECTORS == 1:
                factors = tl.load(x + c, mask=c < n, other=0.0)
                wide, part = products(rows, factors, s, r, row_end, scale, True)
                total += part
                squares += wide * wide
    if VECTORS == 1 and not LONG:
        c = tl.arange(0, BN)
        tl.store(t + c, total, mask=c < n)
    return tl.sum(squares, 0)


@triton.jit
def _elements(
    vector, moment, groups, steps, norm, penalty, strength, acts, inverse_scale, k,
    DTYPE: tl.constexpr, MOMENT_TYPE: tl.constexpr, RULE: tl.constexpr, WITH_MOMENT: tl.constexpr,
    DECOUPLED: tl.constexpr, K: tl.constexpr, WITH_PENALTY: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Step a vector and write its norm and penalty, or some elements without one."""
    weight = tl.load(vector + WEIGHT).to(tl.pointer_type(DTYPE))
    grad = tl.load(vector + GRAD).to(tl.pointer_type(DTYPE))
    first = tl.load(moment + FIRST).to(tl.pointer_type(MOMENT_TYPE))
    second = tl.load(moment + SECOND).to(tl.pointer_type(MOMENT_TYPE))
    has_grad, size = tl.load(vector + GRAD) != 0, tl.load(vector + SIZE)
    gain = tl.load(vector + KIND) == GAIN
    options = _options(moment, groups, steps, RULE)
    squares = tl.zeros([BN], tl.float64)
    excesses = tl.zeros([BN], tl.float64)
    if WITH_PENALTY:
        factor = shift_factor(tl.load(norm), strength, k, K)
    for begin in range(0, size, BN):
        c = begin + tl.arange(0, BN)
        mask = c < size
        x = tl.zeros([BN], tl.float32)
        if WITH_PENALTY:
            value = tl.load(weight + c, mask=mask, other=0.0).to(tl.float64)
            x = vector_gradient(value, gain, factor, strength, k, K)
        new = _next(weight, grad, first, second, c, mask, acts, has_grad, x, inverse_scale,
                    options, DTYPE, RULE, WITH_MOMENT, DECOUPLED)  # fmt: skip
        if WITH_PENALTY:
            value = tl.where(mask, new, 0.0).to(tl.float64)
            squares += value * value
            excess = tl.where(mask, power(tl.abs(value), k, K) - 1, 0.0)
            excesses += excess * excess
    if WITH_PENALTY:
        store_norm(norm, penalty, squares, excesses, gain, k, K)


@triton.jit
def _factors(m, tile, v, v_next, n, stopped, BN: tl.constexpr):
    """Return v_next; or v where all has stopped, and the first tile copies n of it to v_next."""
    x = v_next
    if stopped:
        x = v
        if tl.load(tile + ROW_BEGIN) == 0:
            for begin in range(0, n, BN):
                c = tl.load(m + V_OFFSET) + begin + tl.arange(0, BN)
                mask = begin + tl.arange(0, BN) < n
                tl.store(v_next + c, tl.load(v + c, mask=mask, other=0.0), mask=mask)
    return x


@triton.jit
def _others_are_aligned(m, moment):
    """Tell whether gradient and moments of a matrix start at a multiple of ALIGNMENT bytes."""
    together = tl.load(m + GRAD) | tl.load(moment + FIRST) | tl.load(moment + SECOND)
    return together % ALIGNMENT == 0


@triton.jit(do_not_specialize=["n_matrices", "n_tiles", "n_vectors", "k"])
def update(
    matrices, tiles, vectors, others, matrix_moments, vector_moments, other_moments, groups, steps,
    t_partial, gram_partial, v, v_next, s, scalars, scale, grad_scale, found_inf,
    n_matrices, n_tiles, n_vectors, k,
    DTYPE: tl.constexpr, MOMENT_TYPE: tl.constexpr, RULE: tl.constexpr,
    WITH_MOMENT: tl.constexpr, DECOUPLED: tl.constexpr, K: tl.constexpr,
    VECTORS: tl.constexpr, WITH_SCALE: tl.constexpr, WITH_GRAD_SCALE: tl.constexpr,
    WITH_FOUND_INF: tl.constexpr,
    R0: tl.constexpr, BN0: tl.constexpr, R1: tl.constexpr, BN1: tl.constexpr,
    R2: tl.constexpr, BN2: tl.constexpr,
    R_LONG: tl.constexpr, BN_LONG: tl.constexpr, R_ODD: tl.constexpr, BN_ODD: tl.constexpr,
):  # fmt: skip
    """Program i < n_tiles takes tile i, then n_vectors a vector each, the rest a row of others.

    R rows at a time of at most BN columns: 0 to 2 for aligned rows by length, LONG for longer ones,
    ODD for rows that are not aligned. Where found_inf is above zero, all stays as it is: weights,
    moments, and by products with v, which goes to v_next, the vectors after the host's swap too.
    """
    program = tl.program_id(0)
    stopped = program < 0  # false
    if WITH_FOUND_INF:
        stopped = tl.load(found_inf) > 0
    inverse_scale = tl.full([], 1.0, tl.float32)
    if WITH_GRAD_SCALE:
        inverse_scale = 1 / tl.load(grad_scale)
    multiplier = tl.full([], 1.0, tl.float64)
    if WITH_SCALE:
        multiplier = tl.load(scale).to(tl.float64)
    norms = scalars + 2 * VECTORS * n_matrices
    penalties = norms + n_vectors
    strengths = penalties + n_matrices + n_vectors
    targets = strengths + n_matrices + n_vectors
    if program >= n_tiles + n_vectors:
        i = program - n_tiles - n_vectors
        moment = other_moments + i * MOMENT_FIELDS
        acts = (tl.load(moment + GROUP) >= 0) & (stopped == 0)
        _elements(others + i * VECTOR_FIELDS, moment, groups, steps, scalars, scalars, multiplier,
                  acts, inverse_scale, k, DTYPE, MOMENT_TYPE, RULE, WITH_MOMENT, DECOUPLED, K,
                  False, BN_LONG)  # fmt: skip
    elif program >= n_tiles:
        i = program - n_tiles
        moment = vector_moments + i * MOMENT_FIELDS
        acts = (tl.load(moment + GROUP) >= 0) & (stopped == 0)
        strength = multiplier * tl.load(strengths + n_matrices + i).to(tl.float64)
        _elements(vectors + i * VECTOR_FIELDS, moment, groups, steps, norms + i,
                  penalties + n_matrices + i, strength, acts, inverse_scale, k, DTYPE, MOMENT_TYPE,
                  RULE, WITH_MOMENT, DECOUPLED, K, True, BN1)  # fmt: skip
    else:
        tile = tiles + program.to(tl.int64) * TILE_FIELDS
        index = tl.load(tile + TILE_MATRIX)
        m = matrices + index * MATRIX_FIELDS
        moment = matrix_moments + index * MOMENT_FIELDS
        acts = (tl.load(moment + GROUP) >= 0) & (stopped == 0)
        sigma = tl.load(scalars + index)
        scale_of_t = inverse_power_of_two(sigma)
        strength = multiplier * tl.load(strengths + index).to(tl.float64)
        factor = matrix_factor(sigma, tl.load(targets + index), strength, k, K)
        n = tl.load(m + OUTER) * tl.load(m + INNER)
        x = v_next
        if WITH_FOUND_INF:
            x = _factors(m, tile, v, v_next, VECTORS * n, stopped, BN_LONG)
        if not (is_aligned(m, WEIGHT, ROW_STRIDE, DTYPE) & _others_are_aligned(m, moment)):
            squares = _rows(m, tile, moment, groups, steps, v, x, s, t_partial, scale_of_t, factor,
                            acts, inverse_scale, DTYPE, MOMENT_TYPE, RULE, WITH_MOMENT, DECOUPLED,
                            VECTORS, False, True, R_ODD, BN_ODD)  # fmt: skip
        elif n <= BN0:
            squares = _rows(m, tile, moment, groups, steps, v, x, s, t_partial, scale_of_t, factor,
                            acts, inverse_scale, DTYPE, MOMENT_TYPE, RULE, WITH_MOMENT, DECOUPLED,
                            VECTORS, True, False, R0, BN0)  # fmt: skip
        elif n <= BN1:
            squares = _rows(m, tile, moment, groups, steps, v, x, s, t_partial, scale_of_t, factor,
                            acts, inverse_scale, DTYPE, MOMENT_TYPE, RULE, WITH_MOMENT, DECOUPLED,
                            VECTORS, True, False, R1, BN1)  # fmt: skip
        elif n <= BN2:
            squares = _rows(m, tile, moment, groups, steps, v, x, s, t_partial, scale_of_t, factor,
                            acts, inverse_scale, DTYPE, MOMENT_TYPE, RULE, WITH_MOMENT, DECOUPLED,
                            VECTORS, True, False, R2, BN2)  # fmt: skip
        else:
            squares = _rows(m, tile, moment, groups, steps, v, x, s, t_partial, scale_of_t, factor,
                            acts, inverse_scale, DTYPE, MOMENT_TYPE, RULE, WITH_MOMENT, DECOUPLED,
                            VECTORS, True, True, R_LONG, BN_LONG)  # fmt: skip
        if VECTORS == 1:
            tl.store(gram_partial + program, squares)

"""An optimizer's step with the penalty, and the products of the new weights, in one pass.

A program takes a tile as in gram_matvec.py: what is loaded there goes here through the optimizer's
rule, with the penalty's gradient at the s and v of the step before, and is stored before it is
multiplied by v_next. The last programs take elementwise parameters, and parts of parameters without
a penalty. With several vectors per matrix, the products are a separate launch,
subspace_products.py: the weights are read once more, a seventh more memory traffic for AdamW.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .elementwise import (
    elementwise_gradient,
    gain_excesses,
    gain_targets,
    held_elements,
    lanes_of,
    row_factors,
    row_squares,
    rows_norm,
    shift_of,
    store_norm,
)
from .gram_matvec import add_long_rows
from .penalty import capped, capped_factor, held_factor, matrix_factor
from .tables import (
    ADAMW,
    ALIGNED,
    ALIGNMENT,
    CAP,
    ELEMENTWISE_FIELDS,
    EPS,
    FIRST,
    GAIN,
    GRAD,
    GROUP,
    GROUP_FIELDS,
    IN_PIECES,
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
    PARAMETER,
    PLAIN,
    PULLED,
    REACH,
    ROW_BEGIN,
    ROW_STRIDE,
    ROWS,
    ROWS_KIND,
    SECOND,
    SIZE,
    SPHERE,
    TILE_FIELDS,
    TILE_MATRIX,
    V_OFFSET,
    WEIGHT,
    WEIGHT_DECAY,
    block_of,
    elements_of,
    factors_of,
    inverse_power_of_two,
    is_aligned,
    norms_of,
    parts_of,
    penalties_of,
    strengths_of,
    targets_of,
    whole_loads,
)


@triton.jit
def _lr(moment, groups):
    """Return the learning rate of a parameter's group, float64."""
    return tl.load(groups + tl.maximum(tl.load(moment + GROUP), 0) * GROUP_FIELDS + LR)


@triton.jit
def _options(moment, groups, steps, RULE: tl.constexpr):
    """Return the numbers that the rule needs, float32, in the order of _next."""
    group = groups + tl.maximum(tl.load(moment + GROUP), 0) * GROUP_FIELDS
    step = tl.maximum(tl.load(steps + tl.load(moment + PARAMETER)), 1.0).to(tl.float64)
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
            # A group without momentum leaves an earlier buffer as it is.
            kept = tl.where(momentum != 0, active, False)
            m1 = tl.load(first + offsets, mask=kept, other=0.0).to(tl.float32)
            m1 = momentum * m1 + undamped * g
            tl.store(first + offsets, m1.to(first.dtype.element_ty), mask=kept)
            direction = tl.where(nesterov != 0, g + momentum * m1, m1)
        new = old - lr * direction
    if DECOUPLED > PULLED:
        new -= x
    elif DECOUPLED:
        new -= lr * x
    new = new.to(DTYPE)
    tl.store(weight + offsets, new, mask=active)
    return tl.where(acts, new.to(tl.float32), old)


@triton.jit
def _own_factor(held, j):
    """Return ``held_factor`` of singular value ``j`` under a cap."""
    sigmas, n_matrices, target, strength = held
    return held_factor(tl.load(sigmas + j * n_matrices), target, strength, True)


@triton.jit
def _rows(
    m, tile, moment, groups, steps, v, x, s, t_partial, scale, held, factor, acts, inverse_scale,
    DTYPE: tl.constexpr, MOMENT_TYPE: tl.constexpr, RULE: tl.constexpr,
    WITH_MOMENT: tl.constexpr, DECOUPLED: tl.constexpr, PRODUCTS: tl.constexpr,
    TERMS: tl.constexpr, EACH: tl.constexpr, LAYOUT: tl.constexpr, LONG: tl.constexpr,
    R: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Take blocks of R rows, BN columns at a time (all of them if not LONG); return sum of s^2.

    PRODUCTS are for one vector; for several there is a separate launch. TERMS: two of an operator;
    or, EACH with a factor of its own from ``held``, those of a cap of several singular values.
    """
    elements = elements_of(m, WEIGHT, ROW_STRIDE, OUTER_STRIDE, DTYPE, LAYOUT)
    w, n = elements[0], elements[4]
    grad = tl.load(m + GRAD).to(tl.pointer_type(DTYPE))
    first = tl.load(moment + FIRST).to(tl.pointer_type(MOMENT_TYPE))
    second = tl.load(moment + SECOND).to(tl.pointer_type(MOMENT_TYPE))
    has_grad = tl.load(m + GRAD) != 0
    n_rows = tl.load(m + ROWS)
    v_offset = tl.load(m + V_OFFSET)
    if LAYOUT == ALIGNED:
        grad = tl.multiple_of(grad, ALIGNMENT)
        first = tl.multiple_of(first, ALIGNMENT)
        second = tl.multiple_of(second, ALIGNMENT)
        v_offset = whole_loads(v_offset, tl.float32)
    options = _options(moment, groups, steps, RULE)
    v, s, t, row_begin, row_end = parts_of(m, tile, v, s, t_partial, LAYOUT)
    x += v_offset
    half, other_half = factors_of(scale)
    total = tl.zeros([R, BN], tl.float32)
    squares = tl.zeros([R], tl.float64)
    for row in range(row_begin, row_end, R):
        r = row + tl.arange(0, R)
        old_s = tl.load(s + r, mask=r < row_end, other=0.0).to(tl.float64)
        a = tl.where(factor == 0, 0.0, old_s * factor).to(tl.float32)
        if (TERMS == 2) & (not EACH):
            old_s = tl.load(s + n_rows + r, mask=r < row_end, other=0.0).to(tl.float64)
            b = tl.where(factor == 0, 0.0, old_s * factor).to(tl.float32)
        if PRODUCTS:
            tl.debug_barrier()  # a thread may write the new s where another one reads the old
        rows = tl.zeros([R, BN], tl.float32)
        products = tl.zeros([R, BN], tl.float32)
        for begin in range(0, n if LONG else BN, BN):
            c = begin + tl.arange(0, BN)
            offsets, mask = block_of(elements, r, row_end, c, LAYOUT)
            if DECOUPLED == SPHERE:
                old = tl.load(w + offsets, mask=mask, other=0.0).to(tl.float32)
                penalty = tl.where(factor == 0, 0.0, factor.to(tl.float32) * old)
            else:
                penalty = a[:, None] * tl.load(v + c, mask=c < n, other=0.0)[None, :]
                if EACH:
                    for j in range(1, TERMS):
                        own = _own_factor(held, j)
                        if own != 0:
                            own_s = tl.load(s + j * n_rows + r, mask=r < row_end, other=0.0)
                            b = (own_s.to(tl.float64) * own).to(tl.float32)
                            other = tl.load(v + j * n + c, mask=c < n, other=0.0)
                            penalty += b[:, None] * other[None, :]
                elif TERMS == 2:
                    other = tl.load(v + n + c, mask=c < n, other=0.0)
                    penalty += b[:, None] * other[None, :]
            rows = _next(w, grad, first, second, offsets, mask, acts, has_grad, penalty,
                         inverse_scale, options, DTYPE, RULE, WITH_MOMENT, DECOUPLED)  # fmt: skip
            if PRODUCTS:
                products += rows * tl.load(x + c, mask=c < n, other=0.0)[None, :]
        if PRODUCTS:
            product = tl.sum(products, 1)
            tl.store(s + r, product, mask=r < row_end)
            wide = product.to(tl.float64)
            squares += wide * wide
            scaled = product * half * other_half
            if LONG:
                tl.debug_barrier()  # another thread may have written what is read next
                add_long_rows(elements, r, row_end, scaled, t, row == row_begin, LAYOUT, BN)
            else:
                total += rows * scaled[:, None]
    if PRODUCTS and not LONG:
        c = tl.arange(0, BN)
        tl.store(t + c, tl.sum(total, 0), mask=c < n)
    return tl.sum(squares, 0)


@triton.jit
def _elements(
    vector, moment, groups, steps, norm, penalty, strength, acts, inverse_scale, k, integer, above,
    DTYPE: tl.constexpr, MOMENT_TYPE: tl.constexpr, RULE: tl.constexpr, WITH_MOMENT: tl.constexpr,
    DECOUPLED: tl.constexpr, WITH_PENALTY: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Step an elementwise parameter and write its norm and penalty, or elements without one."""
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
        lr = _lr(moment, groups)
        factor, shortest = shift_of(vector, tl.load(norm), strength, k, integer, above)
    for begin in range(0, size, BN):
        c = begin + tl.arange(0, BN)
        mask = c < size
        x = tl.zeros([BN], tl.float32)
        if WITH_PENALTY:
            value = tl.load(weight + c, mask=mask, other=0.0).to(tl.float64)
            if DECOUPLED > PULLED:
                pull = held_elements(
                    vector, value, tl.load(norm), c, mask, gain, strength, above, DECOUPLED
                )
            else:
                pull = elementwise_gradient(
                    vector, value, c, mask, gain, factor, strength, k, integer, above
                )
            if DECOUPLED == PULLED:
                magnitude, target = (
                    tl.abs(value),
                    gain_targets(vector, c, tl.where(gain, mask, False)),
                )
                most = tl.where(gain, tl.abs(magnitude - target), magnitude * shortest)
                pull = capped(pull, most, lr)
            x = pull.to(tl.float32)
        new = _next(weight, grad, first, second, c, mask, acts, has_grad, x, inverse_scale,
                    options, DTYPE, RULE, WITH_MOMENT, DECOUPLED)  # fmt: skip
        if WITH_PENALTY:
            value = tl.where(mask, new, 0.0).to(tl.float64)
            squares += value * value
            if gain:
                excesses += gain_excesses(vector, value, c, mask, k, integer, above)
    if WITH_PENALTY:
        store_norm(vector, norm, penalty, squares, excesses, k, integer, above)


@triton.jit
def _rows_of_elements(
    vector, moment, groups, steps, norm, penalty, strength, acts, inverse_scale, k, integer, above,
    DTYPE: tl.constexpr, MOMENT_TYPE: tl.constexpr, RULE: tl.constexpr, WITH_MOMENT: tl.constexpr,
    DECOUPLED: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Do the same for rows."""
    weight = tl.load(vector + WEIGHT).to(tl.pointer_type(DTYPE))
    grad = tl.load(vector + GRAD).to(tl.pointer_type(DTYPE))
    first = tl.load(moment + FIRST).to(tl.pointer_type(MOMENT_TYPE))
    second = tl.load(moment + SECOND).to(tl.pointer_type(MOMENT_TYPE))
    has_grad = tl.load(vector + GRAD) != 0
    options = _options(moment, groups, steps, RULE)
    lr = _lr(moment, groups) if DECOUPLED else 0.0
    n_rows, length, row, column, row_step, column_step = lanes_of(vector, BN)
    for first_row in range(0, n_rows, row_step):
        r = first_row + row
        squares = row_squares(weight, r, column, column_step, n_rows, length, BN)
        factor = row_factors(vector, squares, r, n_rows, strength, k, integer, above, lr, DECOUPLED)
        for first_column in range(0, length, column_step):
            c = first_column + column
            place, mask = r * length + c, (r < n_rows) & (c < length)
            value = tl.load(weight + place, mask=mask, other=0.0).to(tl.float64)
            x = (factor * value).to(tl.float32)
            if DECOUPLED > PULLED:
                x = tl.where(factor == 0, 0.0, x)  # a row that is not finite stays
            _next(weight, grad, first, second, place, mask, acts, has_grad, x, inverse_scale,
                  options, DTYPE, RULE, WITH_MOMENT, DECOUPLED)  # fmt: skip
    tl.debug_barrier()  # a thread may read what another one has written
    rows_norm(vector, norm, penalty, k, integer, above, DTYPE, BN)


@triton.jit
def _copy(source, target, offset, n, BN: tl.constexpr):
    """Copy ``n`` numbers from ``offset`` on."""
    for begin in range(0, n, BN):
        c = begin + tl.arange(0, BN)
        tl.store(target + offset + c, tl.load(source + offset + c, mask=c < n, other=0.0),
                 mask=c < n)  # fmt: skip


@triton.jit
def _others_are_aligned(m, moment):
    """Return whether gradient and moments of a matrix start at a multiple of ALIGNMENT bytes."""
    together = tl.load(m + GRAD) | tl.load(moment + FIRST) | tl.load(moment + SECOND)
    return together % ALIGNMENT == 0


@triton.jit(
    do_not_specialize=[
        "n_matrices", "n_tiles", "n_elementwise", "n_sigmas", "k", "integer", "above",
    ],
    do_not_specialize_on_alignment=[
        "matrices", "tiles", "elementwise", "others", "matrix_moments", "elementwise_moments",
        "other_moments", "groups", "steps", "gram_partial", "s", "scalars", "scale", "grad_scale",
        "found_inf",
    ],
)  # fmt: skip
def update(
    matrices, tiles, elementwise, others, matrix_moments, elementwise_moments, other_moments,
    groups, steps, t_partial, gram_partial, v, v_next, s, scalars, scale, grad_scale, found_inf,
    n_matrices, n_tiles, n_elementwise, n_sigmas, k, integer, above,
    DTYPE: tl.constexpr, MOMENT_TYPE: tl.constexpr, RULE: tl.constexpr,
    WITH_MOMENT: tl.constexpr, DECOUPLED: tl.constexpr, PRODUCTS: tl.constexpr,
    TERMS: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr, WIDTHS: tl.constexpr,
    R_LONG: tl.constexpr, BN_LONG: tl.constexpr, R_PLAIN: tl.constexpr, BN_PLAIN: tl.constexpr,
    R_PIECES: tl.constexpr, BN_PIECES: tl.constexpr,
):  # fmt: skip
    """Program i < n_tiles takes tile i; then n_elementwise parameters; the rest a row of others.

    Blocks are those of gram_matvec. Where found_inf is above zero, all stays as it is: weights,
    moments, and by products with v, which goes to v_next, the vectors after the host's swap too.
    Scalars are n_sigmas estimates, as many residuals, and the rest as in schema.SCALARS.
    """
    program = tl.program_id(0)
    stopped = tl.load(found_inf) > 0
    inverse_scale = 1 / tl.load(grad_scale)
    multiplier = tl.load(scale).to(tl.float64)
    norms = norms_of(scalars, n_sigmas)
    penalties = penalties_of(scalars, n_sigmas, n_elementwise)
    strengths = strengths_of(scalars, n_sigmas, n_matrices, n_elementwise)
    targets = targets_of(scalars, n_sigmas, n_matrices, n_elementwise)
    if program >= n_tiles + n_elementwise:
        i = program - n_tiles - n_elementwise
        moment = other_moments + i * MOMENT_FIELDS
        acts = (tl.load(moment + GROUP) >= 0) & (stopped == 0)
        _elements(others + i * ELEMENTWISE_FIELDS, moment, groups, steps, scalars, scalars,
                  multiplier, acts, inverse_scale, k, integer, above, DTYPE, MOMENT_TYPE, RULE,
                  WITH_MOMENT, DECOUPLED, False, BN_LONG)  # fmt: skip
    elif program >= n_tiles:
        i = program - n_tiles
        moment = elementwise_moments + i * MOMENT_FIELDS
        acts = (tl.load(moment + GROUP) >= 0) & (stopped == 0)
        strength = multiplier * tl.load(strengths + n_matrices + i).to(tl.float64)
        vector, penalty = elementwise + i * ELEMENTWISE_FIELDS, penalties + n_matrices + i
        if tl.load(vector + KIND) == ROWS_KIND:
            _rows_of_elements(vector, moment, groups, steps, norms + i, penalty, strength, acts,
                              inverse_scale, k, integer, above, DTYPE, MOMENT_TYPE, RULE,
                              WITH_MOMENT, DECOUPLED, BN_PLAIN)  # fmt: skip
        else:
            _elements(vector, moment, groups, steps, norms + i, penalty, strength, acts,
                      inverse_scale, k, integer, above, DTYPE, MOMENT_TYPE, RULE, WITH_MOMENT,
                      DECOUPLED, True, BN_PLAIN)  # fmt: skip
    else:
        tile = tiles + program.to(tl.int64) * TILE_FIELDS
        index = tl.load(tile + TILE_MATRIX)
        m = matrices + index * MATRIX_FIELDS
        moment = matrix_moments + index * MOMENT_FIELDS
        acts = (tl.load(moment + GROUP) >= 0) & (stopped == 0)
        sigma = tl.load(scalars + index)
        scale_of_t = inverse_power_of_two(sigma)
        strength = multiplier * tl.load(strengths + index).to(tl.float64)
        target = tl.load(targets + index)
        reach = tl.load(m + REACH)
        if DECOUPLED > PULLED:
            factor = held_factor(sigma, target, strength, above | (DECOUPLED == CAP))
            if DECOUPLED == CAP:
                factor = factor / reach
        else:
            factor = matrix_factor(sigma, target, strength, k, integer, above)
        if DECOUPLED == PULLED:
            factor = capped_factor(factor, sigma, target, _lr(moment, groups), reach)
        held = scalars + index, n_matrices, target, strength
        outer = tl.load(m + OUTER)
        n = outer * tl.load(m + INNER)
        x = v_next
        if stopped:
            x = v
            if tl.load(tile + ROW_BEGIN) == 0:
                n_copied = n_sigmas // n_matrices * n
                _copy(v, v_next, tl.load(m + V_OFFSET), n_copied, BN_LONG)
        squares = tl.full([], 0.0, tl.float64)
        if not (is_aligned(m, WEIGHT, ROW_STRIDE, DTYPE) & _others_are_aligned(m, moment)):
            if outer > 1:
                squares = _rows(m, tile, moment, groups, steps, v, x, s, t_partial, scale_of_t,
                                held, factor, acts, inverse_scale, DTYPE, MOMENT_TYPE, RULE,
                                WITH_MOMENT, DECOUPLED, PRODUCTS, TERMS, EACH, IN_PIECES, True,
                                R_PIECES, BN_PIECES)  # fmt: skip
            else:
                squares = _rows(m, tile, moment, groups, steps, v, x, s, t_partial, scale_of_t,
                                held, factor, acts, inverse_scale, DTYPE, MOMENT_TYPE, RULE,
                                WITH_MOMENT, DECOUPLED, PRODUCTS, TERMS, EACH, PLAIN, True,
                                R_PLAIN, BN_PLAIN)  # fmt: skip
        elif n > 64 * 2**WIDTHS:
            squares = _rows(m, tile, moment, groups, steps, v, x, s, t_partial, scale_of_t, held,
                            factor, acts, inverse_scale, DTYPE, MOMENT_TYPE, RULE, WITH_MOMENT,
                            DECOUPLED, PRODUCTS, TERMS, EACH, ALIGNED, True, R_LONG,
                            BN_LONG)  # fmt: skip
        else:
            for i in tl.static_range(WIDTHS):
                if (n <= 128 * 2**i) & ((n > 64 * 2**i) | (i == 0)):
                    squares = _rows(
                        m, tile, moment, groups, steps, v, x, s, t_partial, scale_of_t, held,
                        factor, acts, inverse_scale, DTYPE, MOMENT_TYPE, RULE, WITH_MOMENT,
                        DECOUPLED, PRODUCTS, TERMS, EACH, ALIGNED, False,
                        max(BLOCK // (128 * 2**i), 1), 128 * 2**i,
                    )  # fmt: skip
        if PRODUCTS:
            tl.store(gram_partial + program, squares)

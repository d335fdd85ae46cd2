"""Penalties, and the factors of gradients.

The exponent comes as ``k`` and ``integer``: k where it is a small integer, or -1 (see
tables.power). ``above`` is 1 for a penalty of one side: what is at or below its target counts as
being there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tables import INFINITY, power


@triton.jit
def excess_of(sigma, target, k, integer, above):
    """Return sigma^k - tau^k of a float64 sigma, whose square is the penalty."""
    excess = power(sigma, k, integer) - power(tl.load(target).to(tl.float64), k, integer)
    return pulled(excess, above)


@triton.jit
def pulled(excess, above):
    """Return an excess, and with ``above`` 0 where it is negative."""
    return tl.where((above != 0) & (excess < 0), 0.0, excess)


@triton.jit
def residual_of(sigma, t_norm, scale):
    """Return ||W^T u - sigma v||, float64, from the norm of scale * W^T s."""
    # ||W^T u - sigma v||^2 = ||W^T u||^2 - sigma^2
    known = (sigma > 0) & (sigma < INFINITY)
    wtu = t_norm / (scale * tl.where(known, sigma, 1.0))
    squared = (wtu - sigma) * (wtu + sigma)
    root = tl.where(squared <= 0, 0.0, tl.sqrt(tl.where(squared <= 0, 0.0, squared)))
    return tl.where(known, root, sigma)


@triton.jit
def matrix_factor(sigma, target, strength, k, integer, above):
    """Return what s is multiplied by: strength * 2 k (sigma^k - tau^k) sigma^(k-1) / sigma.

    At sigma = 0 there is no direction to move along: it is zero.
    """
    sigma, target = sigma.to(tl.float64), target.to(tl.float64)
    excess = pulled(power(sigma, k, integer) - power(target, k, integer), above)
    factor = strength * 2 * k * excess
    factor = factor * power(sigma, k - 1, integer - 1)
    return tl.where(sigma == 0, 0.0, factor / tl.where(sigma == 0, 1.0, sigma))


@triton.jit
def shift_factor(norm, strength, k, integer):
    """Return what the elements of a shift of that norm are multiplied by, float64."""
    norm = norm.to(tl.float64)
    return 2 * k * strength * power(norm * norm, k - 1, integer - 1)


@triton.jit
def capped(value, most, lr):
    """Return ``value``, or with its sign the largest one for which lr * |value| <= ``most``."""
    is_over = lr * tl.abs(value) > most
    largest = tl.where(value > 0, most, -most) / tl.where(is_over, lr, 1.0)
    return tl.where(is_over, largest, value)


@triton.jit
def capped_factor(factor, sigma, target, lr, reach):
    """Return :func:`matrix_factor` so that a step of ``lr`` carries sigma to the target at most.

    See csrc/table.h for ``reach``.
    """
    sigma, target = sigma.to(tl.float64), target.to(tl.float64)
    return capped(factor, tl.abs(sigma - target) / (reach * tl.where(sigma == 0, 1.0, sigma)), lr)


@triton.jit
def held_factor(sigma, target, strength, above):
    """Return (sigma - tau) / sigma, by which a constraint brings sigma to its target.

    See ``formulas.held_factor``.
    """
    sigma, target = sigma.to(tl.float64), target.to(tl.float64)
    known = (sigma < INFINITY) & (sigma > target * 1e-30)
    goes = tl.where(strength != 0, known, False)
    excess = pulled(sigma - target, above)
    part = excess / tl.where(goes, sigma, 1.0)
    return tl.where(goes, tl.where(part < 1 - 1e-6, part, 1 - 1e-6), 0.0)

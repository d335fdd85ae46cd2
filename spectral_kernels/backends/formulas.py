"""The whole mathematics in plain PyTorch; the reference backend computes with these functions.

For a matrix W [M, N] and a unit vector v [N] that counts as a constant, the penalty R and its
gradient are (Lewandowski et al., arXiv 2406.06811, with the choices of the README)

    sigma = ||W v||        u = W v / sigma        R = (sigma^k - tau^k)^2
    dR/dW = 2 k (sigma^k - tau^k) sigma^(k-1) u v^T

One power iteration on W^T W takes v to W^T W v / ||W^T W v||. With r vectors, the rows of V [r, N],
it is subspace iteration with Rayleigh-Ritz (Golub and Van Loan, "Matrix Computations", sections 7.3
and 8.2): S = V W^T [r, M]; the eigenvectors of S S^T turn the rows of V and S into estimates of the
r largest singular values and their vectors; the next V is an orthonormal basis of S W.

A bias or shift b has R = ||b||^(2k), or with a target (||b||^k - tau^k)^2. A gain g is a diagonal
matrix, whose singular values are |g_i|: R = sum_i (|g_i|^k - tau_i^k)^2, tau_i = 1 by default. A
row w_i is a matrix with the one singular value ||w_i||: rows have
R = sum_i (||w_i||^k - tau_i^k)^2. R is the raw penalty; the penalty is strength * R.

``above`` is for a penalty of one side: what is at or below its target counts as being there, and
has neither penalty nor gradient. It is a bool, or a 0-d tensor of one.

Wide is float64, or float32 on a device that has no float64 (``tables.device.wide_dtype``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..tables.device import wide, wide_dtype

# Times sigma_1: a smaller Ritz value is rounding.
ZERO = {torch.float64: 1e-6, torch.float32: 1e-3}


# ----------------------------------------------------------------------------- power iteration


class Iteration(NamedTuple):
    """Singular values and vectors after an iteration; sigmas and residuals are wide."""

    sigmas: Tensor  # [r], the largest first
    residuals: Tensor  # [r]; some singular value of W lies within each of its sigma
    s: Tensor  # [r, M], turned to the Ritz vectors
    v: Tensor  # [r, N], likewise
    v_next: Tensor  # [r, N], orthonormal rows


def power_iteration(weight: Tensor, v: Tensor, scale: Tensor | float = 1.0) -> Iteration:
    """Run one iteration of ``weight`` [M, N] from ``v`` [r, N], whose rows are orthonormal.

    ``scale`` multiplies s before it goes into t, so that nothing overflows: see
    :func:`inverse_power_of_two`.
    """
    s = product(weight, v)
    return finished(s, v, gram_of(s), transposed_product(weight, s, scale), scale)


def product(weight: Tensor, v: Tensor) -> Tensor:
    """Return S = V W^T [r, M] of ``weight`` [M, N] and ``v`` [r, N]."""
    return v @ weight.mT


def gram_of(s: Tensor) -> Tensor:
    """Return S S^T [r, r], wide, of ``s`` [r, M]."""
    return wide(s) @ wide(s).mT


def transposed_product(weight: Tensor, s: Tensor, scale: Tensor | float) -> Tensor:
    """Return T = scale * S W [r, N] of ``weight`` [M, N] and ``s`` [r, M]."""
    return (s * scale) @ weight


def finished(s: Tensor, v: Tensor, gram: Tensor, t: Tensor, scale: Tensor | float) -> Iteration:
    """Return what an iteration arrives at, from its products.

    Where t is zero or not finite, ``v_next`` is v.
    """
    sigmas, turn = singular_values(gram)
    if turn is None:
        t_norm = torch.linalg.vector_norm(wide(t))
        v_next, t_norm = t / t_norm, t_norm[None]
    else:
        t, s, v = turn @ wide(t), turn @ wide(s), turn @ wide(v)
        t_norm = torch.linalg.vector_norm(t, dim=1)
        v_next = orthonormal_rows(t)
    good = torch.isfinite(t_norm).all() & (t_norm[0] > 0) & torch.isfinite(sigmas[0])
    residuals = residual_of(sigmas, t_norm, scale)
    return Iteration(sigmas, residuals, s, v, torch.where(good, v_next, v))


def residual_of(sigma: Tensor, t_norm: Tensor, scale: Tensor | float) -> Tensor:
    """Return ||W^T u - sigma v|| = (||W^T u||^2 - sigma^2)^(1/2), from t = scale * W^T s."""
    wtu = t_norm / (scale * sigma)
    residual = ((wtu - sigma) * (wtu + sigma)).clamp(min=0).sqrt()
    return torch.where(~torch.isfinite(sigma) | (sigma == 0), sigma, residual)


def singular_values(gram: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return estimates [r] from S S^T [r, r], and what turns V and S to them; None for r = 1."""
    return (gram[0].sqrt(), None) if len(gram) == 1 else rayleigh_ritz(gram)


def rayleigh_ritz(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Ritz values [r], largest first, and the rotation [r, r] of V and S.

    ``gram`` [r, r] is S S^T. The rows of rotation @ S are orthogonal, and their lengths are the
    values. Values below ZERO times the largest are rounding errors and count as 0. Where S is zero
    or not finite, so are the values, and the rotation is the identity.
    """
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    finite = torch.isfinite(gram).all()
    some = finite & (gram.trace() > 0)
    squares, vectors = torch.linalg.eigh(torch.where(some, gram, eye))
    squares = squares.flip(0)
    least = ZERO[gram.dtype] ** 2 * squares[0]
    squares = torch.where(squares > least, squares, torch.zeros_like(squares))
    squares = torch.where(some, squares, gram.trace())
    return squares.sqrt(), torch.where(some, vectors.flip(1).mT, eye)


def inverse_power_of_two(sigma: Tensor) -> Tensor:
    """Return the power of two that brings ``sigma`` to about one; 1 where sigma is unknown.

    A power of two changes no digit of what it multiplies.
    """
    # From the bits of sigma: not every device has frexp.
    is_wide = sigma.dtype == torch.float64
    digits, bias, kind = (52, 1023, torch.int64) if is_wide else (23, 127, torch.int32)
    known = torch.isfinite(sigma) & (sigma > 0)
    exponent = torch.where(known, sigma, torch.ones_like(sigma)).view(kind) >> digits
    return ((2 * bias - exponent).clamp(min=1) << digits).view(sigma.dtype)


def orthonormal_rows(x: Tensor) -> Tensor:
    """Return an orthonormal basis of the span of the rows of ``x`` [r, N], in their order, wide.

    Row i of it has a product >= 0 with row i of x. A row that depends on those before it is
    replaced by some other direction, or by zeros where there is none (r > N).
    """
    length = torch.linalg.vector_norm(wide(x), dim=1, keepdim=True)
    q, upper = torch.linalg.qr((wide(x) / torch.where(length > 0, length, 1.0)).mT)
    sign = torch.where(upper.diagonal() < 0, -1.0, 1.0)
    found = torch.zeros_like(x, dtype=wide_dtype(x.device))
    found[: len(sign)] = (q * sign).mT
    return found


def orthonormal(v: Tensor) -> Tensor:
    """Return an orthonormal basis of the rows of ``v`` [r, N] in its dtype; r = 1 is normalized."""
    if len(v) == 1:
        return (v / torch.linalg.vector_norm(wide(v))).to(v.dtype)
    return orthonormal_rows(v).to(v.dtype)


def orthonormal_if_finite(v: Tensor) -> Tensor | None:
    """Return :func:`orthonormal` of ``v`` [r, N]; None if its first row is zero or not finite."""
    first = torch.linalg.vector_norm(wide(v[0]))
    good = bool(torch.isfinite(v).all() & (first > 0) & torch.isfinite(first))
    return orthonormal(v) if good else None


# ------------------------------------------------------------------- the penalty and its gradient


def pulled(excess: Tensor, above: bool | Tensor) -> Tensor:
    """Return ``excess``, x^k - tau^k, and with ``above`` 0 where it is negative."""
    if above is False:
        return excess
    return torch.where(above & (excess < 0), torch.zeros_like(excess), excess)


def raw_penalty(
    weight: Tensor,
    v: Tensor,
    exponent: float,
    target: float | Tensor,
    above: bool | Tensor = False,
) -> Tensor:
    """Return R of a matrix ``weight`` [M, N] given ``v`` [N]; differentiable in ``weight``.

    Of an operator, ``v`` [N, 2] has the real and the imaginary part: see ``operators``.
    """
    return raw_penalty_at(torch.linalg.vector_norm(weight @ v), exponent, target, above)


def raw_penalty_at(
    sigma: Tensor, exponent: float, target: float | Tensor, above: bool | Tensor = False
) -> Tensor:
    """Return R of a matrix with the largest singular value ``sigma``."""
    return pulled(sigma**exponent - target**exponent, above) ** 2


def penalty_gradient(s: Tensor, v: Tensor, factor: Tensor) -> Tensor:
    """Return strength * dR/dW [M, N], from ``s`` = W v [M], ``v`` [N] and the gradient's factor.

    Of an operator, ``s`` [2, M] and ``v`` [2, N] have real and imaginary parts.
    """
    return torch.atleast_2d(factor * s).mT @ torch.atleast_2d(v)


def gradient_factor(
    sigma: Tensor,
    strength: Tensor | float,
    exponent: float,
    target: Tensor | float,
    above: bool | Tensor = False,
) -> Tensor:
    """Return strength * 2 k (sigma^k - tau^k) sigma^(k-1) / sigma, by which s is multiplied.

    At sigma = 0 there is no direction to move along: the factor is zero.
    """
    k = exponent
    excess = pulled(sigma**k - target**k, above)
    factor = strength * 2 * k * excess * sigma ** (k - 1) / sigma
    return torch.where(sigma == 0, torch.zeros_like(sigma), factor)


def shift_penalty(b: Tensor, exponent: float) -> Tensor:
    """Return R of a bias or shift ``b`` of any shape: its Euclidean norm to the power 2k."""
    return (b * b).sum() ** exponent


def shift_gradient(b: Tensor, norm: Tensor, exponent: float) -> Tensor:
    """Return dR/db of a bias or shift ``b`` of any shape with the Euclidean norm ``norm``."""
    return 2 * exponent * norm ** (2 * exponent - 2) * b


def gain_penalty(
    g: Tensor, exponent: float, target: Tensor | float = 1.0, above: bool | Tensor = False
) -> Tensor:
    """Return R of a gain ``g`` of any shape: the sum of (|g_i|^k - tau_i^k)^2."""
    return (pulled(g.abs() ** exponent - target**exponent, above) ** 2).sum()


def gain_gradient(
    g: Tensor, exponent: float, target: Tensor | float = 1.0, above: bool | Tensor = False
) -> Tensor:
    """Return dR/dg of a gain ``g`` of any shape."""
    k = exponent
    return 2 * k * pulled(g.abs() ** k - target**k, above) * g.abs() ** (k - 1) * g.sign()


def row_norms(rows: Tensor) -> Tensor:
    """Return the Euclidean norms [n] of ``rows`` [n, length]; with a gradient of 0 at rows of 0."""
    squares = (rows * rows).sum(1)
    is_zero = squares == 0
    return torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, squares).sqrt())


def rows_penalty(
    rows: Tensor, exponent: float, target: Tensor | float, above: bool | Tensor = False
) -> Tensor:
    """Return R of ``rows`` [n, length]: the sum of (||w_i||^k - tau_i^k)^2, tau [n]."""
    return raw_penalty_at(row_norms(rows), exponent, target, above).sum()


def capped(value: Tensor, most: Tensor, lr: float) -> Tensor:
    """Return ``value``, or with its sign the largest one for which lr * |value| <= ``most``.

    In the decoupled form of an optimizer ``value`` is the penalty's gradient, or its factor, and
    ``most`` the distance to the target in the same unit: a step ends at the target at most.
    """
    largest = torch.where(value > 0, most, -most) / (lr or 1.0)
    return torch.where(lr * value.abs() > most, largest, value)


# -------------------------------------------------------------------------------- constraints


def held_factor(sigma: Tensor, strength: Tensor, target: Tensor | float, above: bool) -> Tensor:
    """Return (sigma - tau) / sigma, by which a constraint brings sigma to its target.

    It takes that part of s v^T ("cap", where ``above`` is true, only where sigma is above tau) or
    of W itself ("sphere") from the weights. 0 without strength, where sigma is not finite, and
    where it is zero beside tau: there is no direction to move along. At most all but a millionth of
    a huge sigma goes in a step: more would be lost in rounding.
    """
    goes = (strength != 0) & torch.isfinite(sigma) & (sigma > 1e-30 * target)
    found = (pulled(sigma - target, above) / torch.where(goes, sigma, 1.0)).clamp(max=1 - 1e-6)
    return torch.where(goes, found, torch.zeros_like(found))


# --------------------------------------------------------------------------------- optimizers


def adamw(p: Tensor, g: Tensor, moments, step: Tensor, group) -> tuple[Tensor, list[Tensor]]:
    """Return the next ``p`` and moments by torch.optim.AdamW's rule; ``group`` is of schema.GROUP.

    m1 <- m1 + (1 - beta1) (g - m1), m2 <- beta2 m2 + (1 - beta2) g^2,
    p <- (1 - lr weight_decay) p - lr m1 / (1 - beta1^step) / (sqrt(m2 / (1 - beta2^step)) + eps)
    """
    beta1, beta2 = float(group["option_1"]), float(group["option_2"])
    m1 = moments[0] + (1 - beta1) * (g - moments[0])
    m2 = beta2 * moments[1] + (1 - beta2) * g * g
    corrections = 1 - beta1 ** wide(step), 1 - beta2 ** wide(step)
    root = (m2 / corrections[1]).sqrt() + float(group["eps"])
    kept = (1 - float(group["lr"]) * float(group["weight_decay"])) * p
    return kept - float(group["lr"]) * m1 / corrections[0] / root, [m1, m2]


def sgd(p: Tensor, g: Tensor, moments, step: Tensor, group) -> tuple[Tensor, list[Tensor]]:
    """Return the next ``p`` and moments by torch.optim.SGD's rule; ``group`` is of schema.GROUP.

    g <- g + weight_decay p, m <- momentum m + (1 - dampening) g (no dampening at the first step),
    p <- p - lr m, or with ``nesterov`` p - lr (g + momentum m)
    """
    lr, momentum, dampening = (float(group[name]) for name in ("lr", "option_1", "option_2"))
    g = g + float(group["weight_decay"]) * p
    if momentum == 0:
        return p - lr * g, list(moments)
    m = momentum * moments[0] + (1 - dampening * wide(step > 1)) * g
    return p - lr * (g + momentum * m if group["nesterov"] else m), [m]

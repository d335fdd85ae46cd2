""""""

from __future__ import annotations

import torch
from torch import Tensor

ZERO = 1e-6  # times sigma_1: a smaller Ritz value is rounding


def penalty(weight: Tensor, v: Tensor, exponent: float, target: float | Tensor) -> Tensor:
    """Return R of a matrix ``weight`` [M, N] given ``v`` [N]; differentiable in ``weight``."""
    sigma = torch.linalg.vector_norm(weight @ v)
    return (sigma**exponent - target**exponent) ** 2


def shift_penalty(b: Tensor, exponent: float) -> Tensor:
    """Return R of a bias or shift ``b`` of any shape: its Euclidean norm to the power 2k."""
    return (b * b).sum() ** exponent


def gain_penalty(g: Tensor, exponent: float) -> Tensor:
    """Return R of a gain ``g`` of any shape: the sum of (|g_i|^k - 1)^2."""
    return ((g.abs() ** exponent - 1) ** 2).sum()


def penalty_gradient(weight: Tensor, v: Tensor, exponent: float, target: float) -> Tensor:
    """Return dR/dW [M, N], zero where sigma is zero."""
    s = weight @ v
    sigma = torch.linalg.vector_norm(s)
    factor = 2 * exponent * (sigma**exponent - target**exponent) * sigma ** (exponent - 1)
    return factor * torch.outer(torch.where(sigma > 0, s / sigma, torch.zeros_like(s)), v)


def power_iteration(weight: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return sigma (0-d) and the next v [N] of one iteration with ``weight`` [M, N], ``v`` [N]."""
    s = weight @ v
    t = weight.mT @ s
    return torch.linalg.vector_norm(s), t / torch.linalg.vector_norm(t)


def rayleigh_ritz(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Ritz values [r], largest first, and what turns S and V, [r, r].

    ``gram`` [r, r] is S S^T of S = V W^T [r, M]. The rows of the product of the second with S are
    orthogonal and as long as the values. Values below ZERO times the largest are rounding errors
    and count as 0. Where S is zero or not finite, so are the values, and nothing is turned.
    """
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    finite = torch.isfinite(gram).all()
    some = finite & (gram.trace() > 0)
    squares, vectors = torch.linalg.eigh(torch.where(some, gram, eye))
    squares = squares.flip(0)
    squares = torch.where(squares > ZERO**2 * squares[0], squares, torch.zeros_like(squares))
    squares = torch.where(some, squares, gram.trace())
    return squares.sqrt(), torch.where(some, vectors.flip(1).mT, eye)


def orthonormal_rows(x: Tensor) -> Tensor:
    """Return an orthonormal basis of the span of the rows of ``x`` [r, N], in their order, float64.

    Row i of it has a product >= 0 with row i of x. A row that depends on those before it is
    replaced by some other direction, or by zeros where there is none (r > N).
    """
    length = torch.linalg.vector_norm(x.double(), dim=1, keepdim=True)
    q, upper = torch.linalg.qr((x.double() / torch.where(length > 0, length, 1.0)).mT)
    sign = torch.where(upper.diagonal() < 0, -1.0, 1.0)
    found = torch.zeros_like(x, dtype=torch.float64)
    found[: len(sign)] = (q * sign).mT
    return found


def inverse_power_of_two(sigma: Tensor) -> Tensor:
    """Return the power of two that brings ``sigma`` to about one (1 where it is unknown)."""
    known = torch.isfinite(sigma) & (sigma > 0)
    _, exponent = torch.frexp(torch.where(known, sigma, torch.ones_like(sigma)))
    return torch.ldexp(torch.ones_like(sigma), 1 - exponent)


def adamw(p: Tensor, g: Tensor, moments, step: Tensor, group) -> tuple[Tensor, list[Tensor]]:
    """Return the next ``p`` and moments by torch.optim.AdamW's rule; ``group`` as in csrc/table.h.

    m1 <- m1 + (1 - beta1) (g - m1), m2 <- beta2 m2 + (1 - beta2) g^2,
    p <- (1 - lr weight_decay) p - lr m1 / (1 - beta1^step) / (sqrt(m2 / (1 - beta2^step)) + eps)
    """
    beta1, beta2 = float(group["option_1"]), float(group["option_2"])
    m1 = moments[0] + (1 - beta1) * (g - moments[0])
    m2 = beta2 * moments[1] + (1 - beta2) * g * g
    corrections = 1 - beta1 ** step.double(), 1 - beta2 ** step.double()
    root = (m2 / corrections[1]).sqrt() + float(group["eps"])
    kept = (1 - float(group["lr"]) * float(group["weight_decay"])) * p
    return kept - float(group["lr"]) * m1 / corrections[0] / root, [m1, m2]


def sgd(p: Tensor, g: Tensor, moments, step: Tensor, group) -> tuple[Tensor, list[Tensor]]:
    """Return the next ``p`` and moments by torch.optim.SGD's rule; ``group`` as in csrc/table.h.

    g <- g + weight_decay p, m <- momentum m + (1 - dampening) g (no dampening at the first step),
    p <- p - lr m, or with ``nesterov`` p - lr (g + momentum m)
    """
    lr, momentum, dampening = (float(group[name]) for name in ("lr", "option_1", "option_2"))
    g = g + float(group["weight_decay"]) * p
    if momentum == 0:
        return p - lr * g, list(moments)
    m = momentum * moments[0] + (1 - dampening * (step > 1).double()) * g
    return p - lr * (g + momentum * m if group["nesterov"] else m), [m]


def orthonormal(v: torch.Tensor) -> torch.Tensor:
    """Return an orthonormal basis of the rows of ``v`` [r, N]; one row is divided by its norm."""
    if len(v) == 1:
        return (v / torch.linalg.vector_norm(v.double())).to(v.dtype)
    return orthonormal_rows(v).to(v.dtype)


def orthonormal_if_finite(v: torch.Tensor) -> torch.Tensor | None:
    """Return an orthonormal basis of ``v`` [r, N], or None where its first row is zero."""
    first = torch.linalg.vector_norm(v[0].double())
    good = bool(torch.isfinite(v).all() & (first > 0) & torch.isfinite(first))
    return orthonormal(v) if good else None

"""The whole mathematics in plain PyTorch: the truth that every kernel is checked against.

For a matrix W [M, N] and a unit vector v [N] that counts as a constant, the penalty and its
gradient are (Lewandowski et al., arXiv 2406.06811, with the choices of the README)

    sigma = ||W v||        u = W v / sigma        R = (sigma^k - tau^k)^2
    dR/dW = 2 k (sigma^k - tau^k) sigma^(k-1) u v^T

and one power iteration on W^T W takes v to W^T W v / ||W^T W v||. A bias or shift b has
R = ||b||^(2k), a gain g, whose singular values are |g_i|, has R = sum_i (|g_i|^k - 1)^2.

The functions above the line are that mathematics; those below take a plan and a state as every
backend does, in place, on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor


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


# ------------------------------------------------------------------ the same calls as a backend


def stored(plan, i: int, tensor: Tensor) -> Tensor:
    """Return matrix ``i`` of its parameter (or gradient) as it is stored, rows first, N-d."""
    return plan.matrices[i].of(tensor).permute(plan.layouts[i].permutation)


def matrix(plan, i: int) -> Tensor:
    """Return matrix ``i`` as [M, N] in the dtype of the state."""
    layout, tensor = plan.layouts[i], plan.tensors[plan.matrix_owner[i]].detach()
    return stored(plan, i, tensor).reshape(layout.rows, layout.cols).to(plan.state_dtype)


def _vector_penalty(plan, i: int, x: Tensor, exponent: float) -> Tensor:
    """Return R of vector ``i`` at ``x``, by its kind."""
    return (gain_penalty if plan.vectors[i].kind == "gain" else shift_penalty)(x, exponent)


def _inverse_power_of_two(sigma: Tensor) -> Tensor:
    """Return the power of two that brings ``sigma`` to about one (1 where it is unknown)."""
    known = torch.isfinite(sigma) & (sigma > 0)
    _, exponent = torch.frexp(torch.where(known, sigma, torch.ones_like(sigma)))
    return torch.ldexp(torch.ones_like(sigma), 1 - exponent)


def gram_matvec(plan, state) -> None:
    """Write s = W v, the norms of the vectors, and W^T s (scaled) to ``v_next`` if it is there."""
    scales = _inverse_power_of_two(state.sigma)
    for i in range(len(plan.matrices)):
        weight = matrix(plan, i)
        s = state.rows(i).copy_(state.columns(i, state.v) @ weight.mT)
        if state.v_next is not None:
            state.columns(i, state.v_next).copy_((s * scales[i]) @ weight)
    for i, owner in enumerate(plan.vector_owner):
        vector = plan.tensors[owner].detach().to(plan.state_dtype)
        state.norm[i] = torch.linalg.vector_norm(vector.double())
        state.penalty[len(plan.matrices) + i] = _vector_penalty(plan, i, vector, state.exponent)


def normalize(plan, state) -> None:
    """Write sigma, residual, penalty and the normalized ``v_next`` of every matrix."""
    k = state.exponent
    scales = _inverse_power_of_two(state.sigma).double()
    for i in range(len(plan.matrices)):
        sigma = torch.linalg.vector_norm(state.rows(i)[0].double())
        state.sigma[i] = sigma
        state.penalty[i] = (sigma**k - state.target[i].double() ** k) ** 2
        if state.v_next is None:
            continue
        v, v_next = state.columns(i, state.v), state.columns(i, state.v_next)
        t_norm = torch.linalg.vector_norm(v_next.double())
        good = torch.isfinite(t_norm) & (t_norm > 0) & torch.isfinite(sigma)
        v_next.copy_(torch.where(good, v_next / t_norm, v))
        # ||W^T u - sigma v||^2 = ||W^T u||^2 - sigma^2
        wtu = t_norm / (scales[i] * sigma)
        residual = ((wtu - sigma) * (wtu + sigma)).clamp(min=0).sqrt()
        unknown = ~torch.isfinite(sigma) | (sigma == 0)
        state.residual[i] = torch.where(unknown, sigma, residual)


def rank_one(plan, state, grads, accumulate: bool) -> None:
    """Add strength * dR/dW to ``grads`` (one per owner), or write it over them."""
    k = state.exponent
    strength = state.strength.double()
    if state.scale is not None:
        strength = strength * state.scale
    n = len(plan.matrices)
    sigma, target, norm = state.sigma.double(), state.target.double(), state.norm.double()
    coefficient = strength[:n] * 2 * k * (sigma**k - target**k) * sigma ** (k - 1) / sigma
    coefficient = torch.where(sigma == 0, torch.zeros_like(sigma), coefficient)
    for i, owner in enumerate(plan.matrix_owner):
        if grads[owner] is None:
            continue
        u = (coefficient[i] * state.rows(i)[0]).to(plan.state_dtype)
        view = stored(plan, i, grads[owner].detach())
        _put(view, torch.outer(u, state.columns(i, state.v)[0]).reshape(view.shape), accumulate)
    for i, owner in enumerate(plan.vector_owner):
        if grads[owner] is None:
            continue
        x = plan.tensors[owner].detach().double()
        if plan.vectors[i].kind == "gain":
            value = 2 * k * (x.abs() ** k - 1) * x.abs() ** (k - 1) * x.sign()
        else:
            value = 2 * k * norm[i] ** (2 * k - 2) * x
        _put(grads[owner].detach(), strength[n + i] * value, accumulate)


def _put(grad: Tensor, value: Tensor, accumulate: bool) -> None:
    if accumulate:
        grad.copy_(grad.to(value.dtype) + value)
    else:
        grad.copy_(value)


def differentiable_penalty(plan, state, weights) -> Tensor:
    """Return sum of strength * R at ``state``'s v as a function of ``weights`` (one per owner).

    Autograd sees every operation, so that it may be differentiated any number of times.
    """
    k, n = state.exponent, len(plan.matrices)
    total = torch.zeros((), dtype=plan.state_dtype, device=plan.device)
    for i, owner in enumerate(plan.matrix_owner):
        layout = plan.layouts[i]
        weight = stored(plan, i, weights[owner]).reshape(layout.rows, layout.cols)
        value = penalty(
            weight.to(plan.state_dtype), state.columns(i, state.v)[0], k, state.target[i]
        )
        total = total + state.strength[i] * value
    for i, owner in enumerate(plan.vector_owner):
        vector = weights[owner].to(plan.state_dtype)
        total = total + state.strength[n + i] * _vector_penalty(plan, i, vector, k)
    return total

"""The backend in plain PyTorch, on any device: the truth that every kernel is checked against."""

from __future__ import annotations

import torch
from torch import Tensor

from . import formulas
from .formulas import (
    gain_penalty,
    inverse_power_of_two,
    orthonormal_rows,
    rayleigh_ritz,
    shift_penalty,
)


def stored(plan, i: int, tensor: Tensor) -> Tensor:
    """Return matrix ``i`` of its parameter (or gradient) as it is stored, rows first, N-d."""
    return plan.matrices[i].of(tensor).permute(plan.layouts[i].permutation)


def matrix(plan, i: int) -> Tensor:
    """Return matrix ``i`` as [M, N] in the dtype of the state."""
    layout, tensor = plan.layouts[i], plan.tensors[plan.matrix_ref[i]].detach()
    return stored(plan, i, tensor).reshape(layout.rows, layout.cols).to(plan.state_dtype)


def _elementwise_penalty(plan, i: int, x: Tensor, exponent: float) -> Tensor:
    """Return R of elementwise parameter ``i`` at ``x``, by its kind."""
    return (gain_penalty if plan.elementwise[i].kind == "gain" else shift_penalty)(x, exponent)


def _stale(state) -> Tensor:
    """Tell which matrices a call is about, [n_matrices]."""
    if state.tolerance == 0:
        return torch.ones_like(state.sigma, dtype=torch.bool)
    return state.residual > state.tolerance * state.sigma


def _put(where: Tensor, value: Tensor, acts: Tensor) -> None:
    """Write ``value``, where ``acts`` (0-d) is true."""
    where.copy_(torch.where(acts, value, where.to(value)))


def _parts(plan, i: int) -> tuple[Tensor, Tensor]:
    """Return the partial t [n_tiles, r, N] and products [n_tiles, r, r] of matrix ``i``, views."""
    own, r = plan.table[i], plan.r
    first, n_tiles, n = (
        int(x) for x in (own["first_tile"], own["n_tiles"], own["outer"] * own["inner"])
    )
    start = int(plan.tiles["t_offset"][first]) if n_tiles else 0
    t = plan.t_partial[start : start + n_tiles * r * n].view(n_tiles, r, n)
    return t, plan.gram_partial.view(-1, r, r)[first : first + n_tiles]


def _put_parts(plan, state, i: int, weight: Tensor, scale: Tensor, acts: Tensor) -> None:
    """Write W^T s (scaled) and s s^T of matrix ``i`` as those of its first tile, others zero."""
    s, (t, gram) = state.rows(i), _parts(plan, i)
    if not len(gram):
        return
    _put(gram[0], s.double() @ s.double().mT, acts)
    _put(gram[1:], torch.zeros_like(gram[1:]), acts)
    if state.v_next is not None:
        _put(t[0], (s * scale) @ weight, acts)
        _put(t[1:], torch.zeros_like(t[1:]), acts)


def gram_matvec(plan, state) -> None:
    """Write s = W v, the partial W^T s (scaled) and s s^T, and the norms of the elementwise.

    No W^T s if there is no ``v_next``. With a tolerance, the products of stale matrices alone, with
    ``v_next``.
    """
    scales, stale = inverse_power_of_two(state.sigma), _stale(state)
    vectors = state.v_next if state.tolerance > 0 else state.v
    for i in range(len(plan.matrices)):
        weight, s, v = matrix(plan, i), state.rows(i), state.columns(i, vectors)
        _put(s, v @ weight.mT, stale[i])
        _put_parts(plan, state, i, weight, scales[i], stale[i])
    for i, ref in enumerate(plan.elementwise_ref):
        x = plan.tensors[ref].detach().to(plan.state_dtype)
        state.norm[i] = torch.linalg.vector_norm(x.double())
        state.raw_penalty[len(plan.matrices) + i] = _elementwise_penalty(plan, i, x, state.exponent)


def transposed(plan, state) -> None:
    """Write the partial W^T s (scaled) and s s^T of the s that ``state`` holds.

    No W^T s if there is no ``v_next``. With a tolerance, those of stale matrices alone.
    """
    scales, stale = inverse_power_of_two(state.sigma), _stale(state)
    for i in range(len(plan.matrices)):
        _put_parts(plan, state, i, matrix(plan, i), scales[i], stale[i])


def collect(plan, state, t: Tensor | None, gram: Tensor) -> None:
    """Write the sums of the partial W^T s and s s^T over the tiles of every matrix.

    ``t`` [sum of r N] is of the state's dtype and laid out like ``v``; None if there is no
    ``v_next``. ``gram`` [n_matrices r r] is float64. A matrix without rows or columns has zeros.
    """
    products = gram.view(-1, plan.r, plan.r)
    for i in range(len(plan.matrices)):
        t_parts, gram_parts = _parts(plan, i)
        products[i] = gram_parts.sum(0)
        if t is not None:
            state.columns(i, t).copy_(t_parts.sum(0))


def normalize(plan, state) -> None:
    """Write sigmas, residuals, penalty and the orthonormal ``v_next`` of every matrix.

    From the partial W^T s and s s^T in ``plan``, without a look at weights. With several vectors, v
    and s are turned to the Ritz vectors unless there is no ``v_next``. With a tolerance, all this
    for stale matrices alone, whose v is ``v_next`` first.
    """
    k, stale = state.exponent, _stale(state)
    scales = inverse_power_of_two(state.sigma).double()
    sigmas, residuals = (x.view(plan.r, -1) for x in (state.sigmas, state.residuals))
    for i in range(len(plan.matrices)):
        s, v, (t_parts, gram_parts) = state.rows(i), state.columns(i, state.v), _parts(plan, i)
        gram = gram_parts.sum(0)
        if plan.r == 1:
            sigma, turn = gram[0].sqrt(), None
        else:
            sigma, turn = rayleigh_ritz(gram)
        _put(sigmas[:, i], sigma, stale[i])
        excess = sigma[0] ** k - state.target[i].double() ** k
        _put(state.raw_penalty[i], excess**2, stale[i])
        if state.v_next is None:
            continue
        v_next, t = state.columns(i, state.v_next), t_parts.sum(0)
        if state.tolerance > 0:
            _put(v, v_next, stale[i])
        if turn is None:
            t_norm = torch.linalg.vector_norm(t.double())
            following, t_norm = t / t_norm, t_norm[None]
        else:
            t = turn @ t.double()
            _put(s, turn @ s.double(), stale[i])
            _put(v, turn @ v.double(), stale[i])
            t_norm = torch.linalg.vector_norm(t, dim=1)
            following = orthonormal_rows(t)
        good = torch.isfinite(t_norm).all() & (t_norm[0] > 0) & torch.isfinite(sigma[0])
        _put(v_next, torch.where(good, following, v), stale[i])
        # ||W^T u - sigma v||^2 = ||W^T u||^2 - sigma^2
        wtu = t_norm / (scales[i] * sigma)
        residual = ((wtu - sigma) * (wtu + sigma)).clamp(min=0).sqrt()
        unknown = ~torch.isfinite(sigma) | (sigma == 0)
        _put(residuals[:, i], torch.where(unknown, sigma, residual), stale[i])


def rank_one(plan, state, grads, accumulate: bool) -> None:
    """Add strength * dR/dW to ``grads`` (one per parameter), or write it over them."""
    k = state.exponent
    strength = state.strength.double()
    if state.scale is not None:
        strength = strength * state.scale
    n = len(plan.matrices)
    sigma, target, norm = state.sigma.double(), state.target.double(), state.norm.double()
    coefficient = strength[:n] * 2 * k * (sigma**k - target**k) * sigma ** (k - 1) / sigma
    coefficient = torch.where(sigma == 0, torch.zeros_like(sigma), coefficient)
    for i, ref in enumerate(plan.matrix_ref):
        if grads[ref] is None:
            continue
        u = (coefficient[i] * state.rows(i)[0]).to(plan.state_dtype)
        view = stored(plan, i, grads[ref].detach())
        value = torch.outer(u, state.columns(i, state.v)[0]).reshape(view.shape)
        _put_gradient(view, value, accumulate)
    for i, ref in enumerate(plan.elementwise_ref):
        if grads[ref] is None:
            continue
        x = plan.tensors[ref].detach().double()
        if plan.elementwise[i].kind == "gain":
            value = 2 * k * (x.abs() ** k - 1) * x.abs() ** (k - 1) * x.sign()
        else:
            value = 2 * k * norm[i] ** (2 * k - 2) * x
        _put_gradient(grads[ref].detach(), strength[n + i] * value, accumulate)


def _put_gradient(grad: Tensor, value: Tensor, accumulate: bool) -> None:
    if accumulate:
        grad.copy_(grad.to(value.dtype) + value)
    else:
        grad.copy_(value)


def update(step) -> None:
    """See :meth:`Backend.update`."""
    plan, state = step.plan, step.state
    penalty: list[Tensor] = []
    if plan is not None:
        penalty = [torch.zeros_like(t, dtype=plan.state_dtype) for t in plan.tensors]
        rank_one(plan, state, penalty, accumulate=False)
    for i, (weight, grad) in enumerate(zip(step.weights, step.grads, strict=True)):
        if not step.acts[i]:
            continue
        group = step.groups[step.group_of[i]]
        p = weight.detach().double()
        g = torch.zeros_like(p) if grad is None else grad.double()
        if step.grad_scale is not None:
            g = g / step.grad_scale
        added = penalty[i].double() if i < len(penalty) else torch.zeros_like(p)
        if not step.decoupled:
            g = g + added
        moments = [m.double() for m in step.moments[i]]
        p, moments = step.rule.apply(p, g, moments, step.steps[i], group)
        if step.decoupled:
            p = p - float(group["lr"]) * added
        weight.detach().copy_(p)
        for kept, moment in zip(step.moments[i], moments, strict=True):
            kept.copy_(moment)
    if plan is not None:
        state.swap()
        gram_matvec(plan, state)
        state.swap()


def differentiable_penalty(plan, state, weights) -> Tensor:
    """Return sum of strength * R at ``state``'s v as a function of ``weights`` (one per parameter).

    Autograd sees every operation, so that it may be differentiated any number of times.
    """
    k, n = state.exponent, len(plan.matrices)
    total = torch.zeros((), dtype=plan.state_dtype, device=plan.device)
    for i, ref in enumerate(plan.matrix_ref):
        layout = plan.layouts[i]
        weight = stored(plan, i, weights[ref]).reshape(layout.rows, layout.cols)
        value = formulas.penalty(
            weight.to(plan.state_dtype), state.columns(i, state.v)[0], k, state.target[i]
        )
        total = total + state.strength[i] * value
    for i, ref in enumerate(plan.elementwise_ref):
        x = weights[ref].to(plan.state_dtype)
        total = total + state.strength[n + i] * _elementwise_penalty(plan, i, x, k)
    return total

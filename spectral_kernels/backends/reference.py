"""The backend in plain PyTorch, on any device: the truth that every kernel is checked against."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tables.device import wide
from . import formulas, operators


def stored(plan, i: int, tensor: Tensor) -> Tensor:
    """Return matrix ``i`` of its parameter (or gradient) as it is stored, rows first, N-d."""
    return plan.matrices[i].of(tensor).permute(plan.layouts[i].permutation)


def matrix(plan, i: int) -> Tensor:
    """Return matrix ``i`` as [M, N] in the dtype of the state."""
    layout, tensor = plan.layouts[i], plan.tensors[plan.matrix_ref[i]].detach()
    return stored(plan, i, tensor).reshape(layout.rows, layout.cols).to(plan.state_dtype)


def _rows(plan, i: int, x: Tensor) -> Tensor:
    """Return elementwise parameter ``i``, ``x``, as its rows [n, length]."""
    return x.reshape(plan.n_targets(i), -1) if x.numel() else x.reshape(0, 1)


def _elementwise_penalty(plan, targets, i: int, x: Tensor, exponent: float, above: bool) -> Tensor:
    """Return R of elementwise parameter ``i`` at ``x``, by its kind."""
    kind, target = plan.elementwise[i].kind, targets[i]
    target = None if target is None else target.to(x)
    if kind == "rows":
        return formulas.rows_penalty(_rows(plan, i, x), exponent, target, above)
    if kind == "gain":
        target = 1.0 if target is None else target.view(x.shape)
        return formulas.gain_penalty(x, exponent, target, above)
    if target is None:
        return formulas.shift_penalty(x, exponent)
    return formulas.rows_penalty(x.reshape(1, -1), exponent, target, above)


def _stale(state) -> Tensor:
    """Return which matrices a call is about, [n_matrices]: all of them without a tolerance."""
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


def _put_parts(plan, state, i: int, weight: Tensor, s: Tensor, scale: Tensor, acts: Tensor) -> None:
    """Write the products of ``s`` [r, M] of matrix ``i`` to its first tile, zeros to the others."""
    t, gram = _parts(plan, i)
    if not len(gram):
        return
    _put_first(gram, formulas.gram_of(s), acts)
    if state.v_next is not None:
        _put_first(t, formulas.transposed_product(weight, s, scale), acts)


def _put_first(parts: Tensor, value: Tensor, acts: Tensor) -> None:
    """Write ``value`` to the first of ``parts``, and zeros to the others, if ``acts`` is true."""
    _put(parts[0], value, acts)
    _put(parts[1:], torch.zeros_like(parts[1:]), acts)


def gram_matvec(plan, state) -> None:
    """See :meth:`base.Backend.gram_matvec`."""
    scales, stale = formulas.inverse_power_of_two(state.sigma), _stale(state)
    vectors = state.v_next if state.tolerance > 0 else state.v
    for i in range(len(plan.matrices)):
        weight = matrix(plan, i)
        s = formulas.product(weight, state.columns(i, vectors))
        _put(state.rows(i), s, stale[i])
        _put_parts(plan, state, i, weight, s, scales[i], stale[i])
    for i, ref in enumerate(plan.elementwise_ref):
        x = plan.tensors[ref].detach().to(plan.state_dtype)
        if plan.elementwise[i].kind == "rows":
            norms = torch.linalg.vector_norm(_rows(plan, i, wide(x)), dim=1)
            state.norm[i] = norms.amax() if len(norms) else 0
        else:
            state.norm[i] = torch.linalg.vector_norm(wide(x))
        # Squares of rows may be too large or too small for float32.
        x = x if plan.targets[i] is None else wide(x)
        state.raw_penalty[len(plan.matrices) + i] = _elementwise_penalty(
            plan, plan.targets, i, x, state.exponent, state.above
        )


def transposed(plan, state) -> None:
    """See :meth:`base.Backend.transposed`."""
    scales, stale = formulas.inverse_power_of_two(state.sigma), _stale(state)
    for i in range(len(plan.matrices)):
        _put_parts(plan, state, i, matrix(plan, i), state.rows(i), scales[i], stale[i])


def collect(plan, state, t: Tensor | None, gram: Tensor) -> None:
    """See :meth:`base.Backend.collect`."""
    products = gram.view(-1, plan.r, plan.r)
    for i in range(len(plan.matrices)):
        t_parts, gram_parts = _parts(plan, i)
        products[i] = gram_parts.sum(0)
        if t is not None:
            state.columns(i, t).copy_(t_parts.sum(0))


def taps(plan, i: int) -> operators.Taps:
    """Return the taps of matrix ``i``, an operator."""
    layout, periods = plan.layouts[i], plan.matrices[i].periods
    sizes = dict(zip(layout.column_dims, layout.column_sizes, strict=True))
    sizes = tuple(sizes.get(d + 2, 1) for d in range(len(periods)))
    return operators.taps_of(sizes, periods, plan.device)


def _singular_values(plan, gram: Tensor) -> Tensor:
    """Return the estimates of a matrix from the products of its rows of s."""
    if plan.operators is not None:
        return gram.trace()[None].sqrt()
    return formulas.singular_values(gram)[0]


def _finished_operator(plan, i: int):
    """Return what finishes an iteration of operator ``i`` as ``formulas.finished`` does."""
    layout, own = plan.layouts[i], taps(plan, i)

    def logical(x: Tensor) -> Tensor:
        return layout.to_logical(x).view(2, -1, own.n)

    def finish(s, v, gram, t, scale) -> formulas.Iteration:
        sigma = gram.trace().sqrt()
        found, t_norm = operators.next_vector(logical(t), logical(v), own)
        v_next = layout.from_logical(found.reshape(2, -1))
        residual = formulas.residual_of(sigma, t_norm, scale)
        good = torch.isfinite(v_next).all() & torch.isfinite(sigma)
        v_next = torch.where(good, v_next, wide(v))
        return formulas.Iteration(sigma[None], residual[None], s, v, v_next)

    return finish


def normalize(plan, state) -> None:
    """See :meth:`base.Backend.normalize`."""
    k, stale = state.exponent, _stale(state)
    scales = wide(formulas.inverse_power_of_two(state.sigma))
    sigmas, residuals = (
        x.view(plan.r, -1)[: plan.n_values] for x in (state.sigmas, state.residuals)
    )
    for i in range(len(plan.matrices)):
        s, v, (t_parts, gram_parts) = state.rows(i), state.columns(i, state.v), _parts(plan, i)
        gram = gram_parts.sum(0)
        if state.v_next is None:
            found = _singular_values(plan, gram)
        else:
            v_next = state.columns(i, state.v_next)
            if state.tolerance > 0:
                _put(v, v_next, stale[i])
            finish = formulas.finished if plan.operators is None else _finished_operator(plan, i)
            done = finish(s, v, gram, t_parts.sum(0), scales[i])
            found = done.sigmas
            _put(s, done.s, stale[i])
            _put(v, done.v, stale[i])
            _put(v_next, done.v_next, stale[i])
            _put(residuals[:, i], done.residuals, stale[i])
        _put(sigmas[:, i], found, stale[i])
        raw_penalty = formulas.raw_penalty_at(found[0], k, wide(state.target[i]), state.above)
        _put(state.raw_penalty[i], raw_penalty, stale[i])


def rank_one(plan, state, grads, accumulate: bool, lrs=None) -> None:
    """See :meth:`base.Backend.rank_one`; ``plan`` need not be bound to ``grads``.

    With ``lrs``, learning rates [n_refs], gradients are capped: see ``formulas.capped``.
    """
    above = state.above
    k, n = state.exponent, len(plan.matrices)
    strength = wide(state.strength)
    if state.scale is not None:
        strength = strength * state.scale
    sigma, target, norm = wide(state.sigma), wide(state.target), wide(state.norm)
    factors = formulas.gradient_factor(sigma, strength[:n], k, target, above)
    for i, ref in enumerate(plan.matrix_ref):
        if grads[ref] is None:
            continue
        s, v = _terms(plan, state.rows(i)), _terms(plan, state.columns(i, state.v))
        factor = factors[i]
        if lrs is not None:
            reach = int(plan.table["reach"][i])
            most = (sigma[i] - target[i]).abs() / (reach * sigma[i])
            factor = formulas.capped(factor, most, lrs[ref])
        view = stored(plan, i, grads[ref].detach())
        value = formulas.penalty_gradient(s, v, factor).reshape(view.shape)
        _put_gradient(view, value, accumulate)
    for i, ref in enumerate(plan.elementwise_ref):
        if grads[ref] is None:
            continue
        x, lr = wide(plan.tensors[ref].detach()), None if lrs is None else lrs[ref]
        value = _elementwise_gradient(plan, i, x, norm[i], strength[n + i], k, above, lr)
        _put_gradient(grads[ref].detach(), value, accumulate)


def _terms(plan, x: Tensor) -> Tensor:
    """Return those of the vectors x [r, n] of a matrix that its gradient is made of."""
    return x[:1] if plan.operators is None else x


def _elementwise_gradient(
    plan, i: int, x: Tensor, norm, strength, k: float, above: bool, lr
) -> Tensor:
    """Return the gradient of elementwise parameter ``i``, ``x`` [any shape], capped for ``lr``.

    With ``lr`` None it is not capped. ``norm`` is that in the state.
    """
    kind, target = plan.elementwise[i].kind, plan.targets[i]
    target = None if target is None else wide(target)
    if kind == "gain":
        target = torch.ones_like(x) if target is None else target.view(x.shape)
        most = (x.abs() - target).abs()
        value = strength * formulas.gain_gradient(x, k, target, above)
        return value if lr is None else formulas.capped(value, most, lr)
    if target is None:
        value = strength * formulas.shift_gradient(x, norm, k)
        return value if lr is None else formulas.capped(value, x.abs(), lr)
    norm = torch.linalg.vector_norm(_rows(plan, i, x), dim=1) if kind == "rows" else norm[None]
    factor = formulas.gradient_factor(norm, strength, k, target, above)
    if lr is not None:
        factor = formulas.capped(factor, (norm - target).abs() / norm, lr)
    rows = _rows(plan, i, x) if kind == "rows" else x.reshape(1, -1)
    return (factor[:, None] * rows).reshape(x.shape)


def held_factors(plan, state, above: bool) -> Tensor:
    """Return ``formulas.held_factor`` of every singular value, [plan.n_values, n_matrices] wide."""
    sigmas = wide(state.sigmas).view(plan.r, -1)[: plan.n_values]
    strength = wide(state.strength[: len(plan.matrices)])
    return formulas.held_factor(sigmas, strength, wide(state.target), above)


def _held_part(plan, state, i: int, factors: Tensor) -> Tensor:
    """Return what a cap takes from matrix ``i``, [M, N] wide: the sum of factor_j s_j v_j^T."""
    s, v = wide(state.rows(i)), wide(state.columns(i, state.v))
    if plan.operators is not None:
        return formulas.penalty_gradient(s, v, factors[0] / int(plan.table["reach"][i]))
    return (s.mT * factors) @ v


def _held(plan, state, constraint: str) -> list[Tensor]:
    """Return what ``constraint`` takes from each parameter, see ``formulas.held_factor``; wide."""
    found, n = [torch.zeros_like(wide(t.detach())) for t in plan.tensors], len(plan.matrices)
    strength, norm = wide(state.strength), wide(state.norm)
    above = constraint == "cap" or state.above
    factors = held_factors(plan, state, above)
    for i, ref in enumerate(plan.matrix_ref):
        view = stored(plan, i, found[ref])
        if constraint == "cap":
            part = _held_part(plan, state, i, factors[:, i]).reshape(view.shape)
        else:
            part = factors[0, i] * wide(stored(plan, i, plan.tensors[ref].detach()))
        view.copy_(torch.where(factors[0, i] == 0, torch.zeros_like(part), part))
    for i, ref in enumerate(plan.elementwise_ref):
        x = wide(plan.tensors[ref].detach())
        kind, target, own = plan.elementwise[i].kind, plan.targets[i], strength[n + i]
        if kind == "shift":
            if target is None:
                continue
            factor = formulas.held_factor(norm[i], own, wide(target), True)
        elif kind == "gain":
            target = torch.ones_like(x) if target is None else wide(target).view(x.shape)
            factor = formulas.held_factor(x.abs(), own, target, above)
        else:
            norms, target = torch.linalg.vector_norm(_rows(plan, i, x), dim=1), wide(target)
            factor = formulas.held_factor(norms, own, target, above)
            factor = torch.where(target == 0, 0.0, factor)  # biases, which have no bound
            factor = factor[:, None].expand(_rows(plan, i, x).shape).reshape(x.shape)
        found[ref].copy_(torch.where(factor == 0, torch.zeros_like(x), factor * x))
    return found


def _put_gradient(grad: Tensor, value: Tensor, accumulate: bool) -> None:
    if accumulate:
        grad.copy_(grad.to(value.dtype) + value)
    else:
        grad.copy_(value)


def ratios_of(state) -> Tensor:
    """Return residual / sigma of every matrix, [n_matrices] wide; see :func:`ratios`."""
    return ratios(state.sigma, state.residual)


def ratios(sigma: Tensor, residual: Tensor) -> Tensor:
    """Return residual / sigma, wide; 0 for a zero matrix."""
    sigma = wide(sigma)
    return torch.where(sigma == 0, torch.zeros_like(sigma), wide(residual) / sigma)


def jumped(ratios: Tensor, before: Tensor, least: float, factor: float) -> Tensor:
    """Return for every matrix whether residual / sigma has jumped; see ``base.Backend.jumps``."""
    return (ratios > least) & (ratios > factor * before)


def jumps(state, ratios: Tensor, least: float, factor: float) -> bool:
    """See :meth:`base.Backend.jumps`."""
    now = ratios_of(state)
    if bool(jumped(now, ratios.values, least, factor).any()):
        return True
    ratios.values.copy_(now)
    return False


def update(step) -> None:
    """See :meth:`Backend.update`."""
    plan, state = step.plan, step.state
    penalty: list[Tensor] = []
    if plan is not None and step.constraint is not None:
        penalty = _held(plan, state, step.constraint)
    elif plan is not None:
        penalty = [torch.zeros_like(t, dtype=plan.state_dtype) for t in plan.tensors]
        lrs = [float(step.groups[step.group_of[i]]["lr"]) for i in range(len(penalty))]
        rank_one(plan, state, penalty, False, lrs if step.decoupled else None)
    for i, (weight, grad) in enumerate(zip(step.weights, step.grads, strict=True)):
        if not step.acts[i]:
            continue
        group = step.groups[step.group_of[i]]
        p = wide(weight.detach())
        g = torch.zeros_like(p) if grad is None else wide(grad)
        if step.grad_scale is not None:
            g = g / step.grad_scale
        added = wide(penalty[i]) if i < len(penalty) else torch.zeros_like(p)
        if not step.decoupled:
            g = g + added
        moments = [wide(m) for m in step.moments[i]]
        p, moments = step.rule.apply(p, g, moments, step.steps[i], group)
        if step.decoupled:
            p = p - (float(group["lr"]) if step.constraint is None else 1) * added
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
        v, weight = _terms(plan, state.columns(i, state.v)).mT, weight.to(plan.state_dtype)
        value = formulas.raw_penalty(weight, v, k, state.target[i], state.above)
        total = total + state.strength[i] * value
    for i, ref in enumerate(plan.elementwise_ref):
        x = weights[ref].to(plan.state_dtype)
        x = x if state.targets[i] is None else wide(x)
        own = _elementwise_penalty(plan, state.targets, i, x, k, state.above).to(total)
        total = total + state.strength[n + i] * own
    return total

"""The largest singular values of one matrix, to a tolerance, by Lanczos iteration."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..backends.base import Backend
from ..backends.choice import choose
from ..backends.formulas import orthonormal_rows
from ..selection.matrices import Matrix
from ..sharding.shards import local_of
from ..tables.device import wide_dtype
from .bucket import Bucket

EVERY = 3  # iterations between two convergence checks
BETWEEN = 5  # iterations of the block form between two convergence checks
# Parts of the tolerance: of the bound of the error, and of what so many checks have added. Where
# singular values are dense, the first may hide behind the next ones: it grows by a factor in every
# iteration, and over twelve of them it would show. Half of them miss it ten times as often.
_SURE, _SETTLED, _CHECKS = 0.05, 0.05, 4
_ROWS = 64  # of the basis at first


def singular_values(
    matrix: Matrix, tensor: torch.Tensor, rtol: float, backend: str | Backend = "auto", r: int = 1
) -> tuple[float, ...]:
    """Return the ``r`` largest singular values of one matrix of a parameter.

    See :func:`diagnostics.spectral_norms`.
    """
    finest = 1e-12 if tensor.dtype == torch.float64 else 1e-5
    if not isinstance(rtol, float) or not finest <= rtol < 1:
        raise ValueError(
            f"rtol: expected a number from {finest} to below 1 for {tensor.dtype}, got {rtol!r}"
        )
    if tensor.numel() == 0:
        return (0.0,) * r
    chosen = choose(backend, local_of(tensor).device, tensor.dtype, r)
    bucket = Bucket.of([matrix], [], [tensor], chosen, exponent=1, r=r)
    bucket.state.target.zero_()
    if r == 1:
        return (_lanczos(bucket, rtol, matrix)[0],)
    return _block_lanczos(bucket, rtol, matrix.name)


class Top(NamedTuple):
    """The largest singular value of a matrix, and the vector that the power iteration would keep.

    ``right`` [1, N] in logical order, or ``left`` [1, M] of a matrix that is stored column by
    column; neither if the matrix is zero or not finite.
    """

    sigma: float
    right: torch.Tensor | None = None
    left: torch.Tensor | None = None


def top(matrix: Matrix, tensor: torch.Tensor, rtol: float, backend: str | Backend) -> Top:
    """Return the largest singular value of one matrix of a parameter, within ``rtol``."""
    if tensor.numel() == 0:
        return Top(0.0)
    chosen = choose(backend, local_of(tensor).device, tensor.dtype)
    bucket = Bucket.of([matrix], [], [tensor], chosen, exponent=1, r=1)
    bucket.state.target.zero_()
    sigma, v = _lanczos(bucket, rtol, matrix, exact_vector=True)
    if v is None:
        return Top(sigma)
    layout = bucket.state.plan.layouts[0]
    v = v[None].to(bucket.state.v)
    return Top(sigma, left=v) if layout.side == "left" else Top(sigma, layout.to_logical(v))


def _lanczos(
    bucket: Bucket, rtol: float, matrix: Matrix, exact_vector: bool = False
) -> tuple[float, torch.Tensor | None]:
    """Return sigma_1 and its vector v [N] as it is stored, None if there is none.

    With ``exact_vector`` the vector is as near as sigma_1 is, which takes some more
    iterations; else it may have parts of the next ones, of which sigma_1 knows only the square.
    """
    plan, state = bucket.plan, bucket.state
    n = state.plan.layouts[0].cols
    # A start vector outside of the row space of W adds one dimension to the Krylov space.
    limit = min(n, min(matrix.shape) + 1)
    wide = _wide(plan.device)
    v = _random(torch.Generator().manual_seed(0), n).to(**wide)
    v /= torch.linalg.vector_norm(v)
    rows = torch.empty(min(limit, _ROWS), n, **wide)
    alphas: list[float] = []
    betas: list[float] = []
    unit = 1.0  # sigma of the first product: W / unit keeps every number near one
    history: list[float] = []
    # The first product only gives the magnitude, by which later ones are scaled.
    state.v_next.copy_(v)
    bucket.iterate(1)
    while True:
        k = len(alphas)
        if k == len(rows):
            rows = torch.cat((rows, torch.empty_like(rows)))
        rows[k] = v
        state.v_next.copy_(v)
        bucket.iterate(1)
        sigma, residual = state.sigma.item(), state.residual.item()
        if not math.isfinite(sigma):
            return math.nan, None
        if sigma == 0 and k == 0:
            return 0.0, None
        if k == 0:
            unit = sigma
        alphas.append((sigma / unit) ** 2)
        # W^T W v = length * v_next, and the residual gives the length (see normalize). What it has
        # of the last two vectors is known; a pass over all of them removes what rounding added.
        t = state.v_next.to(**wide) * (math.hypot(sigma, residual) * sigma / unit**2)
        t = t.sub_(v, alpha=alphas[-1])
        if k > 0:
            t.sub_(rows[k - 1], alpha=betas[-1])
        basis = rows[: k + 1]
        t -= basis.mT @ (basis @ t)
        beta = torch.linalg.vector_norm(t).item()
        is_last = k + 1 >= limit or beta <= 1e-14 * alphas[0]
        if (k + 1) % EVERY == 0 or is_last:
            ritz, rest, error, weights = _top_ritz_value(alphas, betas, beta)
            converged = rest <= 0.1 * rtol * ritz if exact_vector else error <= _SURE * rtol * ritz
            history.append(math.sqrt(max(ritz, 0.0)))
            gained = history[-1] - history[-1 - _CHECKS] if len(history) > _CHECKS else math.inf
            if is_last or (converged and gained <= _SETTLED * rtol * history[-1]):
                return history[-1] * unit, weights.to(basis) @ basis
            if k + 1 >= 2000:
                raise _no_convergence(matrix.name, rtol)
        betas.append(beta)
        v = t / beta


def _block_lanczos(bucket: Bucket, rtol: float, name: str) -> tuple[float, ...]:
    """Return r singular values: the Ritz values of W on the space that all blocks of v span.

    Each block has its s = W v; the eigenvalues of s s^T over all blocks are the squares.
    """
    plan, state = bucket.plan, bucket.state
    r, n = plan.r, state.plan.layouts[0].cols
    generator = torch.Generator().manual_seed(0)
    wide = _wide(plan.device)
    block = orthonormal_rows(_random(generator, r, n)).to(**wide)
    # The first product only gives the magnitude, by which later ones are scaled.
    state.columns(0, state.v_next).copy_(block)
    bucket.iterate(1)
    basis = torch.zeros(0, n, **wide)
    images = torch.zeros(0, plan.layouts[0].rows, **wide)
    history: list[torch.Tensor] = []  # of every BETWEEN-th block
    n_blocks = 0
    while True:
        state.columns(0, state.v_next).copy_(block)
        bucket.iterate(1)
        if not torch.isfinite(state.sigma).all():
            return (math.nan,) * r
        basis = torch.cat((basis, state.columns(0, state.v).to(**wide)))
        images = torch.cat((images, state.rows(0).to(**wide)))
        block = _beside(basis, state.columns(0, state.v_next).to(**wide), generator)
        n_blocks += 1
        complete = not block.any()
        if not complete and n_blocks % BETWEEN:
            continue
        squares = torch.linalg.eigvalsh(bucket.sum_rows(images @ images.mT)).flip(0)[:r]
        history.append(squares.clamp(min=0).sqrt())
        settled = len(history) > 1 and bool(
            (history[-1] - history[-2] <= 0.1 * rtol * history[-1][0]).all()
        )
        if settled or complete:
            return tuple(history[-1].tolist())
        if n_blocks >= 2000:
            raise _no_convergence(name, rtol)


def _no_convergence(name: str, rtol: float) -> RuntimeError:
    return RuntimeError(
        f"{name!r}: no convergence to rtol {rtol} in 2000 iterations; pass a larger rtol"
    )


def _wide(device: torch.device) -> dict:
    """Return where the basis is kept, float64: on the CPU if ``device`` has no float64."""
    has_it = wide_dtype(device) == torch.float64
    return {"dtype": torch.float64, "device": device if has_it else "cpu"}


def _random(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")


def _beside(basis: torch.Tensor, block: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return the rows of ``block``, orthonormalized against ``basis`` and each other.

    A row without a new direction (after rounding, such as that of a singular value far below the
    largest) is replaced by a random one, or by zeros if the basis is complete.
    """
    least = 10 * torch.finfo(torch.float32).eps
    found = basis[torch.linalg.vector_norm(basis, dim=1) > 0.5]
    following = torch.zeros_like(block)
    for i, row in enumerate(block):
        if len(found) == len(row):
            break
        unit = _unit_beside(found, row, least)
        if unit is None:
            unit = _unit_beside(found, _random(generator, len(row)).to(row), least)
        if unit is not None:
            following[i] = unit
            found = torch.cat((found, unit[None]))
    return following


def _unit_beside(basis: torch.Tensor, row: torch.Tensor, least: float) -> torch.Tensor | None:
    """Return the unit vector along the part of ``row`` orthogonal to ``basis``.

    None if that part is at most ``least`` times the length of ``row``.
    """
    length = torch.linalg.vector_norm(row)
    for _ in range(2):
        row = row - basis.mT @ (basis @ row)
        norm = torch.linalg.vector_norm(row)
        if not norm > least * length:
            return None
        row, length = row / norm, 1.0
    return row


def _top_ritz_value(alphas, betas, beta: float) -> tuple[float, float, float, torch.Tensor]:
    """Return the largest eigenvalue of the tridiagonal matrix, residual, error bound and vector.

    The error is at most the norm of the residual, and at most its square over the gap to the next
    eigenvalue (Parlett, "The Symmetric Eigenvalue Problem", section 11.7), for which the next Ritz
    value stands.
    """
    diagonal = torch.diag(torch.tensor(alphas, dtype=torch.float64, device="cpu"))
    off = torch.tensor(betas, dtype=torch.float64, device="cpu")
    values, vectors = torch.linalg.eigh(diagonal + torch.diag(off, 1) + torch.diag(off, -1))
    top, rest = float(values[-1]), beta * abs(float(vectors[-1, -1]))
    gap = top - float(values[-2]) if len(values) > 1 else 0.0
    error = rest * min(1.0, rest / gap) if gap > 0 else rest
    return top, rest, error, vectors[:, -1]

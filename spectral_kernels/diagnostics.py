"""Measurements on the weights of a model."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from .backends import check_name, choose
from .buckets import Bucket
from .plan import Plan
from .selection import Matrix, select


def spectral_norms(
    model_or_named_tensors: nn.Module | Iterable[tuple[str, torch.Tensor]],
    rtol: float = 1e-4,
    *,
    backend: str = "auto",
    **selection,
) -> dict[str, float]:
    """Return the largest singular value of every matrix, within ``rtol`` of the SVD's.

    Lanczos iteration on W^T W with full reorthogonalization (Golub and Van Loan, "Matrix
    Computations", section 10.1), with one read of W per step; frozen parameters are measured too.

    Args:
        model_or_named_tensors: a module, or an iterable of (name, tensor).
        rtol: relative error, at least 1e-5 (1e-12 for float64 weights).
        backend: as for SpectralRegularizer.
        selection: ``include``, ``exclude``, ``splits``, ``stacked`` as for SpectralRegularizer.

    Returns:
        name -> sigma_1; nan for a matrix with an element that is not finite.

    Raises:
        ValueError: ``rtol`` out of range, a pattern that matches nothing, no matrix, a memory
            layout that cannot be used in place.
        RuntimeError: a backend that cannot run here, or no convergence.
    """
    check_name(backend)
    unknown = set(selection) - {"include", "exclude", "splits", "stacked"}
    if unknown:
        raise TypeError(f"spectral_norms() got an unexpected argument {unknown.pop()!r}")
    matrices = select(
        model_or_named_tensors, biases=False, norms=False, trainable_only=False, **selection
    ).matrices
    return {
        matrix.name: largest_singular_value(matrix, matrix.owner.get().detach(), rtol, backend)
        for matrix in matrices
    }


def largest_singular_value(
    matrix: Matrix, tensor: torch.Tensor, rtol: float, backend: str = "auto"
) -> float:
    """Return sigma_1 of one matrix of a parameter; see :func:`spectral_norms`."""
    finest = 1e-12 if tensor.dtype == torch.float64 else 1e-5
    if not isinstance(rtol, float) or not finest <= rtol < 1:
        raise ValueError(
            f"rtol: got {rtol!r}; accepted for {tensor.dtype} are numbers from {finest} to 1"
        )
    if tensor.numel() == 0:
        return 0.0
    plan = Plan([matrix], [], [tensor])
    bucket = Bucket(plan, choose(backend, plan.device), exponent=1)
    bucket.state.target.zero_()
    return _lanczos(bucket, rtol, matrix.name)


def _lanczos(bucket: Bucket, rtol: float, name: str) -> float:
    plan, state = bucket.plan, bucket.state
    n = plan.layouts[0].cols
    # A start outside of the row space of W adds one dimension to what can be reached.
    limit = min(n, plan.layouts[0].rows + 1)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(n, generator=generator, dtype=torch.float64, device="cpu").to(plan.device)
    v /= torch.linalg.vector_norm(v)
    basis: list[torch.Tensor] = []
    alphas: list[float] = []
    betas: list[float] = []
    unit = 1.0  # sigma of the first product: W / unit keeps every number near one
    history: list[float] = []
    # The first product only tells the magnitude, by which later ones are scaled.
    state.v_next.copy_(v)
    bucket.iterate(1)
    while True:
        basis.append(v)
        state.v_next.copy_(v)
        bucket.iterate(1)
        sigma, residual = float(state.sigma), float(state.residual)
        if not math.isfinite(sigma):
            return math.nan
        if sigma == 0 and len(basis) == 1:
            return 0.0
        if len(basis) == 1:
            unit = sigma
        # W^T W v = length * v_next, and the residual tells its length (see normalize).
        length = math.hypot(sigma, residual) * sigma / unit**2
        alphas.append((sigma / unit) ** 2)
        t = state.v_next.double() * length
        stacked = torch.stack(basis)
        for _ in range(2):
            t = t - stacked.mT @ (stacked @ t)
        beta = float(torch.linalg.vector_norm(t))
        if len(basis) % 5 == 0 or len(basis) >= limit or beta <= 1e-14 * alphas[0]:
            ritz, rest = _top_ritz_value(alphas, betas, beta)
            history.append(math.sqrt(max(ritz, 0.0)))
            # sigma is half as wrong as its square; the margin is for clustered singular values.
            settled = len(history) > 2 and history[-1] - history[-3] <= 0.1 * rtol * history[-1]
            if len(basis) >= limit or (rest <= 0.1 * rtol * ritz and settled) or beta == 0:
                return history[-1] * unit
            if len(basis) >= 2000:
                raise RuntimeError(f"{name!r}: no convergence to rtol {rtol} in 2000 iterations")
        betas.append(beta)
        v = t / beta


def _top_ritz_value(alphas, betas, beta: float) -> tuple[float, float]:
    """Return the largest eigenvalue of the tridiagonal matrix and its residual norm."""
    diagonal = torch.diag(torch.tensor(alphas, dtype=torch.float64, device="cpu"))
    off = torch.tensor(betas, dtype=torch.float64, device="cpu")
    values, vectors = torch.linalg.eigh(diagonal + torch.diag(off, 1) + torch.diag(off, -1))
    return float(values[-1]), beta * abs(float(vectors[-1, -1]))

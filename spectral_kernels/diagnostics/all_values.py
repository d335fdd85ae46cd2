"""All singular values of one matrix, faster than by an SVD and with the smallest one right."""

from __future__ import annotations

import torch

from ..tables.device import wide, wide_dtype

# The Gram matrix squares the singular values: those below this fraction of the largest lose more
# than half of their digits in float64.
_LEAST_RATIO = 3e-5
_BLOCK = 512  # rows of the Gram matrix that are computed at a time
_PIECE = 1 << 20  # elements of W that are converted at a time
_STEPS = 200  # of the iteration for the smallest value


def all_singular_values(weight: torch.Tensor) -> torch.Tensor:
    """Return all singular values of a matrix, the largest first.

    The square roots of the eigenvalues of W W^T, or W^T W if that is smaller, in float64, which is
    3 to 14 times as fast as an SVD. Its rounding error is 1e-16 sigma_1^2, so that values above
    3e-5 sigma_1 are within 1e-5 of the SVD's, and all within 1e-7 sigma_1. If the smallest value is
    below 3e-5 sigma_1 it is computed for itself, from the R of a QR factorization, by Lanczos
    iteration on (R^T R)^-1, as exactly as by an SVD in float64: within 1e-4 up to a condition
    number of 1e11. What that could not tell from zero, below max(M, N) eps sigma_1, is 0.

    Beside W it needs two squares of min(M, N) numbers and a few rows in float64.

    Args:
        weight: [M, N], finite, of any floating dtype, on any device.

    Returns:
        [min(M, N)], float64 (float32 on a device without it, with its accuracy).
    """
    tall = weight.detach() if weight.shape[0] >= weight.shape[1] else weight.detach().mT
    if tall.shape[1] == 0:
        return torch.empty(0, dtype=wide_dtype(weight.device), device=weight.device)
    low, high = torch.aminmax(tall)
    scale = torch.maximum(wide(-low), wide(high))  # squares neither overflow nor vanish
    if not scale > 0:
        return scale.new_zeros(tall.shape[1])
    squares = torch.linalg.eigvalsh(_gram(tall, scale)).clamp(min=0)
    values = squares.sqrt().flip(0)
    if values[-1] < _LEAST_RATIO * values[0]:
        least = _smallest(_r_factor(tall, scale))
        noise = max(tall.shape) * torch.finfo(values.dtype).eps * values[0]
        values = values.clamp(min=least if least > noise else 0.0)
        values[-1] = least if least > noise else 0.0
    return values * scale


def _gram(tall: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the lower triangle of W^T W / scale^2 for W [M, N], M >= N; above it lies no data."""
    n = tall.shape[1]
    gram = scale.new_zeros(n, n)
    length = max(_BLOCK, _PIECE // n)
    for first in range(0, len(tall), length):
        rows = wide(tall[first : first + length]) / scale
        for start in range(0, n, _BLOCK):
            block = rows[:, start : start + _BLOCK]
            gram[start : start + _BLOCK, : start + _BLOCK].addmm_(
                block.mT, rows[:, : start + _BLOCK]
            )
    return gram


def _r_factor(tall: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return R [N, N] of the QR factorization of W / scale [M, N], M >= N, row block by row block.

    As in Demmel, Grigori, Hoemmen and Langou, "Communication-optimal parallel and sequential QR and
    LU factorizations", SIAM J. Sci. Comput. 34, 2012.
    """
    n = tall.shape[1]
    r = scale.new_zeros(0, n)
    for first in range(0, len(tall), n):
        rows = wide(tall[first : first + n]) / scale
        r = torch.linalg.qr(torch.cat((r, rows)), mode="r").R
    return r


def _smallest(r: torch.Tensor) -> float:
    """Return the smallest singular value of a triangular matrix [N, N]; 0 if it is singular."""
    n = len(r)
    if not bool(r.diagonal().all()):
        return 0.0
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(n, generator=generator, dtype=torch.float64, device="cpu").to(r)
    basis = (v / torch.linalg.vector_norm(v))[:, None]
    images = basis[:, :0]
    found = 0.0
    for _ in range(min(n, _STEPS)):
        # W = R^-T v: the Gram matrix of these images is that of (R^T R)^-1 on the basis.
        image = torch.linalg.solve_triangular(r.mT, basis[:, -1:], upper=False)
        images = torch.cat((images, image), 1)
        before, found = found, float(torch.linalg.matrix_norm(images, 2))
        if not found < float("inf"):
            return 0.0
        if found - before <= 1e-9 * found:
            break
        following = torch.linalg.solve_triangular(r, image, upper=True)
        length = torch.linalg.vector_norm(following)
        for _ in range(2):
            following = following - basis @ (basis.mT @ following)
        norm = torch.linalg.vector_norm(following)
        if not norm > 1e-14 * length:
            break
        basis = torch.cat((basis, following / norm), 1)
    return 1 / found

"""The norm of a convolution as an operator, by a search over frequencies, and where it is attained.

The largest singular value of F(theta) (see ``backends.operators``) is estimated on a grid of
frequencies by power iteration. What comes out best begins the iterations of a regularizer. For the
norm to a tolerance, every local maximum of the grid that is not far below the best is climbed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import operators
from ..backends.operators import Taps
from ..selection.matrices import Matrix
from ..sharding.shards import whole_of
from ..tables.device import wide, wide_dtype

PER_TAP, LEAST = 4, 8  # frequencies along a dimension: per tap of a phase, and at least
ITERATIONS = 8  # of the power method at each frequency; estimates are then some per cent too small
NEAR, MOST_CLIMBS = (
    0.8,
    16,
)  # local maxima that are climbed: from this part of the best, and so many
ROUGH = 0.01  # relative error to which all of them are; then those that may be the best, to the end
BYTES = 2**26  # of what belongs to the frequencies that are looked at together


class Peak(NamedTuple):
    """The norm of an operator, and the vector of it.

    Attributes:
        sigma: the norm, or a lower bound of it.
        right: v [2, N], real and imaginary part, in the parameter's order; some v for a kernel that
            is zero or not finite.
    """

    sigma: float
    right: Tensor
    left: None = None  # as lanczos.Top has it for matrices


def search(matrices: Sequence[Matrix], tensor: Tensor) -> list[Peak]:
    """Return what is best on the grid for the operators of a parameter, which are alike.

    The same on all ranks that hold it.
    """
    kernels, scales, taps = _kernels(matrices, tensor)
    parts = list(_grid(kernels, taps))
    found = []
    for i, scale in enumerate(scales):
        if not 0 < scale < math.inf:
            found.append(Peak(scale, _some(kernels, taps)))
            continue
        sigmas, theta, vectors = max((_of(part, i) for part in parts), key=_largest)
        best = int(sigmas.argmax())
        v = _vector(vectors[best], theta[best], taps)
        found.append(Peak(float(sigmas[best]) * scale, v))
    return found


def norm(matrix: Matrix, tensor: Tensor, rtol: float) -> Peak:
    """Return the norm of an operator within ``rtol``, unless a maximum hides between the grid's."""
    kernels, (scale,), taps = _kernels([matrix], tensor)
    if not 0 < scale < math.inf:
        return Peak(scale, _some(kernels, taps))
    parts = [_of(part, 0) for part in _grid(kernels, taps)]
    sigmas, thetas, vectors = (torch.cat([part[j] for part in parts]) for j in range(3))
    start = [(vectors[i], thetas[i]) for i in _peaks(sigmas, taps)]
    rough = [_climb(kernels[0], *one, taps, max(rtol, ROUGH)) for one in start]
    least = (1 - 3 * ROUGH) * max(sigma for sigma, *_ in rough)
    climbed = [_climb(kernels[0], *own, taps, rtol) for sigma, *own in rough if sigma >= least]
    sigma, a, theta = max(climbed, key=lambda one: one[0])
    return Peak(sigma * scale, _vector(a, theta, taps))


def _kernels(matrices: Sequence[Matrix], tensor: Tensor) -> tuple[Tensor, list[float], Taps]:
    """Return the kernels [G, M, C, taps...], wide and divided by their largest number; these; taps.

    A number is NaN where an element is not finite. What is sharded is gathered.
    """
    whole = whole_of(tensor.detach())
    kernels = wide(torch.stack([matrix.of(whole) for matrix in matrices]))
    taps = operators.taps_of(tuple(kernels.shape[3:]), matrices[0].periods, kernels.device)
    if not kernels.numel():
        return kernels, [0.0] * len(kernels), taps
    scales = kernels.flatten(1).abs().amax(1)
    scales = torch.where(torch.isfinite(scales), scales, math.nan)
    good = torch.where(scales > 0, scales, 1.0).view(-1, *[1] * (kernels.dim() - 1))
    return kernels / good, scales.tolist(), taps


def _of(part: tuple[Tensor, Tensor, Tensor], i: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the part of the grid of kernel ``i``."""
    sigmas, theta, vectors = part
    return sigmas[i], theta, vectors[i]


def _largest(part: tuple[Tensor, Tensor, Tensor]) -> float:
    return float(part[0].max())


def _vector(a: Tensor, theta: Tensor, taps: Taps) -> Tensor:
    """Return v [2, N] of a [C * phases]."""
    a = a.view(-1, taps.n_phases)
    return operators.as_parts(operators.vector_of(a, theta, taps)).flatten(1)


def _some(kernels: Tensor, taps: Taps) -> Tensor:
    """Return a v [2, N] that goes with no kernel in particular."""
    n = kernels.shape[2] * taps.n_phases
    a = torch.full((n,), (n or 1) ** -0.5, dtype=kernels.dtype, device=kernels.device)
    theta = a.new_zeros(len(taps.dims))
    return _vector(torch.complex(a, torch.zeros_like(a)), theta, taps)


def _sizes(taps: Taps) -> list[int]:
    """Return the number of frequencies of the grid along each dimension."""
    return [max(PER_TAP * n, LEAST) for n in taps.counts]


def _frequencies(taps: Taps, device: torch.device) -> Tensor:
    """Return the frequencies of the grid [n, dims], wide, those of the last dimension up to pi.

    F(-theta) is the conjugate of F(theta).
    """
    sizes = _sizes(taps)
    axes = [2 * math.pi * torch.arange(n, dtype=torch.float64) / n for n in sizes]
    if axes:
        axes[-1] = axes[-1][: sizes[-1] // 2 + 1]
    found = torch.cartesian_prod(*axes).view(-1, len(axes))
    return found.to(device, wide_dtype(device))


def _grid(kernels: Tensor, taps: Taps) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield estimates [G, n], frequencies [n, dims], vectors [G, n, C * phases] of parts of a grid.

    An estimate is never above sigma_1 of F, and that is never above the norm. They are in float32:
    products of the kernels with the vectors of many frequencies at once.
    """
    g, m, c = kernels.shape[:3]
    theta = _frequencies(taps, kernels.device)
    flat = kernels.reshape(g, m, -1).float()
    start = torch.randn(2, c, taps.n_phases, 1, generator=torch.Generator().manual_seed(0))
    start = torch.complex(*start.to(kernels.device))
    n_bytes = 32 * flat[:, 0].numel()  # of the vectors of one frequency and what is made of them
    for part in theta.split(max(1, BYTES // max(n_bytes, 1))):
        waves = operators.waves(part, taps).mT.to(start.dtype)  # [taps, n]
        a = start.expand(g, -1, -1, len(part))
        for _ in range(ITERATIONS):
            t = _real_product(flat.mT, _real_product(flat, _spread(a, waves, taps)))
            t = t.view(g, c, -1, len(part)) * waves.conj()
            a = torch.zeros_like(a, memory_format=torch.contiguous_format)
            a.index_add_(2, taps.phases, t)
            a = a / _norms(a.flatten(1, 2)).clamp(min=1e-30)[:, None, None]
        s = _real_product(flat, _spread(a, waves, taps))
        yield _norms(s), part, a.flatten(1, 2).mT


def _spread(a: Tensor, waves: Tensor, taps: Taps) -> Tensor:
    """Return v [G, C * taps, n] of a [G, C, phases, n]."""
    return (a[:, :, taps.phases] * waves).flatten(1, 2)


def _real_product(x: Tensor, y: Tensor) -> Tensor:
    """Return x y of real x and complex y."""
    return torch.view_as_complex(
        (x @ torch.view_as_real(y).flatten(2)).view(*y.shape[:1], -1, *y.shape[2:], 2)
    )


def _norms(x: Tensor) -> Tensor:
    """Return the norms [G, n] of x [G, m, n]."""
    return torch.linalg.vector_norm(x, dim=1)


def _peaks(sigmas: Tensor, taps: Taps) -> list[int]:
    """Return the local maxima of the grid that may be near the largest, the best first."""
    sizes = _sizes(taps)
    if sizes:
        sizes[-1] = sizes[-1] // 2 + 1
    grid = sigmas.view(sizes)
    is_peak = grid >= NEAR * grid.max()
    for d in range(len(sizes) - 1):
        is_peak &= (grid >= grid.roll(1, d)) & (grid >= grid.roll(-1, d))
    if sizes:  # half of the last dimension is there
        is_peak[..., 1:] &= grid[..., 1:] >= grid[..., :-1]
        is_peak[..., :-1] &= grid[..., :-1] >= grid[..., 1:]
    found = is_peak.flatten().nonzero()[:, 0].tolist()
    return sorted(found, key=lambda i: -float(sigmas[i]))[:MOST_CLIMBS]


def matrix_at(kernel: Tensor, theta: Tensor, taps: Taps) -> Tensor:
    """Return F [M, C * phases], complex, of a kernel [M, C, taps...] at ``theta`` [dims]."""
    m, c = kernel.shape[:2]
    waves = operators.waves(theta, taps)
    spread = waves.new_zeros(len(waves), taps.n_phases).scatter_(
        1, taps.phases[:, None], waves[:, None]
    )
    return (kernel.reshape(m * c, -1).to(spread.dtype) @ spread).view(m, -1)


def _climb(
    kernel: Tensor, a: Tensor, theta: Tensor, taps: Taps, rtol: float
) -> tuple[float, Tensor, Tensor]:
    """Return sigma, a and theta of the local maximum near ``theta``.

    Newton's steps between singular values to ``rtol``.
    """
    m, c = kernel.shape[:2]
    flat = kernel.reshape(1, m, -1)
    a, before = a.to(torch.complex128 if kernel.dtype == torch.float64 else a.dtype), 0.0
    for _ in range(200):
        f = matrix_at(kernel, theta, taps)
        sigma, a = _top(f, a, rtol)
        if not sigma > before * (1 + 0.01 * rtol):
            break
        before = sigma
        v = operators.vector_of(a.view(c, -1), theta, taps).view(1, -1, 1)
        t = _real_product(flat.mT, _real_product(flat, v)).view(c, -1)
        theta = operators.improved(t, theta, taps)
    return max(sigma, before), a, theta


def _top(f: Tensor, a: Tensor, rtol: float) -> tuple[float, Tensor]:
    """Return sigma_1 of F [M, n] within ``rtol`` and its right vector, by Lanczos from ``a`` [n].

    Golub and Van Loan, "Matrix Computations", section 10.1, with full reorthogonalization.
    """
    limit = min(f.shape[1], f.shape[0] + 1)
    v, basis, alphas, betas = a / torch.linalg.vector_norm(a), [], [], []
    while True:
        basis.append(v)
        t = f.mH @ (f @ v)
        alphas.append(float(torch.linalg.vecdot(v, t).real))
        stacked = torch.stack(basis, 1)
        for _ in range(2):
            t = t - stacked @ (stacked.mH @ t)
        beta = float(torch.linalg.vector_norm(t))
        tridiagonal = torch.diag(torch.tensor(alphas, dtype=torch.float64))
        if betas:
            off = torch.diag(torch.tensor(betas, dtype=torch.float64), 1)
            tridiagonal = tridiagonal + off + off.mT
        values, weights = torch.linalg.eigh(tridiagonal)
        value, rest = float(values[-1]), beta * abs(float(weights[-1, -1]))
        if len(basis) >= limit or rest <= 0.1 * rtol * value or beta <= 1e-14 * alphas[0]:
            vector = stacked @ weights[:, -1].to(stacked)
            return math.sqrt(max(value, 0.0)), vector / torch.linalg.vector_norm(vector)
        betas.append(beta)
        v = t / beta

"""The norm of a convolution as an operator, by a search over frequencies, and where it is attained.

The largest singular value of F(theta) (see ``backends.operators``) is estimated on a grid of
frequencies by power iteration. What comes out best begins the iterations of a regularizer, and
replaces what they have followed where that is only a local maximum. For the norm to a tolerance,
every local maximum of the grid that is not far below the best is climbed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..backends import operators
from ..backends.operators import Taps
from ..selection.arguments import expected
from ..selection.matrices import Matrix
from ..sharding.shards import is_sharded, whole_of
from ..tables.device import is_capturing, wide, wide_dtype

if TYPE_CHECKING:
    from .bucket import Bucket

EVERY, SOON = 200, 25  # steps between two searches; the latter where one has found what is FAR
BETTER, FAR = 1.01, 1.03  # times its sigma: what an operator goes on from instead of what it has
FEW = 8  # iterations of Lanczos between two of Newton's steps
ROUGH = 0.01  # relative error to which peaks are climbed; those that may be the best, to the end
BYTES = 2**26  # of what belongs to the frequencies that are looked at together


class Grid(NamedTuple):
    """How frequencies are searched.

    Attributes:
        per_tap: frequencies along a dimension per tap of a phase.
        least: frequencies along a dimension, at least.
        iterations: of the power method at each frequency.
    """

    per_tap: int
    least: int
    iterations: int


QUICK, FINE = Grid(3, 6, 4), Grid(4, 8, 8)
N_BEST, MORE_ITERATIONS = 4, 8  # of a quick search: the best are iterated further
NEAR, MOST_CLIMBS = 0.8, 16  # of a fine one: peaks above this part of the best, and so many


class Top(NamedTuple):
    """The norm of an operator, and its vector, as ``lanczos.Top`` has them for matrices.

    Attributes:
        sigma: the norm.
        right: v [2, N], real and imaginary part, in the parameter's order; some v for a kernel that
            is zero or not finite.
    """

    sigma: float
    right: Tensor
    left: None = None


class SearchClock:
    """Counts steps, and has the operators of a model searched again every now and then.

    Sooner at first, and where a maximum was found that is far above what was followed: more of them
    may be, as when a bound has just been set. Not on a GPU, which the host would wait for, and not
    where weights are sharded, whose ranks search together.
    """

    def __init__(self):
        self.left = SOON  # steps until the next search, 1 or more

    def count(self, buckets: Sequence[Bucket] | None) -> None:
        """Begin a step; ``buckets`` are those of the model, None before they are built.

        A search waits until they are.
        """
        if buckets is None:
            self.left = max(1, self.left - 1)
            return
        if all(bucket.plan.operators is None for bucket in buckets):
            return
        self.left -= 1
        if self.left > 0:
            return
        found = [
            search_again(bucket, bucket.state.sigma * BETTER)
            for bucket in buckets
            if bucket.plan.operators is not None and not is_capturing(bucket.plan.device)
        ]
        self.left = SOON if any(found) else EVERY


def checked_next_search(value: Any) -> int | None:
    """Return the steps until the next search as an int; None, of a state without them, as it is.

    A tensor of one element is a number too, and torch's optimizers make a floating one of it.

    Raises:
        TypeError: no number.
        ValueError: not an integer from 1 to EVERY.
    """
    if value is None:
        return None
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise TypeError(expected("state: next_search", "an integer", value))
    if not 1 <= number <= EVERY or number != int(number):
        raise ValueError(expected("state: next_search", f"an integer from 1 to {EVERY}", number))
    return int(number)


def search_again(bucket: Bucket, least: Tensor) -> bool:
    """Let the operators of a bucket go on from the best vectors on a grid of frequencies.

    Those of which an estimate of sigma is above ``least`` [n_matrices], or that is NaN.

    Returns:
        whether one of these is FAR above the present sigma; False on a GPU and of what is sharded.
    """
    state, by_ref, far = bucket.state, {}, False
    for i, ref in enumerate(bucket.plan.matrix_ref.tolist()):
        by_ref.setdefault(ref, []).append(i)
    for ref, indices in by_ref.items():
        if bucket.on_host and bool((least[indices] == math.inf).all()):
            continue
        tensor = bucket.parameters[ref]
        found = search([bucket.matrices[i] for i in indices], tensor)
        looks = bucket.on_host and not is_sharded(tensor)
        for i, sigma, v in zip(indices, *found, strict=True):
            takes = (sigma > least[i]) | least[i].isnan()
            own, v = state.columns(i, state.v_next), state.plan.layouts[i].from_logical(v)
            own.copy_(torch.where(takes, v.to(own), own))
            far = far or (looks and bool(takes & (sigma > state.sigma[i] * FAR)))
    return far


def search(matrices: Sequence[Matrix], tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return what is best on the grid for the operators of a parameter, which are alike.

    The same on all ranks that hold it. The host does not wait for a GPU.

    Returns:
        sigma [G], at most the norm, and v [G, 2, N] in the parameter's order; some v for a kernel
        that is zero or not finite.
    """
    kernels, scales, taps = _kernels(matrices, tensor)
    g, c = len(kernels), kernels.shape[2]
    sigmas, theta, a = _on_grid(kernels, taps, QUICK)
    _, best = sigmas.topk(min(N_BEST, sigmas.shape[1]))
    theta = theta[best]  # [G, best, dims]
    a = a.take_along_dim(best[:, None, None], 3)
    sigmas, a = _power_method(kernels, a, theta, taps, MORE_ITERATIONS)
    sigma, first = sigmas.max(1)
    a = a.take_along_dim(first[:, None, None, None], 3)[..., 0]
    theta = theta[torch.arange(g, device=first.device), first]
    known = ((scales > 0) & (sigma > 0))[:, None, None]
    a = torch.where(known, a.to(_complex(kernels)), (c * taps.n_phases or 1) ** -0.5)
    a = a / torch.linalg.vector_norm(a, dim=(1, 2), keepdim=True)
    waves = operators.waves(theta, taps)[:, None]
    v = a[:, :, taps.phases] * waves
    return sigma * scales, torch.stack((v.real, v.imag), 1).flatten(2)


def norm(matrix: Matrix, tensor: Tensor, rtol: float) -> Top:
    """Return the norm of an operator within ``rtol``, unless a maximum hides between the grid's."""
    kernels, scales, taps = _kernels([matrix], tensor)
    scale = float(scales[0])
    if not 0 < scale < math.inf:
        return Top(scale, search([matrix], tensor)[1][0])
    sigmas, thetas, a = _on_grid(kernels, taps, FINE)
    start = [(a[0, ..., i].flatten(), thetas[i]) for i in _peaks(sigmas[0], taps)]
    rough = [_climb(kernels[0], *one, taps, max(rtol, ROUGH)) for one in start]
    least = (1 - 3 * ROUGH) * max(sigma for sigma, *_ in rough)
    climbed = [_climb(kernels[0], *own, taps, rtol) for sigma, *own in rough if sigma >= least]
    sigma, a, theta = max(climbed, key=lambda one: one[0])
    v = operators.vector_of(a.view(-1, taps.n_phases), theta, taps)
    return Top(sigma * scale, operators.as_parts(v).flatten(1))


def _kernels(matrices: Sequence[Matrix], tensor: Tensor) -> tuple[Tensor, Tensor, Taps]:
    """Return kernels [G, M, C, taps...], wide, divided by their largest numbers; these [G]; taps.

    A number is NaN where an element is not finite; the kernel is then zero. What is sharded is
    gathered.
    """
    whole = whole_of(tensor.detach())
    kernels = wide(torch.stack([matrix.of(whole) for matrix in matrices]))
    taps = operators.taps_of(tuple(kernels.shape[3:]), matrices[0].periods, kernels.device)
    if not kernels.numel():
        return kernels, kernels.new_zeros(len(kernels)), taps
    scales = kernels.flatten(1).abs().amax(1)
    good = torch.isfinite(scales) & (scales > 0)
    shape = -1, *[1] * (kernels.dim() - 1)
    kernels = torch.where(good.view(shape), kernels / scales.view(shape), 0.0)
    return kernels, torch.where(torch.isfinite(scales), scales, math.nan), taps


# ---------------------------------------------------------------------- the grid of frequencies


def _axes(taps: Taps, grid: Grid) -> list[Tensor]:
    """Return the frequencies along each dimension, float64 on the CPU; of the last one, up to pi.

    F(-theta) is the conjugate of F(theta).
    """
    axes = []
    for n in taps.counts:
        size = max(grid.per_tap * n, grid.least)
        kept = size // 2 + 1 if len(axes) == len(taps.counts) - 1 else size
        axes.append(2 * math.pi * torch.arange(kept, dtype=torch.float64) / size)
    return axes


def _frequencies(taps: Taps, grid: Grid, device: torch.device) -> Tensor:
    """Return the frequencies of the grid [n, dims], wide."""
    axes = _axes(taps, grid)
    return torch.cartesian_prod(*axes).view(-1, len(axes)).to(device, wide_dtype(device))


def _on_grid(kernels: Tensor, taps: Taps, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Return estimates [G, n], frequencies [n, dims] and vectors a [G, C, phases, n].

    An estimate is never above sigma_1 of F, but for rounding to float32, and that is never above
    the norm.
    """
    g, _, c = kernels.shape[:3]
    theta = _frequencies(taps, grid, kernels.device)
    start = torch.randn(2, c, taps.n_phases, 1, generator=torch.Generator().manual_seed(0),
                        device="cpu")  # fmt: skip
    start = torch.complex(*start.to(kernels.device))
    n_bytes = 32 * g * c * taps.n  # of the vectors of one frequency and what is made of them
    found = [
        _power_method(kernels, start.expand(g, -1, -1, len(part)), part, taps, grid.iterations)
        for part in theta.split(max(1, BYTES // max(n_bytes, 1)))
    ]
    sigmas, a = (torch.cat(parts, -1) for parts in zip(*found, strict=True))
    return sigmas, theta, a


def _power_method(
    kernels: Tensor, a: Tensor, theta: Tensor, taps: Taps, iterations: int
) -> tuple[Tensor, Tensor]:
    """Return estimates [G, n] and vectors a [G, C, phases, n] at theta [n, dims] or [G, n, dims].

    In float32, by products of the kernels with the vectors of all frequencies at once.
    """
    g, m, c = kernels.shape[:3]
    flat = kernels.reshape(g, m, c * taps.n).float()
    waves = operators.waves(theta, taps).mT.to(a.dtype)  # [(G,) taps, n]
    waves = waves[:, None] if waves.dim() > 2 else waves
    for _ in range(iterations):
        v = (a[:, :, taps.phases] * waves).flatten(1, 2)
        t = _real_product(flat.mT, _real_product(flat, v))
        t = t.view(g, c, -1, a.shape[-1]) * waves.conj()
        a = torch.zeros_like(a, memory_format=torch.contiguous_format)
        a.index_add_(2, taps.phases, t)
        a = a / torch.linalg.vector_norm(a, dim=(1, 2), keepdim=True).clamp(min=1e-30)
    s = _real_product(flat, (a[:, :, taps.phases] * waves).flatten(1, 2))
    return torch.linalg.vector_norm(s, dim=1).to(kernels.dtype), a


def _real_product(x: Tensor, y: Tensor) -> Tensor:
    """Return x y of real x [G, m, k] and complex y [G, k, n]."""
    found = x @ torch.view_as_real(y).flatten(2)
    return torch.view_as_complex(found.view(*found.shape[:2], y.shape[2], 2))


def _complex(x: Tensor) -> torch.dtype:
    return torch.complex128 if x.dtype == torch.float64 else torch.complex64


# ------------------------------------------------------------------------------ to a tolerance


def _peaks(sigmas: Tensor, taps: Taps) -> list[int]:
    """Return the local maxima of a fine grid that may be near the largest, the best first."""
    sizes = [len(axis) for axis in _axes(taps, FINE)]
    grid = sigmas.view(sizes)
    is_peak = grid >= NEAR * grid.max()
    for d in range(len(sizes) - 1):
        is_peak &= (grid >= grid.roll(1, d)) & (grid >= grid.roll(-1, d))
    if sizes:  # half of the last dimension is there
        is_peak[..., 1:] &= grid[..., 1:] >= grid[..., :-1]
        is_peak[..., :-1] &= grid[..., :-1] >= grid[..., 1:]
    found = is_peak.flatten().nonzero()[:, 0].tolist()
    return sorted(found, key=lambda i: -float(sigmas[i]))[:MOST_CLIMBS]


def _climb(
    kernel: Tensor, a: Tensor, theta: Tensor, taps: Taps, rtol: float
) -> tuple[float, Tensor, Tensor]:
    """Return sigma, a [C * phases] and theta of the local maximum near ``theta``.

    Newton's steps between a few steps of Lanczos, and in the end as many as ``rtol`` needs; until
    they gain less than a hundredth of it (a tenth, if that is rough).
    """
    m, c = kernel.shape[:2]
    flat, a, before = kernel.reshape(1, m, -1), a.to(_complex(kernel)), 0.0
    least = 1 + (0.1 if rtol >= ROUGH else 0.01) * rtol
    for _ in range(1000):
        f = matrix_at(kernel, theta, taps)
        sigma, a = _top(f, a, rtol, FEW)
        if sigma <= before * least:
            if rtol >= ROUGH:
                break
            sigma, a = _top(f, a, rtol)
            if sigma <= before * least:
                break
        before = sigma
        v = operators.vector_of(a.view(c, -1), theta, taps).view(1, -1, 1)
        t = _real_product(flat.mT, _real_product(flat, v)).view(c, -1)
        theta = operators.improved(t, theta, taps)
    return max(sigma, before), a, theta


def matrix_at(kernel: Tensor, theta: Tensor, taps: Taps) -> Tensor:
    """Return F [M, C * phases], complex, of a kernel [M, C, taps...] at ``theta`` [dims]."""
    m, c = kernel.shape[:2]
    waves = operators.waves(theta, taps)
    spread = waves.new_zeros(taps.n, taps.n_phases)
    spread.scatter_(1, taps.phases[:, None], waves[:, None])
    return _real_product(kernel.reshape(1, m * c, taps.n), spread[None]).view(m, -1)


def _top(f: Tensor, a: Tensor, rtol: float, most: int = 2000) -> tuple[float, Tensor]:
    """Return sigma_1 of F [M, n] within ``rtol`` and its right vector, by Lanczos from ``a`` [n].

    Or what ``most`` iterations arrive at, which is no less than ||F a|| / ||a||.
    Golub and Van Loan, "Matrix Computations", section 10.1, with full reorthogonalization.
    """
    limit = min(f.shape[1], f.shape[0] + 1, most)
    v, basis, alphas, betas = a / torch.linalg.vector_norm(a), [], [], []
    while True:
        basis.append(v)
        t = (f.mT @ (f @ v).conj()).conj()
        alphas.append(float(torch.linalg.vecdot(v, t).real))
        stacked = torch.stack(basis, 1)
        for _ in range(2):
            t = t - stacked @ (stacked.mH @ t)
        beta = float(torch.linalg.vector_norm(t))
        tridiagonal = torch.diag(torch.tensor(alphas, dtype=torch.float64, device="cpu"))
        if betas:
            off = torch.diag(torch.tensor(betas, dtype=torch.float64, device="cpu"), 1)
            tridiagonal = tridiagonal + off + off.mT
        values, weights = torch.linalg.eigh(tridiagonal)
        value, rest = float(values[-1]), beta * abs(float(weights[-1, -1]))
        if len(basis) >= limit or rest <= 0.1 * rtol * value or beta <= 1e-14 * alphas[0]:
            vector = stacked @ weights[:, -1].to(stacked)
            return math.sqrt(max(value, 0.0)), vector / torch.linalg.vector_norm(vector)
        betas.append(beta)
        v = t / beta

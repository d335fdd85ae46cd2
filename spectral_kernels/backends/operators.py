"""The mathematics of convolutions as operators, in plain PyTorch: the truth for every kernel.

At the frequency theta the kernel K [M, C, n] (rows, channels, taps) acts as the complex matrix

    F(theta)[:, (c, phase)] = sum over the taps p of a phase  K[:, c, p] e^{i q_p . theta}

where q_p says which tap of its phase p is (see ``selection.convolutions``). Its norm as an operator
on an unbounded image is the maximum of sigma_1(F(theta)) over theta, and no smaller for any other
image with zeros around it.

A unit vector a [C, phases] and theta make v [C, n], v_cp = a_{c, phase} e^{i q_p . theta}, so that
s = K v = F(theta) a is a product with the flattened kernel, and

    sigma = ||s||         d sigma / dK = Re(s conj(v)^T) / sigma
    t = K^T s             A(theta')[c, phase] = sum of t_cp e^{-i q_p . theta'} = F(theta')^H s

The next theta is one where ||A|| is larger, found by Newton's method, and the next a is A / ||A||:
neither can lower sigma, which never exceeds the norm. v is all that is kept: theta is in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..tables.device import wide
from ..tables.operators import counts_of

TRIALS = 2  # steps that are tried, each a quarter of the one before


class Taps:
    """The taps of a kernel [rows, channels, taps...], flattened to [rows, channels, n].

    Attributes:
        dims: dimensions along which a phase has several taps: those that a frequency has.
        counts: largest number of taps of a phase along each of ``dims``.
        phases: [n], which phase a tap belongs to.
        numbers: [n, len(dims)], which tap of its phase it is, wide.
        n: number of taps.
        n_phases: number of phases.
        in_phase: [n_phases], how many taps each has.
        pairs: for each of ``dims`` the taps that follow each other, two index tensors.
    """

    def __init__(self, sizes: Sequence[int], periods: Sequence[int], device: torch.device):
        axes = [torch.arange(n, device=device) for n in sizes]
        place = torch.cartesian_prod(*axes).view(-1, len(sizes))
        period = torch.tensor(periods, device=device)
        self.phases, self.n_phases = torch.zeros_like(place[:, 0]), 1
        for d, (size, step) in enumerate(zip(sizes, periods, strict=True)):
            self.phases = self.phases * min(size, step) + place[:, d] % step
            self.n_phases *= min(size, step)
        self.n = len(place)
        self.in_phase = torch.bincount(self.phases, minlength=self.n_phases)
        counts = counts_of(sizes, periods)
        self.dims = [d for d, n in enumerate(counts) if n > 1]
        self.counts = [counts[d] for d in self.dims]
        self.numbers = wide((place // period)[:, self.dims])
        self.pairs = []
        for d in self.dims:
            first = (place[:, d] + periods[d] < sizes[d]).nonzero()[:, 0]
            self.pairs.append((first, first + math.prod(sizes[d + 1 :]) * periods[d]))


@lru_cache(maxsize=256)
def taps_of(sizes: tuple[int, ...], periods: tuple[int, ...], device: torch.device) -> Taps:
    """Return the taps of a kernel of ``sizes`` on a device."""
    return Taps(sizes, periods, device)


def waves(theta: Tensor, taps: Taps) -> Tensor:
    """Return e^{i q . theta} [..., n] of frequencies [..., dims]."""
    angle = theta @ taps.numbers.mT
    return torch.polar(torch.ones_like(angle), angle)


def frequency_of(v: Tensor, taps: Taps) -> Tensor:
    """Return theta [dims] of v [C, n]; 0 where v does not depend on it."""
    found = [torch.angle((v[:, a].conj() * v[:, b]).sum()) for a, b in taps.pairs]
    return torch.stack(found) if found else v.real.new_zeros(0)


def contracted(t: Tensor, theta: Tensor, taps: Taps) -> Tensor:
    """Return A(theta) [C, phases] of t [C, n]."""
    return _summed(t * waves(theta, taps).conj(), taps)


def _summed(x: Tensor, taps: Taps) -> Tensor:
    """Return the sums of x [C, n] over the taps of each phase, [C, phases]."""
    return x.new_zeros(len(x), taps.n_phases).index_add_(1, taps.phases, x)


def vector_of(a: Tensor, theta: Tensor, taps: Taps) -> Tensor:
    """Return v [C, n] of a [C, phases] and theta [dims]."""
    return a[:, taps.phases] * waves(theta, taps)


def _square(x: Tensor) -> Tensor:
    return (x.real**2 + x.imag**2).sum()


def improved(t: Tensor, theta: Tensor, taps: Taps) -> Tensor:
    """Return a frequency where ||A|| is not smaller than at ``theta``, by a step of Newton's."""
    n = len(taps.dims)
    if n == 0:
        return theta
    x = t * waves(theta, taps).conj()
    a = _summed(x, taps)
    first = [_summed(x * (-1j * q), taps) for q in taps.numbers.mT]
    gradient = torch.stack([2 * (a.conj() * b).real.sum() for b in first])
    hessian = gradient.new_zeros(n, n)
    for j in range(n):
        for k in range(j + 1):
            second = _summed(x * -(taps.numbers[:, j] * taps.numbers[:, k]), taps)
            value = 2 * ((first[j].conj() * first[k]).real + (a.conj() * second).real).sum()
            hessian[j, k] = hessian[k, j] = value
    step = newton_step(gradient, hessian, taps.counts)
    square, found = _square(a), theta
    for _ in range(TRIALS):
        # The first that is better; none where t is not finite.
        better = (_square(contracted(t, theta + step, taps)) > square) & (found == theta).all()
        found = torch.where(better, theta + step, found)
        step = step / 4
    return found


def newton_step(gradient: Tensor, hessian: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the step [dims] towards a maximum, at most pi / (2 taps) along each dimension.

    Where the Hessian is not negative definite, a multiple of the identity makes it so.
    """
    shift = 2 * torch.linalg.matrix_norm(hessian)
    step = torch.full_like(gradient, math.nan)
    for matrix in (torch.diag(shift.expand(len(counts))) - hessian, -hessian):
        lower, info = torch.linalg.cholesky_ex(matrix)
        solved = torch.cholesky_solve(gradient[:, None], lower)[:, 0]
        step = torch.where(info == 0, solved, step)
    # Per tap, in units of pi / 2.
    relative = torch.stack([x.abs() * n for x, n in zip(step, counts, strict=True)]) * (2 / math.pi)
    return step / relative.max().clamp(min=1)


def as_complex(x: Tensor) -> Tensor:
    """Return real and imaginary parts [2, ...] as wide complex numbers."""
    return torch.complex(wide(x[0]), wide(x[1]))


def as_parts(x: Tensor) -> Tensor:
    """Return complex numbers [...] as real and imaginary parts [2, ...]."""
    return torch.stack((x.real, x.imag))


def next_vector(t: Tensor, v: Tensor, taps: Taps) -> tuple[Tensor, Tensor]:
    """Return the next v, and the norm of A at the frequency of v.

    Args:
        t: [2, C, n], real and imaginary part.
        v: [2, C, n], likewise.
        taps: of the kernel.

    Returns:
        v [2, C, n], not finite where t is zero or not finite, and a 0-d norm.
    """
    t, theta = as_complex(t), frequency_of(as_complex(v), taps)
    before = _square(contracted(t, theta, taps)).sqrt()
    theta = improved(t, theta, taps)
    a = contracted(t, theta, taps)
    return as_parts(vector_of(a / _square(a).sqrt(), theta, taps)), before


def projected(v: Tensor, taps: Taps) -> Tensor | None:
    """Return the v [2, C, n] of the unit vector a and the frequency that are nearest to ``v``.

    None if that is zero or not finite.
    """
    x = as_complex(v)
    theta = frequency_of(x, taps)
    a = contracted(x, theta, taps)
    a = a / taps.in_phase  # phases with few taps count as much as others
    norm = _square(a).sqrt()
    if not bool(torch.isfinite(norm)) or not bool(norm > 0):
        return None
    return as_parts(vector_of(a / norm, theta, taps))

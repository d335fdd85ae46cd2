"""The state of the power iteration, carried from step to step in flat buffers."""

from __future__ import annotations

import math

import numpy as np
import torch

from .device import number_on
from .plan import Plan
from .schema import SCALARS, SLOT, address

_ADDRESSES = slice(SLOT["v"], SLOT["target"] + 1)


WAIT, LONGEST_WAIT = 8.0, 1024.0  # steps between two warm-ups of a matrix whose vectors jump


class Ratios:
    """Residual / sigma of every matrix in the last step, on the host.

    Attributes:
        values: [n_matrices] float64; infinite until a step has been.
        n_steps: 0-d float64, how often jumps have been looked for.
        address: of ``values``, behind which ``n_steps`` lies.
    """

    def __init__(self, n_matrices: int):
        both = torch.full((n_matrices + 1,), math.inf, dtype=torch.float64, device="cpu")
        self.values, self.n_steps = both[:-1], both[-1].zero_()
        self.address = both.data_ptr()
        self._last = torch.full_like(self.values, -math.inf)  # steps of the last due jumps
        self._wait = torch.full_like(self.values, WAIT)

    def reset(self) -> None:
        """Expect jumps of all, at the next step."""
        self.values.zero_()
        self._last.fill_(-math.inf)

    def due(self, jumped: torch.Tensor) -> torch.Tensor:
        """Return which of those that have ``jumped``, [n_matrices] bool, are to be warmed up.

        Where the vectors of a matrix jump all the time, as under a cap that is below several of its
        singular values, fewer and fewer: the wait doubles up to LONGEST_WAIT steps.
        """
        since = self.n_steps - self._last
        due = jumped & (since >= self._wait)
        wait = torch.where(since < 4 * self._wait, 2 * self._wait, WAIT).clamp(max=LONGEST_WAIT)
        self._wait = torch.where(due, wait, self._wait)
        self._last = torch.where(due, self.n_steps, self._last)
        return due


class State:
    """Vectors and scalars of one plan, with the header through which kernels find them.

    With r vectors per matrix: ``v`` [sum of r * N] are the vectors from which ``s``
    [sum of r * M] and ``sigmas`` [r * n_matrices], the largest first, were computed; ``v_next``
    are those of the next iteration (None in a read-only copy). ``scalars`` holds sigmas, residuals
    and target of every matrix, norm of every elementwise parameter, raw penalty and strength of
    both.

    With ``tolerance`` above 0, calls process only stale matrices (residual > tolerance * sigma),
    and start from ``v_next``.
    """

    def __init__(self, plan: Plan, v, v_next, s, scalars, exponent: float):
        self.plan, self.v, self.v_next, self.s, self.scalars = plan, v, v_next, s, scalars
        self.targets = plan.targets  # of elementwise parameters
        self.scale: torch.Tensor | None = None
        self.tolerance = 0.0
        self.header = plan.header.copy()
        self.address = address(self.header)
        self.set_exponent(exponent)
        first, size = scalars.data_ptr(), scalars.element_size()
        self.header[_ADDRESSES] = (
            v.data_ptr(), 0 if v_next is None else v_next.data_ptr(), s.data_ptr(),
            *[first + size * start for start in plan.scalar_starts],
        )  # fmt: skip
        if v_next is None:
            self.header[SLOT["t_partial"]] = 0

    @classmethod
    def allocate(cls, plan: Plan, exponent: float) -> State:
        """Allocate the state of ``plan`` for exponent k, filled with NaN."""

        def unknown(n):
            return torch.full((n,), math.nan, dtype=plan.state_dtype, device=plan.device)

        vectors = unknown(plan.v_size), unknown(plan.v_size), unknown(plan.s_size)
        return cls(plan, *vectors, unknown(sum(plan.scalar_sizes)), exponent)

    def __getattr__(self, name: str) -> torch.Tensor:
        """Return the part ``name`` of ``scalars``, a view."""
        if name not in SCALARS:
            raise AttributeError(name)
        i = SCALARS.index(name)
        start = self.plan.scalar_starts[i]
        part = self.scalars[start : start + self.plan.scalar_sizes[i]]
        self.__dict__[name] = part
        return part

    @property
    def sigma(self) -> torch.Tensor:
        """Estimates of sigma_1, [n_matrices], a view."""
        return self.sigmas[: len(self.plan.matrices)]

    @property
    def residual(self) -> torch.Tensor:
        """Residuals of ``sigma``, [n_matrices], a view."""
        return self.residuals[: len(self.plan.matrices)]

    def set_exponent(self, exponent: float) -> None:
        """Set the exponent k."""
        self.exponent = self.header.view(np.float64)[SLOT["exponent"]] = exponent

    @property
    def above(self) -> bool:
        """Whether what is at or below its target has neither penalty nor gradient."""
        return bool(self.header[SLOT["above"]])

    def set_above(self, above: bool) -> None:
        """Set whether the penalty has one side; states of a plan begin with that of the plan."""
        self.header[SLOT["above"]] = above

    def set_tolerance(self, tolerance: float) -> None:
        """Restrict calls to matrices with residual / sigma above ``tolerance`` (0: process all)."""
        self.tolerance = self.header.view(np.float64)[SLOT["tolerance"]] = tolerance

    def check_sizes(self) -> State:
        """Return this state, if kernels stay within its buffers.

        Raises:
            RuntimeError: a buffer with another number of elements than the plan needs.
        """
        plan, n_scalars = self.plan, sum(self.plan.scalar_sizes)
        sizes = plan.v_size, plan.v_size, plan.s_size, n_scalars
        for name, n in zip(("v", "v_next", "s", "scalars"), sizes, strict=True):
            buffer = getattr(self, name)
            if buffer is not None and buffer.numel() != n:
                raise RuntimeError(
                    f"buffer {name} of the state: expected {n} elements for these parameters, got "
                    f"{buffer.numel()}"
                )
        return self

    def swap(self) -> None:
        """Exchange ``v`` and ``v_next``: the next iteration reads ``v``."""
        self.v, self.v_next = self.v_next, self.v
        header, v = self.header, SLOT["v"]
        header[v], header[v + 1] = header[v + 1], header[v]

    def use(self, v: torch.Tensor, v_next: torch.Tensor | None) -> None:
        """Replace the buffers ``v`` and ``v_next``."""
        self.v, self.v_next = v, v_next
        self.header[SLOT["v"]] = v.data_ptr()
        self.header[SLOT["v_next"]] = 0 if v_next is None else v_next.data_ptr()

    def snapshot(self) -> State:
        """Return a read-only copy for a gradient, which later iterations do not change."""
        copies = self.v.clone(), None, self.s.clone(), self.scalars.clone()
        return State(self.plan, *copies, self.exponent)

    def evaluation(self) -> State:
        """Return a state that evaluates ``v_next`` and leaves this one unchanged."""
        own = None, torch.empty_like(self.s), self.scalars.clone()
        return State(self.plan, self.v_next, *own, self.exponent)

    def set_scale(self, scale: float | torch.Tensor | None) -> None:
        """Set a factor of every strength, kept on the device (None: no factor)."""
        if scale is not None:
            scale = number_on(self.plan.device, self.plan.state_dtype, scale)
            self.header[SLOT["scale"]] = scale.data_ptr()
        elif self.scale is not None:
            self.header[SLOT["scale"]] = 0
        self.scale = scale

    def columns(self, i: int, v: torch.Tensor) -> torch.Tensor:
        """Return the part of a flat v buffer that belongs to matrix ``i``, [r, N]."""
        r, start, n = self.plan.r, int(self.plan.table["v_offset"][i]), self.plan.layouts[i].cols
        return v[start : start + r * n].view(r, n)

    def rows(self, i: int) -> torch.Tensor:
        """Return the part of s that belongs to matrix ``i``, [r, M]."""
        r, start, m = self.plan.r, int(self.plan.table["s_offset"][i]), self.plan.layouts[i].rows
        return self.s[start : start + r * m].view(r, m)

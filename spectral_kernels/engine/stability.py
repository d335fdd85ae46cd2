"""A warning where the penalty makes a gradient step unstable.

A step of SGD carries sigma to ``sigma - lr * strength * dR/dsigma``. It ends farther from the
target than it began if ``lr * strength * |dR/dsigma| > 2 |sigma - tau|``; and since dR/dsigma grows
with sigma^(2k - 1), the steps after it diverge. Optimizers that normalize gradients, as Adam does,
take no such steps, and in the decoupled form a step ends at the target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..backends import formulas
from ..selection.warn import warn
from .bucket import Bucket

FIRST, EVERY = 10, 100  # on a CPU: the first steps are looked at, and every EVERY-th after them


class StabilityWatch:
    """Warns, once, where a step of SGD with the penalty is unstable."""

    def __init__(self):
        self._until, self._first, self._has_warned = 1, FIRST, False

    def restart(self) -> None:
        """Look at the next steps, since the strength has changed."""
        self._until, self._first = 1, FIRST

    @property
    def is_next(self) -> bool:
        """Whether :meth:`step` would look at the next step."""
        return self._until == 1

    def skip(self) -> None:
        """Count a step that is not looked at."""
        self._until -= 1

    def step(self, buckets: Sequence[Bucket], groups: Sequence[Mapping[str, Any]]) -> None:
        """Look at the step that SGD is about to take, if it is one of those to look at.

        On a GPU the host would have to wait for sigma: there :meth:`look` is for readings.

        Args:
            buckets: the buckets, with the sigmas of the step.
            groups: the optimizer's parameter groups.
        """
        self._until -= 1
        if self._until:
            return
        self._first -= 1
        self._until = 1 if self._first > 0 else EVERY
        for bucket in buckets:
            if bucket.on_host:
                state, n = bucket.state, len(bucket.plan.matrices)
                parts = state.sigma, state.target, state.strength[:n]
                self.look(bucket, groups, *(part.numpy() for part in parts))

    def look(
        self,
        bucket: Bucket,
        groups: Sequence[Mapping[str, Any]],
        sigma: np.ndarray,
        target: np.ndarray,
        strength: np.ndarray,
    ) -> None:
        """Warn if a step with these numbers of the matrices, [n_matrices] each, is unstable."""
        if self._has_warned:
            return
        lrs = {id(p): float(group["lr"]) for group in groups for p in group["params"]}
        plan, k = bucket.plan, bucket.state.exponent
        lr = np.array([lrs.get(id(bucket.parameters[ref]), 0.0) for ref in plan.matrix_ref])
        sigma, target, strength = (x.astype(np.float64) for x in (sigma, target, strength))
        at, to = torch.from_numpy(sigma), torch.from_numpy(target)
        own = torch.from_numpy(strength)
        factor = formulas.gradient_factor(at, own, k, to, bucket.state.above).numpy()
        with np.errstate(all="ignore"):  # sigma may be nan or huge
            # Of an operator d sigma / dW has a squared norm of at least half its reach.
            step = lr * np.abs(factor) * sigma * np.maximum(plan.table["reach"] / 2, 1)
            is_unstable = np.isfinite(sigma) & (step > 2 * np.abs(sigma - target))
        if not is_unstable.any():
            return
        self._has_warned = True
        i = int(np.argmax(np.where(is_unstable, sigma, -1)))
        warn(
            f"the penalty makes the step of SGD unstable for {plan.matrices[i].name!r}: with lr "
            f"{lr[i]:g} and strength {strength[i]:g} it moves sigma by {step[i]:.3g} from "
            f"{sigma[i]:.3g}, past its target {target[i]:.3g} and farther away from it than "
            "before; use a smaller strength or lr, or decoupled=True, with which a step ends at "
            "the target at most",
            RuntimeWarning,
        )

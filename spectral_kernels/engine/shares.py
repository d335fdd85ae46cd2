"""A warning when one parameter is nearly the whole penalty.

That is seldom meant: a scale that was taken for a weight, or a weight that began far too large. It
is looked for when the regularizer is built if the model is small and on a CPU, or else when vectors
are first warmed up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..selection import transforms
from ..selection.warn import warn
from .bucket import Bucket

if TYPE_CHECKING:
    from .model_buckets import ModelBuckets

SHARE = 0.9  # of the penalty
LEAST = 1.0  # the penalty, strength * R, from which on it matters beside a loss
FEWEST = 3  # parameters, of which one may be the most
_MOST_TENSORS, _MOST_ELEMENTS = 256, 1 << 22  # of a small model
_PLAIN = {torch.Tensor, torch.nn.Parameter}


def look_when_built(buckets: ModelBuckets) -> None:
    """Look at the penalties of a small model on a CPU, which takes milliseconds.

    With buckets of its own: weights may be loaded or moved before the first step.
    """
    tensors = [ref.get() for ref in buckets.refs]
    if (
        transforms.is_active()
        or not isinstance(buckets.settings.backend, str)
        or not all(type(t) in _PLAIN and t.device.type == "cpu" for t in tensors)
        or len(tensors) > _MOST_TENSORS
        or sum(t.numel() for t in tensors) > _MOST_ELEMENTS
    ):
        return
    once = type(buckets)(buckets.selection, buckets.settings, buckets.coefficients)
    once.shares = buckets.shares
    with contextlib.suppress(ValueError, RuntimeError):  # these are raised at the first use
        once.bound()
    buckets.shares.begin_anew()


class ShareWatch:
    """Warns, once, about a parameter with more than SHARE of a penalty above LEAST."""

    def __init__(self):
        self._told = self._looked = False

    def begin_anew(self) -> None:
        """Look once more: what was seen may have changed before the first step."""
        self._looked = False

    def look(self, buckets: Sequence[Bucket]) -> None:
        """Look at the penalties of all buckets, just warmed up; on a GPU this waits for it."""
        if self._told or self._looked:
            return
        self._looked, penalties = True, {}
        for bucket in buckets:
            plan, state = bucket.plan, bucket.state
            values = (state.strength * state.raw_penalty).tolist()
            for entry, value in zip((*plan.matrices, *plan.elementwise), values, strict=True):
                penalties[entry.ref.name] = penalties.get(entry.ref.name, 0.0) + value
        total = sum(penalties.values())
        if len(penalties) < FEWEST or not LEAST < total < float("inf"):
            return
        name = max(penalties, key=penalties.__getitem__)
        if penalties[name] > SHARE * total:
            self._told = True
            warn(
                f"parameter {name!r} is {100 * penalties[name] / total:.4g} % of the penalty of "
                f"{total:.4g}; if it is no weight, or is not to be held at its target, leave it "
                "out (exclude), or say what it is (roles, strength)"
            )

"""A step of the penalty that stays prepared; see tables/guard.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import torch

from ..backends.native import Cpu
from ..tables.guard import CHANGED, FITS, IGNORED, MISSING, NONE, TENSOR, Guard, Watched
from .bucket import JUMP, JUMP_FACTOR, Bucket, run_steps

if TYPE_CHECKING:
    from .model_buckets import ModelBuckets


class Step(Protocol):
    """A prepared step."""

    guard: Guard

    def release(self) -> None:
        """End it: something has changed."""


Prepared = TypeVar("Prepared", bound=Step)


class Preparation(Generic[Prepared]):
    """The prepared step, if there is one, and when it is worth to prepare the next.

    Where something changes in every step, such as the addresses of weights, none stays prepared:
    after every one that was of no use twice as many steps as before go by without.
    """

    def __init__(self):
        self.step: Prepared | None = None
        self._wait, self._pause = 0, 1

    def drop(self) -> None:
        """Note that the prepared step does not fit any more."""
        if self.step is None:
            return
        self.step.release()
        self._pause = 1 if self.step.guard.was_useful else min(2 * self._pause, 64)
        self._wait, self.step = self._pause - 1, None

    def renew(self, prepare: Callable[[], Prepared]) -> None:
        """Keep the step that ``prepare`` returns, or can't, if it is time for one."""
        if self._wait:
            self._wait -= 1
            return
        try:
            self.step = prepare()
        except ValueError:  # it cannot be; steps go on as they are
            self._wait = 64


class PreparedPenalty:
    """The addition of the penalty's gradient to every ``.grad``.

    Args:
        model: the buckets of the model.
        buckets: those of the step, unsharded, bound to their parameters and gradients.

    Raises:
        ValueError: such a step cannot be prepared.
    """

    def __init__(self, model: ModelBuckets, buckets: Sequence[Bucket]):
        # Nothing here refers to ``model``, which refers to this.
        self._all, self._buckets = model.buckets, list(buckets)
        self._is_scaled = any(bucket.state.scale is not None for bucket in buckets)
        watched = Watched()
        watch_model(watched, model)
        self.is_native = all(runs_jobs(bucket) for bucket in buckets)
        for bucket in buckets:
            plan, out = bucket.plan, bucket.left_out
            watched.columns += [(len(watched.holders), column) for column in plan.grad_columns]
            watched.holders += [
                (p, IGNORED if i in out else NONE if p.grad is None else TENSOR)
                for i, p in enumerate(bucket.parameters)
            ]
            watched.counters.append(plan.counter)
            if self.is_native:
                watched.jobs.append((bucket.state.address, 0, bucket.ratios_address, 0, 0, 0))
        self.guard = Guard(watched, JUMP, JUMP_FACTOR)
        for bucket in buckets:
            bucket.plan.grads_seen = None  # from now on the tables change without it

    def release(self) -> None:
        """End it; the next step looks at everything."""

    def take(self, model: ModelBuckets, n: int, scale: float | torch.Tensor | None) -> bool:
        """Take the step with ``n`` power iterations; return False if something has changed."""
        if model.buckets is not self._all:
            return False
        if model.coefficients.strength_tensor is not None:
            model.fill_strength()
        if scale is not None or self._is_scaled:
            self._is_scaled = True  # should this be interrupted
            for bucket in self._buckets:
                bucket.state.set_scale(scale)
            self._is_scaled = scale is not None
        is_native = self.is_native and n == 1
        run = self.guard.step if is_native else self.guard.look
        if (found := run()) == MISSING:
            for bucket in self._buckets:
                bucket.create_missing_grads(bucket.grads())
            found = run()
        if found == CHANGED:
            return False
        if found != FITS or not is_native:
            self._go_on(n, found)
        return True

    def _go_on(self, n: int, begun: int) -> None:
        """Run what native code has not: all, or, from 0 on, the job ``begun`` and those behind."""
        left = self._buckets
        grads = [bucket.grads() for bucket in left]
        if begun >= 0:
            left[begun].finish_after_jump(grads[begun])
            for bucket, own in zip(left[:begun], grads, strict=False):
                bucket.count_edits(own)
            left, grads = left[begun + 1 :], grads[begun + 1 :]
        run_steps(left, grads, n)


def watch_model(watched: Watched, model: ModelBuckets) -> None:
    """Watch all that the buckets of a model depend on, but for ``model.buckets`` itself.

    Raises:
        ValueError: that cannot be watched.
    """
    follower = model.selection.follower
    if follower is not None:
        watched.lookups += follower.lookups()
        frozen = follower.frozen_parameters()
        if any(p is None for p in frozen):
            raise ValueError("a frozen parameter was removed")
        watched.holders += [(p, IGNORED) for p in frozen]
    watched.lookups += model.lookups()
    for bucket in model.buckets:
        if bucket.is_sharded:
            raise ValueError("a parameter is sharded")
        for name in ("state", "backend", "extra_iterations", "idle", "frozen"):
            watched.attribute(bucket, name)
        watched.read += bucket.parameters


def runs_jobs(bucket: Bucket) -> bool:
    """Return whether native code can run a whole step of ``bucket``."""
    return type(bucket.kernels) is Cpu and not bucket.extra_iterations

"""An optimizer's step that stays prepared; see tables/guard.py."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..backends.native import Cpu
from ..engine.bucket import JUMP, JUMP_FACTOR
from ..engine.prepared import runs_jobs, watch_model
from ..tables.guard import FITS, NONE, Guard, Watched
from ..tables.schema import GROUP, address
from .update import Update

if TYPE_CHECKING:
    from .base import SpectralOptimizer


class Option(NamedTuple):
    """A hyperparameter: where it is in a parameter group, and in schema.GROUP.

    Attributes:
        key: its key in a parameter group.
        field: its field of schema.GROUP.
        index: its place in a tuple; -1 for a number.
        is_fixed: whether another value needs another preparation.
    """

    key: str
    field: str
    index: int = -1
    is_fixed: bool = False


class PreparedUpdate:
    """A step of SpectralAdamW or SpectralSGD.

    Args:
        optimizer: the optimizer.
        updates: its updates, which have just taken a step.

    Raises:
        ValueError: such a step cannot be prepared.
    """

    def __init__(self, optimizer: SpectralOptimizer, updates: Sequence[Update]):
        # Nothing here refers to ``optimizer``, which refers to this.
        self._updates = optimizer._updates
        self._parts = _parts(optimizer)
        self.is_native = all(
            type(update.backend) is Cpu and (update.bucket is None or runs_jobs(update.bucket))
            for update in updates
        )
        watched = Watched(edited=[])
        groups = optimizer.param_groups
        watched.lookups += [(group, "params", group["params"]) for group in groups]
        watched.lists += [(groups, groups), *((g["params"], g["params"]) for g in groups)]
        watched.mappings.append((optimizer.state, [*optimizer.state], [*optimizer.state.values()]))
        for update in updates:
            update.watch(watched, self.is_native)
        taken = {id(p) for p, _ in watched.holders}
        others = (p for group in groups for p in group["params"] if id(p) not in taken)
        watched.holders += [(p, NONE) for p in others]
        watch_model(watched, optimizer.regularizer._buckets)
        if self.is_native:
            watched.options += [
                (group, x.key, x.index, address(update.groups) + i * GROUP.itemsize
                 + GROUP.fields[x.field][1], x.is_fixed)
                for update in updates for i, group in enumerate(groups) for x in optimizer._options
            ]  # fmt: skip
        self.guard = Guard(watched, JUMP, JUMP_FACTOR)

    def release(self) -> None:
        """End it; the next step looks at everything, and goes on from the same versions."""
        versions, start = self.guard.versions(), 0
        for update in self._updates if self.is_native else ():
            update.knows_versions(versions[start : start + update.n_regularized])
            start += update.n_regularized

    def fits(self, optimizer: SpectralOptimizer) -> bool:
        """Return whether nothing has changed; the tables have the present gradients then."""
        if not all(map(operator.is_, _parts(optimizer), self._parts)) or self.guard.look() != FITS:
            return False
        for update in self._updates:
            update.grads = [p.grad for p in update.weights]
        return True

    def take(self, optimizer: SpectralOptimizer) -> bool:
        """Take the step; return False if something has changed."""
        if not all(map(operator.is_, _parts(optimizer), self._parts)):
            return False
        found = self.guard.step()
        if found == FITS:
            return True
        if found < 0:
            return False
        for update in self._updates[: found + 1]:
            update.count_edits()
        self._updates[found].bucket.warm_up_jumped()
        for update in self._updates[found + 1 :]:
            update.run()
        return True


def _parts(optimizer: SpectralOptimizer) -> tuple[object, ...]:
    """Return the objects of an optimizer and its regularizer that others may be put in place of."""
    own, buckets = optimizer._updates, optimizer._buckets.buckets
    return optimizer.param_groups, optimizer.state, own, buckets

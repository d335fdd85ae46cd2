"""An optimizer's step, with the penalty in it, over the parameters of one device and dtype.

The state holds s = W v, sigma = ||s|| and the next v from the step before. The step passes
g + strength * dR/dW(W; v) to the optimizer's rule, then multiplies the new weights by the next v:
the iteration that a regularizer would run at the start of the next step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..backends import formulas
from ..backends.base import Backend, Rule, Step
from ..engine.bucket import Bucket
from ..selection.arguments import one_of
from ..sharding import shards
from ..tables.addresses import Column, Counter, Look, entries, look
from ..tables.device import DeviceTables, fill, number_on
from ..tables.guard import NONE, TENSOR, Watched
from ..tables.layout import same_strides
from ..tables.schema import (
    CONSTRAINTS,
    DTYPES,
    ELEMENTWISE,
    GROUP,
    HEADER,
    MOMENT,
    RULES,
    SLOT,
    UPDATE,
    UPDATE_SLOT,
    address,
)

PART = 32768  # elements per unit of work of a parameter without a penalty
_ON_DEVICE = "others", "matrix_moments", "elementwise_moments", "other_moments", "groups"
_TABLES = [UPDATE_SLOT[name] for name in _ON_DEVICE]
ADAMW = Rule(RULES["adamw"], ("exp_avg", "exp_avg_sq"), formulas.adamw)
SGD = Rule(RULES["sgd"], ("momentum_buffer",), formulas.sgd)


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Raise ValueError if no step can be taken for a parameter of ``dtype``."""
    if dtype not in DTYPES:
        raise ValueError(
            f"params: expected {one_of(map(str, DTYPES))}, got parameter {name!r} of {dtype} (put "
            "it into an optimizer of its own)"
        )


class Update:
    """An optimizer's tables for the parameters of one device and dtype.

    Args:
        rule: AdamW or SGD.
        backend: the backend that takes the step.
        bucket: the bucket of the regularized parameters, or None.
        names: names of the parameters, for error messages.
        weights: the parameters; those of the bucket first, in the order of its refs.
        states: the optimizer's state of each parameter, with its moments and its step count, an
            element of ``steps``.
        moment_names: exp_avg and exp_avg_sq, or momentum_buffer, or nothing.
        group_of: the row of ``groups`` of each parameter.
        moment_dtype: dtype of the parameters, or float32.
        n_groups: number of parameter groups, the rows of ``groups``.
    """

    def __init__(
        self,
        rule: Rule,
        backend: Backend,
        bucket: Bucket | None,
        names: Sequence[str],
        weights: Sequence[torch.Tensor],
        states: Sequence[dict[str, Any]],
        moment_names: tuple[str, ...],
        group_of: Sequence[int],
        moment_dtype: torch.dtype,
        n_groups: int,
    ):
        self.rule, self.backend, self.bucket = rule, backend, bucket
        self.moment_dtype = moment_dtype
        self.names, self.weights, self.states = names, list(weights), list(states)
        self._keys = *moment_names, "step"
        kept = (state.get(key) for state in states for key in moment_names)
        self._is_sharded = any(map(shards.is_sharded, kept))
        self.moments: list[tuple[torch.Tensor, ...]] = []
        self.group_of = np.array(group_of, np.int64)
        self.device, self.dtype = weights[0].device, weights[0].dtype
        check_dtype(names[0], self.dtype)
        self.n_regularized = len(bucket.plan.refs) if bucket is not None else 0
        self.steps = torch.zeros(len(weights), dtype=torch.float32, device=self.device)
        self._step_addresses = self.steps.data_ptr() + 4 * np.arange(len(weights))
        self.grads: list[torch.Tensor | None] = []
        self.acts: list[bool] = []  # whether each parameter takes the step
        self._acting = torch.zeros_like(self.steps)
        self._versions: list[int] = []
        self._seen: Look | None = None
        self._layouts = self._seen_weights = None
        self._idle: frozenset[int] = frozenset()
        self.groups = np.zeros(n_groups, GROUP)
        self._options: list[tuple] = []  # the values in groups
        self._groups_version = 0
        self._placed: tuple[int, ...] = ()  # the addresses of _ON_DEVICE in the header
        self.grad_scale: torch.Tensor | None = None
        self.found_inf: torch.Tensor | None = None
        self.decoupled, self.constraint = False, None
        self._build_tables()

    def _build_tables(self) -> None:
        others = [
            (ref, start, min(PART, self.weights[ref].numel() - start))
            for ref in range(self.n_regularized, len(self.weights))
            for start in range(0, self.weights[ref].numel(), PART)
        ]
        ref, start, size = np.array(others, np.int64).reshape(-1, 3).T.copy()
        self.others = np.zeros(len(others), ELEMENTWISE)
        self.others["grad_dtype"], self.others["size"] = DTYPES[self.dtype], size
        offsets = start * self.dtype.itemsize
        self._columns = [Column(self.others, "weight", ref, offsets)]
        self._grad_column = Column(self.others, "grad", ref, offsets)
        none = np.zeros(0, np.int64)
        plan = None if self.bucket is None else self.bucket.plan
        # Index of the parameter, and first element, of every row, by table.
        rows = {
            "matrix_moments": (none, none) if plan is None else (plan.matrix_ref, plan.offsets),
            "elementwise_moments": (none, none)
            if plan is None
            else (plan.elementwise_ref, 0 * plan.elementwise_ref),
            "other_moments": (ref, start),
        }
        self._rows = [(np.zeros(len(own), MOMENT), own) for own, _ in rows.values()]
        n, step = len(self.weights), len(self._keys)
        for (table, own), (_, first) in zip(self._rows, rows.values(), strict=True):
            table["parameter"] = own
            for i, field in zip(range(step - 1), ("first", "second"), strict=False):
                offsets = first * self.moment_dtype.itemsize
                self._columns.append(Column(table, field, n + step * own + i, offsets))
        self._header = np.zeros(len(HEADER), np.int64)  # of a step without a penalty
        self._header[SLOT["weight_dtype"]] = DTYPES[self.dtype]
        self._plain_header = address(self._header)
        tables = self.others, *(row[0] for row in self._rows)
        what = "an address of a parameter, a gradient or a moment"
        self.tables, self.counter = DeviceTables(tables, self.device, what), Counter()
        self.group_table = DeviceTables([self.groups], self.device, "a hyperparameter")
        self.header = np.zeros(len(UPDATE), np.int64)
        self.address = address(self.header)
        fields = {
            "rule": self.rule.number, "moment_dtype": DTYPES[self.moment_dtype],
            "n_others": len(self.others), "steps": self.steps.data_ptr(),
        }  # fmt: skip
        for name, value in fields.items():
            self.header[UPDATE_SLOT[name]] = value

    def watch(self, watched: Watched, is_native: bool) -> None:
        """Add what this update depends on; from now on its tables change without it.

        Args:
            watched: what the optimizer's prepared step depends on.
            is_native: whether native code takes the step.

        Raises:
            ValueError: that cannot be watched.
        """
        if self._is_sharded or self.grad_scale is not None or self.found_inf is not None:
            raise ValueError("moments are sharded, or gradients are scaled")
        for state in self.states:
            watched.lookups += [(state, key, state[key]) for key in self._keys if key in state]
        watched.written += [*self.weights, self.steps, *(x for own in self.moments for x in own)]
        first = len(watched.holders)
        watched.holders += [
            (p, NONE if grad is None else TENSOR)
            for p, grad in zip(self.weights, self.grads, strict=True)
        ]
        watched.columns.append((first, self._grad_column))
        watched.counters.append(self.counter)
        own = self.bucket
        if own is not None:
            watched.columns += [(first, column) for column in own.plan.grad_columns]
            watched.counters.append(own.plan.counter)
            own.plan.grads_seen = None
        if is_native:
            watched.versioned += self.weights[: self.n_regularized]
            watched.edited += [*self.weights, self.steps]
            header = self._plain_header if own is None else own.state.address
            ratios = 0 if own is None else own.ratios_address
            counts = self.steps.data_ptr(), self._acting.data_ptr(), len(self.steps)
            watched.jobs.append((header, self.address, ratios, *counts))
        self._seen, self._options, self.grads = None, [], []

    def count_edits(self) -> None:
        """Tell autograd that weights and step counts have changed."""
        torch.autograd.graph.increment_version([*self.weights, self.steps])

    def knows_versions(self, versions: Sequence[int]) -> None:
        """Note the versions of the regularized weights after the last step."""
        self._versions = list(versions)

    def as_step(self) -> Step:
        """Return the step for the backend."""
        plan, state = (None, None) if self.bucket is None else (self.bucket.plan, self.bucket.state)
        return Step(
            rule=self.rule, plan=plan, state=state, weights=self.weights, grads=self.grads,
            moments=self.moments, acts=self.acts, steps=self.steps, groups=self.groups,
            group_of=self.group_of, decoupled=self.decoupled, constraint=self.constraint,
            grad_scale=self.grad_scale,
            found_inf=self.found_inf, moment_dtype=self.moment_dtype, others=self.others,
            tables=self.tables, group_table=self.group_table, address=self.address,
            plain_header=self._plain_header,
        )  # fmt: skip

    def bind(self, weights: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None]) -> bool:
        """Point the tables at the parameters, gradients and moments of this step.

        Returns:
            False if a parameter or its state is no longer what this was built for: another update
            must be built.

        Raises:
            ValueError: a parameter, gradient or moment that cannot be used in place.
        """
        kept = entries(self.states, self._keys)
        if self._is_sharded:
            kept = [None if x is None else shards.local_of(x) for x in kept]
        try:
            found = look([*weights, *kept], grads)
        except RuntimeError:  # something without plain memory, which has no address
            if not all(isinstance(x, torch.Tensor) for x in kept):
                return False
            self._check(weights, grads)
            raise
        found.check(self._name)
        if self.bucket is not None:
            self.bucket.plan.bind_grads(grads[: self.n_regularized])
        self.weights, self.grads, seen = weights, grads, self._seen
        idle = frozenset() if self.bucket is None else self.bucket.idle
        if found == seen and idle == self._idle:
            return True
        step = len(self._keys)
        if found.written.layouts != self._layouts and self._layouts is not None:
            return False
        addresses = found.written.address_array()[len(weights) :]
        if not np.array_equal(addresses[step - 1 :: step], self._step_addresses):
            return False
        self.moments = [tuple(kept[i : i + step - 1]) for i in range(0, len(kept), step)]
        if seen is None or found.read.layouts != seen.read.layouts:
            self._check(weights, grads)
        # Until all of it is written, should that be interrupted.
        self._seen, self._idle = None, idle
        self.counter.count()
        self._set_acts(weights, grads)
        if seen is None or found.written != seen.written:
            for column in self._columns:
                column.write(found.written)
        self._grad_column.write(found.read)
        self._seen, self._layouts = found, found.written.layouts
        return True

    def _set_acts(self, weights, grads) -> None:
        """Write which parameters take this step: those of a group, with a gradient or a penalty."""
        acts = [grad is not None for grad in grads]
        for i in range(self.n_regularized):
            acts[i] |= weights[i].requires_grad and i not in self._idle
        acts = [x and group >= 0 for x, group in zip(acts, self.group_of.tolist(), strict=True)]
        if acts == self.acts:
            return
        group = np.where(acts, self.group_of, -1)
        for table, ref in self._rows:
            table["group"] = group[ref]
        fill(self._acting, acts)
        self.acts = acts

    def _name(self, i: int) -> str:
        """Return what the tensor is that ``bind`` has looked at as number ``i``."""
        n, step = len(self.names), len(self._keys)
        if i < n:
            return f"parameter {self.names[i]!r}"
        if i >= n + n * step:
            return f"the gradient of parameter {self.names[i - n - n * step]!r}"
        return f"{self._keys[(i - n) % step]} of parameter {self.names[(i - n) // step]!r}"

    def _check(self, weights, grads) -> None:
        moments = self.moments or [()] * len(weights)
        for name, weight, grad, own in zip(self.names, weights, grads, moments, strict=True):
            if not same_strides(torch.empty_like(weight, device="meta"), weight):
                raise ValueError(
                    f"parameter {name!r}: expected no gaps between its elements, got strides "
                    f"{tuple(weight.stride())} of shape {tuple(weight.shape)}"
                )
            expected = [(grad, "gradient", weight.dtype)] if grad is not None else []
            expected += [(m, "moment", self.moment_dtype) for m in own]
            for tensor, what, dtype in expected:
                if tensor.layout != torch.strided and what == "gradient":
                    raise ValueError(
                        f"gradient of parameter {name!r}: expected a dense one, got layout "
                        f"{tensor.layout} (use Embedding(sparse=False), or put the parameter into "
                        "an optimizer of its own, such as torch.optim.SparseAdam)"
                    )
                for field, value in (
                    ("layout", torch.strided), ("dtype", dtype), ("device", weight.device),
                    ("shape", weight.shape),
                ):  # fmt: skip
                    if getattr(tensor, field) != value:
                        raise ValueError(
                            f"{what} of parameter {name!r}: expected {field} {value}, got "
                            f"{getattr(tensor, field)}"
                        )
                if not same_strides(tensor, weight) and tensor.numel():
                    raise ValueError(
                        f"{what} of parameter {name!r}: expected the parameter's strides "
                        f"{tuple(weight.stride())}, got {tuple(tensor.stride())}"
                    )

    def look_ahead(self, changed: bool) -> None:
        """Bring the products up to date with the weights.

        Args:
            changed: whether the weights may have changed without a new version in torch.
        """
        if self.bucket is None:
            return
        versions, seen = self._regularized_versions(), self.bucket.plan.weights_seen
        changed = changed or versions != self._versions or seen is not self._seen_weights
        self.bucket.look_ahead(changed)
        self._seen_weights = seen

    def set_options(self, rows: Sequence[tuple], decoupled: bool, constraint: str | None) -> None:
        """Write the hyperparameters of every group, in the order of schema.GROUP.

        A learning rate that is a tensor on a GPU is copied there: its value may change between
        replays of a CUDA graph. Numbers are constants of the graph, as in torch.optim.
        """
        self.decoupled = self.header[UPDATE_SLOT["decoupled"]] = decoupled
        self.constraint = constraint
        self.header[UPDATE_SLOT["constraint"]] = CONSTRAINTS[constraint]
        on_device = {i: row[0] for i, row in enumerate(rows) if isinstance(row[0], torch.Tensor)}
        rows = [(0.0 if i in on_device else row[0], *row[1:]) for i, row in enumerate(rows)]
        if rows != self._options:
            self.groups[:] = np.array(rows, GROUP)
            self._options = rows
            self._groups_version += 1
        self.group_table.refresh(self._groups_version)
        if on_device:
            numbers = self.group_table.views[0].view(torch.float64).view(len(rows), -1)
            for i, lr in on_device.items():
                numbers[i, 0].copy_(lr)

    def set_scaling(self, grad_scale: torch.Tensor | None, found_inf: torch.Tensor | None) -> None:
        """Divide gradients by ``grad_scale``, and skip the step where ``found_inf`` > 0."""
        for name, number in (("grad_scale", grad_scale), ("found_inf", found_inf)):
            if number is not None:
                number = number_on(self.device, torch.float32, number)
            setattr(self, name, number)
            self.header[UPDATE_SLOT[name]] = 0 if number is None else number.data_ptr()

    def run(self) -> None:
        """Take a step."""
        self.tables.refresh(self.counter.value)
        placed = *self.tables.addresses, *self.group_table.addresses
        if placed != self._placed:
            self.header[_TABLES] = self._placed = placed
        step, counted, done = self.as_step(), self.steps._version, False
        if self.bucket is not None:
            self.bucket.is_ahead = False  # until the products are those of the new weights
        try:
            self._count(1)
            done = self.backend.update(step) is None
        except MemoryError:  # nothing has been written
            if self.bucket is not None:
                self.bucket.is_ahead = True
            raise
        finally:
            if done:
                torch.autograd.graph.increment_version(self.weights)  # kernels write to addresses
            elif self.steps._version != counted:
                self._count(-1)
        if self.bucket is not None:
            self.bucket.after_update()
        self._versions = self._regularized_versions()

    def _count(self, n: int) -> None:
        """Add ``n`` to the step counts of the parameters that take this step."""
        taken = self._acting if self.found_inf is None else self._acting * (self.found_inf <= 0)
        self.steps.add_(taken, alpha=n)

    def _regularized_versions(self) -> list[int]:
        return [weight._version for weight in self.weights[: self.n_regularized]]

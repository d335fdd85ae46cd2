"""An optimizer's step, with the penalty in it, over the parameters of one device and dtype.

The state holds s = W v, sigma = ||s|| and the next v from the step before. The step passes
g + strength * dR/dW(W; v) to the optimizer's rule, then multiplies the new weights by the next v:
the iteration that a regularizer would run at the start of the next step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..backends import formulas
from ..backends.base import Backend, Rule, Step
from ..engine.bucket import Bucket
from ..tables.addresses import memory_of
from ..tables.device import DeviceTables, fill, number_on
from ..tables.schema import (
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


class Update:
    """An optimizer's tables for the parameters of one device and dtype.

    Args:
        rule: AdamW or SGD.
        backend: the backend that takes the step.
        bucket: the bucket of the regularized parameters, or None.
        names: names of the parameters, for error messages.
        weights: the parameters; those of the bucket first, in the order of its refs.
        moments: exp_avg and exp_avg_sq, or momentum_buffer, or nothing, of each parameter.
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
        moments: Sequence[tuple[torch.Tensor, ...]],
        group_of: Sequence[int],
        moment_dtype: torch.dtype,
        n_groups: int,
    ):
        self.rule, self.backend, self.bucket = rule, backend, bucket
        self.moment_dtype = moment_dtype
        self.names, self.weights, self.moments = names, list(weights), list(moments)
        self.group_of = np.array(group_of, np.int64)
        self.device, self.dtype = weights[0].device, weights[0].dtype
        self.n_regularized = len(bucket.plan.refs) if bucket is not None else 0
        self.steps = torch.zeros(len(weights), dtype=torch.float32, device=self.device)
        self.grads: list[torch.Tensor | None] = []
        self.acts: list[bool] = []  # whether each parameter takes the step
        self._acting = torch.zeros_like(self.steps)
        self._versions: list[int] = []
        self._seen = self._seen_weights = self._checked = None
        self.groups = np.zeros(n_groups, GROUP)
        self._options: list[tuple] = []  # the values in groups
        self._groups_version = 0
        self._placed: tuple[int, ...] = ()  # the addresses of _ON_DEVICE in the header
        self.grad_scale: torch.Tensor | None = None
        self.found_inf: torch.Tensor | None = None
        self.decoupled = False
        self._build_tables()

    def _build_tables(self) -> None:
        others = [
            (ref, start, min(PART, self.weights[ref].numel() - start))
            for ref in range(self.n_regularized, len(self.weights))
            for start in range(0, self.weights[ref].numel(), PART)
        ]
        ref, self._other_start, size = np.array(others, np.int64).reshape(-1, 3).T.copy()
        self.others = np.zeros(len(others), ELEMENTWISE)
        self.others["grad_dtype"], self.others["size"] = DTYPES[self.dtype], size
        self._other_ref = ref
        none = np.zeros(0, np.int64)
        plan = None if self.bucket is None else self.bucket.plan
        # Index of the parameter, and first element, of every row, by table.
        rows = {
            "matrix_moments": (none, none) if plan is None else (plan.matrix_ref, plan.offsets),
            "elementwise_moments": (none, none) if plan is None else (plan.elementwise_ref, 0),
            "other_moments": (ref, self._other_start),
        }
        self._rows = [(np.zeros(len(own), MOMENT), own, start) for own, start in rows.values()]
        self._header = np.zeros(len(HEADER), np.int64)  # of a step without a penalty
        self._header[SLOT["weight_dtype"]] = DTYPES[self.dtype]
        self._plain_header = address(self._header)
        tables = self.others, *(row[0] for row in self._rows)
        what = "an address of a parameter, a gradient or a moment"
        self.tables, self._version = DeviceTables(tables, self.device, what), 0
        self.group_table = DeviceTables([self.groups], self.device, "a hyperparameter")
        self.header = np.zeros(len(UPDATE), np.int64)
        self.address = address(self.header)
        fields = {
            "rule": self.rule.number, "moment_dtype": DTYPES[self.moment_dtype],
            "n_others": len(self.others), "steps": self.steps.data_ptr(),
        }  # fmt: skip
        for name, value in fields.items():
            self.header[UPDATE_SLOT[name]] = value

    def as_step(self) -> Step:
        """Return the step for the backend."""
        plan, state = (None, None) if self.bucket is None else (self.bucket.plan, self.bucket.state)
        return Step(
            rule=self.rule, plan=plan, state=state, weights=self.weights, grads=self.grads,
            moments=self.moments, acts=self.acts, steps=self.steps, groups=self.groups,
            group_of=self.group_of, decoupled=self.decoupled, grad_scale=self.grad_scale,
            found_inf=self.found_inf, moment_dtype=self.moment_dtype, others=self.others,
            tables=self.tables, group_table=self.group_table, address=self.address,
            plain_header=self._plain_header,
        )  # fmt: skip

    def bind(self, weights: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None]) -> None:
        """Point the tables at the parameters and gradients of this step.

        Raises:
            ValueError: a parameter, gradient or moment that cannot be used in place.
        """
        self.weights, self.grads = weights, grads
        if self.bucket is not None:
            self.bucket.plan.bind_grads(grads[: self.n_regularized])
        try:
            seen = self._looked_at()
        except RuntimeError:  # a gradient without plain memory, which has no address
            self._check()
            raise
        if seen == self._seen:
            return
        if (layouts := self._layouts(seen)) != self._checked:
            self._check()
            self._checked = layouts
        acts = [grad is not None for grad in grads]
        for i in range(self.n_regularized):
            acts[i] |= weights[i].requires_grad
        if acts != self.acts:
            self.acts = acts
            fill(self._acting, acts)
        self._place_others(seen)
        group = np.where(self.acts, self.group_of, -1)
        kept = [memory_of(m).address_array() for m in zip(*self.moments, strict=True)]
        for table, ref, start in self._rows:
            table["parameter"], table["group"] = ref, group[ref]
            for field, address_of in zip(("first", "second"), kept, strict=False):
                table[field] = address_of[ref] + start * self.moment_dtype.itemsize
        self._version += 1
        self._seen = seen

    def _place_others(self, seen: tuple) -> None:
        """Write the addresses in ``seen`` of parameters without a penalty and their gradients."""
        here, others, _ = seen
        if not others:
            return
        found = np.zeros((2, len(self.weights)), np.int64)
        found[0, self.n_regularized :] = others[0].address_array()
        found[1, [self.n_regularized + i for i in here]] = others[1].address_array()
        offsets = self._other_start * self.dtype.itemsize
        for field, addresses in zip(("weight", "grad"), found[:, self._other_ref], strict=True):
            self.others[field] = np.where(addresses, addresses + offsets, 0)

    def _looked_at(self) -> tuple:
        """Return a value that changes when an address does; the plan's version covers its own."""
        weights, grads = self.weights[self.n_regularized :], self.grads[self.n_regularized :]
        here = [i for i, grad in enumerate(grads) if grad is not None]
        others = (memory_of(weights), memory_of([grads[i] for i in here])) if weights else ()
        return here, others, self.bucket and self.bucket.plan.version

    def _layouts(self, seen: tuple) -> tuple:
        """Return a value that changes when the result of ``_check`` may change."""
        here, others, _ = seen
        plan = None if self.bucket is None else self.bucket.plan
        own = None if plan is None else (plan.grads_seen[0], plan.grads_seen[1].layouts,
                                         plan.weights_seen.layouts)  # fmt: skip
        return here, [memory.layouts for memory in others], own

    def _check(self) -> None:
        for name, weight, grad, moments in zip(
            self.names, self.weights, self.grads, self.moments, strict=True
        ):
            if torch.empty_like(weight, device="meta").stride() != weight.stride():
                raise ValueError(
                    f"parameter {name!r} has strides {tuple(weight.stride())}; accepted are "
                    "parameters without gaps between their elements"
                )
            expected = [(grad, "gradient", weight.dtype)] if grad is not None else []
            expected += [(m, "moment", self.moment_dtype) for m in moments]
            for tensor, what, dtype in expected:
                if (tensor.layout, tensor.dtype) != (torch.strided, dtype):
                    raise ValueError(
                        f"the {what} of parameter {name!r} is {tensor.dtype}, {tensor.layout}; "
                        f"accepted is {dtype}, {torch.strided}"
                    )
                if tensor.stride() != weight.stride() and tensor.numel():
                    raise ValueError(
                        f"the {what} of parameter {name!r} has strides {tuple(tensor.stride())}; "
                        f"accepted are those of the parameter, {tuple(weight.stride())}"
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

    def set_options(self, rows: Sequence[tuple], decoupled: bool) -> None:
        """Write the hyperparameters of every group, in the order of schema.GROUP.

        A learning rate that is a tensor on a GPU is copied there: its value may change between
        replays of a CUDA graph. Numbers are constants of the graph, as in torch.optim.
        """
        self.decoupled = self.header[UPDATE_SLOT["decoupled"]] = decoupled
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
        self.tables.refresh(self._version)
        placed = *self.tables.addresses, *self.group_table.addresses
        if placed != self._placed:
            self.header[_TABLES] = self._placed = placed
        counted = self._acting
        if self.found_inf is not None:
            counted = counted * (self.found_inf <= 0)
        self.steps += counted
        try:
            self.backend.update(self.as_step())
        except MemoryError:  # nothing has been written
            self.steps -= counted
            raise
        if self.bucket is not None:
            self.bucket.after_update()
        torch.autograd.graph.increment_version(self.weights)  # kernels write to addresses
        self._versions = self._regularized_versions()

    def _regularized_versions(self) -> list[int]:
        return [weight._version for weight in self.weights[: self.n_regularized]]

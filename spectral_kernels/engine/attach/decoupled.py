"""The penalty beside an optimizer's step: W <- W - lr * strength * dR/dW.

W, lr and the singular vectors are those at the start of the step, and the optimizer's rule sees W
without the penalty: what is subtracted is computed before the step, and subtracted after it. No
step carries a singular value past its target: with c = lr * strength * dR/dsigma,

    W <- W - clamp(c, -|sigma - target|, |sigma - target|) u v^T

and likewise the norm of a bias, a shift or a row, and the absolute value of an element of a gain.

A constraint brings sigma to its target in one step instead, without lr and strength (which only
says, where it is 0, that there is nothing to do): "cap" is the last line with an infinite c where
sigma is above its target and 0 elsewhere, for each of several singular values; "sphere" is
W <- (target / sigma) W, before the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from ...backends.formulas import gain_gradient, held_factor
from ...backends.reference import held_factors, stored
from ...tables import device as device_tables
from ...tables.device import wide
from ...tables.plan import Plan, Targets
from ...tables.state import State
from ..bucket import Bucket
from .optimizers import groups_of, learning_rates


class Decoupled:
    """What the steps of one optimizer subtract from the parameters that it holds.

    Args:
        constraint: None, "cap" or "sphere".
    """

    def __init__(self, constraint: str | None):
        self.constraint = constraint
        self._entries: WeakKeyDictionary[Plan, _Entries] = WeakKeyDictionary()
        self._changes: list[_Change] = []

    @torch.no_grad()
    def prepare(
        self, buckets: Sequence[Bucket], n_iterations: int, optimizer: torch.optim.Optimizer
    ) -> None:
        """Run power iterations, and compute what :meth:`apply` subtracts.

        Raises:
            ValueError: a learning rate that is not a number.
        """
        held = self.constraint
        self._changes, rates = [], [0.0]
        if buckets and held is None:
            rates = learning_rates(optimizer)
        for bucket in buckets:
            bucket.begin(n_iterations)
        for bucket in buckets:
            if not bucket.extra_iterations:
                bucket.backend.normalize(bucket.plan, bucket.state)
                bucket.recover()
            if bucket.plan not in self._entries:
                self._entries[bucket.plan] = _Entries(bucket)
            entries = self._entries[bucket.plan]
            rate = entries.rate(rates, optimizer, bucket)
            self._changes.append(_Change(bucket, n_iterations, entries, rate, held))
        if held == "sphere":
            for change in self._changes:
                change.scale_matrices(getattr(optimizer, "found_inf", None))

    @torch.no_grad()
    def apply(self, optimizer: torch.optim.Optimizer) -> None:
        """Subtract it, unless GradScaler has found gradients that are not finite."""
        changes, self._changes = self._changes, []
        for change in changes:
            # GradScaler sets this attribute of an optimizer whose kernels look at it.
            change.apply(getattr(optimizer, "found_inf", None))


class _Entries:
    """The entries of a plan: the group of each, and the elementwise ones laid end to end.

    Attributes:
        state: one with exponent 1, for the kernels that add.
        is_matrix: whether each parameter consists of matrices.
        elementwise: those whose changes are computed together, laid end to end.
        most: the largest strength of each operator; None for matrices.
    """

    def __init__(self, bucket: Bucket):
        plan, own = bucket.plan, bucket.state
        scalars = torch.empty_like(own.scalars)
        self.state = State(own.plan, own.v, own.v_next, own.s, scalars, 1.0)
        self.state.set_above(False)  # the strength says it
        self.is_matrix = np.isin(np.arange(len(plan.refs)), plan.matrix_ref).tolist()
        self._refs = [*plan.matrix_ref.tolist(), *plan.elementwise_ref.tolist()]
        self._sizes_seen: list[int] = []  # of the groups
        self._groups: list[int] = []  # of each entry, the index of its group
        self._targets_seen: Targets | None = None
        self.elementwise: list[_Flat] = []
        self.most = None
        if plan.operators is not None:
            reach = torch.from_numpy(plan.table["reach"].copy()).to(plan.device)
            self.most = 0.5 / reach.to(plan.state_dtype)

    def update_targets(self, plan: Plan) -> None:
        """Lay the elementwise parameters end to end, those with targets with theirs."""
        if plan.targets is self._targets_seen:
            return
        groups: dict[tuple, list[int]] = {}
        for i, (entry, own) in enumerate(zip(plan.elementwise, plan.targets, strict=True)):
            groups.setdefault((entry.kind, entry.length, own is None), []).append(i)
        self.elementwise = [_Flat(plan, *key[:2], entries) for key, entries in groups.items()]
        self._targets_seen = self.state.targets = plan.targets

    def rate(self, rates: Sequence[float | Tensor], optimizer, bucket: Bucket) -> float | Tensor:
        """Return the learning rate, or, if they differ, that of every entry, on the device."""
        first, plan = rates[0], bucket.plan
        if all(rate is first for rate in rates):
            is_tensor = isinstance(first, Tensor)
            return _on_device(plan, first) if is_tensor else first
        sizes = [len(group["params"]) for group in optimizer.param_groups]
        if sizes != self._sizes_seen:
            place = {id(group): i for i, group in enumerate(optimizer.param_groups)}
            groups = groups_of(optimizer)
            of_ref = [place[id(groups[id(p)])] for p in bucket.parameters]
            self._groups, self._sizes_seen = [of_ref[ref] for ref in self._refs], sizes
        if any(isinstance(rate, Tensor) for rate in rates):
            own = [_on_device(plan, rate) for rate in rates]
            return torch.stack([own[i] for i in self._groups])
        found = torch.empty(len(self._refs), dtype=plan.state_dtype, device=plan.device)
        device_tables.fill(found, [float(rates[i]) for i in self._groups])
        return found


class _Flat:
    """Elementwise parameters of one kind, laid end to end: ``sizes`` elements each.

    They all have targets, ``targets`` in the same order, or none has. Rows have ``length`` elements
    each.
    """

    def __init__(self, plan: Plan, kind: str, length: int, entries: list[int]):
        self.kind, self.refs = kind, [int(plan.elementwise_ref[i]) for i in entries]
        self.length = length
        self.sizes = [plan.tensors[ref].numel() for ref in self.refs]
        index, counts = torch.tensor([entries, self.sizes], dtype=torch.int64, device="cpu")
        self.entries = index.to(plan.device)
        self.entry_of = index.repeat_interleave(counts).to(plan.device)  # of every element
        own = [plan.targets[i] for i in entries]
        self.targets = None if own[0] is None else torch.cat(own)

    def elements(self, plan: Plan) -> Tensor:
        """Return the present elements, a copy, in the dtype of the state."""
        tensors = [plan.tensors[ref] for ref in self.refs]
        flat = torch.cat([t if t.dim() == 1 else t.reshape(-1) for t in tensors])
        return flat.to(plan.state_dtype)


class _Change:
    """What a step adds to the parameters of a bucket.

    Kernels add c u v^T with an exponent of 1: its factor, 2 strength (sigma - target), then is c
    for a strength of at most 1/2, and stays finite where sigma^k would not. For operators it is at
    most 1/2 over their reach, see csrc/table.h.
    """

    def __init__(
        self,
        bucket: Bucket,
        n_iterations: int,
        entries: _Entries,
        rate: float | Tensor,
        constraint: str | None,
    ):
        own, n, state = bucket.state, len(bucket.plan.matrices), entries.state
        entries.update_targets(bucket.plan)
        self._bucket, self._n_iterations, self._entries = bucket, n_iterations, entries
        state.use(own.v, own.v_next)
        state.scalars.copy_(own.scalars)
        pairs = [(flat, flat.elements(bucket.plan)) for flat in entries.elementwise]
        self._capped: list[int] = []  # matrices of several vectors, which no kernel changes
        if constraint is not None:
            above = constraint == "cap" or own.above
            factors = held_factors(bucket.plan, own, above)
            self._factors = factors[0]
            one = constraint == "cap" and bucket.plan.n_values == 1
            goes = self._factors != 0 if one else torch.zeros_like(own.sigma) > 0
            if constraint == "cap" and not one:
                self._capped, self._several = self._above(factors[0]), factors.to(own.s.dtype)
            state.strength[:n].copy_(-(0.5 if entries.most is None else entries.most) * goes)
            state.sigma.copy_(torch.where(goes, own.sigma, 0.0))
            self._values = [_held(x, flat, own.norm, own.strength[n:], above) for flat, x in pairs]
            return
        strength, k = own.strength * -rate, own.exponent
        found = matrix_strength(own.sigma, own.target, strength[:n], k, own.above)
        if entries.most is not None:
            found = found.clamp(-entries.most, entries.most)
        state.strength[:n].copy_(found)
        self._values = [
            _CHANGES[flat.kind](x, flat, own.norm, strength[n:], k, own.above) for flat, x in pairs
        ]

    def _above(self, factors: Tensor) -> list[int]:
        """Return the matrices whose factor is not 0; on a GPU, where nothing waits for it, all."""
        if device_tables.shares_memory(factors.device):
            return factors.nonzero()[:, 0].tolist()
        return list(range(len(factors)))

    def _cap(self, i: int) -> None:
        """Subtract factor_j s_j v_j^T from matrix ``i``, or from this rank's shard of it."""
        plan, state = self._bucket.plan, self._entries.state
        if self._bucket.is_sharded:
            state = self._bucket.backend.local(plan, state)
        factors = self._several[:, i]
        part = (state.rows(i).mT * factors) @ state.columns(i, state.v)
        part = torch.where(factors[0] == 0, torch.zeros_like(part), part)  # it may not be finite
        weight = stored(plan, i, plan.tensors[int(plan.matrix_ref[i])].detach())
        weight.copy_(weight.to(part.dtype) - part.view_as(weight))

    def scale_matrices(self, found_inf: Tensor | None) -> None:
        """Divide sigma of every matrix by sigma / target, if ``found_inf`` is not above 0."""
        plan = self._bucket.plan
        kept, is_free = 1 - self._factors, self._is_free()
        if found_inf is not None:
            stays = device_tables.number_on(plan.device, kept.dtype, found_inf) > 0
            kept = torch.where(stays, 1.0, kept)
        for i, ref in enumerate(plan.matrix_ref):
            if is_free[ref]:
                weight = stored(plan, i, plan.tensors[ref].detach())
                weight.copy_(wide(weight) * kept[i])

    def apply(self, found_inf: Tensor | None) -> None:
        """Add it, if ``found_inf`` is not above 0."""
        bucket, plan, state = self._bucket, self._bucket.plan, self._entries.state
        if found_inf is not None:
            if device_tables.shares_memory(plan.device):
                if float(found_inf) > 0:
                    return
            else:
                goes = device_tables.number_on(plan.device, torch.float32, found_inf) <= 0
                state.strength.mul_(goes)
                self._values = [values * goes for values in self._values]
                if self._capped:
                    self._several = self._several * goes
        free = self._is_free()
        for i in self._capped:
            if free[int(plan.matrix_ref[i])]:
                self._cap(i)
        for flat, values in zip(self._entries.elementwise, self._values, strict=True):
            parts = zip(flat.refs, values.split_with_sizes(flat.sizes), strict=True)
            pairs = [(plan.tensors[ref], part) for ref, part in parts if free[ref]]
            if pairs:
                shaped = [y if x.dim() == 1 else y.view_as(x) for x, y in pairs]
                torch._foreach_add_([x for x, _ in pairs], shaped)
        weights = [
            weight if is_matrix and is_free else None
            for weight, is_matrix, is_free
            in zip(plan.tensors, self._entries.is_matrix, free, strict=True)
        ]  # fmt: skip
        plan.bind_grads(weights)
        bucket.add_gradient(state, weights, accumulate=True)
        bucket.settle(self._n_iterations)
        # Kernels write to addresses.
        torch.autograd.graph.increment_version([t for t in weights if t is not None])

    def _is_free(self) -> list[bool]:
        """Return whether each parameter may change."""
        out = self._bucket.left_out
        return [p.requires_grad and i not in out for i, p in enumerate(self._bucket.parameters)]


def matrix_strength(
    sigma: Tensor, target: Tensor, strength: Tensor, k: float, above: bool = False
) -> Tensor:
    """Return the strength [n] with which exponent 1 has the capped gradient of exponent ``k``.

    strength 2 k (sigma^k - tau^k) sigma^(k-1), at most |sigma - tau|, over 2 (sigma - tau).
    """
    if k == 2:
        value = (sigma + target) * sigma
    else:
        gap = sigma - target
        slope = k * target ** (k - 1)
        quotient = torch.where(gap == 0, slope, (sigma**k - target**k) / gap)
        value = quotient * sigma ** (k - 1)
    if above:
        value = torch.where(sigma < target, 0.0, value)
    return (strength * _finite(value)).mul_(k).clamp_(-0.5, 0.5)


def _shift_change(
    b: Tensor, flat: _Flat, norm: Tensor, strength: Tensor, k: float, above: bool
) -> Tensor:
    if flat.targets is None:
        factor = (strength * _finite(norm ** (2 * k - 2))).mul_(2 * k).clamp_(-1, 1)
    else:
        factor = torch.zeros_like(norm)
        own = norm[flat.entries], flat.targets, strength[flat.entries], k, above
        factor[flat.entries] = _vector_factor(*own)
    return factor.index_select(0, flat.entry_of).mul_(b)


def _gain_change(
    g: Tensor, flat: _Flat, _: Tensor, strength: Tensor, k: float, above: bool
) -> Tensor:
    target = 1 if flat.targets is None else flat.targets
    most = (g.abs() - target).abs()
    slope = _finite(gain_gradient(g, k, target, above))
    change = strength.index_select(0, flat.entry_of).mul_(slope)
    return torch.minimum(torch.maximum(change, -most), most)


def _rows_change(
    w: Tensor, flat: _Flat, _: Tensor, strength: Tensor, k: float, above: bool
) -> Tensor:
    rows, norm, own = _rows_of(w, flat)
    factor = _vector_factor(norm, wide(flat.targets), wide(strength)[own], k, above)
    return (factor[:, None] * rows).to(w.dtype).flatten()


def _rows_of(w: Tensor, flat: _Flat) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows, wide, their norms and their entries."""
    rows = wide(w).view(-1, max(flat.length, 1))
    return rows, torch.linalg.vector_norm(rows, dim=1), flat.entry_of[:: max(flat.length, 1)]


def _vector_factor(norm: Tensor, target: Tensor, strength: Tensor, k: float, above: bool) -> Tensor:
    """Return by how much of themselves vectors [n] of Euclidean norm ``norm`` change."""
    change = matrix_strength(norm, target, strength, k, above) * 2 * (norm - target)
    return torch.where(norm == 0, 0.0, change / norm)


def _held(x: Tensor, flat: _Flat, norm: Tensor, strength: Tensor, above: bool) -> Tensor:
    """Return what a constraint adds to each element; biases are capped, if they have a target."""
    if flat.kind == "gain":
        target = torch.ones_like(x) if flat.targets is None else flat.targets
        own = wide(strength)[flat.entry_of]
        return _part(held_factor(wide(x.abs()), own, wide(target), above), x)
    if flat.targets is None:
        return torch.zeros_like(x)
    target = wide(flat.targets)
    if flat.kind == "shift":
        factor = torch.zeros_like(wide(norm))
        own = wide(norm)[flat.entries], wide(strength)[flat.entries], target
        factor[flat.entries] = held_factor(*own, True)
        return _part(factor[flat.entry_of], x)
    rows, norms, own = _rows_of(x, flat)
    factor = held_factor(norms, wide(strength)[own], target, above)
    factor = torch.where(target == 0, 0.0, factor)  # biases, which have no bound
    return _part(factor[:, None], rows).to(x.dtype).flatten()


def _part(factor: Tensor, x: Tensor) -> Tensor:
    return torch.where(factor == 0, 0.0, -factor * wide(x)).to(x.dtype)


# What is added to each element of a flat vector, by kind; strength contains -lr.
_CHANGES = {"shift": _shift_change, "gain": _gain_change, "rows": _rows_change}


def _finite(x: Tensor) -> Tensor:
    """Return ``x``, where it has overflowed the largest number: 0 times that is 0."""
    most = torch.finfo(x.dtype).max
    return x.clamp(-most, most)


def _on_device(plan: Plan, number: float | Tensor) -> Tensor:
    return device_tables.number_on(plan.device, plan.state_dtype, number).reshape(())

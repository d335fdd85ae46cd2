"""The penalty beside an optimizer's step: W <- W - lr * strength * dR/dW.

W, lr and the singular vectors are those at the start of the step, and the optimizer's rule sees W
without the penalty: what is subtracted is computed before the step, and subtracted after it. No
step carries a singular value past its target: with c = lr * strength * dR/dsigma,

    W <- W - clamp(c, -|sigma - target|, |sigma - target|) u v^T

and likewise a bias or shift not past 0, and an element of a gain not past 1 or -1.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...backends.formulas import gain_gradient
from ...tables import device as device_tables
from ...tables.plan import Plan
from ...tables.state import State
from ..bucket import Bucket
from .optimizers import groups_of, learning_rates


class Decoupled:
    """What the steps of one optimizer subtract from the parameters that it holds."""

    def __init__(self):
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
        self._changes, rates = [], learning_rates(optimizer)
        for bucket in buckets:
            bucket.begin(n_iterations)
        for bucket in buckets:
            if not bucket.extra_iterations:
                bucket.backend.normalize(bucket.plan, bucket.state)
            if bucket.plan not in self._entries:
                self._entries[bucket.plan] = _Entries(bucket.plan)
            entries = self._entries[bucket.plan]
            rate = entries.rate(rates, optimizer, bucket)
            self._changes.append(_Change(bucket, n_iterations, entries, rate))

    @torch.no_grad()
    def apply(self, optimizer: torch.optim.Optimizer) -> None:
        """Subtract it, unless GradScaler has found gradients that are not finite."""
        changes, self._changes = self._changes, []
        for change in changes:
            # GradScaler sets this attribute of an optimizer whose kernels look at it.
            change.apply(getattr(optimizer, "found_inf", None))


class _Entries:
    """The entries of a plan: the group of each, and the elementwise ones laid end to end."""

    def __init__(self, plan: Plan):
        self._refs = [*plan.matrix_ref.tolist(), *plan.elementwise_ref.tolist()]
        self._sizes_seen: list[int] = []  # of the groups
        self._groups: list[int] = []  # of each entry, the index of its group
        found = [_Flat(plan, kind) for kind in _CHANGES]
        self.elementwise = [flat for flat in found if flat.refs]

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
    """The elementwise parameters of one kind, laid end to end."""

    def __init__(self, plan: Plan, kind: str):
        entries = [i for i, entry in enumerate(plan.elementwise) if entry.kind == kind]
        self.kind, self.refs = kind, [int(plan.elementwise_ref[i]) for i in entries]
        sizes = [plan.tensors[ref].numel() for ref in self.refs]
        index, counts = torch.tensor([entries, sizes], dtype=torch.int64, device="cpu")
        self.entry_of = index.repeat_interleave(counts).to(plan.device)  # of every element


class _Change:
    """What a step subtracts from the parameters of a bucket.

    Kernels subtract c u v^T with an exponent of 1: its factor, 2 strength (sigma - target), then is
    c for a strength of at most 1/2, and stays finite where sigma^k would not.
    """

    def __init__(self, bucket: Bucket, n_iterations: int, entries: _Entries, rate: float | Tensor):
        state, n = bucket.state, len(bucket.plan.matrices)
        self._bucket, self._n_iterations = bucket, n_iterations
        strength = state.strength * rate
        scalars = state.scalars.clone()
        self._state = State(state.plan, state.v, state.v_next, state.s, scalars, 1.0)
        own = matrix_strength(state.sigma, state.target, strength[:n], state.exponent)
        self._strength = self._state.strength[:n].copy_(own).neg_()
        self._values = [
            (flat.refs, _flat_change(bucket.plan, flat, state.norm, strength[n:], state.exponent))
            for flat in entries.elementwise
        ]

    def apply(self, found_inf: Tensor | None) -> None:
        """Subtract it, if ``found_inf`` is not above 0."""
        bucket, plan = self._bucket, self._bucket.plan
        if found_inf is not None:
            if device_tables.shares_memory(plan.device):
                if float(found_inf) > 0:
                    return
            else:
                goes = device_tables.number_on(plan.device, torch.float32, found_inf) <= 0
                self._strength.mul_(goes)
                self._values = [(refs, value * goes) for refs, value in self._values]
        free = [p.requires_grad for p in bucket.parameters]
        for refs, values in self._values:
            values = values.split([plan.tensors[ref].numel() for ref in refs])
            pairs = [
                (plan.tensors[ref].detach(), value)
                for ref, value in zip(refs, values, strict=True)
                if free[ref]
            ]
            if pairs:
                torch._foreach_sub_([x for x, _ in pairs], [v.view(x.shape) for x, v in pairs])
        flat = {ref for refs, _ in self._values for ref in refs}
        weights = [t if free[i] and i not in flat else None for i, t in enumerate(plan.tensors)]
        plan.bind_grads(weights)
        bucket.add_gradient(self._state, weights, accumulate=True)
        bucket.settle(self._n_iterations)
        # Kernels write to addresses.
        torch.autograd.graph.increment_version([t for t in weights if t is not None])


def matrix_strength(sigma: Tensor, target: Tensor, strength: Tensor, k: float) -> Tensor:
    """Return the strength [n] with which exponent 1 has the capped gradient of exponent ``k``.

    strength 2 k (sigma^k - tau^k) sigma^(k-1), at most |sigma - tau|, over 2 (sigma - tau).
    """
    if k == 2:
        quotient = sigma + target
    else:
        gap = sigma - target
        slope = k * target ** (k - 1)
        quotient = torch.where(gap == 0, slope, (sigma**k - target**k) / gap)
    return _times(strength, k * quotient * sigma ** (k - 1)).clamp(-0.5, 0.5)


def _shift_change(b: Tensor, norm: Tensor, strength: Tensor, k: float) -> Tensor:
    return _times(strength, 2 * k * norm ** (2 * k - 2)).clamp(-1, 1) * b


def _gain_change(g: Tensor, _: Tensor, strength: Tensor, k: float) -> Tensor:
    most = (g.abs() - 1).abs()
    return torch.minimum(torch.maximum(_times(strength, gain_gradient(g, k)), -most), most)


_CHANGES = {"shift": _shift_change, "gain": _gain_change}


def _times(strength: Tensor, x: Tensor) -> Tensor:
    """Return strength * x, and 0 for strength 0 even where x overflows."""
    return torch.where(strength == 0, strength, strength * x)


def _flat_change(plan: Plan, flat: _Flat, norm: Tensor, strength: Tensor, k: float) -> Tensor:
    """Return what is subtracted from every element of ``flat``; ``strength`` includes lr."""
    x = torch.cat([plan.tensors[ref].detach().reshape(-1) for ref in flat.refs])
    of = flat.entry_of
    return _CHANGES[flat.kind](x.to(plan.state_dtype), norm[of], strength[of], k)


def _on_device(plan: Plan, number: float | Tensor) -> Tensor:
    return device_tables.number_on(plan.device, plan.state_dtype, number).reshape(())

"""Strength and target of every matrix and elementwise parameter, and their device copies."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from ..backends.base import Backend
from ..selection import transforms
from ..selection.arguments import by_name, check_by_pattern, check_number, mup_factor, shown
from ..selection.matrices import Elementwise, Matrix, Selection
from ..tables import device as device_tables
from . import initial, lanczos, operators
from .bucket import Bucket
from .initial import Initial

Strength = float | torch.Tensor | Mapping[str, float]
# A number, "initial", "mup" or a multiple such as "0.5*mup"; by pattern.
Target = float | str | Mapping[str, float | str]


TARGETS = ("initial", "mup")  # the words of a target


def number_of(target: float | str, rows: int, cols: int) -> float:
    """Return the target of a matrix [rows, cols]: c sqrt(rows / cols) for "c*mup"."""
    factor = mup_factor(target)
    if factor is None:
        return target
    return factor * math.sqrt(rows / cols) if cols else factor


class Coefficients:
    """Strength and target of each entry of a selection.

    Args:
        selection: matrices and elementwise parameters.
        strength: factor of R: a number, a 0-d tensor, or a mapping from name patterns.
        target: tau: a number, "initial", "mup" or a multiple of it, or a mapping from name patterns
            to these.
        backend: the backend, or its name, that measures initial targets.

    Raises:
        TypeError: a strength or target of the wrong type.
        ValueError: a value out of range, or a name that no pattern matches.
    """

    def __init__(
        self, selection: Selection, strength: Strength, target: Target, backend: str | Backend
    ):
        self._selection, self._backend = selection, backend
        # Vectors of the matrices that were measured, [1, N] and [1, M]: the power iteration starts
        # from them, so that the penalty is zero at first.
        self.right: dict[str, torch.Tensor] = {}
        self.left: dict[str, torch.Tensor] = {}
        self.initial: dict[str, Initial] = {}  # measured targets, by name of the entry
        if isinstance(strength, torch.Tensor):
            _check_tensor(strength, is_read=True)
        self.strength = strength
        self._target, self._targets = self._checked_target(target)

    @property
    def _entries(self) -> list[Matrix | Elementwise]:
        return [*self._selection.matrices, *self._selection.elementwise]

    @property
    def strength(self) -> Strength:
        """Factor of R: the tensor that was given, a number, or a copy of the mapping."""
        return dict(self._strength) if isinstance(self._strength, dict) else self._strength

    @strength.setter
    def strength(self, strength: Strength) -> None:
        is_tensor = isinstance(strength, torch.Tensor)
        if is_tensor:
            transforms.check_plain(
                "strength", strength, "with strength 1, multiply penalty() by it"
            )
            _check_tensor(strength, is_read=device_tables.shares_memory(strength.device))
        else:
            strength = check_by_pattern("strength", strength)
            self._strengths = by_name("strength", strength, self._selection)
        self._strength = strength
        self.strength_tensor: torch.Tensor | None = strength if is_tensor else None

    @property
    def target(self) -> Target:
        """Tau: a number, "initial", "mup" or a multiple, or a copy of the mapping."""
        return dict(self._target) if isinstance(self._target, dict) else self._target

    def _checked_target(self, target: Target) -> tuple[Target, dict[str, float | str]]:
        target = check_by_pattern("target", target, words=TARGETS)
        return target, by_name("target", target, self._selection)

    def assign_target(self, target: Target) -> None:
        """Replace the target, once all that is needed for it is known."""
        target, targets = self._checked_target(target)
        if not any(entry.ref.get().is_meta for entry in self._entries):
            self.initial.update(self._measured(targets))
        self._target, self._targets = target, targets

    def prepared(self, selection: Selection) -> tuple[dict[str, float], dict[str, float | str]]:
        """Return strengths and targets by name for another ``selection`` of the model.

        Raises:
            ValueError: a name that no pattern matches.
        """
        strengths = {}
        if self.strength_tensor is None:
            strengths = by_name("strength", self._strength, selection, is_first=False)
        return strengths, by_name("target", self._target, selection, is_first=False)

    def take(self, strengths: dict[str, float], targets: dict[str, float | str], new) -> None:
        """Continue with what :meth:`prepared` has returned, now that the selection is that one.

        Args:
            strengths: by name.
            targets: by name.
            new: names of the matrices whose initial target is to be measured anew.
        """
        self._strengths, self._targets = strengths, targets
        self.initial = {n: x for n, x in self.initial.items() if n in targets and n not in new}

    def fill(self, bucket: Bucket) -> None:
        """Write strength and target into a new bucket."""
        self.fill_strength(bucket)
        self.measure_initial()
        self.fill_target(bucket)

    def fill_strength(self, bucket: Bucket) -> None:
        """Write the strength of every entry into a bucket."""
        values, idle = self.strength_tensor, set()
        if values is None:
            entries = (*bucket.plan.matrices, *bucket.plan.elementwise)
            values = [self._strengths[entry.name] for entry in entries]
            if 0 in values:
                idle = {entry.ref for entry, x in zip(entries, values, strict=True) if x == 0}
        is_idle = frozenset(i for i, ref in enumerate(bucket.plan.refs) if ref in idle)
        if is_idle != bucket.idle:  # prepared steps watch it
            bucket.idle = is_idle
        device_tables.fill(bucket.state.strength, values)
        bucket.leave_out_frozen(bucket.state.strength)

    def fill_target(self, bucket: Bucket) -> None:
        """Write the target of every entry into a bucket; all initial ones must be measured.

        An elementwise parameter that has got another number of elements is measured again.
        """
        plan = bucket.plan
        values = [
            self.initial[m.name] if target == "initial"
            else number_of(target, *m.shape_now()) if isinstance(target, str)
            else target
            for m, target in ((m, self._targets[m.name]) for m in bucket.matrices)
        ]  # fmt: skip
        device_tables.fill(bucket.state.target, values)
        targets = []
        for entry, ref in zip(plan.elementwise, plan.elementwise_ref, strict=True):
            target, parameter = self.target_of(entry), bucket.parameters[ref]
            is_tensor = isinstance(target, torch.Tensor)
            if is_tensor and target.numel() != entry.n_targets(parameter.numel()):
                target = initial.measured(entry, parameter)
                self.initial[entry.name] = target
            targets.append(target)
        bucket.set_targets(targets)

    def target_of(self, entry: Elementwise) -> Initial | None:
        """Return the target of an elementwise parameter; None: that of its kind."""
        target = self._targets[entry.name]
        if target == "initial":
            return self.initial[entry.name]
        if isinstance(target, str) and entry.kind != "rows":
            return mup_factor(target) if entry.kind == "gain" else entry.target
        target = number_of(target, 1, entry.length)
        return target if entry.kind == "rows" and entry.target is None else entry.target

    def initial_names(self) -> list[str]:
        """Return the names of the entries with the target "initial"."""
        return [x.name for x in self._entries if self._targets[x.name] == "initial"]

    def measure_initial(self) -> None:
        """Measure the entries with target "initial" that have not been measured."""
        self.initial.update(self._measured(self._targets))

    def _measured(self, targets: Mapping[str, float | str]) -> dict[str, Initial]:
        found: dict[str, Initial] = {}
        for entry in self._entries:
            if targets[entry.name] != "initial" or entry.name in self.initial:
                continue
            tensor = entry.ref.get()
            with transforms.suspended():
                tensor = transforms.value_of(entry.ref.name, tensor)
                if isinstance(entry, Elementwise):
                    found[entry.name] = initial.measured(entry, tensor)
                    continue
                with torch.inference_mode(False):
                    if entry.periods is None:
                        top = lanczos.top(entry, tensor, rtol=1e-4, backend=self._backend)
                    else:
                        top = operators.norm(entry, tensor, rtol=1e-4)
            found[entry.name] = top.sigma
            for vectors, v in ((self.right, top.right), (self.left, top.left)):
                if v is not None:
                    vectors[entry.name] = v
        return found


def _check_tensor(strength: torch.Tensor, is_read: bool) -> None:
    """Check a strength that is a tensor, and its value too if ``is_read``."""
    if strength.dim() != 0 or not strength.is_floating_point():
        raise ValueError(
            f"strength: expected a number or a 0-d floating-point tensor, got {shown(strength)} "
            f"and dtype {strength.dtype}"
        )
    if is_read and not strength.is_meta:
        check_number("strength", strength.item())

"""Strength and target of every matrix and elementwise parameter, and their device copies."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..backends.base import Backend
from ..selection import transforms
from ..selection.arguments import by_name
from ..selection.matrices import Selection
from ..tables import device as device_tables
from .bucket import Bucket
from .lanczos import singular_values

Strength = float | torch.Tensor | Mapping[str, float]
Target = float | str | Mapping[str, float | str]


class Coefficients:
    """Strength and target of each entry of a selection.

    Args:
        selection: matrices and elementwise parameters.
        strength: factor of R: a number, a 0-d tensor, or a mapping from name patterns.
        target: tau: a number, "initial", or a mapping from name patterns to these.
        backend: the backend, or its name, that measures initial targets.

    Raises:
        TypeError: a strength or target of the wrong type.
        ValueError: a value out of range, or a name that no pattern matches.
    """

    def __init__(
        self, selection: Selection, strength: Strength, target: Target, backend: str | Backend
    ):
        self._selection, self._backend = selection, backend
        self.strength, self.target = strength, target
        self._targets = by_name("target", target, selection, words=("initial",))
        self.initial: dict[str, float] = {}  # measured targets, by name of the matrix

    @property
    def strength(self) -> Strength:
        """Factor of R, as given."""
        return self._strength

    @strength.setter
    def strength(self, strength: Strength) -> None:
        is_tensor = isinstance(strength, torch.Tensor)
        if is_tensor:
            transforms.check_plain(
                "strength", strength, "are plain ones; with strength 1, multiply penalty() by it"
            )
            if strength.dim() != 0 or not strength.is_floating_point():
                raise ValueError(
                    f"strength: got a tensor of shape {tuple(strength.shape)} and dtype "
                    f"{strength.dtype}; accepted are 0-d floating-point tensors"
                )
        else:
            self._strengths = by_name("strength", strength, self._selection)
        self._strength = strength
        self.strength_tensor: torch.Tensor | None = strength if is_tensor else None

    def fill(self, bucket: Bucket) -> None:
        """Write strength and target into a new bucket."""
        self.fill_strength(bucket)
        self.measure_initial()
        values = [
            self.initial[matrix.name] if target == "initial" else target
            for matrix, target in ((m, self._targets[m.name]) for m in bucket.plan.matrices)
        ]
        device_tables.fill(bucket.state.target, values)

    def fill_strength(self, bucket: Bucket) -> None:
        """Write the strength of every entry into a bucket."""
        values = self.strength_tensor
        if values is None:
            entries = (*bucket.plan.matrices, *bucket.plan.elementwise)
            values = [self._strengths[entry.name] for entry in entries]
        device_tables.fill(bucket.state.strength, values)

    def measure_initial(self) -> None:
        """Measure sigma_1 of the matrices with target "initial" that have not been measured."""
        for matrix in self._selection.matrices:
            if self._targets[matrix.name] == "initial" and matrix.name not in self.initial:
                tensor = matrix.ref.get()
                with transforms.suspended():
                    tensor = transforms.value_of(matrix.ref.name, tensor)
                    (self.initial[matrix.name],) = singular_values(
                        matrix, tensor, rtol=1e-4, backend=self._backend
                    )

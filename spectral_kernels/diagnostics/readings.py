"""Readings of a regularizer's or an optimizer's matrices: singular values and metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
import torch

from ..engine.bucket import Bucket
from ..engine.initial import largest
from ..engine.model_buckets import ModelBuckets
from ..engine.untraced import untraced
from ..engine.vectors import triplets_of
from ..selection.arguments import expected
from ..selection.listing import listing
from ..selection.matrices import Elementwise, Matrix
from .attention import attention_norms
from .attention_layers import attention_modules
from .log import Log


class LayerReading(NamedTuple):
    """One matrix in ``Readings.report``; of rows ``shape`` is (number, length)."""

    name: str
    shape: tuple[int, int]
    sigma: float
    residual: float


class Readings:
    """Readings of the matrices, which SpectralRegularizer and the optimizers share.

    A depthwise convolution, whose kernels are rows that are matrices of their own, counts as one
    matrix, the block-diagonal one of all its rows: sigma_1 is the largest norm of a row, which is
    exact. It comes after the other matrices; its residual and its other estimates are 0.
    """

    _buckets: ModelBuckets

    def _sgd_groups(self) -> list[Mapping[str, Any]]:
        """Return the parameter groups whose steps are those of SGD with the penalty in them."""
        return []

    @property
    @untraced
    def names(self) -> list[str]:
        """Names of the matrices; parts of a split or stacked parameter carry a suffix."""
        return [entry.name for entry in self._listed()]

    def _listed(self) -> list[Matrix | Elementwise]:
        self._buckets.follow()
        selection = self._buckets.selection
        return [*selection.matrices, *filter(is_matrix, selection.elementwise)]

    @property
    def sigma(self) -> torch.Tensor:
        """Estimates of sigma_1, [n_matrices], in the order of ``names``, on the device; a copy.

        As of the last step; for an optimizer, of the weights after its step.
        """
        return self.singular_values[:, 0]

    @property
    def residual(self) -> torch.Tensor:
        """Residuals, [n_matrices], a copy: a singular value is within ``residual`` of ``sigma``."""
        return self.residuals[:, 0]

    @property
    @untraced
    def singular_values(self) -> torch.Tensor:
        """Estimates of the ``n_vectors`` largest singular values, [n_matrices, n_vectors], a copy.

        Largest first, in the order of ``names``. No estimate is above the singular value that it
        estimates. Those that a matrix does not have, or below 1e-6 of the largest, are 0.
        """
        with self._buckets.lock:
            return gather(self._buckets.bound(), self.names, "sigmas")

    @property
    @untraced
    def residuals(self) -> torch.Tensor:
        """Residuals of ``singular_values``, [n_matrices, n_vectors], a copy."""
        with self._buckets.lock:
            return gather(self._buckets.bound(), self.names, "residuals")

    @untraced
    def singular_vectors(self) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Return name -> (u [M], sigma, v [N]) of every matrix, on its device; sigma is 0-d.

        With r vectors per matrix, [r, M], [r] and [r, N], the largest sigma first. They are those
        of the last step, in float32 (float64 for float64 weights): u = W v / sigma, or of a matrix
        that is stored column by column v = W^T u / sigma. Outputs are rows, and columns are in the
        parameter's own order, however it is stored.
        Before the first step they are those of the warm-up, as ``sigma`` is. For an optimizer they
        are of the weights after its step. Where sigma is 0, u is too.

        sigma and v are views, which the next step writes to: ``clone()`` what is to be kept. u is a
        copy. Of a matrix that is stored column by column, such as a transposed one, u is the view
        and v the copy; v is a copy too where columns lie in another order than the parameter's, as
        in channels_last. Those of an operator of a convolution are complex copies with K v =
        sigma u, of which v is a unit vector over channels times a wave over taps. Rows of depthwise
        convolutions have no vectors of their own. Of sharded weights the vector along sharded rows
        of the memory has this rank's part.
        """
        with self._buckets.lock:
            found = {}
            for bucket in self._buckets.bound():
                bucket.measure()
                found |= triplets_of(bucket)
        return {name: found[name] for name in self.names if name in found}

    @untraced
    def report(self) -> list[LayerReading]:
        """Return (name, shape, sigma, residual) of every matrix; this synchronizes a GPU."""
        self._buckets.tell_of_added()
        values = self._sigma_and_residual().tolist()
        return [
            LayerReading(entry.name, shape_of(entry), sigma, residual)
            for entry, sigma, residual in zip(self._listed(), *values, strict=True)
        ]

    @untraced
    def metrics(self, per_layer: bool = False, prefix: str = "spectral") -> dict[str, float]:
        """Return numbers for a logger, as of the last step; this synchronizes a GPU once.

        "spectral/sigma_max", "spectral/sigma_median" and "spectral/sigma_min" over the matrices,
        "spectral/residual_max", the largest residual / sigma, "spectral/above_target", the number
        of sigma above their target (of rows, the largest one) by more than the residual, and
        "spectral/penalty", ``strength * R``. Without matrices, those of sigma and residual are left
        out. "spectral/attention_max" is the largest sigma_1 of W_q^T W_k over the heads of all
        attention layers, which bounds their logits, of the weights as they are now; see
        ``diagnostics.attention_norms`` for it, and ``diagnostics.attention_modules`` for the
        modules. It is left out where there are none, or their weights are sharded. It takes two
        products of small matrices per head, in float64: on a CPU some milliseconds per layer.

        Args:
            per_layer: add "spectral/sigma/NAME" and "spectral/residual/NAME" of every matrix; the
                latter is residual / sigma too; and "spectral/attention/NAME" of every attention
                layer, the largest over its heads.
            prefix: what the names begin with instead of "spectral", to tell several regularizers
                apart.

        Raises:
            TypeError: ``prefix`` is not a string.
        """
        if not isinstance(prefix, str):
            raise TypeError(expected("prefix", "a string", prefix))
        with self._buckets.lock:
            self._buckets.tell_of_added()
            found = metrics(self._buckets, self.names, per_layer, self._sgd_groups())
        return {f"{prefix}/{name}": value for name, value in found.items()}

    @untraced
    def log_to(self, path: str | PathLike[str], every: int = 1) -> Log:
        """Return ``log``: ``log(step)`` in the loop appends sigma and residual of every matrix.

        The file is ``.csv`` or ``.jsonl``; an existing log of the same matrices is continued. One
        that the model no longer has is NaN. See ``diagnostics.log.Log``.
        """
        return Log(path, names := self.names, partial(self._logged, names), every)

    def _listing(self) -> list[str]:
        """Return lines of text with what is selected; a model that cannot be followed is told."""
        try:
            self._buckets.tell_of_added()
        except (ValueError, RuntimeError) as error:
            return [*listing(self._buckets.selection), f"the model has changed: {error}"]
        return listing(self._buckets.selection)

    def _logged(self, names: Sequence[str]) -> torch.Tensor:
        """Return sigma and residual of the matrices ``names``; NaN for those that are gone."""
        with self._buckets.lock:
            found = self._sigma_and_residual()
            if self.names == names:
                return found
            place = {name: i for i, name in enumerate(self.names)}
        found = torch.cat((found, found.new_full((2, 1), torch.nan)), 1)
        return found[:, [place.get(name, -1) for name in names]]

    def _sigma_and_residual(self) -> torch.Tensor:
        with self._buckets.lock:  # both of the same step
            return torch.stack((self.sigma, self.residual))


def is_matrix(entry: Elementwise) -> bool:
    """Return whether an elementwise parameter is a matrix to a user: rows with their target."""
    return entry.kind == "rows" and entry.target is None


def shape_of(entry: Matrix | Elementwise) -> tuple[int, int]:
    """Return the current shape; of rows, their number and length."""
    if isinstance(entry, Elementwise):
        return entry.n_targets(entry.ref.get().numel()), entry.length
    return entry.shape_now()


def rows_of(bucket: Bucket) -> list[int]:
    """Return the indices of the elementwise parameters that are matrices to a user."""
    return [i for i, entry in enumerate(bucket.plan.elementwise) if is_matrix(entry)]


def gather(buckets: Sequence[Bucket], names: Sequence[str], field: str) -> torch.Tensor:
    """Return "sigmas" or "residuals" of all matrices, [n_matrices, n_vectors], a copy.

    On the device of the first bucket, in the order of ``names``.
    """
    first, by_name = buckets[0].plan, {}
    for bucket in buckets:
        bucket.measure()
        values = getattr(bucket.state, field).view(bucket.plan.r, -1)[: first.n_values].mT
        if rows := rows_of(bucket):
            own = values.new_zeros(len(rows), first.n_values)
            if field == "sigmas":
                own[:, 0] = bucket.state.norm[rows]
            values = torch.cat((values, own))
        if len(buckets) == 1:
            return values.clone(memory_format=torch.contiguous_format)
        own_names = [x.name for x in bucket.plan.matrices]
        own_names += [bucket.plan.elementwise[i].name for i in rows]
        by_name.update(zip(own_names, values.unbind(), strict=True))
    dtype = _dtype(by_name.values())
    if not names:
        return torch.empty(0, first.n_values, dtype=dtype, device=first.device)
    return torch.stack([by_name[n].to(device=first.device, dtype=dtype) for n in names])


def metrics(
    model_buckets: ModelBuckets,
    names: Sequence[str],
    per_layer: bool,
    groups: Sequence[Mapping[str, Any]],
) -> dict[str, float]:
    """See ``Readings.metrics``; ``names`` is the order of the matrices. Without a prefix.

    The watch for unstable steps looks at the sigmas, if there are ``groups`` of SGD.
    """
    buckets = model_buckets.bound()
    parts = []
    for bucket in buckets:
        bucket.measure()
        state, n = bucket.state, len(bucket.plan.matrices)
        parts += [state.sigma, state.residual, state.target, state.strength[:n],
                  state.norm[rows_of(bucket)], bucket.value(state).view(1)]  # fmt: skip
    root = model_buckets.selection.root
    layers = [] if root is None else attention_modules(root)
    parts += [attention_norms(x.query, x.key, x.n_heads).amax().view(1) for x in layers]
    devices = [bucket.plan.device for bucket in buckets]
    device = next((d for d in devices if d.type != "cpu"), devices[0])
    dtype = _dtype(parts)
    numbers = torch.cat([part.to(device=device, dtype=dtype) for part in parts]).tolist()

    penalty, by_name = 0.0, {}
    for bucket in buckets:
        n = len(bucket.plan.matrices)
        sigma, residual, target, strength = np.array(numbers[: 4 * n]).reshape(4, n)
        if groups:
            model_buckets.watch.look(bucket, groups, sigma, target, strength)
        for matrix, *values in zip(bucket.plan.matrices, sigma, residual, target, strict=True):
            by_name[matrix.name] = values
        numbers = numbers[4 * n :]
        for i in rows_of(bucket):
            entry, norm = bucket.plan.elementwise[i], numbers.pop(0)
            most = largest(model_buckets.coefficients.target_of(entry))
            # Rounded as it is in the buckets.
            most = torch.tensor(most, dtype=bucket.plan.state_dtype, device="cpu").item()
            by_name[entry.name] = norm, 0.0, most
        penalty += numbers.pop(0)
    found = {"penalty": penalty, "above_target": 0.0}
    if layers:  # what is left of the numbers
        found["attention_max"] = float(np.max(numbers))
    if per_layer:
        found |= {f"attention/{x.name}": n for x, n in zip(layers, numbers, strict=True)}
    if not names:
        return found
    sigma, residual, target = np.array([by_name[name] for name in names]).T
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(residual == 0, 0, residual / sigma)
        found |= {
            "sigma_max": float(sigma.max()),
            "sigma_median": float(np.median(sigma)),
            "sigma_min": float(sigma.min()),
            "residual_max": float(ratio.max()),
            "above_target": float((sigma - residual > target).sum()),
        }
    if per_layer:
        for start, values in (("sigma", sigma), ("residual", ratio)):
            found |= {f"{start}/{n}": float(x) for n, x in zip(names, values, strict=True)}
    return found


def _dtype(tensors) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32

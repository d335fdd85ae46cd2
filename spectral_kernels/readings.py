"""What the buckets know, gathered: singular values of all matrices, and metrics for a logger."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from .bucket import Bucket


class Row(NamedTuple):
    """One line of ``SpectralRegularizer.report``."""

    name: str
    shape: tuple[int, int]
    sigma: float
    residual: float


def gather(buckets: Sequence[Bucket], names: Sequence[str], field: str) -> torch.Tensor:
    """Return "sigmas" or "residuals" of all matrices, [n_matrices, n_vectors], a copy.

    On the device of the first bucket, in the order of ``names``.
    """
    first, by_name = buckets[0].plan, {}
    for bucket in buckets:
        bucket.measure()
        values = getattr(bucket.state, field).view(first.r, -1).mT
        if len(buckets) == 1:
            return values.clone(memory_format=torch.contiguous_format)
        by_name.update(zip((m.name for m in bucket.plan.matrices), values.unbind(), strict=True))
    dtype = _dtype(by_name.values())
    if not names:
        return torch.empty(0, first.r, dtype=dtype, device=first.device)
    return torch.stack([by_name[n].to(device=first.device, dtype=dtype) for n in names])


def metrics(buckets: Sequence[Bucket], names: Sequence[str], per_layer: bool) -> dict[str, float]:
    """See ``SpectralRegularizer.metrics``; ``names`` is the order of the matrices."""
    parts = []
    for bucket in buckets:
        bucket.measure()
        state = bucket.state
        parts += [state.sigma, state.residual, state.target, bucket.value(state).view(1)]
    devices = [bucket.plan.device for bucket in buckets]
    device = next((d for d in devices if d.type != "cpu"), devices[0])
    dtype = _dtype(parts)
    numbers = torch.cat([part.to(device=device, dtype=dtype) for part in parts]).tolist()

    penalty, by_name = 0.0, {}
    for bucket in buckets:
        n = len(bucket.plan.matrices)
        columns = (numbers[:n], numbers[n : 2 * n], numbers[2 * n : 3 * n])
        for matrix, *values in zip(bucket.plan.matrices, *columns, strict=True):
            by_name[matrix.name] = values
        penalty += numbers[3 * n]
        numbers = numbers[3 * n + 1 :]
    found = {"spectral/penalty": penalty, "spectral/above_target": 0.0}
    if names:
        sigma, residual, target = np.array([by_name[name] for name in names]).T
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(residual == 0, 0, residual / sigma)
            found |= {
                "spectral/sigma_max": float(sigma.max()),
                "spectral/sigma_median": float(np.median(sigma)),
                "spectral/sigma_min": float(sigma.min()),
                "spectral/residual_max": float(ratio.max()),
                "spectral/above_target": float((sigma - residual > target).sum()),
            }
    if per_layer:
        found |= {f"spectral/sigma/{name}": by_name[name][0] for name in names}
        found |= {f"spectral/residual/{name}": by_name[name][1] for name in names}
    return found


def _dtype(tensors) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32

"""The vectors in a regularizer's state_dict, checked before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from .buckets import orthonormal
from .selection import Matrix


class LoadResult(NamedTuple):
    """What a state_dict did not have, and what of it was not used."""

    missing: list[str]
    unexpected: list[str]


def vectors_of(
    state: Mapping[str, Any], matrices: Sequence[Matrix]
) -> tuple[dict[str, torch.Tensor], LoadResult]:
    """Return orthonormal vectors [r, N] by name of the matrix, and which names did not match.

    Raises:
        TypeError: not a dict with "vectors".
        ValueError: vectors of the wrong shape, or zero, or not finite.
    """
    if not isinstance(state, Mapping) or not isinstance(state.get("vectors"), Mapping):
        raise TypeError('state: accepted is the dict that state_dict() returns, with "vectors"')
    by_name = {matrix.name: matrix for matrix in matrices}
    given = state["vectors"]
    found = {name: _checked(by_name[name], v) for name, v in given.items() if name in by_name}
    missing = [name for name in by_name if name not in found]
    return found, LoadResult(missing, [name for name in given if name not in by_name])


def _checked(matrix: Matrix, v) -> torch.Tensor:
    rows, cols = matrix.shape_now()
    shape = tuple(getattr(v, "shape", ()))
    if not isinstance(v, torch.Tensor) or len(shape) != 2 or shape[0] < 1 or shape[1] != cols:
        raise ValueError(
            f"state: the vectors of {matrix.name!r} have shape {shape}; accepted is (1, {cols}), "
            f"or a row for each of several, for this matrix of {rows} x {cols}"
        )
    wide = v.detach().to(torch.promote_types(v.dtype, torch.float32))
    norms = torch.linalg.vector_norm(wide.double(), dim=1)
    if not torch.isfinite(norms).all() or (norms[0] == 0 and v.numel()):
        raise ValueError(f"state: the vectors of {matrix.name!r} have norms {norms.tolist()}")
    # Vectors that are orthonormal already keep their bits; those beyond N are zero.
    gram = wide.double() @ wide.double().mT
    off = (gram - torch.diag((norms > 0).to(gram))).abs().max()
    return wide.clone() if off < 2e-6 else orthonormal(wide)

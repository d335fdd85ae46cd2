"""Vectors of a loaded state_dict, checked before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..backends import operators
from ..backends.formulas import orthonormal
from ..selection.arguments import expected
from ..selection.matrices import Matrix
from ..tables.device import wide


class LoadResult(NamedTuple):
    """Names missing from a loaded state_dict, and names in it that were not used."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class Loaded(NamedTuple):
    """Vectors of a loaded state_dict by name of the matrix, and the names that did not match."""

    vectors: dict[str, torch.Tensor]
    left: dict[str, torch.Tensor]
    result: LoadResult


NOTHING_LOADED = Loaded({}, {}, LoadResult([], []))


def vectors_of(state: Mapping[str, Any], matrices: Sequence[Matrix]) -> Loaded:
    """Return orthonormal vectors [r, N] and left vectors [r, M] by matrix name.

    Raises:
        TypeError: not a dict with "vectors".
        ValueError: vectors of the wrong shape, or zero, or not finite.
    """
    if not isinstance(state, Mapping) or not isinstance(state.get("vectors"), Mapping):
        wanted = 'the dict that state_dict() returns, with "vectors"'
        raise TypeError(expected("state", wanted, state))
    by_name = {matrix.name: matrix for matrix in matrices}
    right, left = (state.get(key, {}) for key in ("vectors", "left"))
    given = list(dict.fromkeys((*right, *left)))
    # Right vectors fit a matrix that has got other rows, left ones then do not.
    left = {n: v for n, v in left.items() if n not in right or _fits(by_name.get(n), v)}
    # Vectors of a flattened kernel do not fit its operator.
    right, left = (
        {n: v for n, v in own.items() if n not in by_name or _is_alike(by_name[n], v)}
        for own in (right, left)
    )
    found, found_left = (
        {name: _checked(by_name[name], v, side) for name, v in own.items() if name in by_name}
        for own, side in ((right, 1), (left, 0))
    )
    missing = [name for name in by_name if name not in found and name not in found_left]
    unexpected = [name for name in given if name not in by_name]
    return Loaded(found, found_left, LoadResult(missing, unexpected))


def with_initial(
    result: LoadResult, initial: Mapping[str, Any], wanted: Sequence[str], known: Sequence[str]
) -> LoadResult:
    """Return ``result`` with the names whose initial targets are missing, or were not used.

    Args:
        result: about the vectors.
        initial: the loaded initial targets by name.
        wanted: names of the entries with the target "initial".
        known: names of all entries.
    """
    missing = [name for name in wanted if name not in initial]
    unexpected = [name for name in initial if name not in known]
    return LoadResult(
        list(dict.fromkeys((*result.missing_keys, *missing))),
        list(dict.fromkeys((*result.unexpected_keys, *unexpected))),
    )


def _fits(matrix: Matrix | None, left) -> bool:
    """Return whether left vectors [r, M] have as many elements as ``matrix`` has rows."""
    return matrix is None or tuple(getattr(left, "shape", ()))[1:] == (matrix.shape_now()[0],)


def _is_alike(matrix: Matrix, v) -> bool:
    """Return whether ``v`` may be of ``matrix``: [2, N] of an operator."""
    return matrix.periods is None or tuple(getattr(v, "shape", ()))[:1] == (2,)


def _checked(matrix: Matrix, v, side: int) -> torch.Tensor:
    """Return right (``side`` 1) or left vectors (0) of ``matrix``, orthonormal.

    Those of an operator are the nearest that it can have.
    """
    sizes = matrix.shape_now()
    shape, n = tuple(getattr(v, "shape", ())), sizes[side]
    if not isinstance(v, torch.Tensor) or len(shape) != 2 or shape[0] < 1 or shape[1] != n:
        kind = "vectors" if side else "left vectors"
        raise ValueError(
            f"state: {kind} of {matrix.name!r}: expected shape "
            f"({1 if matrix.periods is None else 2}, {n}), or one row per vector, for a matrix of "
            f"{sizes[0]} x {sizes[1]}, got {shape}"
        )
    found = v.detach().to(torch.promote_types(v.dtype, torch.float32))
    norms = torch.linalg.vector_norm(wide(found), dim=1)
    if not torch.isfinite(norms).all() or (norms[0] == 0 and v.numel()):
        raise ValueError(
            f"state: vectors of {matrix.name!r}: expected finite ones, and the first not zero, got "
            f"norms {norms.tolist()}"
        )
    if matrix.periods is not None:
        return _of_operator(matrix, found)
    # Vectors that are already orthonormal keep their bits; those beyond N are zero.
    gram = wide(found) @ wide(found).mT
    off = (gram - torch.diag((norms > 0).to(gram))).abs().max()
    return found.clone() if off < 2e-6 else orthonormal(found)


def _of_operator(matrix: Matrix, v: torch.Tensor) -> torch.Tensor:
    """Return ``v`` [2, N], or if it is no vector of an operator, what is nearest to it."""
    shape = tuple(matrix.of(matrix.ref.get()).shape)
    taps = operators.taps_of(shape[2:], matrix.periods, v.device)
    found = operators.projected(v.view(2, shape[1], -1), taps)
    if found is None:
        raise ValueError(
            f"state: vectors of {matrix.name!r}: expected some with a part that the operator has, "
            "got none"
        )
    found = found.flatten(1).to(v.dtype)
    return v.clone() if (found - v).abs().max() < 2e-6 else found

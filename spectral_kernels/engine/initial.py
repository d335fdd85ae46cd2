"""Initial targets: what the entries of a selection are held at with the target "initial".

A float for a matrix (sigma_1) and a shift (its norm); a tensor [n] on the CPU for a gain (the
absolute values of its elements) and for rows (their norms), of the whole parameter if it is
sharded, in float32 (float64 for float64 parameters).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from ..selection.arguments import check_number, expected
from ..selection.matrices import Elementwise, Selection
from ..sharding.shards import whole_of
from ..tables.device import wide

Initial = float | torch.Tensor


def measured(entry: Elementwise, parameter: torch.Tensor) -> Initial:
    """Return the initial target of ``entry`` of ``parameter``, a plain tensor or a DTensor."""
    with torch.inference_mode(False), torch.no_grad():  # the numbers outlive an inference mode
        x = wide(whole_of(parameter.detach()))
        if entry.kind == "shift":
            return float(torch.linalg.vector_norm(x))
        found = x.abs().flatten() if entry.kind == "gain" else row_norms(entry, x)
        narrow = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        return found.to(device="cpu", dtype=narrow)


def row_norms(entry: Elementwise, parameter: torch.Tensor) -> torch.Tensor:
    """Return the Euclidean norms of the rows of ``parameter``, [n_rows], wide."""
    if not parameter.numel():
        return wide(parameter.new_empty(0))
    rows = wide(parameter.reshape(entry.n_targets(parameter.numel()), -1))
    return torch.linalg.vector_norm(rows, dim=1)


def checked_initial(initial: Mapping[str, Initial], selection: Selection) -> dict[str, Initial]:
    """Return the initial targets of a loaded state_dict by name of the entry.

    Raises:
        TypeError: no mapping; one of the wrong kind: neither a number nor a tensor.
        ValueError: one of another size, not finite, or below 0.
    """
    if not isinstance(initial, Mapping):
        wanted = "a mapping from names to numbers and tensors"
        raise TypeError(expected("state: initial targets", wanted, initial))
    several = {x.name: x for x in selection.elementwise if x.kind != "shift"}
    found: dict[str, Initial] = {}
    for name, value in initial.items():
        what = f"state: initial target of {name!r}"
        if name in several:
            found[name] = _checked_numbers(what, value, several[name])
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number and not (isinstance(value, torch.Tensor) and value.numel() == 1):
            raise TypeError(expected(what, "a number", value))
        found[name] = check_number(what, float(value))
    return found


def _checked_numbers(what: str, value, entry: Elementwise) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise TypeError(expected(what, "a tensor", value))
    n = entry.n_targets(entry.ref.get().numel())
    if tuple(value.shape) != (n,):
        raise ValueError(f"{what}: expected shape ({n},), got {tuple(value.shape)}")
    numbers = value.detach().cpu().clone()
    numbers = numbers.to(torch.promote_types(numbers.dtype, torch.float32))
    if not bool(torch.isfinite(numbers).all()) or bool((numbers < 0).any()):
        raise ValueError(f"{what}: expected finite numbers >= 0, got others")
    return numbers


def copied(initial: Mapping[str, Initial]) -> dict[str, Initial]:
    """Return copies."""
    return {n: x.clone() if isinstance(x, torch.Tensor) else x for n, x in initial.items()}


def largest(target: Initial) -> float:
    """Return the largest number of a target; nan if one of them is."""
    if not isinstance(target, torch.Tensor):
        return target
    return float(target.max()) if target.numel() else math.nan

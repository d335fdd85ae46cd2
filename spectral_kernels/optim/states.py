"""Checks of the state of a parameter, moments and step count, in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..selection.arguments import check_number
from ..sharding import shards


def check_state(name: str, p: torch.Tensor, state: Mapping[str, Any], moments: Sequence[str]):
    """Check moments and step count of a loaded state of parameter ``p``, called ``name``.

    Raises:
        TypeError: one that is not a tensor or, for the step count, a number.
        ValueError: another shape than the parameter's, or values that no optimizer has written.
    """
    for key in moments:
        kept = state.get(key)
        if kept is None:
            continue
        what = f"state_dict: {key} of parameter {name!r}"
        if not isinstance(kept, torch.Tensor):
            raise TypeError(f"{what} is a {type(kept).__name__}; accepted is a tensor")
        if kept.shape != p.shape:
            raise ValueError(
                f"{what} has shape {tuple(kept.shape)}; accepted is that of the parameter, "
                f"{tuple(p.shape)}"
            )
        values = shards.local_of(kept)
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"{what} has values that are not finite; accepted are finite ones")
        if key == "exp_avg_sq" and bool((values < 0).any()):
            raise ValueError(f"{what} has values below 0; accepted are means of squares")
    step = state.get("step")
    if step is not None:
        is_number = isinstance(step, int | float) and not isinstance(step, bool)
        if not is_number and not (isinstance(step, torch.Tensor) and step.numel() == 1):
            raise TypeError(
                f"state_dict: step of parameter {name!r} is a {type(step).__name__}; accepted is a "
                "number"
            )
        check_number(f"state_dict: step of parameter {name!r}", float(step))

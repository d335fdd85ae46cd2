"""The state of a parameter, moments and step count: in a step, and checked in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..selection.arguments import check_number, expected, shown
from ..sharding import shards
from ..tables.layout import same_strides


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
            raise TypeError(expected(what, "a tensor", kept))
        if kept.shape != p.shape:
            raise ValueError(
                f"{what}: expected the parameter's shape {tuple(p.shape)}, got {tuple(kept.shape)}"
            )
        values = shards.local_of(kept)
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"{what}: expected finite values, got some that are not")
        if key == "exp_avg_sq" and bool((values < 0).any()):
            raise ValueError(f"{what}: expected means of squares, got some below 0")
    step = state.get("step")
    if step is not None:
        what = f"state_dict: step of parameter {name!r}"
        is_number = isinstance(step, int | float) and not isinstance(step, bool)
        if not is_number and not (isinstance(step, torch.Tensor) and step.numel() == 1):
            raise TypeError(expected(what, "a number", step))
        check_number(what, float(step))


def state_of(
    name: str,
    p: torch.Tensor,
    state: Mapping[str, Any],
    moments: Sequence[str],
    names: Sequence[str],
    dtype: torch.dtype,
    counts_steps: bool,
) -> dict[str, Any]:
    """Return moments and step count of parameter ``p``, called ``name``: those in ``state`` or new.

    Args:
        name: of the parameter.
        p: the parameter.
        state: what the optimizer has of it.
        moments: names of the rule's moments.
        names: those of them that a step keeps.
        dtype: of a moment; others are converted.
        counts_steps: whether torch's counterpart keeps a step count.

    Raises:
        ValueError: some of them are missing, or a moment does not have the parameter's shape.
    """
    found: dict[str, Any] = {}
    kept = {key: state[key] for key in names if state.get(key) is not None}
    step = state.get("step")
    is_partial = len(kept) not in (0, len(names))
    if is_partial or (counts_steps and bool(kept) != (step is not None)):
        missing = [key for key in (*names, "step") if state.get(key) is None]
        raise ValueError(
            f"state of parameter {name!r}: expected all of {', '.join((*names, 'step'))}, or none "
            f"to begin anew, got a state without {', '.join(missing)}"
        )
    for key in names:
        moment = torch.zeros_like(p, dtype=dtype, requires_grad=False)
        found[key] = _fitting(name, key, kept[key], moment) if key in kept else moment
    if not names:  # those of an earlier momentum stay, as in torch
        found |= {key: state.get(key) for key in moments}
    if step is None or (names and not kept):
        step = float(bool(kept))  # torch.optim.SGD does not count steps
    return {**found, "step": step}


def _fitting(name: str, key: str, kept, like: torch.Tensor) -> torch.Tensor:
    """Return the moment ``kept`` if it is laid out like ``like``, or else a copy that is."""
    if not isinstance(kept, torch.Tensor) or kept.shape != like.shape:
        raise ValueError(
            f"{key} of parameter {name!r}: expected a tensor of the parameter's shape "
            f"{tuple(like.shape)}, got {shown(kept)} (after a change of shape, remove "
            "optimizer.state[parameter] to begin anew)"
        )
    fits = kept.dtype == like.dtype and same_strides(kept, like)
    same = type(kept) is type(like) and fits and kept.device == like.device
    return kept if same else like.copy_(kept)

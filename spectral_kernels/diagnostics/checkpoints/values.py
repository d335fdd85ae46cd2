"""Numbers, shapes, dtypes and attributes from the records of a pickle."""

from __future__ import annotations

from typing import Any

import torch

from .pickles import Global, PickleError, Record

_MOST_DIMS = 64


def count_of(value: Any) -> int:
    """Return a number of elements.

    Raises:
        PickleError: it is no integer of at least 0.
    """
    if type(value) is not int or value < 0:
        raise PickleError("a count is no integer of at least 0")
    return value


def shape_of(value: Any) -> tuple[int, ...]:
    """Return a shape from a tuple, or a Record of torch.Size.

    Raises:
        PickleError: it is none.
    """
    if isinstance(value, Record) and value.kind == "torch.Size":
        (value,) = value.arguments
    if not isinstance(value, tuple | list) or len(value) > _MOST_DIMS:
        raise PickleError("a shape is no tuple of integers")
    return tuple(count_of(n) for n in value)


def dtype_of(value: Any) -> str:
    """Return the name of a dtype from a Global such as torch.float32.

    Raises:
        PickleError: torch has none of this name.
    """
    name = value.name.removeprefix("torch.") if isinstance(value, Global) else ""
    if not isinstance(getattr(torch, name, None), torch.dtype):
        raise PickleError("a dtype is none of torch's")
    return name


def attributes(state: Any) -> dict:
    """Return attributes from a state: a dict, or a pair of dicts where there are slots."""
    found: dict = {}
    for part in state if isinstance(state, tuple) else (state,):
        if isinstance(part, dict):
            found.update(part)
    return found

"""Checks of arguments that several files share."""

from __future__ import annotations

import math
from collections.abc import Sequence


def number(argument: str, value, at_least: float = 0.0, words: Sequence[str] = ()) -> float:
    """Return ``value`` if it is a finite number >= ``at_least``; TypeError or ValueError if not."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        accepted = "".join(f" or {word!r}" for word in words)
        raise TypeError(f"{argument}: got {value!r}; accepted is a number{accepted}")
    if not math.isfinite(value) or value < at_least:
        raise ValueError(f"{argument}: got {value!r}; accepted are finite numbers >= {at_least}")
    return value


def count(argument: str, value, at_least: int, words: Sequence[str] = ()) -> int:
    """Return ``value`` if it is an integer >= ``at_least``; TypeError or ValueError if not."""
    if isinstance(value, bool) or not isinstance(value, int):
        accepted = "".join(f" or {word!r}" for word in words)
        raise TypeError(f"{argument}: got {value!r}; accepted is an integer{accepted}")
    if value < at_least:
        raise ValueError(f"{argument}: got {value!r}; accepted are integers >= {at_least}")
    return value


def one_of(argument: str, value, accepted: Sequence[int]) -> int:
    """Return ``value`` if it is one of ``accepted``; TypeError or ValueError if not."""
    listed = ", ".join(map(str, accepted))
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument}: got {value!r}; accepted are {listed}")
    if value not in accepted:
        raise ValueError(f"{argument}: got {value!r}; accepted are {listed}")
    return value

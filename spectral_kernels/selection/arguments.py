"""Checks of arguments, name patterns, and numbers by name pattern."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .matrices import Selection


def check_number(argument: str, value, at_least: float = 0.0, words: Sequence[str] = ()) -> float:
    """Return ``value`` if it is a finite number >= ``at_least``; TypeError or ValueError if not."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        accepted = "".join(f" or {word!r}" for word in words)
        raise TypeError(f"{argument}: got {value!r}; accepted is a number{accepted}")
    if not math.isfinite(value) or value < at_least:
        raise ValueError(f"{argument}: got {value!r}; accepted are finite numbers >= {at_least}")
    return value


def check_count(argument: str, value, at_least: int, words: Sequence[str] = ()) -> int:
    """Return ``value`` if it is an integer >= ``at_least``; TypeError or ValueError if not."""
    if isinstance(value, bool) or not isinstance(value, int):
        accepted = "".join(f" or {word!r}" for word in words)
        raise TypeError(f"{argument}: got {value!r}; accepted is an integer{accepted}")
    if value < at_least:
        raise ValueError(f"{argument}: got {value!r}; accepted are integers >= {at_least}")
    return value


def check_choice(argument: str, value, accepted: Sequence[int]) -> int:
    """Return ``value`` if it is one of ``accepted``; TypeError or ValueError if not."""
    listed = ", ".join(map(str, accepted))
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument}: got {value!r}; accepted are {listed}")
    if value not in accepted:
        raise ValueError(f"{argument}: got {value!r}; accepted are {listed}")
    return value


def match(name: str, patterns: Iterable[str]) -> str | None:
    """Return the first glob pattern that ``name`` matches, or None."""
    return match_any([name], patterns)


def match_any(names: Sequence[str], patterns: Iterable[str]) -> str | None:
    """Return the first glob pattern that one of the ``names`` of a tensor matches, or None."""
    return next((p for p in patterns if any(fnmatch.fnmatchcase(n, p) for n in names)), None)


def check_patterns(argument: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    """Raise ValueError if a pattern matches no parameter, which is most likely a typing error."""
    names = list(names)
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise ValueError(f"{argument}: {pattern!r} matches no parameter; there are: {shown}")


def check_pattern_list(argument: str, patterns: Sequence[str] | None) -> list[str] | None:
    """Return ``patterns`` as a list, or None; TypeError if it is not a list of strings."""
    if patterns is None:
        return None
    found = None
    if isinstance(patterns, Iterable) and not isinstance(patterns, str):
        found = list(patterns)
    if found is None or not all(isinstance(p, str) for p in found):
        raise TypeError(f"{argument}: got {patterns!r}; accepted is a list of glob patterns")
    return found


def by_name(
    argument: str, value, selection: Selection, words: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the value of ``argument`` for every matrix and elementwise parameter by name.

    Raises:
        TypeError: neither a number, one of ``words``, nor a mapping to these.
        ValueError: a number below 0, a pattern without a match, a name that no pattern matches.
    """
    entries = [*selection.matrices, *selection.elementwise]
    if not isinstance(value, Mapping):
        if value not in words:
            check_number(argument, value, at_least=0, words=words)
        return {entry.name: value for entry in entries}
    owned = [entry.ref.name for entry in entries]
    check_patterns(argument, value, [*owned, *(name for name, _ in selection.skipped)])
    found = {}
    for entry, name in zip(entries, owned, strict=True):
        pattern = match(name, value)
        if pattern is None:
            raise ValueError(
                f"{argument}: no pattern matches {name!r}; end the mapping with a '*' entry"
            )
        if value[pattern] not in words:
            check_number(f"{argument}[{pattern!r}]", value[pattern], at_least=0, words=words)
        found[entry.name] = value[pattern]
    return found

"""Arguments that may be one number for everything or a mapping from name patterns to numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .arguments import number
from .selection import Selection, check_patterns, match


def by_name(
    argument: str, value, selection: Selection, words: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the value of ``argument`` for every matrix and vector by name.

    Raises:
        TypeError: neither a number, one of ``words``, nor a mapping to these.
        ValueError: a number below 0, a pattern that matches nothing, a name that none matches.
    """
    entries = [*selection.matrices, *selection.vectors]
    if not isinstance(value, Mapping):
        if value not in words:
            number(argument, value, at_least=0, words=words)
        return {entry.name: value for entry in entries}
    owned = [entry.owner.name for entry in entries]
    check_patterns(argument, value, [*owned, *(name for name, _ in selection.skipped)])
    found = {}
    for entry, name in zip(entries, owned, strict=True):
        pattern = match(name, value)
        if pattern is None:
            raise ValueError(
                f"{argument}: no pattern matches {name!r}; end the mapping with a '*' entry"
            )
        if value[pattern] not in words:
            number(f"{argument}[{pattern!r}]", value[pattern], at_least=0, words=words)
        found[entry.name] = value[pattern]
    return found

"""A selection as text: what is regularized by role and view, and what is not by reason."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from .matrices import Selection

_PULLED = {"shift": "pulled to 0", "gain": "every element pulled to 1"}


def listing(selection: Selection) -> list[str]:
    """Return lines of text with every parameter of a selection.

    Parameters that differ in the numbers of their names alone share a line, which counts them.
    """
    matrices = selection.matrices
    lines = [_counted(matrices, "matrix", "matrices")]
    lines += _grouped(
        (m.view or "rows x columns", m.name, f"{m.shape[0]} x {m.shape[1]}") for m in matrices
    )
    rows = [entry for entry in selection.elementwise if entry.kind == "rows"]
    if rows:
        lines.append(_counted(rows, "parameter of rows", "parameters of rows"))
        lines += _grouped((entry.view, entry.name, f"rows of {entry.length}") for entry in rows)
    rest = [entry for entry in selection.elementwise if entry.kind != "rows"]
    if rest:
        lines.append(_counted(rest, "elementwise parameter", "elementwise parameters"))
        lines += _grouped((_PULLED[entry.kind], entry.name, "") for entry in rest)
    if selection.skipped:
        lines.append(f"{len(selection.skipped)} skipped")
        lines += _grouped((reason, name, "") for name, reason in selection.skipped)
    return lines


def _counted(entries: Sequence, one: str, many: str) -> str:
    return f"{len(entries)} {one if len(entries) == 1 else many}"


def _grouped(entries: Iterable[tuple[str, str, str]]) -> list[str]:
    """Return lines of (heading, name, size) under their headings, similar ones in one line."""
    found: dict[str, dict[tuple[str, str], list[str]]] = {}
    for heading, name, size in entries:
        key = re.sub(r"\d+", "*", name), size
        found.setdefault(heading, {}).setdefault(key, []).append(name)
    lines = []
    for heading, kinds in found.items():
        width = max(len(size) for _, size in kinds)
        lines.append(f"  {heading}")
        for (_, size), names in kinds.items():
            count = f"  ({len(names)})" if len(names) > 1 else ""
            lines.append(f"    {size:>{width}}{'  ' if width else ''}{_common(names)}{count}")
    return lines


def _common(names: Sequence[str]) -> str:
    """Return what names of one pattern have in common: h.0.w, h.1.w and h.3.w are h.{0,1,3}.w."""
    if len(names) == 1:
        return names[0]
    columns = zip(*(re.split(r"(\d+)", name) for name in names), strict=True)
    parts = []
    for column in columns:
        different = list(dict.fromkeys(column))
        parts.append(different[0] if len(different) == 1 else _range(different))
    return "".join(parts)


def _range(numbers: Sequence[str]) -> str:
    """Return numbers as text: 0-5 where they follow each other, or else the first few."""
    values = sorted(map(int, numbers))
    if values == list(range(values[0], values[-1] + 1)):
        return f"{{{values[0]}-{values[-1]}}}"
    shown = [str(x) for x in values[:4]] + ["..."] * (len(values) > 4)
    return "{" + ",".join(shown) + "}"

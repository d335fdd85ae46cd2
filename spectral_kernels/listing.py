"""What has been selected, as text."""

from __future__ import annotations

from .selection import Selection

_PULLED = {"shift": "pulled to 0", "gain": "every element pulled to 1"}


def listing(selection: Selection) -> list[str]:
    """Return lines with every matrix and vector, and what was skipped and why."""
    entries = [*selection.matrices, *selection.vectors]
    width = max((len(entry.name) for entry in entries), default=0)
    lines = [f"{len(selection.matrices)} matrices"]
    for matrix in selection.matrices:
        shape = f"{matrix.shape[0]} x {matrix.shape[1]}"
        lines.append(f"  {matrix.name:{width}}  {shape:>13}  {matrix.view}".rstrip())
    if selection.vectors:
        lines.append(f"{len(selection.vectors)} vectors")
        lines += [f"  {v.name:{width}}  {_PULLED[v.kind]}" for v in selection.vectors]
    if selection.skipped:
        lines.append(f"{len(selection.skipped)} skipped")
        lines += [f"  {name:{width}}  {why}" for name, why in selection.skipped]
    return lines

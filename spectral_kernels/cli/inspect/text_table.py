"""A table as text: columns that are as wide as their cells, names that break at dots."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

_LEAST_WIDTH = 16  # of names
_GAP = "   "


@dataclass
class TextTable:
    """Cells of one or several lines; the first column holds names."""

    heads: Sequence[str]
    is_right: Sequence[bool]
    """Whether a column holds numbers."""
    rows: list[list[str]] = field(default_factory=list)
    bad: set[int] = field(default_factory=set)
    """Rows that are to catch the eye."""
    gap: str = _GAP
    """Between columns."""

    def widths(self) -> list[int]:
        """Return the width of every column."""
        columns = zip(self.heads, *self.rows, strict=True)
        return [max(map(_width, "\n".join(cells).split("\n"))) for cells in columns]

    @property
    def width(self) -> int:
        """Number of character cells of a line."""
        return sum(self.widths()) + len(self.gap) * (len(self.heads) - 1) + 2

    def fit(self, width: int) -> None:
        """Break names into lines, so that a line of the table has ``width`` cells if possible."""
        if (excess := self.width - width) > 0:
            least = max(self.widths()[0] - excess, _LEAST_WIDTH)
            self.rows = [[_folded(name, least), *others] for name, *others in self.rows]

    def lines(self, rule: str, bold: str, plain: str) -> Iterator[str]:
        """Yield the lines; ``bold`` and ``plain`` stand around those of bad rows."""
        widths = self.widths()
        high = max(head.count("\n") for head in self.heads)
        heads = ["\n" * (high - head.count("\n")) + head for head in self.heads]
        yield ""
        yield from self._row(heads, widths)
        yield f" {rule * (sum(widths) + len(self.gap) * (len(widths) - 1))}"
        for number, row in enumerate(self.rows):
            for line in self._row(row, widths):
                yield f"{bold}{line}{plain}" if number in self.bad else line
        yield ""

    def _row(self, cells: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
        columns = [cell.split("\n") for cell in cells]
        for parts in itertools.zip_longest(*columns, fillvalue=""):
            padded = []
            for part, width, is_right in zip(parts, widths, self.is_right, strict=True):
                blank = " " * (width - _width(part))
                padded.append(blank + part if is_right else part + blank)
            yield f" {self.gap.join(padded)}".rstrip()


def _width(text: str) -> int:
    """Return the number of cells that a text without line breaks takes on a terminal."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def _folded(name: str, width: int) -> str:
    """Break a name that is too long into lines: after dots, and inside what is still too long."""
    if _width(name) <= width:
        return name
    lines = [""]
    for piece in re.findall(r"[^.]*\.|[^.]+$", name):
        if lines[-1].strip() and _width(lines[-1] + piece) > width:
            lines.append("  ")
        for character in piece:
            if _width(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return "\n".join(lines)


def number(value: float, digits: int = 3) -> str:
    """Return a number with so many digits after the point, or as a power of ten."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    small = 10.0**-digits
    return f"{value:.{digits}f}" if small <= abs(value) < 1e6 else f"{value:.2e}"


def condition(value: float) -> str:
    """Return a condition number."""
    return f"{value:.1f}" if value < 100 else f"{value:.1e}"


def percent(value: float) -> str:
    """Return a change in percent, with its sign."""
    if math.isnan(value):
        return "nan"
    return f"{value:+.1f} %" if not abs(value) >= 1e5 else f"{value:+.1e} %"

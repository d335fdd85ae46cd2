"""The results of ``spectral-kernels inspect`` on the terminal: a table, and lines below it."""

from __future__ import annotations

import collections
import itertools
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ...diagnostics.checkpoints import Skipped
from ..console import tell
from .base import EPSILON, VECTORS
from .report import Result, size
from .rows import MatrixRow, change
from .stacks import Stack, summarized
from .values import RTOL

_FEW = 3  # names shown of a long list
_LEAST_WIDTH = 16  # of names
_GAP = "   "


def show(result: Result) -> None:
    """Print the table and what it leaves out."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    table = _base_table(result) if result.has_base else _table(result)
    # Output that is no terminal has a line per matrix, for grep and files.
    is_folded = sys.stdout.isatty() or "COLUMNS" in os.environ
    if is_folded and table.width > console.width and result.is_comparison:
        table = _table(result, has_ranks=False)
    tables = [table]
    if not result.is_comparison and result.measured[0].attention:
        tables.append(_attention_table(result))
    is_coloured = console.color_system not in (None, "windows") and not console.no_color
    bold, plain = ("\x1b[1;31m", "\x1b[0m") if is_coloured else ("", "")
    line = "─" if console.encoding.startswith("utf") else "-"
    for one in tables:
        if is_folded:
            one.fit(console.width)
        print("\n".join(one.lines(line, bold, plain)))
    for text in notes(result):
        tell(text)


@dataclass
class _Table:
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


def _table(result: Result, has_ranks: bool = True) -> _Table:
    if result.n_values and not result.is_comparison:
        return _spectrum_table(result)
    has_dtypes = len({row.dtype for row, _ in result.pairs}) > 1 and not result.is_comparison
    has_operators = result.has_operators
    texts = ["matrix", "shape"] + ["dtype"] * has_dtypes
    if result.is_comparison:
        numbers = ["sigma_1,\nfirst", "other", "change"]
        numbers += ["stable rank,\nfirst", "other"] if has_ranks else []
    else:
        numbers = ["sigma_1", "stable\nrank", "||W||_F", "sigma_1\n/ usual"]
        numbers += ["as an\noperator"] * has_operators
    lines = list(result.pairs if result.has_all_experts else summarized(result.pairs))
    has_stacks = any(isinstance(line, Stack) for line in lines)
    if has_stacks:
        numbers += [
            "median\nchange" if result.is_comparison else "median\nof all",
            "shown:\nexpert",
        ]
    table = _Table([*texts, *numbers], [False] * len(texts) + [True] * len(numbers))
    for line in lines:
        stack = line if isinstance(line, Stack) else None
        one, other = line.shown if isinstance(line, Stack) else line
        cells = [one.name if stack is None else stack.name, size(one.shape)]
        if other is None:
            cells += [one.dtype] if has_dtypes else []
            cells += [_number(one.sigma), _number(one.stable_rank, 1), _number(one.norm, 2),
                      _number(one.ratio, 2)]  # fmt: skip
            if has_operators:
                cells.append("" if one.operator is None else _number(one.operator))
        else:
            if other.shape != one.shape:
                cells[1] += f"\n-> {size(other.shape)}"
            cells += [_number(one.sigma), _number(other.sigma),
                      _percent(change(one.sigma, other.sigma))]  # fmt: skip
            if has_ranks:
                cells += [_number(one.stable_rank, 1), _number(other.stable_rank, 1)]
        if has_stacks:
            cells += _stack_cells(stack, other is not None)
        if not all(math.isfinite(row.sigma) for row in (one, other) if row is not None):
            table.bad.add(len(table.rows))
        table.rows.append(cells)
    return table


def _base_table(result: Result) -> _Table:
    """Return the table of --base: what was added to each matrix."""
    numbers = ["sigma_1\nof base", "of the\nsum", "of the\nupdate", "||update||\n/ ||base||"]
    numbers.append(f"intruders\nof {VECTORS}")
    table = _Table(["matrix", "shape", *numbers], [False] * 2 + [True] * len(numbers))
    for row, _ in result.pairs:
        added = row.added
        cells = [row.name, size(row.shape)]
        if added is None:
            cells += [""] * len(numbers)
        else:
            count = "-" if added.intruders is None else str(added.intruders)
            cells += [*map(_number, (added.base_sigma, added.sum_sigma, added.update_sigma)),
                      _number(added.relative, 4), count]  # fmt: skip
            if not math.isfinite(added.sum_sigma):
                table.bad.add(len(table.rows))
        table.rows.append(cells)
    return table


def _spectrum_table(result: Result) -> _Table:
    """Return the table of --values, which leaves out what would make it too wide."""
    n = result.n_values
    more = [] if n == 1 else ["sigma_2"] if n == 2 else [f"sigma_2 ..\nsigma_{n}"]
    heads = ["sigma_1", *more, "stable\nrank", "eff.\nrank", "condition", "alpha", "D",
             "above\nedge"]  # fmt: skip
    heads += ["as an\noperator"] * result.has_operators
    table = _Table(["matrix", "shape", *heads], [False] * 2 + [True] * len(heads), gap="  ")
    for row, _ in result.pairs:
        cells = [row.name, size(row.shape), _number(row.sigma)]
        if more:
            ends = row.values[1:2] + row.values[2:][-1:]
            cells.append(" .. ".join(_number(value, 2) for value in ends))
        cells.append(_number(row.stable_rank, 1))
        if (full := row.spectrum) is None:
            cells += [""] * 5
        else:
            cells += [_number(full.effective_rank, 1), _condition(full.condition),
                      _number(full.alpha, 2), _number(full.alpha_distance, 2),
                      str(full.n_above_edge)]  # fmt: skip
        if result.has_operators:
            cells.append("" if row.operator is None else _number(row.operator))
        if not math.isfinite(row.sigma):
            table.bad.add(len(table.rows))
        table.rows.append(cells)
    return table


def _base_lines(result: Result) -> list[str]:
    first = result.measured[0]
    found = [row.added for row in first.rows if row.added is not None]
    lines = [f"base: {first.base}, which has {len(found)} of the matrices"]
    for skipped in _grouped(first.unmatched):
        lines.append(f"not in the base, {skipped}")
    for why, count in collections.Counter(a.reason for a in found if a.reason).items():
        lines.append(f"intruders not counted for {count} matrices: {why}")
    lines.append(
        f"intruders: of the first {VECTORS} left singular vectors of the sum, those whose cosine "
        f"with each one of the base is below {EPSILON:g} (arXiv 2410.21228)"
    )
    return lines


def _stack_cells(stack: Stack | None, is_comparison: bool) -> list[str]:
    """Return the median of a stack, and which of its matrices the line shows."""
    if stack is None:
        return ["", ""]
    median = (_percent if is_comparison else _number)(stack.median)
    return [median, f"{stack.number} of {stack.count}"]


def _attention_table(result: Result) -> _Table:
    rows = result.measured[0].attention
    if result.top is not None:  # nan before all others, as for matrices
        rows = sorted(rows, key=lambda row: (not math.isnan(row.largest), -row.largest))
        rows = rows[: result.top]
    heads = ["attention, sigma_1 of W_q^T W_k by head", "heads", "largest", "head", "median"]
    table = _Table(heads, [False] + [True] * 4)
    for number, row in enumerate(rows):
        if not math.isfinite(row.largest):
            table.bad.add(number)
        table.rows.append(
            [row.name, str(len(row.norms)), _number(row.largest), str(row.head),
             _number(row.median)]
        )  # fmt: skip
    return table


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


def notes(result: Result) -> list[str]:
    """Return what stands below the table: the checkpoints, and what was left out and why."""
    first = result.measured[0]
    shown = "" if len(result.pairs) == result.total else f", {len(result.pairs)} shown"
    if result.is_comparison:
        lines = [f"first: {first.path}", f"other: {result.measured[1].path}",
                 f"{result.total} matrices in both{shown}", *result.notes]  # fmt: skip
        for rows, one in zip(result.only, result.measured, strict=True):
            if rows:
                lines.append(f"only in {one.path}: {_some([row.name for row in rows])}")
    else:
        dtypes = ", ".join(sorted({row.dtype for row in first.rows}))
        numbers = sum(row.size for row in first.rows)
        lines = [
            f"{first.path}: {result.total} matrices{shown}, {_many(numbers)} weights, {dtypes}"
        ]
        if not first.rows:
            lines = [f"{first.path}: no matrices"]
    for one in result.measured:
        where = f" in {one.path}" if result.is_comparison else ""
        made = collections.Counter(row.made_by for row in one.rows if row.made_by)
        lines += [f"made{where} of stored tensors: {n} matrices, {how}" for how, n in made.items()]
        lines += [f"skipped{where}, {text}" for text in _grouped(one.skipped)]
        lines += [f"not divided{where}, {text}" for text in _grouped(one.whole)]
        if one.not_finite:
            some = _some([f"{bad.name} {bad.counts}" for bad in one.not_finite], "; ")
            lines.append(f"not finite{where}: {some}")
        if one.of_optimizer:
            lines.append(f"left out{where}: {one.of_optimizer} tensors of an optimizer's state "
                         "(--include '*' takes them too)")  # fmt: skip
        for why, layers in _by_reason(one.attention_left_out).items():
            lines.append(f"attention left out{where}, {why}: {_some([x.name for x in layers])}")
    if result.has_base:
        lines += _base_lines(result)
    if result.n_values and not result.is_comparison:
        lines += _about_spectra(first.rows)
    if result.pairs:
        usual = "" if result.is_comparison or result.has_base or result.n_values else (
            "; usual: of a fresh nn.Linear or convolution in torch"
        )  # fmt: skip
        lines.append(f"sigma_1 is within {100 * RTOL:g} % of the SVD's{usual}")
    return lines


def _by_reason(skipped: Sequence[Skipped]) -> dict[str, list[Skipped]]:
    reasons: dict[str, list[Skipped]] = {}
    for one in skipped:
        reasons.setdefault(one.reason, []).append(one)
    return reasons


def _grouped(skipped: Sequence[Skipped]) -> list[str]:
    """Return a text for each reason, with some of the names."""
    return [
        f"{why}: {_some([f'{e.name} {size(e.shape)}'.rstrip() for e in entries])}"
        for why, entries in _by_reason(skipped).items()
    ]


def _about_spectra(rows: Sequence[MatrixRow]) -> list[str]:
    """Say what the columns of --values are, and of which matrices they are not known."""
    large = [row.name for row in rows if row.spectrum is None and math.isfinite(row.sigma)]
    lines = []
    if large:
        lines.append(f"largest values only, shorter side above --spectrum-limit: {_some(large)}")
    if len(large) < len(rows):
        lines.append("alpha: exponent of the tail of sigma^2, D: distance of its fit; "
                     "edge: where the values of noise end")  # fmt: skip
    return lines


def _some(names: Sequence[str], between: str = ", ") -> str:
    more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
    return between.join(names[:_FEW]) + more


def _many(number: int) -> str:
    for unit, letter in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if number >= unit:
            return f"{number / unit:.1f}{letter}"
    return str(number)


def _number(value: float, digits: int = 3) -> str:
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    small = 10.0**-digits
    return f"{value:.{digits}f}" if small <= abs(value) < 1e6 else f"{value:.2e}"


def _condition(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.1e}"


def _percent(value: float) -> str:
    if math.isnan(value):
        return "nan"
    return f"{value:+.1f} %" if not abs(value) >= 1e5 else f"{value:+.1e} %"

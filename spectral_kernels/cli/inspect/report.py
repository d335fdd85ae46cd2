"""The results of ``spectral-kernels inspect``, as a table, JSON, CSV and curves."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .checkpoint import Entry
from .measure import RTOL, MatrixRow, Measured, change, ordered

_FEW = 3  # names shown of a long list
_LEAST_WIDTH = 16  # of names in a table
_COLUMNS: dict[str, Callable[[MatrixRow], object]] = {
    "name": lambda row: row.name,
    "shape": lambda row: list(row.shape),
    "dtype": lambda row: row.dtype,
    "sigma": lambda row: row.sigma,
    "stable_rank": lambda row: row.stable_rank,
    "norm": lambda row: row.norm,
    "usual_sigma": lambda row: row.usual,
    "ratio": lambda row: row.ratio,
}
_COMPARED = ("sigma", "stable_rank", "norm")


@dataclass(frozen=True)
class Result:
    """One checkpoint, or two side by side."""

    measured: Sequence[Measured]
    pairs: Sequence[tuple[MatrixRow, MatrixRow | None]]
    """Sorted and cut: each row, with the other checkpoint's if there are two."""
    total: int
    """Number of pairs before the cut."""
    only: Sequence[Sequence[MatrixRow]]
    """Rows that only the first, and only the second checkpoint has."""

    @classmethod
    def of(cls, measured: Sequence[Measured], sort: str | None, top: int | None) -> Result:
        """Match two checkpoints by name, sort and cut."""
        first = measured[0].rows
        if len(measured) == 1:
            return cls(measured, ordered([(row, None) for row in first], sort, top), len(first), ())
        others = {row.name: row for row in measured[1].rows}
        names = {row.name for row in first}
        both = [(row, others[row.name]) for row in first if row.name in others]
        only = (
            [row for row in first if row.name not in others],
            [row for row in measured[1].rows if row.name not in names],
        )
        return cls(measured, ordered(both, sort, top), len(both), only)

    @property
    def is_comparison(self) -> bool:
        """Whether there are two checkpoints."""
        return len(self.measured) > 1


def as_json(result: Result) -> str:
    """Return a JSON document; numbers that are not finite are null, since JSON has none."""
    rows = []
    for one, other in result.pairs:
        row = _values(one)
        if other is not None:
            row["other"] = {k: v for k, v in _values(other).items() if k != "name"}
            row["change_percent"] = {k: change(_COLUMNS[k](one), _COLUMNS[k](other))
                                     for k in _COMPARED}  # fmt: skip
        rows.append(row)
    document = {"checkpoint": str(result.measured[0].path)}
    if result.is_comparison:
        document["other"] = str(result.measured[1].path)
    document |= {"rtol": RTOL, "matrices": rows}
    if result.is_comparison:
        document["only_in_checkpoint"], document["only_in_other"] = (
            [_values(row) for row in rows] for rows in result.only
        )
    document["skipped"] = [
        {"checkpoint": str(one.path), "name": entry.name, "shape": list(entry.shape),
         "dtype": entry.dtype, "reason": why}
        for one in result.measured for entry, why in one.skipped
    ]  # fmt: skip
    return json.dumps(_without_nan(document), indent=1, allow_nan=False) + "\n"


def as_csv(result: Result) -> str:
    """Return CSV with a line per matrix, including those that only one checkpoint has."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = list(_COLUMNS)
    more = [f"other_{k}" for k in names[1:]] + [f"{k}_change_percent" for k in _COMPARED]
    writer.writerow(names + more if result.is_comparison else names)
    blank = [""] * (len(names) - 1)
    unchanged = [""] * len(_COMPARED)
    for one, other in result.pairs:
        cells = _cells(one)
        if other is not None:
            cells += _cells(other)[1:]
            cells += [change(_COLUMNS[k](one), _COLUMNS[k](other)) for k in _COMPARED]
        writer.writerow(cells)
    if result.is_comparison:
        for row in result.only[0]:
            writer.writerow([*_cells(row), *blank, *unchanged])
        for row in result.only[1]:
            writer.writerow([row.name, *blank, *_cells(row)[1:], *unchanged])
    return text.getvalue()


def _values(row: MatrixRow) -> dict:
    return {key: of(row) for key, of in _COLUMNS.items()}


def _cells(row: MatrixRow) -> list:
    return [_size(v) if isinstance(v, list) else v for v in _values(row).values()]


def _without_nan(value):
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def curves(result: Result) -> tuple[list[tuple[MatrixRow, MatrixRow | None]], list[str]]:
    """Return the data of the plot: all rows in the order of layers, and names of checkpoints."""
    others = {row.name: row for one in result.measured[1:] for row in one.rows}
    rows = [(row, others.get(row.name)) for row in result.measured[0].rows]
    return rows, [str(one.path) for one in result.measured]


def show(result: Result) -> None:
    """Print the table and what it leaves out."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    table = _table(result)
    if not sys.stdout.isatty() and "COLUMNS" not in os.environ:
        console.width = _width(table)  # a line per matrix, for grep and files
    excess = _width(table) - console.width
    if excess > 0 and result.is_comparison:
        table = _table(result, has_ranks=False)
        excess = _width(table) - console.width
    if excess > 0:
        longest = max(len(one.name) for one, _ in result.pairs)
        table = _table(result, not result.is_comparison, max(longest - excess, _LEAST_WIDTH))
    console.print(table)
    for line in _lines(result):
        console.print(line, soft_wrap=True)


def _width(table) -> int:
    from rich.console import Console

    return Console(width=10_000).measure(table).maximum


def _table(result: Result, has_ranks: bool = True, name_width: int = 10_000):
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("matrix", overflow="fold")
    table.add_column("shape", no_wrap=True)
    has_dtypes = len({row.dtype for row, _ in result.pairs}) > 1 and not result.is_comparison
    if has_dtypes:
        table.add_column("dtype", no_wrap=True)
    if result.is_comparison:
        heads = ["sigma_1,\nfirst", "\nother", "\nchange"]
        heads += ["stable rank,\nfirst", "\nother"] if has_ranks else []
    else:
        heads = ["sigma_1", "stable\nrank", "||W||_F", "sigma_1\n/ usual"]
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for one, other in result.pairs:
        cells = [_folded(one.name, name_width), _size(one.shape)]
        if other is None:
            cells += [one.dtype] if has_dtypes else []
            cells += [_number(one.sigma), _number(one.stable_rank, 1), _number(one.norm, 2),
                      _number(one.ratio, 2)]  # fmt: skip
        else:
            if other.shape != one.shape:
                cells[1] += f"\n-> {_size(other.shape)}"
            cells += [_number(one.sigma), _number(other.sigma),
                      _percent(change(one.sigma, other.sigma))]  # fmt: skip
            if has_ranks:
                cells += [_number(one.stable_rank, 1), _number(other.stable_rank, 1)]
        bad = not all(math.isfinite(row.sigma) for row in (one, other) if row is not None)
        table.add_row(*map(Text, cells), style="bold red" if bad else None)
    return table


def _folded(name: str, width: int) -> str:
    """Break a name that is too long into lines, after dots."""
    lines = [""]
    for piece in re.findall(r"[^.]*\.|[^.]+$", name):
        if lines[-1].strip() and len(lines[-1] + piece) > width:
            lines.append("  ")
        lines[-1] += piece
    return "\n".join(lines)


def _lines(result: Result) -> list[str]:
    first = result.measured[0]
    shown = "" if len(result.pairs) == result.total else f", {len(result.pairs)} shown"
    if result.is_comparison:
        lines = [f"first: {first.path}", f"other: {result.measured[1].path}",
                 f"{result.total} matrices in both{shown}"]  # fmt: skip
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
        reasons: dict[str, list[Entry]] = {}
        for entry, why in one.skipped:
            reasons.setdefault(why, []).append(entry)
        for why, entries in reasons.items():
            some = _some([f"{e.name} {_size(e.shape)}" for e in entries])
            lines.append(f"skipped{where}, {why}: {some}")
        if one.of_optimizer:
            lines.append(f"left out{where}: {one.of_optimizer} tensors of an optimizer's state "
                         "(--include '*' takes them too)")  # fmt: skip
    if result.pairs:
        usual = "" if result.is_comparison else (
            "; usual: of a fresh nn.Linear or convolution in torch"
        )  # fmt: skip
        lines.append(f"sigma_1 is within {100 * RTOL:g} % of the SVD's{usual}")
    return lines


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
    return ", ".join(names[:_FEW]) + more


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


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


def _percent(value: float) -> str:
    return f"{value:+.1f} %" if not abs(value) >= 1e5 else f"{value:+.1e} %"

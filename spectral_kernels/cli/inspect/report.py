"""The results of ``spectral-kernels inspect``, as JSON, CSV and curves."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...diagnostics.untrusted import csv_cell
from .base import EPSILON, LIMIT, VECTORS
from .check import skipped_values, values_of
from .rows import Added, MatrixRow, Measured, change, ordered
from .values import RTOL

COLUMNS: dict[str, Callable[[MatrixRow], object]] = {
    "name": lambda row: row.name,
    "shape": lambda row: list(row.shape),
    "dtype": lambda row: row.dtype,
    "sigma": lambda row: row.sigma,
    "stable_rank": lambda row: row.stable_rank,
    "norm": lambda row: row.norm,
    "usual_sigma": lambda row: row.usual,
    "ratio": lambda row: row.ratio,
    "operator_norm": lambda row: row.operator,
    "made_by": lambda row: row.made_by,
    "values": lambda row: list(row.values),
}
_OF_SPECTRUM = ("sigma_min", "condition", "effective_rank", "alpha", "alpha_distance", "mp_edge",
                "n_above_edge")  # fmt: skip
COLUMNS |= {
    name: lambda row, name=name: None if row.spectrum is None else getattr(row.spectrum, name)
    for name in _OF_SPECTRUM
}
ADDED: dict[str, Callable[[Added], object]] = {
    "base": lambda added: added.base,
    "base_sigma": lambda added: added.base_sigma,
    "sum_sigma": lambda added: added.sum_sigma,
    "update_sigma": lambda added: added.update_sigma,
    "relative_update": lambda added: added.relative,
    "intruders": lambda added: added.intruders,
}
COMPARED = ("sigma", "stable_rank", "norm")


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
    notes: Sequence[str] = ()
    """What was matched under another name, and what could not be told."""
    has_all_experts: bool = True
    """Whether the table has a line per expert, not per stack of them."""
    top: int | None = None
    """How many rows were asked for; None: all."""

    @classmethod
    def of(
        cls,
        measured: Sequence[Measured],
        sort: str | None,
        top: int | None,
        notes: Sequence[str] = (),
        has_all_experts: bool = True,
    ) -> Result:
        """Match two checkpoints by name, sort and cut."""
        first = measured[0].rows
        more = notes, has_all_experts, top
        if len(measured) == 1:
            pairs = ordered([(row, None) for row in first], sort, top)
            return cls(measured, pairs, len(first), (), *more)
        others = {row.name: row for row in measured[1].rows}
        names = {row.name for row in first}
        both = [(row, others[row.name]) for row in first if row.name in others]
        only = (
            [row for row in first if row.name not in others],
            [row for row in measured[1].rows if row.name not in names],
        )
        return cls(measured, ordered(both, sort, top), len(both), only, *more)

    @property
    def is_comparison(self) -> bool:
        """Whether there are two checkpoints."""
        return len(self.measured) > 1

    @property
    def has_base(self) -> bool:
        """Whether the matrices are compared with those of a base model."""
        return self.measured[0].base is not None

    @property
    def has_operators(self) -> bool:
        """Whether there are norms of operators."""
        return any(row.operator is not None for one in self.measured for row in one.rows)

    @property
    def n_values(self) -> int:
        """How many singular values were asked for; 0: sigma_1 alone."""
        return max((len(row.values) for one in self.measured for row in one.rows), default=0)


def as_json(result: Result) -> str:
    """Return a JSON document; numbers that are not finite are null, since JSON has none."""
    rows = []
    for one, other in result.pairs:
        row = _values(one)
        if other is not None:
            row["other"] = {k: v for k, v in _values(other).items() if k != "name"}
            row["change_percent"] = {k: change(COLUMNS[k](one), COLUMNS[k](other))
                                     for k in COMPARED}  # fmt: skip
        if result.has_base:
            row["added"] = None if one.added is None else _of_added(one.added)
        rows.append(row)
    document = {"checkpoint": str(result.measured[0].path)}
    if result.is_comparison:
        document["other"] = str(result.measured[1].path)
    document |= {"rtol": RTOL, "matrices": rows}
    if result.is_comparison:
        document["only_in_checkpoint"], document["only_in_other"] = (
            [_values(row) for row in rows] for rows in result.only
        )
        document["matching"] = list(result.notes)
    if result.has_base:
        first = result.measured[0]
        document["base"] = {
            "checkpoint": str(first.base), "intruder_vectors": VECTORS,
            "intruder_epsilon": EPSILON, "intruder_limit": LIMIT,
            "unmatched": [{"name": s.name, "reason": s.reason} for s in first.unmatched],
        }  # fmt: skip
    document["not_finite"] = [values_of(m.path, one) for m in result.measured
                              for one in m.not_finite]  # fmt: skip
    document["attention"] = [
        {"checkpoint": str(one.path), "layer": row.name, "largest": row.largest,
         "largest_head": row.head, "median": row.median, "sigma": list(row.norms)}
        for one in result.measured for row in one.attention
    ]  # fmt: skip
    document["attention_left_out"] = [
        {"checkpoint": str(one.path), "layer": s.name, "reason": s.reason}
        for one in result.measured for s in one.attention_left_out
    ]  # fmt: skip
    document["skipped"] = [
        skipped_values(one.path, s) for one in result.measured for s in one.skipped
    ]  # fmt: skip
    return json.dumps(_without_nan(document), indent=1, allow_nan=False) + "\n"


def as_csv(result: Result) -> str:
    """Return CSV with a line per matrix, including those that only one checkpoint has.

    A name that a spreadsheet would take for a formula has an apostrophe before it.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = list(COLUMNS)
    more = [f"other_{k}" for k in names[1:]] + [f"{k}_change_percent" for k in COMPARED]
    added = list(ADDED) if result.has_base else []
    writer.writerow(names + more if result.is_comparison else names + added)
    blank = [""] * (len(names) - 1)
    unchanged = [""] * len(COMPARED)
    for one, other in result.pairs:
        cells = _cells(one)
        if other is not None:
            cells += _cells(other)[1:]
            cells += [change(COLUMNS[k](one), COLUMNS[k](other)) for k in COMPARED]
        if result.has_base:
            cells += _added_cells(one.added)
        writer.writerow(cells)
    if result.is_comparison:
        for row in result.only[0]:
            writer.writerow([*_cells(row), *blank, *unchanged])
        for row in result.only[1]:
            writer.writerow([csv_cell(row.name), *blank, *_cells(row)[1:], *unchanged])
    return text.getvalue()


def _values(row: MatrixRow) -> dict:
    return {key: of(row) for key, of in COLUMNS.items()}


def _cells(row: MatrixRow) -> list:
    values = _values(row) | {
        "name": csv_cell(row.name), "shape": size(row.shape),
        "made_by": csv_cell(row.made_by or ""), "values": " ".join(map(str, row.values)),
    }  # fmt: skip
    return list(values.values())


def _of_added(added: Added) -> dict:
    return {key: of(added) for key, of in ADDED.items()}


def _added_cells(added: Added | None) -> list:
    if added is None:
        return [""] * len(ADDED)
    return list((_of_added(added) | {"base": csv_cell(added.base)}).values())


def size(shape: Sequence[int]) -> str:
    """Return a shape as text: ``768x3x16``."""
    return "x".join(map(str, shape))


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

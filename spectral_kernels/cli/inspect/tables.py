"""The tables of ``spectral-kernels inspect``: of matrices, of what is added, and of attention."""

from __future__ import annotations

import math

from .base import VECTORS
from .report import Result, size
from .rows import change
from .stacks import Pair, Stack, summarized
from .text_table import TextTable, condition, number, percent


def matrix_table(result: Result, has_ranks: bool = True) -> TextTable:
    """Return the table of the matrices, or of those that two checkpoints have."""
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
    lines = _lines(result)
    has_stacks = any(isinstance(line, Stack) for line in lines)
    if has_stacks:
        numbers += [
            "median\nchange" if result.is_comparison else "median\nof all",
            "shown:\nexpert",
        ]
    table = TextTable([*texts, *numbers], [False] * len(texts) + [True] * len(numbers))
    for line in lines:
        stack = line if isinstance(line, Stack) else None
        one, other = line.shown if isinstance(line, Stack) else line
        cells = [one.name if stack is None else stack.name, size(one.shape)]
        if other is None:
            cells += [one.dtype] if has_dtypes else []
            cells += [number(one.sigma), number(one.stable_rank, 1), number(one.norm, 2),
                      number(one.ratio, 2)]  # fmt: skip
            if has_operators:
                cells.append("" if one.operator is None else number(one.operator))
        else:
            if other.shape != one.shape:
                cells[1] += f"\n-> {size(other.shape)}"
            cells += [number(one.sigma), number(other.sigma),
                      percent(change(one.sigma, other.sigma))]  # fmt: skip
            if has_ranks:
                cells += [number(one.stable_rank, 1), number(other.stable_rank, 1)]
        if has_stacks:
            cells += _stack_cells(stack, other is not None)
        if not all(math.isfinite(row.sigma) for row in (one, other) if row is not None):
            table.bad.add(len(table.rows))
        table.rows.append(cells)
    return table


def base_table(result: Result) -> TextTable:
    """Return the table of --base: what was added to each matrix."""
    numbers = ["sigma_1\nof base", "of the\nsum", "of the\nupdate", "||update||\n/ ||base||"]
    numbers.append(f"intruders\nof {VECTORS}")
    table = TextTable(["matrix", "shape", *numbers], [False] * 2 + [True] * len(numbers))
    for row, _ in result.pairs:
        added = row.added
        cells = [row.name, size(row.shape)]
        if added is None:
            cells += [""] * len(numbers)
        else:
            count = "-" if added.intruders is None else str(added.intruders)
            cells += [*map(number, (added.base_sigma, added.sum_sigma, added.update_sigma)),
                      number(added.relative, 4), count]  # fmt: skip
            if not math.isfinite(added.sum_sigma):
                table.bad.add(len(table.rows))
        table.rows.append(cells)
    return table


def _spectrum_table(result: Result) -> TextTable:
    """Return the table of --values, which leaves out what would make it too wide."""
    n = result.n_values
    more = [] if n == 1 else ["sigma_2"] if n == 2 else [f"sigma_2 ..\nsigma_{n}"]
    heads = ["sigma_1", *more, "stable\nrank", "eff.\nrank", "condition", "alpha", "D",
             "above\nedge"]  # fmt: skip
    heads += ["as an\noperator"] * result.has_operators
    lines = _lines(result)
    has_stacks = any(isinstance(line, Stack) for line in lines)
    heads += ["median\nsigma_1", "shown:\nexpert"] * has_stacks
    table = TextTable(["matrix", "shape", *heads], [False] * 2 + [True] * len(heads), gap="  ")
    for line in lines:
        stack = line if isinstance(line, Stack) else None
        row, _ = line.shown if isinstance(line, Stack) else line
        name = row.name if stack is None else stack.name
        cells = [name, size(row.shape), number(row.sigma)]
        if more:
            ends = row.values[1:2] + row.values[2:][-1:]
            cells.append(" .. ".join(number(value, 2) for value in ends))
        cells.append(number(row.stable_rank, 1))
        if (full := row.spectrum) is None:
            cells += [""] * 5
        else:
            cells += [number(full.effective_rank, 1), condition(full.condition),
                      number(full.alpha, 2), number(full.alpha_distance, 2),
                      str(full.n_above_edge)]  # fmt: skip
        if result.has_operators:
            cells.append("" if row.operator is None else number(row.operator))
        if has_stacks:
            cells += _stack_cells(stack, is_comparison=False)
        if not math.isfinite(row.sigma):
            table.bad.add(len(table.rows))
        table.rows.append(cells)
    return table


def _lines(result: Result) -> list[Pair | Stack]:
    return list(result.pairs if result.has_all_experts else summarized(result.pairs))


def _stack_cells(stack: Stack | None, is_comparison: bool) -> list[str]:
    """Return the median of a stack, and which of its matrices the line shows."""
    if stack is None:
        return ["", ""]
    median = (percent if is_comparison else number)(stack.median)
    return [median, f"{stack.number} of {stack.count}"]


def attention_table(result: Result) -> TextTable:
    """Return the table of attention: the norms of the heads of each layer."""
    rows = result.measured[0].attention
    if result.top is not None:  # nan before all others, as for matrices
        rows = sorted(rows, key=lambda row: (not math.isnan(row.largest), -row.largest))
        rows = rows[: result.top]
    heads = ["attention, sigma_1 of W_q^T W_k by head", "heads", "largest", "head", "median"]
    table = TextTable(heads, [False] + [True] * 4)
    for place, row in enumerate(rows):
        if not math.isfinite(row.largest):
            table.bad.add(place)
        table.rows.append(
            [row.name, str(len(row.norms)), number(row.largest), str(row.head),
             number(row.median)]
        )  # fmt: skip
    return table

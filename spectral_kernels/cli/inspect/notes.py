"""What stands below the tables: the checkpoints, and what was left out and why."""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence

from ...diagnostics.checkpoints import Skipped
from ..console import counted, some
from .base import EPSILON, VECTORS
from .report import Result, size
from .rows import MatrixRow
from .values import RTOL


def notes(result: Result) -> list[str]:
    """Return what stands below the table: the checkpoints, and what was left out and why."""
    first = result.measured[0]
    shown = "" if len(result.pairs) == result.total else f", {len(result.pairs)} shown"
    if result.is_comparison:
        lines = [f"first: {first.path}", f"other: {result.measured[1].path}",
                 f"{_matrices(result.total)} in both{shown}", *result.notes]  # fmt: skip
        for rows, one in zip(result.only, result.measured, strict=True):
            if rows:
                lines.append(f"only in {one.path}: {some([row.name for row in rows])}")
    else:
        dtypes = ", ".join(sorted({row.dtype for row in first.rows}))
        numbers = sum(row.size for row in first.rows)
        lines = [
            f"{first.path}: {_matrices(result.total)}{shown}, {_many(numbers)} weights, {dtypes}"
        ]
        if not first.rows:
            lines = [f"{first.path}: no matrices"]
    for one in result.measured:
        where = f" in {one.path}" if result.is_comparison else ""
        made = collections.Counter(row.made_by for row in one.rows if row.made_by)
        lines += [
            f"made{where} of stored tensors: {_matrices(n)}, {how}" for how, n in made.items()
        ]
        lines += [f"skipped{where}, {text}" for text in _grouped(one.skipped)]
        lines += [f"not divided{where}, {text}" for text in _grouped(one.whole)]
        if one.not_finite:
            bad = some([f"{tensor.name} {tensor.counts}" for tensor in one.not_finite], "; ")
            lines.append(f"not finite{where}: {bad}")
        if one.of_optimizer:
            number = counted(one.of_optimizer, "tensor", "tensors")
            lines.append(f"left out{where}: {number} of an optimizer's state "
                         "(--include '*' takes them too)")  # fmt: skip
        for why, layers in _by_reason(one.attention_left_out).items():
            lines.append(f"attention left out{where}, {why}: {some([x.name for x in layers])}")
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


def _matrices(number: int) -> str:
    return counted(number, "matrix", "matrices")


def _by_reason(skipped: Sequence[Skipped]) -> dict[str, list[Skipped]]:
    reasons: dict[str, list[Skipped]] = {}
    for one in skipped:
        reasons.setdefault(one.reason, []).append(one)
    return reasons


def _grouped(skipped: Sequence[Skipped]) -> list[str]:
    """Return a text for each reason, with some of the names."""
    return [
        f"{why}: {some([f'{e.name} {size(e.shape)}'.rstrip() for e in entries])}"
        for why, entries in _by_reason(skipped).items()
    ]


def _about_spectra(rows: Sequence[MatrixRow]) -> list[str]:
    """Say what the columns of --values are, and of which matrices they are not known."""
    large = [row.name for row in rows if row.spectrum is None and math.isfinite(row.sigma)]
    lines = []
    if large:
        lines.append(f"largest values only, shorter side above --spectrum-limit: {some(large)}")
    if len(large) < len(rows):
        lines.append("alpha: exponent of the tail of sigma^2, D: distance of its fit; "
                     "edge: where the values of noise end")  # fmt: skip
    return lines


def _base_lines(result: Result) -> list[str]:
    first = result.measured[0]
    found = [row.added for row in first.rows if row.added is not None]
    lines = [f"base: {first.base}, which has {len(found)} of the matrices"]
    for skipped in _grouped(first.unmatched):
        lines.append(f"not in the base, {skipped}")
    for why, count in collections.Counter(a.reason for a in found if a.reason).items():
        lines.append(f"intruders not counted for {_matrices(count)}: {why}")
    lines.append(
        f"intruders: of the first {VECTORS} left singular vectors of the sum, those whose cosine "
        f"with each one of the base is below {EPSILON:g} (arXiv 2410.21228)"
    )
    return lines


def _many(number: int) -> str:
    for unit, letter in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if number >= unit:
            return f"{number / unit:.1f}{letter}"
    return str(number)

"""The page of inspect: one HTML file with the table, the picture, and what was left out."""

from __future__ import annotations

import base64
import hashlib
import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources

from ...diagnostics.untrusted import printable
from . import picture, report
from .notes import notes
from .rows import MatrixRow, change

_STYLE, _SCRIPT = (
    resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
    for name in ("page.css", "page.js")
)
# Only this script may run, whatever a name contains, and nothing may be loaded or sent.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-"
    + base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    + "'; base-uri 'none'; form-action 'none'"
)
# Heads of columns whose key says less; those of others are their keys.
_HEADS = {
    "name": "matrix", "sigma": "sigma_1", "norm": "||W||_F", "usual_sigma": "usual sigma_1",
    "ratio": "sigma_1 / usual", "operator_norm": "as an operator",
}  # fmt: skip


def as_html(result: report.Result, limit: float | None = None) -> str:
    """Return the page, which loads nothing and whose names are text whatever they contain.

    The same result gives the same page.

    Args:
        result: of one checkpoint, or of two.
        limit: of --fail-above, a line in the picture; None: no line.
    """
    paths = [str(one.path) for one in result.measured]
    title = " and ".join(_escaped(path.rstrip("/").rpartition("/")[2]) for path in paths)
    rows, checkpoints = report.curves(result)
    wide, narrow = (picture.as_svg(rows, checkpoints, limit, narrow) for narrow in (False, True))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{title}: singular values</title>
<style>
{_STYLE}</style>
</head>
<body>
<h1>Singular values of {title}</h1>
{_broken(result)}
<figure>
<div class="wide" role="img" aria-label="sigma_1 of every matrix over depth">{wide}</div>
<div class="narrow" role="img" aria-label="sigma_1 of every matrix over depth">{narrow}</div>
</figure>
<h2>Matrices</h2>
<div class="filter" hidden>
<label for="filter">Names</label>
<input id="filter" type="search" placeholder="a part, or *.attn.*" autocomplete="off">
<output id="count" for="filter"></output>
<button id="more" type="button" hidden>show all</button>
</div>
{_table(_columns(result), len(result.pairs), _bad_rows(result), ' id="matrices"')}
{_attention(result)}
<div class="notes">
{_paragraphs(notes(result))}
</div>
{_left_out(result)}
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _escaped(text: str) -> str:
    return html.escape(printable(text))


def _paragraphs(texts: Sequence[str]) -> str:
    return "\n".join(f"<p>{_escaped(text)}</p>" for text in texts)


def _bad_rows(result: report.Result) -> set[int]:
    """Return which pairs hold a matrix whose sigma_1 is not finite."""
    return {i for i, pair in enumerate(result.pairs)
            if any(row is not None and not math.isfinite(row.sigma) for row in pair)}  # fmt: skip


def _broken(result: report.Result) -> str:
    number = len(_bad_rows(result))
    if not number:
        return ""
    verb = "matrix is" if number == 1 else "matrices are"
    return f'<p class="bad">{number} {verb} not finite; sorting by sigma_1 puts them first</p>'


# --------------------------------------------------------------------------------------- columns


@dataclass(frozen=True)
class _Column:
    key: str
    head: str
    values: Sequence[object]
    """Of every row: text, a number, several numbers, or None."""

    @cached_property
    def role(self) -> str:
        """The class of its cells: name, text, number or several."""
        if self.key == "name":
            return "name"
        some = next((value for value in self.values if value is not None), "")
        if isinstance(some, (list, tuple)) and not self.holds_shapes:
            return "several"
        return "number" if isinstance(some, (int, float)) else "text"

    @property
    def holds_shapes(self) -> bool:
        """Whether its values are shapes, whose order is that of their sizes."""
        return self.key.endswith("shape")

    @property
    def is_empty(self) -> bool:
        """Whether no row has a value."""
        return all(value is None or value in ((), []) for value in self.values)

    @property
    def order(self) -> str:
        """By what it is sorted: "text" or "number"."""
        return "text" if self.role in ("name", "text") and not self.holds_shapes else "number"

    @cached_property
    def decimals(self) -> int:
        """So many that most values have four digits."""
        sizes = sorted(abs(v) for v in _flat(self.values) if v and math.isfinite(v))
        middle = sizes[len(sizes) // 2] if sizes else 1.0
        return min(max(3 - math.floor(math.log10(middle)), 0), 3)

    def cell(self, value: object) -> str:
        """Return the HTML of a cell; ``data-v`` holds numbers with all their digits."""
        data = ""
        if self.order == "number" and value is not None:
            numbers = [math.prod(value)] if self.holds_shapes else _flat([value])
            exact = " ".join(map(_exact, numbers))
            data = f' data-v="{exact}"'
        text = _escaped(self.shown(value))
        if self.role == "name":  # lines may break there
            text = text.replace(".", ".<wbr>")
        return f'<td class="{self.role}"{data}>{text}</td>'

    def shown(self, value: object) -> str:
        """Return the text of a cell."""
        if value is None:
            return ""
        if self.holds_shapes:
            return report.size(value)
        if isinstance(value, (list, tuple)):
            return " ".join(map(self.shown, value))
        if not isinstance(value, float):
            return str(value)
        if self.key.endswith("_percent"):
            return f"{value:+.1f} %" if not abs(value) >= 1e5 else f"{value:+.1e} %"
        is_fixed = value == 0 or 10.0 ** (1 - self.decimals) <= abs(value) < 1e6
        return f"{value:.{self.decimals}f}" if is_fixed else f"{value:.3g}"


def _flat(values: Sequence[object]) -> Iterator:
    """Yield the numbers of values that are one number, several, or None."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        elif value is not None:
            yield value


def _exact(number: float) -> str:
    return repr(float(number)) if isinstance(number, float) else str(number)


def _columns(result: report.Result) -> list[_Column]:
    """Return the columns of the table, without those that are empty."""
    ones = [one for one, _ in result.pairs]
    columns = _plain_columns(ones)
    if result.is_comparison:
        others = [other for _, other in result.pairs if other is not None]
        columns = list(_compared(columns, _plain_columns(others)))
    return [c for c in columns if c.key == "name" or not c.is_empty]


def _plain_columns(rows: Sequence[MatrixRow]) -> list[_Column]:
    values = {key: [of(row) for row in rows] for key, of in report.COLUMNS.items()}
    values |= {
        key: [None if row.added is None else of(row.added) for row in rows]
        for key, of in report.ADDED.items()
    }
    return [_Column(key, _HEADS.get(key, key.replace("_", " ")), of) for key, of in values.items()]


def _compared(columns: Sequence[_Column], others: Sequence[_Column]) -> Iterator[_Column]:
    """Yield the columns of two checkpoints; what is the same in all rows of both stands once."""
    for one, other in zip(columns, others, strict=True):
        if one.key == "name" or one.values == other.values:
            yield one
            continue
        yield _Column(one.key, f"{one.head}, first", one.values)
        yield _Column(f"other_{one.key}", "other", other.values)
        if one.key in report.COMPARED:
            changes = [change(*pair) for pair in zip(one.values, other.values, strict=True)]
            yield _Column(f"{one.key}_change_percent", "change", changes)


# ---------------------------------------------------------------------------------------- tables


def _table(columns: Sequence[_Column], n_rows: int, bad: set[int], attributes: str = "") -> str:
    heads = "".join(
        f'<th scope="col" class="{c.role}" data-key="{_escaped(c.key)}"'
        f' data-order="{c.order}">{_escaped(c.head)}</th>'
        for c in columns
    )
    lines = []
    for i in range(n_rows):
        cells = "".join(c.cell(c.values[i]) for c in columns)
        lines.append(f"<tr class=bad>{cells}" if i in bad else f"<tr>{cells}")
    body = "\n".join(lines)
    return (
        '<div class="scroll" role="region" aria-label="table" tabindex="0">'
        f"<table{attributes}>\n<thead><tr>{heads}</tr></thead>\n"
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _attention(result: report.Result) -> str:
    """Return a table of the attention layers of each checkpoint that has some."""
    parts = []
    for one in filter(lambda measured: measured.attention, result.measured):
        rows = one.attention
        columns = [
            _Column("name", "layer", [row.name for row in rows]),
            _Column("heads", "heads", [len(row.norms) for row in rows]),
            _Column("largest", "largest", [row.largest for row in rows]),
            _Column("largest_head", "its head", [row.head for row in rows]),
            _Column("median", "median", [row.median for row in rows]),
            _Column("sigma", "of all heads", [row.norms for row in rows]),
        ]
        where = f" in {_escaped(str(one.path))}" if result.is_comparison else ""
        bad = {i for i, row in enumerate(rows) if not math.isfinite(row.largest)}
        parts.append(f"<h2>Attention{where}: sigma_1 of W_q<sup>T</sup> W_k by head</h2>\n"
                     + _table(columns, len(rows), bad))  # fmt: skip
    return "\n".join(parts)


def _left_out(result: report.Result) -> str:
    """Return the complete lists of what the lines below the table shorten."""
    parts = []
    for one in result.measured:
        where = f" in {one.path}" if result.is_comparison else ""
        columns = [
            _Column("name", "name", [s.name for s in one.skipped]),
            _Column("shape", "shape", [s.shape for s in one.skipped]),
            _Column("dtype", "dtype", [s.dtype for s in one.skipped]),
            _Column("reason", "reason", [s.reason for s in one.skipped]),
        ]
        parts.append(_details(f"skipped{where}", columns))
    for rows, one in zip(result.only, result.measured, strict=False):
        parts.append(_details(f"only in {one.path}", _plain_columns(rows)))
    return "\n".join(filter(None, parts))


def _details(title: str, columns: Sequence[_Column]) -> str:
    number = len(columns[0].values)
    if not number:
        return ""
    table = _table(columns, number, set())
    return f"<details><summary>{number} {_escaped(title)}</summary>\n{table}\n</details>"

"""The results of ``spectral-kernels inspect`` on the terminal: tables, and lines below them."""

from __future__ import annotations

import os
import sys

from ..console import tell
from .notes import notes
from .report import Result
from .tables import attention_table, base_table, matrix_table


def show(result: Result) -> None:
    """Print the table and what it leaves out."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    table = base_table(result) if result.has_base else matrix_table(result)
    # Output that is no terminal has a line per matrix, for grep and files.
    is_folded = sys.stdout.isatty() or "COLUMNS" in os.environ
    if is_folded and table.width > console.width and result.is_comparison:
        table = matrix_table(result, has_ranks=False)
    tables = [table]
    if not result.is_comparison and result.measured[0].attention:
        tables.append(attention_table(result))
    is_coloured = console.color_system not in (None, "windows") and not console.no_color
    bold, plain = ("\x1b[1;31m", "\x1b[0m") if is_coloured else ("", "")
    line = "─" if console.encoding.startswith("utf") else "-"
    for one in tables:
        if is_folded:
            one.fit(console.width)
        print("\n".join(one.lines(line, bold, plain)))
    for text in notes(result):
        tell(text)

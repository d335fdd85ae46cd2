"""Names and files of unknown origin: safe to print, to put into a spreadsheet, and to open."""

from __future__ import annotations

import os
import stat
from os import PathLike

# A spreadsheet takes a cell that begins with one of these for a formula; the last four are their
# full-width forms.
_FORMULA = tuple("=+-@\t\r\uff1d\uff0b\uff0d\uff20")
_KINDS = {
    stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip


def printable(text: str) -> str:
    """Return ``text`` with what could steer a terminal, or is not visible, as Python's escapes.

    These are control characters, line breaks, terminal codes, characters that turn the direction
    of writing, and halves of surrogate pairs: ``"\\x1b[2J"`` becomes ``"\\\\x1b[2J"``.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def csv_cell(text: str) -> str:
    """Return ``text`` with an apostrophe before it if a spreadsheet would take it for a formula."""
    return f"'{text}" if text.lstrip(" ").startswith(_FORMULA) else text


def irregular(path: str | PathLike[str]) -> str | None:
    """Return what ``path`` is if reading it could wait or never end, such as "a FIFO", else None.

    Links are followed.

    Raises:
        OSError: there is no such file, or it cannot be looked at.
    """
    kind = stat.S_IFMT(os.stat(path).st_mode)
    return None if kind == stat.S_IFREG else _KINDS.get(kind, "a special file")

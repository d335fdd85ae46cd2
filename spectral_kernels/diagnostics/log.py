"""Logs of sigma and residual of every matrix over the steps, as CSV or JSON lines."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from ..engine.untraced import untraced
from ..selection.arguments import check_count, expected
from .untrusted import irregular, printable

SUFFIXES = (".csv", ".jsonl")
SIGMA, RESIDUAL = "sigma/", "residual/"  # prefixes of names in the header of a CSV
LAST_STEP = 2**63 - 1
_COLUMNS = ("sigma", "residual")
_JSON_NUMBER = re.compile(rb"(?<=: )[-+.0-9enul]+")
_LONGEST_NUMBER = 24  # characters, of a number that is written
_LONGEST_LINE = 1 << 28  # bytes, of a line that is read


class Log:
    """Handle of ``SpectralRegularizer.log_to``: ``log(step)`` appends a line.

    A CSV has a header and the columns step, sigma/NAME of every matrix, residual/NAME of every
    matrix; JSON lines are ``{"step": 0, "sigma": {NAME: ...}, "residual": {NAME: ...}}``, with null
    for values that are not finite. Each line is written at once and in one piece. A line that does
    not fit on the disk is taken back, and a half line at the end, left by a killed run, is removed
    before the next one.

    Args:
        path: name in .csv or .jsonl; an existing log of the same matrices is continued.
        names: names of the matrices.
        read: returns sigma and residual of the matrices, [2, n_matrices].
        every: only steps divisible by it are written.

    Raises:
        TypeError: ``every`` is not an integer.
        ValueError: ``every`` below 1, another suffix, a file that is not a log of these matrices;
            it is left as it is.
        FileNotFoundError: the folder of ``path`` does not exist.
        OSError: the file cannot be written.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        names: Sequence[str],
        read: Callable[[], torch.Tensor],
        every: int = 1,
    ):
        self.path, self.names, self._read = Path(path), list(names), read
        self.every = check_count("every", every, 1)
        self._left: tuple[int, ...] | None = None  # the file after the last look at it or line
        if self.path.suffix not in SUFFIXES:
            raise ValueError(
                f"path: expected a name that ends in .csv or .jsonl, got {self._shown}"
            )
        if not self.path.parent.is_dir():
            raise FileNotFoundError(
                f"path: expected a file in a folder that exists, got {self._shown}"
            )
        if _writes():
            self._open().close()

    @untraced
    def __call__(self, step: int) -> None:
        """Append the current sigma and residual; with a process group every rank may call it.

        Only rank 0 writes. This synchronizes a GPU if ``step`` is divisible by ``every``.

        Raises:
            TypeError: ``step`` is not an integer.
            ValueError: ``step`` below 0 or above 2**63 - 1, or another file is at ``path`` now.
            OSError: the line cannot be written completely; the file then is as before.
        """
        if check_count("step", step, 0) > LAST_STEP:
            raise ValueError(
                "step: expected an integer from 0 to 2**63 - 1, got one of "
                f"{step.bit_length()} bits"
            )
        if step % self.every:
            return
        values = self._read()
        if not _writes():
            return
        sigma, residual = values.tolist()
        text = self._line(step, sigma, residual)
        with self._open() as file:
            *_, size = self._left
            _append(file, size, (text if size else self._header() + text).encode(), self.path)
            self._left = _identity(file)

    @property
    def _shown(self) -> str:
        return repr(str(self.path))

    def _header(self) -> str:
        if self.path.suffix == ".jsonl":
            return ""
        columns = [start + name for start in (SIGMA, RESIDUAL) for name in self.names]
        return _csv_line(["step", *map(printable, columns)])

    def _line(self, step: int, sigma: Sequence[float], residual: Sequence[float]) -> str:
        if self.path.suffix == ".csv":
            return _csv_line([step, *(f"{x:.9g}" for x in (*sigma, *residual))])
        columns = {"sigma": sigma, "residual": residual}
        rows = {key: dict(zip(self.names, map(_or_none, x), strict=True))
                for key, x in columns.items()}  # fmt: skip
        return json.dumps({"step": step, **rows}, allow_nan=False) + "\n"

    def _open(self) -> io.FileIO:
        """Open the file to append; if it is not as this object left it, look at what it holds."""
        if self._left is None:
            self._refuse_irregular()  # before it is opened, which may wait
        file = io.FileIO(self.path, "a+")
        try:
            if _identity(file) != self._left:
                self._refuse_irregular()
                self._continue(file)
                self._left = _identity(file)
        except BaseException:
            file.close()
            raise
        return file

    def _refuse_irregular(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            if (kind := irregular(self.path)) is not None:
                raise ValueError(f"path: expected a regular file, got {self._shown}, {kind}")

    def _continue(self, file: io.FileIO) -> None:
        """Check that the file is empty or a log of these matrices; remove a half last line."""
        begin = self._header() or self._line(LAST_STEP, *[[0.0] * len(self.names)] * 2)
        begin = begin.encode()
        reader = io.BufferedReader(file)
        reader.seek(0)
        # Of a file that is no log, the first line may be of any length.
        first = reader.readline(len(begin) + _LONGEST_NUMBER * (2 * len(self.names) + 1))
        if first.endswith(b"\n"):
            is_log, end = self._is_first(first), _end_of_last_line(reader)
        else:
            is_log, end = not first or self._is_half(first, begin), 0
        size = reader.seek(0, io.SEEK_END)
        reader.detach()
        if not is_log:
            raise ValueError(
                f"path: expected a new name or a log of these {len(self.names)} matrices, got "
                f"{self._shown}, which exists and is no such log"
            )
        if end < size:
            file.truncate(end)

    def _is_first(self, line: bytes) -> bool:
        """Return whether a whole line is the first one of a log of these matrices."""
        if self.path.suffix == ".csv":
            return line == self._header().encode()
        try:
            row = json.loads(line)
            is_step = type(row.pop("step")) is int
            same = all([*column.keys()] == self.names for column in row.values())
            return is_step and same and tuple(row) == _COLUMNS
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return False

    def _is_half(self, line: bytes, begin: bytes) -> bool:
        """Return whether ``line`` is cut off from a first line such as ``begin``.

        To be sure, the name of the first matrix must be in it.
        """
        if not self.names:
            return False
        if self.path.suffix == ".csv":
            least = _csv_line(["step", printable(SIGMA + self.names[0])]).rstrip("\n").encode()
        else:
            least = f'{{"step": 0, "sigma": {{{json.dumps(self.names[0])}'.encode()
            line, begin, least = (_JSON_NUMBER.sub(b"", part) for part in (line, begin, least))
        return line.startswith(least) and begin.startswith(line)


class LogError(Exception):
    """A file that cannot be read as a log; the message names it."""


class History(NamedTuple):
    """The contents of a log: increasing ``steps`` [T], ``sigma`` and ``residual`` [T, n_matrices].

    From JSON lines, numbers that are not finite are NaN; from a CSV they are NaN or inf as written.
    """

    names: list[str]
    steps: np.ndarray
    sigma: np.ndarray
    residual: np.ndarray


def read(path: str | PathLike[str]) -> History:
    """Read a log, possibly while it is being written: a half line at the end is left out.

    Where a run resumed from an earlier step, the rows that it had written from that step on are
    left out.

    Raises:
        LogError: the file is not a log, or has no complete row.
        OSError: the file cannot be read.
    """
    path = Path(path)
    shown = printable(str(path))
    if path.suffix not in SUFFIXES:
        raise LogError(
            f"{shown}: expected a name that ends in .csv or .jsonl, as log_to() writes, got "
            f"{path.suffix!r}"
        )
    if (kind := irregular(path)) is not None:
        raise LogError(f"{shown}: expected a regular file, got {kind}")
    parse = _parsed_csv if path.suffix == ".csv" else _parsed_json
    try:
        with path.open("rb") as file:
            names, rows = parse(shown, _lines(shown, file))
    except csv.Error as error:
        raise LogError(f"{shown}: not a log of log_to(): {error}") from None
    if not rows:
        raise LogError(f"{shown}: holds no step yet")
    if not names:
        raise LogError(f"{shown}: holds no matrix")
    kept, earliest = [], math.inf
    for row in reversed(rows):
        if row[0] < earliest:
            kept.append(row)
            earliest = row[0]
    table = np.array([row[1] for row in kept[::-1]], np.float64)
    steps = np.array([row[0] for row in kept[::-1]], np.int64)
    if (table < 0).any():
        row, column = np.argwhere(table < 0)[0]
        raise LogError(
            f"{shown}: step {steps[row]}: {_COLUMNS[column // len(names)]}: expected a number >= "
            f"0, inf or nan, got {table[row, column]}"
        )
    return History(names, steps, table[:, : len(names)], table[:, len(names) :])


def _lines(path: str, file) -> Iterator[bytes]:
    """Yield the whole lines of a file, without their ends."""
    while (line := file.readline(_LONGEST_LINE)).endswith(b"\n"):
        yield line[:-1]
    if len(line) == _LONGEST_LINE:
        raise LogError(f"{path}: not a log of log_to(): a line is over {len(line)} bytes long")


def _parsed_csv(
    path: str, lines: Iterator[bytes]
) -> tuple[list[str], list[tuple[int, list[float]]]]:
    cells = csv.reader(line.decode(errors="replace") for line in lines)
    header = next(cells, [])
    n = len(header) // 2
    names = [column.removeprefix(SIGMA) for column in header[1 : n + 1]]
    wanted = ["step", *(start + name for start in (SIGMA, RESIDUAL) for name in names)]
    if header != wanted:
        raise LogError(f"{path}: not a log of log_to(): line 1 is not a header of its columns")
    rows = []
    for number, row in enumerate(cells, 2):
        try:
            rows.append((int(row[0]), [float(x) for x in row[1:]]))
        except (ValueError, IndexError):
            raise LogError(f"{path}: line {number} is not a row of numbers") from None
        if len(row) != len(header):
            raise LogError(f"{path}: line {number}: expected {len(header)} columns, got {len(row)}")
        _check_step(path, number, rows[-1][0])
    return names, rows


def _parsed_json(
    path: str, lines: Iterator[bytes]
) -> tuple[list[str], list[tuple[int, list[float]]]]:
    names, rows = None, []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            step, own = row["step"], [row[key] for key in _COLUMNS]
            names = [*own[0]] if names is None else names
            same = [*own[0]] == [*own[1]] == names
            cells = [x for column in own for x in column.values()]
            if type(step) is not int or not {*map(type, cells)} <= {float, int, type(None)}:
                raise TypeError
            rows.append((step, [math.nan if x is None else float(x) for x in cells]))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            raise LogError(f"{path}: line {number} is not a line of log_to()") from None
        if not same:
            raise LogError(f"{path}: line {number} has other matrices than line 1")
        _check_step(path, number, step)
    return names or [], rows


def _check_step(path: str, number: int, step: int) -> None:
    if not 0 <= step <= LAST_STEP:
        raise LogError(expected(f"{path}: line {number}", "a step from 0 to 2**63 - 1", step))


def _writes() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _identity(file: io.FileIO) -> tuple[int, ...]:
    """Return what changes when another writes to the file, or puts another one in its place."""
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size


def _append(file: io.FileIO, end: int, data: bytes, path: Path) -> None:
    """Write all of ``data`` at the end of a file, or raise OSError with the file as it was."""
    rest = memoryview(data)
    try:
        while rest:  # a full disk takes a part of it, and the next write says why
            written = file.write(rest)
            if not written:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            rest = rest[written:]
    except BaseException as error:
        with contextlib.suppress(OSError):  # if it fails, the next call removes the half line
            file.truncate(end)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def _csv_line(cells: Sequence) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _or_none(x: float) -> float | None:
    return float(f"{x:.9g}") if math.isfinite(x) else None


def _end_of_last_line(file, block: int = 1 << 16) -> int:
    """Return the position after the last newline of a file that has one."""
    end = file.seek(0, io.SEEK_END)
    while end:
        start = max(end - block, 0)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0

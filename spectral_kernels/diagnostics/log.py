"""Logs of sigma and residual of every matrix over the steps, as CSV or JSON lines."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from ..engine.untraced import untraced
from ..selection.arguments import check_count

SUFFIXES = (".csv", ".jsonl")
SIGMA, RESIDUAL = "sigma/", "residual/"  # prefixes of names in the header of a CSV


class Log:
    """Handle of ``SpectralRegularizer.log_to``: ``log(step)`` appends a line.

    A CSV has a header and the columns step, sigma/NAME of every matrix, residual/NAME of every
    matrix; JSON lines are ``{"step": 0, "sigma": {NAME: ...}, "residual": {NAME: ...}}``, with null
    for values that are not finite. Each line is written at once and in one piece. An incomplete
    last line, left by a killed run, is removed when the file is opened again.

    Args:
        path: name in .csv or .jsonl; an existing log of the same matrices is continued.
        names: names of the matrices.
        read: returns sigma and residual of the matrices, [2, n_matrices].
        every: only steps divisible by it are written.

    Raises:
        TypeError: ``every`` is not an integer.
        ValueError: ``every`` below 1, another suffix, a file that is not a log of these matrices.
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
        if self.path.suffix not in SUFFIXES:
            raise ValueError(
                f"path: got '{self.path}'; accepted are names that end in .csv, .jsonl"
            )
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"path: got '{self.path}'; its folder does not exist")
        if _writes():
            self._continue()

    @untraced
    def __call__(self, step: int) -> None:
        """Append the current sigma and residual; with a process group every rank may call it.

        Only rank 0 writes. This synchronizes a GPU if ``step`` is divisible by ``every``.
        """
        if check_count("step", step, 0) % self.every:
            return
        values = self._read()
        if not _writes():
            return
        sigma, residual = values.tolist()
        with self.path.open("ab", buffering=0) as file:
            text = self._line(step, sigma, residual)
            file.write((text if file.tell() else self._header() + text).encode())

    def _header(self) -> str:
        if self.path.suffix == ".jsonl":
            return ""
        columns = [start + name for start in (SIGMA, RESIDUAL) for name in self.names]
        return _csv_line(["step", *columns])

    def _line(self, step: int, sigma: Sequence[float], residual: Sequence[float]) -> str:
        if self.path.suffix == ".csv":
            return _csv_line([step, *(f"{x:.9g}" for x in (*sigma, *residual))])
        columns = {"sigma": sigma, "residual": residual}
        rows = {key: dict(zip(self.names, map(_or_none, x), strict=True))
                for key, x in columns.items()}  # fmt: skip
        return json.dumps({"step": step, **rows}, allow_nan=False) + "\n"

    def _continue(self) -> None:
        """Check an existing file, and remove an incomplete line at its end."""
        with self.path.open("a+b") as file:
            file.seek(0)
            first = file.readline()
            if first.endswith(b"\n"):
                self._check(first)
                file.truncate(_end_of_last_line(file))
            elif first:
                begin = self._header() or '{"step": '
                if not begin.encode().startswith(first[: len(begin.encode())]):
                    raise ValueError(
                        f"path: '{self.path}' exists and is not a log of these matrices"
                    )
                file.truncate(0)

    def _check(self, first: bytes) -> None:
        if self.path.suffix == ".csv":
            same = first == self._header().encode()
        else:
            try:
                row = json.loads(first)
                same = list(row["sigma"]) == list(row["residual"]) == self.names
            except (ValueError, TypeError, KeyError):
                same = False
        if not same:
            raise ValueError(
                f"path: '{self.path}' exists and is not a log of these {len(self.names)} matrices; "
                "accepted are a new name, or the log of a model with the same names"
            )


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
    """Read a log, possibly while it is being written: an incomplete last line is left out.

    Where a run resumed from an earlier step, the rows that it had written from that step on are
    left out.

    Raises:
        LogError: the file is not a log, or has no complete row.
        OSError: the file cannot be read.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise LogError(f"{path}: accepted are names in .csv and .jsonl, as log_to() writes them")
    lines = path.read_bytes().split(b"\n")[:-1]
    parse = _parsed_csv if path.suffix == ".csv" else _parsed_json
    try:
        names, rows = parse(path, lines)
    except csv.Error as error:
        raise LogError(f"{path}: not a log of log_to(): {error}") from None
    if not rows:
        raise LogError(f"{path}: holds no step yet")
    if not names:
        raise LogError(f"{path}: holds no matrix")
    kept, earliest = [], math.inf
    for row in reversed(rows):
        if row[0] < earliest:
            kept.append(row)
            earliest = row[0]
    table = np.array([row[1] for row in kept[::-1]], np.float64)
    steps = np.array([row[0] for row in kept[::-1]], np.int64)
    return History(names, steps, table[:, : len(names)], table[:, len(names) :])


def _parsed_csv(path: Path, lines: list[bytes]) -> tuple[list[str], list[tuple[int, list[float]]]]:
    cells = csv.reader(line.decode(errors="replace") for line in lines)
    header = next(cells, [])
    n = len(header) // 2
    names = [column.removeprefix(SIGMA) for column in header[1 : n + 1]]
    expected = ["step", *(start + name for start in (SIGMA, RESIDUAL) for name in names)]
    if header != expected:
        raise LogError(f"{path}: not a log of log_to(): line 1 is not a header of its columns")
    rows = []
    for number, row in enumerate(cells, 2):
        try:
            rows.append((int(row[0]), [float(x) for x in row[1:]]))
        except (ValueError, IndexError):
            raise LogError(f"{path}: line {number} is not a row of numbers") from None
        if len(row) != len(header):
            raise LogError(f"{path}: line {number} has {len(row)} columns, not {len(header)}")
    return names, rows


def _parsed_json(path: Path, lines: list[bytes]) -> tuple[list[str], list[tuple[int, list[float]]]]:
    names, rows = None, []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            own = [row["sigma"], row["residual"]]
            names = [*own[0]] if names is None else names
            same = [*own[0]] == [*own[1]] == names
            values = [math.nan if x is None else float(x) for d in own for x in d.values()]
            rows.append((int(row["step"]), values))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise LogError(f"{path}: line {number} is not a line of log_to()") from None
        if not same:
            raise LogError(f"{path}: line {number} has other matrices than line 1")
    return names or [], rows


def _writes() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


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

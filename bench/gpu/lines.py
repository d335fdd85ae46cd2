"""One JSON line per measurement, in a file that keeps whatever was written before a kill."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FILE = "results.jsonl"
Line = dict[str, Any]


class Lines:
    """Appends lines of one stage to ``results.jsonl`` in ``folder``; several processes may do so.

    Every line has stage, case, dtype, backend, what, value, unit and dry_run. If something failed
    or was left out, its line has a reason instead of a value, and ``failed`` says which of the two.
    ``failures`` counts the lines that failed.
    """

    def __init__(self, folder: Path, stage: str, dry_run: bool):
        self.path, self.stage, self.dry_run = Path(folder) / FILE, stage, dry_run
        self.failures = 0

    def put(
        self,
        what: str,
        value: float | None,
        unit: str | None,
        *,
        case: str | None = None,
        dtype: str | None = None,
        backend: str | None = None,
        **more: Any,
    ) -> None:
        """Append a line; it is written to the file before this returns."""
        line = {
            "stage": self.stage, "case": case, "dtype": dtype, "backend": backend, "what": what,
            "value": value, "unit": unit, "dry_run": self.dry_run, **more,
        }  # fmt: skip
        line = {key: float(f"{x:.6g}") if type(x) is float else x for key, x in line.items()}
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, (json.dumps(line, default=str) + "\n").encode())
        finally:
            os.close(file)

    def failed(self, what: str, reason: object, **where: Any) -> None:
        """Record a failure or an exception; the stage's exit code is then 1.

        The traceback of an exception goes to the stage's output.
        """
        self.failures += 1
        if isinstance(reason, BaseException):
            traceback.print_exception(reason)
        self.put(what, None, None, failed=True, reason=_text(reason), **where)

    def left_out(self, what: str, reason: object, **where: Any) -> None:
        """Record why something was not done."""
        self.put(what, None, None, failed=False, reason=_text(reason), **where)


def _text(reason: object) -> str:
    """Return the reason in one line, with the type of an exception."""
    if isinstance(reason, BaseException):
        reason = f"{type(reason).__name__}: {reason}"
    return " ".join(str(reason).split())[:600]


def read(folder: Path) -> tuple[list[Line], int]:
    """Return the lines in ``folder``, and how many are unreadable (one, if truncated)."""
    path, found, unreadable = Path(folder) / FILE, [], 0
    if not path.exists():
        return found, unreadable
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and "what" in line:
            found.append(line)
        else:
            unreadable += 1
    return found, unreadable


def outcome(line: Line) -> str:
    """Return "ok", "FAILED" or "left out"."""
    if line["value"] is not None:
        return "ok"
    return "FAILED" if line["failed"] else "left out"


class Results:
    """Lines by subject; of several with the same subject the last counts.

    ``beside`` of a line says what else was timed in the same rounds, if a stage has several groups.
    """

    def __init__(self, lines: Sequence[Line]):
        self.all = list(lines)
        self.last: dict[tuple, Line] = {}
        for line in self.all:
            self.last[_key(line)] = line

    def value(self, stage: str, what: str, where: tuple = (None, None), backend=None):
        """Return the last value of (case, dtype) = ``where``, or None."""
        return self.line(stage, what, where, backend).get("value")

    def line(self, stage: str, what: str, where: tuple, backend=None, beside=None) -> Line:
        """Return the last line, or an empty one."""
        return self.last.get((stage, what, *where, backend, beside), {})

    def where(self, stage: str, *what: str) -> list[tuple[str, str]]:
        """Return every (case, dtype) for which a stage has figures, in order."""
        return list(dict.fromkeys(
            (x["case"], x["dtype"]) for x in self.all
            if x["stage"] == stage and x["what"] in what and x.get("value") is not None
        ))  # fmt: skip

    def backends(self, stage: str) -> list[str]:
        """Return the names of our backends for which a stage has lines."""
        names = {x["backend"] for x in self.all if x["stage"] == stage and x["what"] != "available"}
        return [name for name in ("triton", "cuda", "cpu") if name in names]


def _key(line: Line) -> tuple:
    more = next((line[name] for name in ("beside", "of", "test") if name in line), None)
    return line["stage"], line["what"], line["case"], line["dtype"], line["backend"], more

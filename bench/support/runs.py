"""Files of runs: a line of JSON each, which a kill may cut off."""

from __future__ import annotations

import json
import os
from datetime import date
from pathlib import Path

import torch
from pytest_benchmark.utils import get_commit_info

from spectral_kernels.cli.env import processor

from ..report.results import commit_name

FILE = "runs.jsonl"


def load(folder: Path) -> list[dict]:
    """Return the runs in a folder.

    Raises:
        ValueError: a line that is no run (a truncated last line is left out).
    """
    path = folder / FILE
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # the last is empty or truncated by a kill
    found = []
    for i, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {i}: invalid JSON: {error}") from None
    return found


def where() -> dict[str, str]:
    """Return commit, torch version, processor and date, which go with every run."""
    return {
        "commit": commit_name(get_commit_info()),
        "torch": torch.__version__, "processor": processor(), "date": date.today().isoformat(),
    }  # fmt: skip


def cut_off(path: Path) -> None:
    """Remove a last line that was truncated by a kill."""
    if path.exists() and not (data := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)

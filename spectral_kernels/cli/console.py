"""Shared by the commands: argument types, exit codes and messages."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

FAILED = 1
INTERRUPTED = 130  # as a shell reports a process that SIGINT has ended


def say(text: str, code: int = FAILED) -> int:
    """Print ``text`` on standard error, and return the exit code ``code``."""
    print(f"spectral-kernels: {text}", file=sys.stderr, flush=True)
    return code


def integer(at_least: int) -> Callable[[str], int]:
    """Return the argparse type of integers >= ``at_least``."""

    def parsed(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not at_least <= value < 2**63:
            raise argparse.ArgumentTypeError(f"got {text!r}; accepted are integers >= {at_least}")
        return value

    return parsed


def non_negative(text: str) -> float:
    """Return a finite number >= 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted are numbers from 0 on")
    return value


def writable(text: str) -> Path:
    """Return the path of a file that can be written."""
    path = Path(text)
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"got {text!r}; cannot write to folder '{path.parent}'")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"got {text!r}; it is a directory")
    return path


def png(text: str) -> Path:
    """Return the path of a PNG that can be written."""
    if Path(text).suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted are names that end in .png")
    return writable(text)


def split(text: str) -> tuple[str, int | tuple[int, ...]]:
    """Return name pattern and parts of ``PATTERN=N`` or ``PATTERN=SIZE,SIZE,...``."""
    pattern, _, sizes = text.rpartition("=")
    try:
        numbers = tuple(map(int, sizes.split(",")))
    except ValueError:
        numbers = ()
    if not pattern or not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(
            f"got {text!r}; accepted are PATTERN=N and PATTERN=SIZE,SIZE,..."
        )
    return pattern, numbers[0] if len(numbers) == 1 else numbers

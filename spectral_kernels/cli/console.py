"""Shared by the commands: argument types, exit codes, and messages that are safe to print."""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from ..diagnostics.untrusted import printable
from ..selection.arguments import one_of

FAILED = 1
INTERRUPTED = 130  # as a shell reports a process that SIGINT has ended


def say(text: str, code: int = FAILED, details: Sequence[str] = ()) -> int:
    """Print ``text`` in one line on standard error, and return the exit code ``code``.

    Args:
        text: the message; characters that steer a terminal are escaped.
        code: what the command returns.
        details: lines that follow the message, such as those of a traceback.
    """
    lines = f"spectral-kernels: {text}", *details
    print("\n".join(map(printable, lines)), file=sys.stderr, flush=True)
    return code


def tell(text: str) -> None:
    """Print ``text`` in one line on standard output."""
    print(printable(text), flush=True)


def counted(number: int, one: str, many: str) -> str:
    """Return a number with its noun: ``"1 matrix"``, ``"2 matrices"``."""
    return f"{number} {one if number == 1 else many}"


def some(names: Sequence[str], between: str = ", ", most: int = 3) -> str:
    """Return the first of many names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return between.join(names[:most]) + more


class Parser(argparse.ArgumentParser):
    """A parser whose errors are safe to print: a shell's ``*`` may put any name into them."""

    def error(self, message: str) -> NoReturn:
        """Print usage and message, and exit."""
        super().error(printable(message))


@contextlib.contextmanager
def escaped_output() -> Iterator[None]:
    """Let standard output be UTF-8 whatever the locale.

    A terminal shows the characters of its own encoding, so that it keeps that; others are escaped.
    """
    stream = sys.stdout
    if not isinstance(stream, io.TextIOWrapper):
        yield
        return
    encoding, errors = stream.encoding, stream.errors
    wanted = encoding if stream.isatty() else "utf-8"
    stream.reconfigure(encoding=wanted, errors="backslashreplace")
    try:
        yield
    finally:
        stream.reconfigure(encoding=encoding, errors=errors)


def integer(at_least: int, at_most: int = 2**63 - 1) -> Callable[[str], int]:
    """Return the argparse type of integers from ``at_least`` to ``at_most``."""
    most = "2**63 - 1" if at_most == 2**63 - 1 else at_most

    def parsed(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not at_least <= value <= at_most:
            raise argparse.ArgumentTypeError(
                f"expected an integer from {at_least} to {most}, got {text!r}"
            )
        return value

    return parsed


def non_negative(text: str) -> float:
    """Return a finite number >= 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number >= 0, got {text!r}")
    return value


def writable(text: str) -> Path:
    """Return the path of a file that can be written."""
    path = Path(text)
    if not os.path.isdir(path.parent) or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(
            f"expected a file in a folder that can be written to, got {text!r} in '{path.parent}'"
        )
    if os.path.isdir(path):
        raise argparse.ArgumentTypeError(f"expected a file, got {text!r}, a directory")
    return path


def named(*suffixes: str) -> Callable[[str], Path]:
    """Return the argparse type of files that can be written, with one of several suffixes."""

    def parsed(text: str) -> Path:
        if Path(text).suffix.lower() not in suffixes:
            raise argparse.ArgumentTypeError(
                f"expected a name that ends in {one_of(suffixes)}, got {text!r}"
            )
        return writable(text)

    return parsed


picture_path = named(".png", ".pdf", ".svg")
page_path = named(".html", ".htm")


def split(text: str) -> tuple[str, int | tuple[int, ...], int | None]:
    """Return name pattern, parts and dimension of ``PATTERN=N`` or ``PATTERN=SIZE,SIZE,...``.

    The dimension, 0 or 1, follows as ``@1``; None without.
    """
    pattern, _, sizes = text.rpartition("=")
    sizes, _, dim = sizes.partition("@")
    try:
        numbers = tuple(map(int, sizes.split(",")))
    except ValueError:
        numbers = ()
    if not pattern or not numbers or min(numbers) < 1 or dim not in ("", "0", "1"):
        raise argparse.ArgumentTypeError(
            "expected PATTERN=N or PATTERN=SIZE,SIZE,..., both also with @0 or @1 for a dimension, "
            f"got {text!r}"
        )
    return pattern, numbers[0] if len(numbers) == 1 else numbers, int(dim) if dim else None

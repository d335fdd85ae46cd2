"""The command line: environment, demo, inspection of checkpoints, plots of logs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from .. import __version__
from . import env
from .console import FAILED, INTERRUPTED, Parser, escaped_output
from .demo import command as demo
from .inspect import command as inspect
from .plot import command as plot


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    with escaped_output():
        return _run(argv)


def _run(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        code = arguments.command(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of the pipe is gone; discard the rest of the buffer.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _parser() -> Parser:
    parser = Parser(prog="spectral-kernels", description="Spectral regularization for PyTorch.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in (env, demo, inspect, plot):
        command.add_parser(commands)
    return parser

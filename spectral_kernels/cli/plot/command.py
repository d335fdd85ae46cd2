"""The command ``spectral-kernels plot``: the plot of a log that log_to() has written."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...diagnostics import log as logs
from ..console import counted, picture_path, say, tell


def add_parser(commands) -> None:
    """Add the command to the subparsers ``commands``."""
    parser = commands.add_parser(
        "plot",
        help="the picture of a log of log_to(): sigma and residuals over the steps",
        description="Draw sigma_1 of every matrix over the steps, also of a run that goes on.",
    )
    parser.add_argument("log", type=Path, metavar="LOG", help=".csv or .jsonl file")
    parser.add_argument("--out", type=picture_path, metavar="FILE",
                         help=".png, .pdf or .svg; default: a .png beside the log")  # fmt: skip
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return the exit code."""
    log = arguments.log
    try:
        from . import picture

        history = logs.read(log)
        out = arguments.out or log.with_suffix(".png")
        picture.draw(history, log.name, out)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        return say("plot needs matplotlib: pip install 'spectral_kernels[plot]'")
    except logs.LogError as error:
        return say(str(error))
    except OSError as error:
        return say(f"{error.filename or arguments.out or log}: {error.strerror or error}")
    except MemoryError:
        return say(f"{log}: it needs more memory than this machine has")
    except (ArithmeticError, ValueError) as error:
        return say(f"{log}: it cannot be drawn: {error}")
    first, last = history.steps[0], history.steps[-1]
    matrices = counted(len(history.names), "matrix", "matrices")
    rows = counted(len(history.steps), "row", "rows")
    tell(f"{matrices}, {rows}, steps {first} to {last}")
    tell(f"picture: {out}")
    return 0

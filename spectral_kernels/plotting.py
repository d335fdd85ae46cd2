"""The command ``spectral-kernels plot``: the picture of a log that log_to() has written."""

from __future__ import annotations

import argparse
import sys

from . import logs


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line asks for and return the exit code."""
    out = arguments.out or arguments.log.with_suffix(".png")
    try:
        from . import log_plots

        history = logs.read(arguments.log)
        log_plots.draw(history, arguments.log.name, out)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        return _fail("plot needs matplotlib: pip install 'spectral_kernels[plot]'")
    except logs.LogError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename or out}: {error.strerror or error}")
    first, last = history.steps[0], history.steps[-1]
    print(f"{len(history.names)} matrices, {len(history.steps)} rows, steps {first} to {last}")
    print(f"picture: {out}", flush=True)
    return 0


def _fail(text: str) -> int:
    print(f"spectral-kernels: {text}", file=sys.stderr, flush=True)
    return 1

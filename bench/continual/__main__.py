"""``python -m bench.continual``: run methods on streams of tasks, and report the results."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from pathlib import Path

from rich.console import Console

from . import report
from .methods import METHODS
from .models import MODELS
from .runner import run_all
from .train import NAMES, OWN_DATA, Key


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options, names split at their commas."""
    parser = argparse.ArgumentParser(prog="python -m bench.continual", description=__doc__)
    parser.add_argument("--out", default="continual", type=Path,
                        help="folder; what is there is not run again")  # fmt: skip
    parser.add_argument("--problem", default="random_labels", help=", ".join(NAMES))
    parser.add_argument("--data", default="digits", help="digits, textures")
    parser.add_argument("--model", default="mlp", help=", ".join((*MODELS, "ppo (of cartpole)")))
    parser.add_argument("--methods", default="none,l2,spectral", help=", ".join(METHODS))
    parser.add_argument("--strengths", default="default",
                        help="of the methods that have one, e.g. 1e-4,1e-3")  # fmt: skip
    parser.add_argument("--seeds", default=5, type=int)
    parser.add_argument("--tasks", default=40, type=int)
    parser.add_argument("--epochs", default=40, type=int, help="per task")
    parser.add_argument("--workers", default=len(os.sched_getaffinity(0)), type=int)
    return parser.parse_args(argv)


def keys(options: argparse.Namespace) -> list[Key]:
    """Return the runs that are asked for.

    Raises:
        ValueError: an unknown name, or a method that does not suit the model.
    """
    found = []
    names = (getattr(options, name).split(",") for name in ("problem", "data", "model", "methods"))
    for problem, data, model, method in itertools.product(*names):
        data = "none" if problem in OWN_DATA else data
        own = METHODS[method].strengths if method in METHODS else ()
        if own and options.strengths != "default":
            own = tuple(map(float, options.strengths.split(",")))
        for strength in own or (0.0,):
            first = Key(problem, data, model, method, strength, 0, options.tasks, options.epochs)
            first.check()
            found += [first._replace(seed=seed) for seed in range(options.seeds)]
    # Seed by seed, so that an interrupted call has runs of every method.
    return sorted(found, key=lambda key: key.seed)


def main(argv: list[str] | None = None) -> int:
    """Run, then write the report of everything in the folder."""
    argv = sys.argv[1:] if argv is None else argv
    console = Console()
    if argv[:1] == ["report"]:
        parser = argparse.ArgumentParser(prog="python -m bench.continual report")
        parser.add_argument("folder", type=Path)
        folder = parser.parse_args(argv[1:]).folder
    else:
        options = parse(argv)
        folder = options.out
        try:
            wanted = keys(options)
        except ValueError as error:
            console.print(f"[red]{error}")
            return 2
        try:
            run_all(wanted, folder, options.workers, console)
        except KeyboardInterrupt:
            console.print("interrupted: the same command goes on where this one was")
            return 130
    for path in report.write(folder):
        console.print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""``python -m bench.continual``: run methods on streams of tasks, and report the results."""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
import sys
from pathlib import Path

from rich.console import Console

from . import checks, own, report
from .data import DATA
from .methods import METHODS
from .models import MODELS
from .runner import WorkersEndedError, run_all, say, words
from .train import LR, NAMES, OWN_DATA, Key

DEFAULTS = {"problem": "random_labels", "data": "digits", "model": "mlp",
            "method": "none,l2,spectral"}  # fmt: skip
LISTED = 5  # failed runs that are named at the end


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options, names as lists."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.continual", description=__doc__,
        epilog="Problems, models and methods: names separated by commas, options may be repeated; "
        "FILE.py:CLASS is a class of one's own, see README.md.",
    )  # fmt: skip
    parser.add_argument("--out", default="continual", type=Path,
                        help="folder; what is there is not run again")  # fmt: skip
    for name, known in {
        "problem": NAMES, "data": tuple(DATA), "model": (*MODELS, "ppo (cartpole, slippery)"),
        "method": METHODS,
    }.items():  # fmt: skip
        flags = [f"--{name}", "--methods"] if name == "method" else [f"--{name}"]
        more = "" if name == "data" else ", FILE.py:CLASS"
        parser.add_argument(*flags, dest=name, action="append", metavar="NAMES",
                            help=f"{', '.join(known)}{more}; {DEFAULTS[name]}")  # fmt: skip
    parser.add_argument("--strengths", default="default",
                        help="of the methods that have one, e.g. 1e-4,1e-3")  # fmt: skip
    parser.add_argument("--lrs", default=f"{LR:g}", help="learning rates; %(default)s")
    parser.add_argument("--seeds", default=5, type=int)
    parser.add_argument("--first-seed", default=0, type=int)
    parser.add_argument("--tasks", default=40, type=int)
    parser.add_argument("--epochs", default=40, type=int, help="per task")
    parser.add_argument("--limit", default=math.inf, type=float,
                        help="seconds of a run; longer ones are recorded as failed")  # fmt: skip
    parser.add_argument("--budget", default=math.inf, type=float,
                        help="seconds after which no run begins; call again to go on")  # fmt: skip
    parser.add_argument("--workers", default=len(os.sched_getaffinity(0)), type=int)
    options = parser.parse_args(argv)
    for name, default in DEFAULTS.items():
        setattr(options, name, ",".join(getattr(options, name) or [default]).split(","))
    return options


def keys(options: argparse.Namespace) -> list[Key]:
    """Return the runs that are asked for.

    Raises:
        ValueError: an unknown name, a method that does not suit the model, or a class of one's own
            that is not what is expected.
    """
    found = []
    names = {name: getattr(options, name) for name in DEFAULTS}
    for kind in own.KINDS:
        names[kind] = [own.register(kind, name) if own.is_own(name) else name
                       for name in names[kind]]  # fmt: skip
    for problem, data, model, method in itertools.product(*names.values()):
        data = "none" if problem in OWN_DATA or own.known(problem) else data
        strengths = checks.strengths(method)
        if strengths and options.strengths != "default":
            strengths = tuple(map(float, options.strengths.split(",")))
        for strength in strengths or (0.0,):
            first = Key(problem, data, model, method, strength, 0, options.tasks, options.epochs)
            checks.check(first)
            seeds = range(options.first_seed, options.first_seed + options.seeds)
            found += [first._replace(seed=seed, lr=float(lr))
                      for seed in seeds for lr in options.lrs.split(",")]  # fmt: skip
    # Seed by seed, so that an interrupted call has runs of every method.
    return sorted(dict.fromkeys(found), key=lambda key: key.seed)


def main(argv: list[str] | None = None) -> int:
    """Run, then write the report of everything in the folder.

    Returns:
        0; 1 if runs failed or worker processes ended, 2 for a wrong option, 130 for Ctrl-C.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        # A worker that imports a script without a guard; run_all() explains it, once.
        raise SystemExit(1)
    own.refuse_restart()
    argv = sys.argv[1:] if argv is None else argv
    console = Console()
    failures = []
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
            return _fail(console, error, 2)
        try:
            failures = run_all(wanted, folder, options.workers, console, options.limit,
                               options.budget)  # fmt: skip
        except WorkersEndedError as error:
            return _fail(console, error, 1)
        except KeyboardInterrupt:
            console.print("interrupted: the same command goes on where this one was")
            return 130
    try:
        for path in report.write(folder):
            console.print(f"wrote {path}", soft_wrap=True)
    except ValueError as error:
        return _fail(console, error, 1)
    if failures:
        failed = [words(failure.key) for failure in failures]
        listed = ", ".join(failed[:LISTED]) + (", ..." if len(failed) > LISTED else "")
        return _fail(console, f"{len(failed)} of {len(wanted)} runs failed, the same command tries "
                     f"them again: {listed}", 1)  # fmt: skip
    return 0


def _fail(console: Console, message: object, code: int) -> int:
    say(console, str(message))
    return code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except own.StartsWorkError as error:
        sys.exit(f"{os.environ[own.VARIABLE]} {error} while it is imported: {own.GUARD}")

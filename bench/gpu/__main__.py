"""One stage in this process: ``python -m bench.gpu STAGE FOLDER --until SECONDS``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import group, outside, parallel
from .lines import Lines


def main() -> int:
    """Run the stage; the exit code is 1 if something failed."""
    parser = argparse.ArgumentParser(prog="bench.gpu")
    parser.add_argument("stage")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--until", type=float, required=True, help="time.monotonic() at its end")
    parser.add_argument("--cases", default="")
    parser.add_argument("--after")
    parser.add_argument("--without", default="")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    group.end_with_parent()
    lines = Lines(arguments.folder, arguments.stage, arguments.dry_run)
    code = _run(lines, arguments)
    return code or int(lines.failures > 0 or bool(arguments.without))


def _run(lines: Lines, arguments: argparse.Namespace) -> int:
    if lines.stage == "build":
        outside.build(lines)
    elif lines.stage == "tests":
        return outside.tests(lines)
    elif lines.stage == "memcheck":
        outside.memcheck(lines, ("triton", "cuda"), arguments.until)
    elif lines.stage in ("cuda", "triton") and not lines.dry_run:
        parallel.backend(lines, lines.stage, arguments.until)
    else:
        _measure(lines, arguments)
    return 0


def _measure(lines: Lines, arguments: argparse.Namespace) -> None:
    """Run a stage that imports torch."""
    from . import checks, kernels, loops, optimizers
    from .job import Job

    job = Job(
        lines, "cpu" if lines.dry_run else "cuda", arguments.until,
        tuple(arguments.cases.split(",")), tuple(filter(None, arguments.without.split(","))),
        arguments.after,
    )  # fmt: skip
    stages = {
        "versions": checks.versions,
        "compile": checks.compile_core,
        "cuda": lambda job: checks.backend(job, "cpu"),
        "triton": lambda job: checks.backend(job, "triton"),
        "kernels": kernels.run,
        "optimizers": optimizers.run,
        "loops": loops.run,
    }
    if lines.stage in ("kernels", "optimizers", "loops"):
        job.leave_out_unavailable()
    stages[lines.stage](job)


if __name__ == "__main__":
    sys.exit(main())

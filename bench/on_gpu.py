"""Check and time everything on a GPU in minutes: ``python -m bench.on_gpu FOLDER --budget 400``.

Builds the module, checks both backends, times kernels, steps, optimizers and loops, runs the tests
marked gpu and memcheck, most important first and within the budget, whatever fails or hangs. FOLDER
gets results.jsonl (a line per measurement, written at once), table.md and the outputs of the
stages; bench/README.md says how to read them.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .gpu import stages
from .gpu.environment import cuda_device, environment, sources
from .gpu.lines import FILE, Lines, read
from .gpu.stages import Stage
from .gpu.table import table

CASES = ("vit_b", "llama_1b", "gpt2", "resnet18", "one_huge", "mlp")
# Timings need an idle machine: they wait for these background stages.
QUIET = ("build", "compile")
# Seconds in a run of 400, stages that it needs, whether it is in the background. The seconds of
# foreground stages are scaled to the time left when they start, see ``gpu.stages``.
SECONDS = {
    "build": (110, (), True), "versions": (20, (), False), "compile": (70, (), True),
    "cuda": (20, ("build",), False), "triton": (30, ("compile",), False),
    "kernels": (110, QUIET, False), "optimizers": (40, QUIET, False), "loops": (75, QUIET, False),
    "tests": (75, QUIET, False), "memcheck": (40, QUIET, False),
}  # fmt: skip
# Slower in a rehearsal: Triton's interpreter, the C++ compiler, imports beside background stages.
_REHEARSED = {"versions": 40, "triton": 60, "loops": 75}
# Tiny cases gain nothing from a second thread.
_REHEARSAL = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
_LOGS = {"build": "build.txt", "compile": "compile.txt", "tests": "tests.txt"}


def chosen(arguments: argparse.Namespace, folder: Path) -> list[Stage]:
    """Return the stages that were asked for."""
    found = []
    for name, (seconds, needs, background) in SECONDS.items():
        if (arguments.only and name not in arguments.only) or (
            name == "build" and arguments.no_build
        ):
            continue
        if arguments.dry_run:
            seconds = _REHEARSED.get(name, seconds)
        command = [sys.executable, "-u", "-m", "bench.gpu", name, str(folder)]
        command += [f"--cases={','.join(arguments.cases)}"] + ["--dry-run"] * arguments.dry_run
        found.append(
            Stage(
                name, seconds, lambda until, command=command: [*command, f"--until={until}"],
                _LOGS.get(name, "stages.log"), needs, background,
                _REHEARSAL if arguments.dry_run and name != "tests" else {},
            )
        )  # fmt: skip
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is that of the first stage that failed."""
    begin = time.monotonic()
    arguments = _parser().parse_args(argv)
    folder = arguments.folder.resolve()
    if arguments.table:
        print(table(*read(folder)))
        return 0
    device = None if arguments.dry_run else cuda_device()
    if device is None and not arguments.dry_run:
        return _refuse("the driver shows no CUDA device; --dry-run rehearses on a CPU")
    if (reason := _not_ours(folder, arguments)) is not None:
        return _refuse(reason)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / FILE).exists():
        own = environment(device)
        Lines(folder, "run", arguments.dry_run).put("environment", None, None, environment=own)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    code = 130
    try:
        code = stages.run(chosen(arguments, folder), folder, arguments.budget, arguments.dry_run,
                          lambda text: _said(folder, text), begin)  # fmt: skip
    except KeyboardInterrupt:
        pass
    finally:
        print(_write_table(folder), flush=True)
    return code


def _said(folder: Path, text: str) -> None:
    """Print how a stage ended, and update the table."""
    print(text, flush=True)
    _write_table(folder)


def _write_table(folder: Path) -> str:
    text = table(*read(folder))
    (folder / "table.md").write_text(f"```\n{text}\n```\n")
    return text


def _refuse(reason: str) -> int:
    print(f"bench.on_gpu: {reason}", file=sys.stderr)
    return 2


def _not_ours(folder: Path, arguments: argparse.Namespace) -> str | None:
    """Return why this run cannot add to the results in ``folder``, or None."""
    lines, _ = read(folder)
    known = next((line for line in lines if line["what"] == "environment"), None)
    if known is None:
        return None
    if not arguments.only:
        return f"{folder}: expected a new folder, or --only to add to it, got one with results"
    if known["dry_run"] != arguments.dry_run:
        return f"{folder}: figures of a dry run and of a GPU do not go into one file"
    if known["environment"]["sources"] != sources():
        return f"{folder}: expected results of these sources, got others (name a new folder)"
    return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.on_gpu", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--budget", type=_seconds, default=stages.BUDGET, metavar="SECONDS",
                        help="that the whole takes at most (default: %(default)g)")  # fmt: skip
    parser.add_argument("--only", action="append", choices=tuple(SECONDS), metavar="STAGE",
                        help="one of " + ", ".join(SECONDS) + "; may be repeated")  # fmt: skip
    parser.add_argument("--no-build", action="store_true", help="take the module that is there")
    parser.add_argument("--cases", type=_cases, default=CASES, metavar="CASE,CASE",
                        help="some of " + ", ".join(CASES))  # fmt: skip
    parser.add_argument("--dry-run", action="store_true",
                        help="rehearse everything on a CPU, with tiny cases")  # fmt: skip
    parser.add_argument("--table", action="store_true", help="show the table of FOLDER again")
    return parser


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 10 <= value <= 86400:
        raise argparse.ArgumentTypeError(f"expected seconds from 10 to 86400, got {text!r}")
    return value


def _cases(text: str) -> tuple[str, ...]:
    found = tuple(text.split(","))
    if unknown := set(found) - set(CASES):
        raise argparse.ArgumentTypeError(
            f"expected some of {', '.join(CASES)}, got {', '.join(sorted(unknown))}"
        )
    return found


if __name__ == "__main__":
    sys.exit(main())

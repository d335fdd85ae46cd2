"""The command ``spectral-kernels inspect``: the singular values of a checkpoint's matrices."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ...diagnostics.checkpoints import Checkpoint, CheckpointError
from ...selection.convolutions import CHOICES
from ..console import FAILED, integer, non_negative, png, say, split, tell, writable
from . import report, table
from .measure import Patterns, measure, planned
from .rows import SORTS, Measured
from .spectrum import MOST_VALUES, SIDE_LIMIT, SpectrumOptions

USAGE, ABOVE = 2, 3  # exit codes


def add_parser(commands) -> None:
    """Add the command to the subparsers ``commands``."""
    parser = commands.add_parser(
        "inspect",
        help="largest singular values and stable ranks of the matrices of a checkpoint",
        description=(
            "Measure the matrices of a checkpoint, or compare two by name. Every tensor with two "
            "or more dimensions is a matrix (dim 0, rest). PATTERN is a glob pattern of names, as "
            "'*.mlp.*', and such options may be repeated."
        ),
        epilog="Exit codes: 0 fine, 1 could not read or write, 2 wrong usage, 3 --fail-above.",
    )
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT",
        help=".safetensors, .pt, .pth, .bin or .ckpt file, *.index.json, or a directory of them",
    )  # fmt: skip
    parser.add_argument("other", type=Path, nargs="?", metavar="OTHER",
                         help="a second checkpoint: changes from the first to it")  # fmt: skip
    several = {"action": "append", "metavar": "PATTERN"}
    parser.add_argument("--include", "--filter", **several, help="take these only")
    parser.add_argument("--exclude", **several, default=[], help="leave these out")
    parser.add_argument(
        "--splits", action="append", default=[], type=split, metavar="PATTERN=N",
        help="divide dim 0 into N equal parts, or by sizes: '*.qkv.weight=768,256,256'",
    )  # fmt: skip
    parser.add_argument("--stacked", **several, default=[], help="E matrices from (E, out, in)")
    parser.add_argument(
        "--convolutions", choices=CHOICES, default=CHOICES[0],
        help="operator: also the norms of the convolutions whose kernels have 3 to 5 dimensions, "
        "for stride 1 and one group",
    )  # fmt: skip
    parser.add_argument(
        "--values", type=integer(1, MOST_VALUES), metavar="K",
        help=f"the K largest singular values, up to {MOST_VALUES}; of matrices that are small "
        "enough also condition, effective rank, tail exponent and the values above the noise",
    )  # fmt: skip
    parser.add_argument(
        "--spectrum-limit", type=integer(0), default=SIDE_LIMIT, metavar="N",
        help="small enough for --values: the shorter side is N at most (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--heads", type=integer(1), metavar="N",
                         help="heads of every attention layer (default: config.json)")  # fmt: skip
    parser.add_argument("--sort", choices=SORTS,
                         help="largest first (default: as the layers come)")  # fmt: skip
    parser.add_argument("--top", type=integer(1), metavar="N",
                         help="the first N after sorting, by default by sigma")  # fmt: skip
    parser.add_argument("--json", type=writable, metavar="FILE", help="- for standard output")
    parser.add_argument(
        "--csv", type=writable, metavar="FILE",
        help="- for standard output; names that a spreadsheet would take for formulas begin with '",
    )  # fmt: skip
    parser.add_argument("--plot", type=png, metavar="FILE.png", help="sigma_1 over depth")
    parser.add_argument("--fail-above", type=non_negative, metavar="X",
                         help="exit code 3 if a sigma_1 is above X or not finite")  # fmt: skip
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return the exit code."""
    try:
        return _run(arguments)
    except CheckpointError as error:
        return say(str(error), FAILED)
    except KeyboardInterrupt:
        say("interrupted", FAILED)
        raise
    except BrokenPipeError:
        raise  # the command line's, not one of a file
    except OSError as error:
        return say(f"{error.filename or 'output'}: {error.strerror or error}", FAILED)


def _run(arguments: argparse.Namespace) -> int:
    to_stdout = [o for o in (arguments.json, arguments.csv) if o is not None and str(o) == "-"]
    if len(to_stdout) > 1:
        return say("--json - and --csv -: only one of them can go to standard output", USAGE)
    if arguments.sort == "change" and arguments.other is None:
        return say("--sort change: needs a second checkpoint", USAGE)
    _need("matplotlib" if arguments.plot else None, None if to_stdout else "rich")

    patterns = Patterns(
        arguments.include, arguments.exclude, dict(arguments.splits), arguments.stacked,
        arguments.convolutions,
    )  # fmt: skip
    spectra = None
    if arguments.values is not None:
        spectra = SpectrumOptions(arguments.values, arguments.spectrum_limit)
    paths = [p for p in (arguments.checkpoint, arguments.other) if p is not None]
    checkpoints = [Checkpoint(path) for path in paths]
    for checkpoint in checkpoints:
        if not checkpoint.tensors:
            raise CheckpointError(f"{checkpoint.path}: holds no tensor")
    try:
        patterns.check([e.name for checkpoint in checkpoints for e in checkpoint.tensors])
        plans = [planned(c, patterns, spectra, arguments.heads) for c in checkpoints]
    except ValueError as error:  # patterns that do not fit the checkpoint
        return say(str(error), USAGE)
    measured = []
    with _progress(sum(plan.elements for plan in plans)) as step:
        for plan in plans:
            measured.append(measure(plan, step))
            plan.checkpoint.close()

    result = report.Result.of(measured, arguments.sort, arguments.top)
    for target, text in ((arguments.json, report.as_json), (arguments.csv, report.as_csv)):
        if target is not None and str(target) == "-":
            sys.stdout.write(text(result))
            sys.stdout.flush()
        elif target is not None:
            target.write_text(text(result), encoding="utf-8")
    if arguments.plot is not None:
        from . import picture

        picture.draw_layers(*report.curves(result), arguments.plot)
    if not to_stdout:
        table.show(result)
        if arguments.plot is not None:
            tell(f"picture: {arguments.plot}")
    return _above(measured, arguments.fail_above)


def _above(measured: Sequence[Measured], limit: float | None) -> int:
    """Report matrices above the limit or not finite, and return the exit code."""
    if limit is None:
        return 0
    above = [(one.path, row) for one in measured for row in one.rows if not row.sigma <= limit]
    for path, row in above[:10]:
        where = f"{path}: " if len(measured) > 1 else ""
        say(f"{where}{row.name}: sigma_1 {row.sigma:.4g} is above {limit:g}", ABOVE)
    if len(above) > 10:
        say(f"and {len(above) - 10} more", ABOVE)
    return ABOVE if above else 0


def _need(*packages: str | None) -> None:
    for package in packages:
        # A blocked package is None in sys.modules.
        blocked = package in sys.modules and sys.modules[package] is None
        if package and (blocked or importlib.util.find_spec(package) is None):
            raise CheckpointError(
                f"inspect needs {package}: pip install 'spectral_kernels[inspect]'"
            )


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[str, int], None]]:
    """Show a progress bar if stderr is a terminal; yield ``step``."""
    if not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        yield lambda name, elements: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.text import Text

    columns = (
        BarColumn(bar_width=25),
        TextColumn("{task.percentage:3.0f} %"),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=max(total, 1))

        def step(name: str, done: int) -> None:
            short = Text(name)
            short.truncate(max(bar.console.width - 50, 10), overflow="ellipsis")
            bar.update(task, advance=done, description=short.plain)

        yield step

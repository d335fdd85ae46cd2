"""The command ``spectral-kernels inspect``: the singular values of a checkpoint's matrices."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence, Set
from pathlib import Path

from ...diagnostics.checkpoints import Checkpoint, CheckpointError
from ...selection.convolutions import CHOICES
from ..console import (
    FAILED,
    integer,
    non_negative,
    page_path,
    picture_path,
    say,
    split,
    tell,
    writable,
)
from . import base, check, report, terminal
from .matching import Matching, matched
from .measure import Patterns, Plan, measure, planned
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
            "or more dimensions is a matrix (dim 0, rest), but for those that are known to hold "
            "several. PATTERN is a glob pattern of names, as '*.mlp.*', and such options may be "
            "repeated. Formats, columns and options: docs/inspect.md."
        ),
        epilog="Exit codes: 0 fine, 1 could not read, write or compare, 2 wrong usage, "
        "3 --fail-above or --check.",
    )
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT",
        help="a file of safetensors or torch.save, *.index.json, or a directory of them",
    )  # fmt: skip
    parser.add_argument("other", type=Path, nargs="?", metavar="OTHER",
                         help="a second checkpoint: changes from the first to it")  # fmt: skip
    parser.add_argument(
        "--base", type=Path, metavar="MODEL",
        help="the model that CHECKPOINT is an adapter of, or was fine-tuned from: what is added",
    )  # fmt: skip
    several = {"action": "append", "metavar": "PATTERN"}
    parser.add_argument("--include", "--filter", **several, help="take these only")
    parser.add_argument("--exclude", **several, default=[], help="leave these out")
    parser.add_argument(
        "--splits", action="append", default=[], type=split, metavar="PATTERN=N",
        help="divide the outputs into N equal parts, or by sizes: '*.qkv.weight=768,256,256'; they "
        "are dim 0, where nothing else is known, or as told: '*.c_attn.weight=3@1'",
    )  # fmt: skip
    parser.add_argument(
        "--no-splits", action="store_true",
        help="leave weights whole that are known to hold several matrices, such as q, k and v",
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
    parser.add_argument("--experts", action="store_true",
                         help="a line per expert, instead of one per stack of experts")  # fmt: skip
    parser.add_argument(
        "--check", action="store_true",
        help="only look for values that are not finite, in every tensor: exit code 3 if there are",
    )  # fmt: skip
    parser.add_argument("--json", type=writable, metavar="FILE", help="- for standard output")
    parser.add_argument(
        "--csv", type=writable, metavar="FILE",
        help="- for standard output; names that a spreadsheet would take for formulas begin with '",
    )  # fmt: skip
    parser.add_argument("--plot", type=picture_path, metavar="FILE",
                         help="sigma_1 over depth, as .png, .pdf or .svg")  # fmt: skip
    parser.add_argument("--html", type=page_path, metavar="FILE",
                         help="a page: the table, to sort and filter, and the picture")  # fmt: skip
    parser.add_argument(
        "--fail-above", type=non_negative, metavar="X",
        help="exit code 3 if a sigma_1 is above X, or anything is not finite",
    )  # fmt: skip
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
        return say("--sort change: expected two checkpoints, got one", USAGE)
    if arguments.base is not None and arguments.other is not None:
        return say("--base: expected one checkpoint, got two (they are compared without it)", USAGE)
    if arguments.check and (wrong := _not_of_check(arguments)):
        wanted = "no other options than --include, --exclude and --json"
        return say(f"--check: expected {wanted}, got {wrong}", USAGE)
    _need("matplotlib" if arguments.plot or arguments.html else None,
          None if to_stdout or arguments.check else "rich")  # fmt: skip

    splits = {pattern: sizes for pattern, sizes, _ in arguments.splits}
    dims = {pattern: dim for pattern, _, dim in arguments.splits if dim is not None}
    patterns = Patterns(
        arguments.include, arguments.exclude, splits, arguments.stacked,
        arguments.convolutions, dims, not arguments.no_splits,
    )  # fmt: skip
    spectra = None
    if arguments.values is not None:
        spectra = SpectrumOptions(arguments.values, arguments.spectrum_limit)
    paths = [p for p in (arguments.checkpoint, arguments.other) if p is not None]
    # What is stored is looked through, not the weights that are made of it.
    checkpoints = [Checkpoint(path, effective=not arguments.check) for path in paths]
    for checkpoint in checkpoints:
        if not checkpoint.tensors:
            raise CheckpointError(f"{checkpoint.path}: holds no tensor{_why_none(checkpoint)}")
    compares = len(checkpoints) > 1 and not arguments.check
    matching = _matched(checkpoints) if compares else Matching()
    try:
        patterns.check([e.name for checkpoint in checkpoints for e in checkpoint.tensors])
        if arguments.check:
            return _check(checkpoints, arguments)
        config = next((c.config for c in checkpoints if c.config), {})
        plans = [
            planned(c, patterns, c.config or config, spectra, arguments.heads) for c in checkpoints
        ]
    except ValueError as error:  # patterns that do not fit the checkpoint
        return say(str(error), USAGE)
    if compares:
        _check_common(plans, matching.notes)
    measured = []
    with _progress(sum(plan.work + base.work(plan, arguments.base) for plan in plans)) as step:
        for plan in plans:
            measured.append(measure(plan, step))
            if arguments.base is not None:
                with Checkpoint(arguments.base) as model:
                    base.compare(plan, model, measured[-1], step)
            plan.checkpoint.close()

    has_all = arguments.experts or arguments.top is not None
    result = report.Result.of(measured, arguments.sort, arguments.top, matching.notes, has_all)
    for target, text in ((arguments.json, report.as_json), (arguments.csv, report.as_csv)):
        if target is not None and str(target) == "-":
            sys.stdout.write(text(result))
            sys.stdout.flush()
        elif target is not None:
            target.write_text(text(result), encoding="utf-8")
    if arguments.plot is not None:
        from . import picture

        picture.draw_layers(*report.curves(result), arguments.plot, arguments.fail_above)
    if arguments.html is not None:
        from . import page

        arguments.html.write_text(page.as_html(result, arguments.fail_above), encoding="utf-8")
    if not to_stdout:
        terminal.show(result)
        if arguments.plot is not None:
            tell(f"picture: {arguments.plot}")
        if arguments.html is not None:
            tell(f"page: {arguments.html}")
    return _above(measured, arguments.fail_above)


def _why_none(checkpoint: Checkpoint) -> str:
    """Return what was left out of a checkpoint of which nothing is shown, and why."""
    said = [f"{skipped.name}: {skipped.reason}" for skipped in checkpoint.skipped[:3]]
    more = len(checkpoint.skipped) - len(said)
    return "".join(f"; {text}" for text in said) + (f"; and {more} more" if more else "")


def _matched(checkpoints: Sequence[Checkpoint]) -> Matching:
    """Give the tensors of the second checkpoint the names that they have in the first one."""
    shapes = [{e.name: e.shape for e in c.tensors if not e.in_optimizer} for c in checkpoints]
    found = matched(*shapes)
    checkpoints[1].tensors = found.renamed(checkpoints[1].tensors)
    return found


def _check_common(plans: Sequence[Plan], notes: Sequence[str]) -> None:
    """Raise CheckpointError if two checkpoints have no matrix in common, however it is named."""
    first, other = plans
    if set(first.matrices) & set(other.matrices):
        return
    examples = [f"'{next(iter(plan.matrices))}' in {plan.checkpoint.path}"
                for plan in plans if plan.matrices]  # fmt: skip
    said = ", such as " + " and ".join(examples) if examples else ""
    raise CheckpointError("; ".join([f"nothing to compare: no matrix is in both{said}", *notes]))


def _not_of_check(arguments: argparse.Namespace) -> str:
    """Return the options that were given and say nothing to --check."""
    given = {
        "--csv": arguments.csv, "--plot": arguments.plot, "--top": arguments.top,
        "--sort": arguments.sort, "--splits": arguments.splits, "--stacked": arguments.stacked,
        "--no-splits": arguments.no_splits, "--experts": arguments.experts,
        "--html": arguments.html, "--base": arguments.base, "--values": arguments.values,
        "--heads": arguments.heads, "--convolutions": arguments.convolutions != CHOICES[0],
        "--spectrum-limit": arguments.spectrum_limit != SIDE_LIMIT,
        "--fail-above": arguments.fail_above is not None or None,
    }  # fmt: skip
    return ", ".join(option for option, value in given.items() if value)


def _check(checkpoints: Sequence[Checkpoint], arguments: argparse.Namespace) -> int:
    """Look through checkpoints for values that are not finite, and return the exit code."""
    taken = [check.chosen(c.tensors, arguments.include, arguments.exclude) for c in checkpoints]
    results = []
    with _progress(sum(map(check.elements, taken))) as step:
        for checkpoint, entries in zip(checkpoints, taken, strict=True):
            results.append(check.check(checkpoint, entries, step))
            checkpoint.close()
    if arguments.json is not None and str(arguments.json) != "-":
        arguments.json.write_text(check.as_json(results), encoding="utf-8")
    if str(arguments.json) == "-":
        sys.stdout.write(check.as_json(results))
    else:
        for result in results:
            for line in check.lines(result):
                tell(line)
    return ABOVE if any(result.bad for result in results) else 0


def _above(measured: Sequence[Measured], limit: float | None) -> int:
    """Report matrices above the limit or not finite, and return the exit code."""
    if limit is None:
        return 0
    said = []
    for one in measured:
        where = f"{one.path}: " if len(measured) > 1 else ""
        said += [f"{where}{bad.name}: {bad.counts}" for bad in one.not_finite]
        bad_names = {bad.name for bad in one.not_finite}
        said += [f"{where}{row.name}: sigma_1 {row.sigma:.4g} is above {limit:g}"
                 for row in one.rows if not row.sigma <= limit
                 and (row.sigma > limit or not _is_of(row.name, bad_names))]  # fmt: skip
    for line in said[:10]:
        say(line, ABOVE)
    if len(said) > 10:
        say(f"and {len(said) - 10} more", ABOVE)
    return ABOVE if said else 0


def _is_of(name: str, tensors: Set[str]) -> bool:
    """Return whether a matrix, such as ``w[3][gate]``, is of one of these tensors."""
    while name not in tensors and name.endswith("]"):
        name = name.rpartition("[")[0]
    return name in tensors


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

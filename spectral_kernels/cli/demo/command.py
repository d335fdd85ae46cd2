"""The command ``spectral-kernels demo``: its arguments, progress and summary."""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..console import INTERRUPTED, integer, picture_path, say, tell

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from .experiment import Display, Epoch, Results


def add_parser(commands) -> None:
    """Add the command to the subparsers ``commands``."""
    parser = commands.add_parser(
        "demo",
        help="continual learning with no regularizer, L2 and spectral regularization",
        description=(
            "Train one network on task after task of random labels for the same images, with no "
            "regularizer, with L2, and with spectral regularization attached to Adam and inside "
            "SpectralAdamW. Ctrl-C keeps what is finished."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--tasks", type=integer(1), default=30, help="how often labels change")
    parser.add_argument("--epochs", type=integer(1), default=40, help="epochs per task")
    parser.add_argument("--seed", type=integer(0), default=0, help="of data, weights and batches")
    parser.add_argument("--out", type=picture_path, default="demo.png",
                         help="where the picture goes: .png, .pdf or .svg")  # fmt: skip
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Train, draw and print the summary; return the exit code."""
    start = time.perf_counter()
    try:
        from rich.console import Console

        from . import experiment, picture
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("sklearn", "matplotlib", "rich"):
            raise
        return say(f"the demo needs {missing}: pip install 'spectral_kernels[demo]'")

    tasks, epochs, seed = arguments.tasks, arguments.epochs, arguments.seed
    console = Console()
    try:
        if sys.stdout.isatty() and not console.is_dumb_terminal:
            with bars(console, experiment.ARMS, tasks, epochs) as display:
                results = experiment.run(tasks, epochs, seed, display)
        else:
            results = experiment.run(tasks, epochs, seed, lines(tasks))
    except experiment.WorkerError as error:
        what, *traceback = str(error).split("\n")
        return say(what, details=traceback)
    finished, code = any(results.arms.values()), 0
    if finished:
        console.print(table(results))
        try:
            picture.draw(results, arguments.out)
            tell(f"picture: {arguments.out}")
        except OSError as error:
            code = say(f"{error.filename or arguments.out}: {error.strerror or error}")
    print(f"total time: {time.perf_counter() - start:.1f} s", flush=True)
    if results.interrupted:
        before = "" if finished else " before any task was finished"
        return say(f"interrupted{before}", INTERRUPTED)
    return code


@contextlib.contextmanager
def bars(console: Console, arms: Sequence[str], tasks: int, epochs: int) -> Iterator[Display]:
    """Show a progress bar per arm; yield the ``display`` for :func:`experiment.run`."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:13}"),
        BarColumn(bar_width=25),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(compact=True),
    )
    # Not expanded: the "^C" that a terminal echoes must fit after the bar on the last line, or the
    # display moves by a line.
    with Progress(*columns, console=console) as progress:
        total = tasks * epochs
        ids = {arm: progress.add_task(arm, total=total, state="waiting") for arm in arms}

        def display(e: Epoch) -> None:
            state = f"task {e.task:{len(str(tasks))}}/{tasks}  accuracy {e.accuracy:.3f}"
            progress.update(ids[e.arm], completed=(e.task - 1) * epochs + e.epoch, state=state)

        yield display


def lines(tasks: int) -> Display:
    """Return a ``display`` for :func:`experiment.run` that prints a line per tenth of an arm."""

    def display(e: Epoch) -> None:
        if e.result is not None and e.task * 10 // tasks > (e.task - 1) * 10 // tasks:
            print(f"{e.arm:13}  task {e.task}/{tasks}  accuracy {e.accuracy:.3f}", flush=True)

    return display


def table(results: Results) -> Table:
    """Return the summary, one row per arm, after an interruption with the finished tasks."""
    from rich import box
    from rich.table import Table

    few = min(5, results.tasks)
    rows = Table(box=box.SIMPLE_HEAD, caption="accuracy on a task's labels at the end of the task")
    rows.add_column("arm")
    if results.interrupted:
        rows.add_column("tasks\ndone", justify="right")
    rows.add_column(f"accuracy,\nfirst {few}", justify="right")
    rows.add_column(f"accuracy,\nlast {few}", justify="right")
    rows.add_column("largest singular value\nof layers 1 to 4", justify="right", no_wrap=True)
    rows.add_column("ms per\nstep", justify="right")
    for arm, done in results.arms.items():
        cells = [arm, str(len(done))] if results.interrupted else [arm]
        if done:
            cells += [f"{statistics.mean(r.accuracy for r in done[:few]):.3f}"]
            cells += [f"{statistics.mean(r.accuracy for r in done[-few:]):.3f}"]
            cells += [" ".join(f"{sigma:5.2f}" for sigma in done[-1].sigmas)]
            cells += [f"{statistics.median(r.ms_per_step for r in done):.2f}"]
        rows.add_row(*cells)
    return rows

"""Distributes runs over the cores, one line of a file each; an interrupted call resumes."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import queue
import sys
import time
import traceback
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..support.runs import FILE, cut_off, load, where
from ..support.workers import end_with_parent
from . import own
from .train import CONTROL, LR, Key

_reports = None  # in a worker: where it reports its progress


class Failure(NamedTuple):
    """A run that raised an exception."""

    key: Key
    traceback: str  # with the exception
    place: str  # the traceback alone


class WorkersEndedError(Exception):
    """A worker process ended before its run did."""


def key_of(run: dict) -> Key:
    """Return the key of a run."""
    return Key(
        **{field: run[field] for field in Key._fields if field in run}
    )  # the first had no lr


def run_all(
    keys: Sequence[Key], folder: Path, workers: int, console: Console, limit: float = math.inf,
    budget: float = math.inf,
) -> list[Failure]:  # fmt: skip
    """Run what the folder lacks; return the runs that raised an exception, which are not written.

    No run begins after ``budget`` seconds; ``limit`` are the seconds of a run (see train.run).

    Each line is written with one call when its run is finished, so that a kill loses only the runs
    in progress. A traceback is printed when the first exception comes from there.

    Raises:
        WorkersEndedError: a worker process ended, which ends all of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = {key_of(found) for found in load(folder)}
    todo = [key for key in keys if key not in done]
    failures: list[Failure] = []
    if not todo:
        return failures
    cut_off(folder / FILE)
    context = multiprocessing.get_context("spawn")
    reports = context.Queue()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeRemainingColumn())  # fmt: skip
    with (
        (folder / FILE).open("ab", buffering=0) as file,
        Progress(*columns, console=console) as bars,
        ProcessPoolExecutor(workers, context, _start, (reports, own.registered())) as pool,
    ):
        every = bars.add_task("runs", total=len(keys), completed=len(keys) - len(todo))
        shown: dict[Key, int | None] = {}
        futures: dict[Future, Key] = {}
        waiting: set[Future] = set()
        queued, place, end = deque(todo), where(), time.monotonic() + budget
        try:
            while waiting or (queued and time.monotonic() < end):
                while queued and len(waiting) < workers and time.monotonic() < end:
                    key = queued.popleft()
                    futures[future := pool.submit(_work, key, limit)] = key
                    waiting.add(future)
                finished, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                _show(reports, bars, shown)
                for future in finished:
                    key, found = futures.pop(future), future.result()
                    if isinstance(found, Failure):
                        if found.place not in [failure.place for failure in failures]:
                            say(console, f"failed: {words(key)}\n{found.traceback}")
                        failures.append(found)
                    else:
                        line = json.dumps(found | place, separators=(",", ":"))
                        file.write(line.encode() + b"\n")
                        os.fsync(file.fileno())
                    bars.advance(every)
                    if (bar := shown.get(key)) is not None:
                        bars.remove_task(bar)
                    shown[key] = None  # later reports are not shown
        except BrokenProcessPool:
            _show(reports, bars, shown)
            running = [words(key) for key, bar in shown.items() if bar is not None]
            raise WorkersEndedError(_why_ended(running)) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.kill()
            raise
    return failures


def say(console: Console, message: str) -> None:
    """Print what went wrong, in lines as they are."""
    console.print(message, style="red", markup=False, highlight=False, soft_wrap=True)


def words(key: Key) -> str:
    """Return a key as a line for the terminal."""
    names = (own.given(name) for name in (key.problem, key.model, key.method))
    lr = "" if key.lr == LR else f" lr {key.lr:g}"
    return f"{' '.join(names)} {key.strength:g}{lr} seed {key.seed}"


def _why_ended(running: list[str]) -> str:
    """Return what is said when a worker process ended."""
    main = getattr(sys.modules["__main__"], "__file__", None)
    if not running and main is not None and sys.modules["__main__"].__spec__ is None:
        return f"{main}: every worker process imports this file, and ended at that: {own.GUARD}"
    return (
        "a worker process ended before its run did, as one does that is killed for want of memory; "
        f"running were: {', '.join(running) or 'none'}"
    )


def _start(reports, every: tuple[own.Own, ...]) -> None:
    global _reports
    _reports = reports
    own.register_again(every)
    end_with_parent()


def _work(key: Key, limit: float) -> dict | Failure:
    _reports.put((key, 0))
    try:
        if key.problem in CONTROL:
            from .control import run
        else:
            from .train import run
        found = run(key, lambda epochs: _reports.put((key, epochs)), limit)
        return found | own.labels(key._asdict())
    except (Exception, SystemExit) as error:  # as text, since not every exception can be sent
        place = "".join(traceback.format_tb(error.__traceback__))
        return Failure(key, traceback.format_exc(), place)


def _show(reports, bars: Progress, shown: dict[Key, int | None]) -> None:
    while True:
        try:
            key, epochs = reports.get_nowait()
        except queue.Empty:
            return
        if key not in shown:
            shown[key] = bars.add_task(words(key), total=key.tasks * key.epochs)
        if shown[key] is not None:
            bars.update(shown[key], completed=epochs)

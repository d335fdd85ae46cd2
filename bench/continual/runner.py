"""Distributes runs over the cores, one line of a file each; an interrupted call resumes."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..support.runs import FILE, cut_off, load, where
from ..support.workers import end_with_parent
from .train import Key

_reports = None  # in a worker: where it reports its progress


def key_of(run: dict) -> Key:
    """Return the key of a run."""
    return Key(**{field: run[field] for field in Key._fields})


def run_all(keys: Sequence[Key], folder: Path, workers: int, console: Console) -> int:
    """Run what the folder lacks; return the number of runs.

    Each line is written with one call when its run is finished, so that a kill loses only the runs
    in progress.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = {key_of(found) for found in load(folder)}
    todo = [key for key in keys if key not in done]
    if not todo:
        return 0
    cut_off(folder / FILE)
    context = multiprocessing.get_context("spawn")
    reports = context.Queue()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeRemainingColumn())  # fmt: skip
    with (
        (folder / FILE).open("ab", buffering=0) as file,
        Progress(*columns, console=console) as bars,
        ProcessPoolExecutor(workers, context, _start, (reports,)) as pool,
    ):
        every = bars.add_task("runs", total=len(keys), completed=len(keys) - len(todo))
        shown: dict[Key, int | None] = {}
        futures = {pool.submit(_work, key): key for key in todo}
        waiting, place = set(futures), where()
        try:
            while waiting:
                finished, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                _show(reports, bars, shown)
                for future in finished:
                    line = json.dumps(future.result() | place, separators=(",", ":"))
                    file.write(line.encode() + b"\n")
                    os.fsync(file.fileno())
                    bars.advance(every)
                    if (bar := shown.get(futures[future])) is not None:
                        bars.remove_task(bar)
                    shown[futures[future]] = None  # later reports are not shown
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.kill()
            raise
    return len(todo)


def _start(reports) -> None:
    global _reports
    _reports = reports
    end_with_parent()


def _work(key: Key) -> dict:
    if key.problem == "cartpole":
        from .control import run
    else:
        from .train import run
    return run(key, lambda epochs: _reports.put((key, epochs)))


def _show(reports, bars: Progress, shown: dict[Key, int | None]) -> None:
    while True:
        try:
            key, epochs = reports.get_nowait()
        except queue.Empty:
            return
        if key not in shown:
            what = f"{key.problem} {key.model} {key.method} {key.strength:g} seed {key.seed}"
            shown[key] = bars.add_task(what, total=key.tasks * key.epochs)
        if shown[key] is not None:
            bars.update(shown[key], completed=epochs)

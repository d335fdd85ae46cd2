"""Runs stages one after another within a budget of seconds, each in its own process group.

Of the budget left, a stage may take its share among the stages that have not started: its
``seconds`` over theirs. Time that it leaves over goes to later stages, and the total never exceeds
the budget. Background stages run beside the others, for at most ``seconds`` scaled by the budget.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import group
from .environment import ROOT
from .lines import Lines

BUDGET = 400.0  # for which ``Stage.seconds`` are given
RESERVE = 0.03  # part of the budget reserved for killing the last stage and for the table
KILLED = 124  # exit code of a stage that exceeded its limit or had no time left
_LEAST = 0.5  # seconds; with less left, a stage is not started


@dataclass(frozen=True)
class Stage:
    """A process of the run.

    ``command`` is called with the monotonic time at which it will be killed. The stage starts when
    the stages that it ``needs``, if they are part of the run, have ended, successfully or not.
    """

    name: str
    seconds: float
    command: Callable[[float], Sequence[str]]
    log: str = "stages.log"
    needs: tuple[str, ...] = ()
    background: bool = False
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass
class _Running:
    stage: Stage
    process: subprocess.Popen
    start: float
    until: float


def limit(stage: Stage, waiting: Sequence[Stage], left: float, budget: float) -> float:
    """Return the seconds that ``stage`` may take; ``waiting`` are all that have not started.

    ``left`` is the rest of ``budget``, both in seconds.
    """
    if stage.background:
        return min(stage.seconds * budget / BUDGET, left)
    others = sum(other.seconds for other in waiting if not other.background)
    return left * stage.seconds / others


def run(
    stages: Sequence[Stage],
    folder: Path,
    budget: float,
    dry_run: bool = False,
    say: Callable[[str], Any] = print,
    begin: float | None = None,
) -> int:
    """Run ``stages`` in order, each once the stages that it needs have ended; return an exit code.

    It is that of the first stage that failed, or KILLED, or 0. The lines "started" and "ended" of
    each stage go to ``folder``. The budget starts at ``begin``, a monotonic time.
    """
    begin = time.monotonic() if begin is None else begin
    end = begin + (1 - RESERVE) * budget
    waiting, running, first_failure = list(stages), [], 0
    try:
        while waiting or running:
            for one in list(running):
                code = one.process.poll()
                if code is None and time.monotonic() < one.until:
                    continue
                running.remove(one)
                outcome = _end(one, code, folder, dry_run)
                first_failure = first_failure or outcome
                say(_summary(one, outcome, begin))
            names = {stage.name for stage in waiting} | {one.stage.name for one in running}
            busy = any(not one.stage.background for one in running)
            for stage in list(waiting):
                if names & set(stage.needs) or (busy and not stage.background):
                    continue
                left = end - time.monotonic()
                seconds = limit(stage, waiting, left, budget)
                waiting.remove(stage)
                if left < _LEAST:
                    Lines(folder, stage.name, dry_run).failed("ended", "the budget was used up")
                    say(f"{stage.name}: not started, the budget is used up")
                    first_failure = first_failure or KILLED
                    continue
                running.append(_start(stage, seconds, folder, dry_run))
                busy = busy or not stage.background
            time.sleep(0.02)
    finally:
        for one in running:  # if this process is interrupted
            _kill(one.process)
    return first_failure


def _start(stage: Stage, seconds: float, folder: Path, dry_run: bool) -> _Running:
    start = time.monotonic()
    command = [str(part) for part in stage.command(start + seconds)]
    Lines(folder, stage.name, dry_run).put("started", seconds, "s")
    with (folder / stage.log).open("a") as log:
        log.write(f"\n==== {stage.name}, at most {seconds:.0f} s: {' '.join(command)}\n")
        log.flush()
        # A stage watches this pipe, and ends itself when this process is gone.
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **stage.variables}, stdin=subprocess.PIPE,
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    return _Running(stage, process, start, start + seconds)


def _end(one: _Running, code: int | None, folder: Path, dry_run: bool) -> int:
    """Kill the rest of the stage's group, record how it ended, and return its exit code."""
    _kill(one.process)
    took = time.monotonic() - one.start
    outcome, exit_code = "ok", 0
    if code is None:
        outcome, exit_code = "killed", KILLED
    elif code:
        outcome = f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
        exit_code = code if code > 0 else 128 - code
    most = one.until - one.start
    Lines(folder, one.stage.name, dry_run).put("ended", took, "s", limit=most, outcome=outcome)
    return exit_code


def _kill(process: subprocess.Popen) -> None:
    group.end(process)
    if process.stdin is not None:
        process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):  # it may hang in a driver
        process.wait(timeout=3)


def _summary(one: _Running, exit_code: int, begin: float) -> str:
    now = time.monotonic()
    how = {0: "ok", KILLED: "killed at its limit"}.get(exit_code, f"failed with {exit_code}")
    took, most = now - one.start, one.until - one.start
    return f"[{now - begin:5.1f} s] {one.stage.name}: {how}, {took:.1f} s of {most:.0f}"

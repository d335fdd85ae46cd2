"""Stages "cuda" and "triton" on a GPU: checks in processes of their own, several at once.

A process that breaks the device, or dies, then affects no other check. This module does not import
torch, which takes long: the processes do, in parallel.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from multiprocessing.connection import wait
from typing import NamedTuple

from .lines import Lines

# Most important first; each check in all dtypes, then the next check.
CHECKS = ("1 vector", "ragged shapes", "SpectralAdamW", "SpectralSGD", "4 vectors")
DTYPES = ("bfloat16", "float32", "float16")
PROCESSORS_LEFT = 2  # for other stages
LAST_PART = 0.95  # share of a stage's time; the rest is for killing and writing
MOST = 14  # processes at once: each has a context on the device
NOT_BEGUN, NOT_DONE = "the stage's time is used up", "it was not done when the stage's time was up"


class Answer(NamedTuple):
    """Result of a function, or, if not None, ``error``: why there is none.

    ``seconds`` is the time of the function alone, or None if it did not finish in time.
    """

    result: object
    error: str | None
    seconds: float | None


def one_check(what: str, dtype: str, backend: str, device: str) -> tuple[str | None, str | None]:
    """Return why the backend cannot run here, and what a check found wrong; None: nothing."""
    import torch

    from spectral_kernels.backends import choice

    from . import checks

    torch.set_num_threads(1)  # other checks use the other processors
    if (reason := choice.unavailable(backend)) is not None:
        return reason, None
    dtype = getattr(torch, dtype)
    return None, checks.problem(what, dtype, backend, torch.device(device), device == "cpu")


def backend(lines: Lines, name: str, until: float, device: str = "cuda") -> None:
    """Check a backend until ``until``, a monotonic time; write a line as each check finishes."""
    checks = {(what, dtype): partial(one_check, what, dtype, name, device)
              for what in CHECKS for dtype in DTYPES}  # fmt: skip
    now, available = time.monotonic(), False
    processes = min(MOST, max(1, len(os.sched_getaffinity(0)) - PROCESSORS_LEFT))
    for key, answer in answers(checks, processes, now + LAST_PART * (until - now)):
        where = {"dtype": key[1], "backend": name}
        if answer.error is not None:
            write = lines.left_out if answer.seconds is None else lines.failed
            write(key[0], answer.error, **where)
            continue
        reason, problem = answer.result
        if reason is not None:
            lines.failed("available", reason, backend=name)
            return
        if not available:
            lines.put("available", 1, None, backend=name)
            available = True
        if problem is None:
            lines.put(key[0], answer.seconds, "s", **where)
        else:
            lines.failed(key[0], problem, **where)


def answers(
    functions: Mapping[tuple, Callable[[], object]], processes: int, until: float
) -> Iterator[tuple[tuple, Answer]]:
    """Call each function in a process of its own, at most ``processes`` at once, in order.

    Yield key and answer as each finishes; those unfinished at ``until``, a monotonic time, are
    killed and yielded last. The functions must be picklable.
    """
    context = multiprocessing.get_context("spawn")
    waiting, running = list(functions), {}
    try:
        while (waiting or running) and (left := until - time.monotonic()) > 0:
            if waiting and len(running) < processes:
                key = waiting.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_call, args=(functions[key], theirs), daemon=True)
                running[ours] = key, process, time.monotonic()
                process.start()
                theirs.close()  # so that ours closes when the process ends
                continue
            for ours in wait(list(running), left):
                key, process, start = running.pop(ours)
                yield key, _answer(ours, process, start)
    finally:
        for _, process, _ in running.values():
            _kill(process)
    for key, _, _ in running.values():
        yield key, Answer(None, NOT_DONE, None)
    for key in waiting:
        yield key, Answer(None, NOT_BEGUN, None)


def _call(function: Callable[[], object], connection) -> None:
    """Send what a function returns or raises; the traceback goes to the stage's output."""
    start, result, reason = time.perf_counter(), None, None
    try:
        result = function()
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"
    sys.stdout.flush()
    sys.stderr.flush()
    connection.send(Answer(result, reason, time.perf_counter() - start))


def _answer(connection, process, start: float) -> Answer:
    try:
        answer = connection.recv()
    except EOFError:
        process.join(1)
        code = process.exitcode
        how = f"exit code {code}"
        if code is not None and code < 0:
            how = f"signal {signal.Signals(-code).name}"
        answer = Answer(None, f"its process ended with {how}", time.monotonic() - start)
    _kill(process)  # after an illegal access, for example, its exit may hang
    return answer


def _kill(process) -> None:
    if process.pid is not None:
        process.kill()
        process.join(1)

"""Timing of functions in turn within a time limit; CUDA graphs; host time of a call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import torch

from ..support import devices, interleave

MIN_TIME = 0.01  # seconds of calls that one duration averages
LEAST, MOST = 3, 25  # rounds
_HOST_CALLS = 20  # at most: with two launches each, far from filling a stream's queue
_HOST_TIME = 0.02  # seconds of a few such calls

Function = Callable[[], object]


class Timed(NamedTuple):
    """Durations of one function in seconds, per call or per launch in a call."""

    durations: list[float]

    @property
    def median(self) -> float:
        """Return the median."""
        return statistics.median(self.durations)

    def spread(self) -> dict[str, float]:
        """Return minimum and maximum in microseconds, and the number of rounds."""
        return {"least": 1e6 * min(self.durations), "most": 1e6 * max(self.durations),
                "rounds": len(self.durations)}  # fmt: skip


def in_turn_for(
    functions: Mapping[Hashable, Function],
    seconds: float,
    device: str,
    per_call: Mapping[Hashable, int] | None = None,
    most: int = MOST,
) -> dict[Hashable, Timed]:
    """Time ``functions`` in rounds, one duration of each per round, for about ``seconds``.

    At most ``most`` rounds, and at least LEAST if that allows. ``per_call`` is the number of
    launches per call of a function whose single launch is timed.
    """
    clock = devices.CLOCKS[device]
    start = time.monotonic()
    durations: dict[Hashable, list[float]] = {name: [] for name in functions}
    for done in range(most):
        passed = time.monotonic() - start
        if done >= LEAST and passed * (done + 1) / done > seconds:
            break
        found = interleave.measure(functions, 1, MIN_TIME, warmup=int(done == 0), clock=clock)
        for name, (duration,) in found.items():
            durations[name].append(duration / (per_call or {}).get(name, 1))
    return {name: Timed(own) for name, own in durations.items()}


def host_seconds(function: Function, device: str) -> float:
    """Return the CPU time of a call in this thread, without waiting for a GPU."""
    start = now(device)
    function()
    duration = now(device) - start
    calls = max(1, min(_HOST_CALLS, int(_HOST_TIME / duration)))
    times = []
    for _ in range(5 if duration < _HOST_TIME else 1):
        synchronize(device)
        start = time.thread_time()
        for _ in range(calls):
            function()
        times.append((time.thread_time() - start) / calls)
    synchronize(device)
    return statistics.median(times)


def synchronize(device: str) -> None:
    """Wait for the device; raises errors of earlier kernels."""
    if device == "cuda":
        torch.cuda.synchronize()


def captured(functions: Sequence[Function]) -> Function:
    """Return the replay of one CUDA graph of all ``functions``, each of which has run before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for function in functions:
            function()
    return lambda kept=functions: graph.replay()  # the functions own its memory


def copy_bandwidth(device: str, most: int) -> dict[str, float]:
    """Return bytes per second of a copy (read and written), a read and an addition in place."""
    n = 2**29 if device == "cuda" else 2**23  # 2 GiB in float32, or 32 MiB
    x = torch.randn(n, device=device)
    y = torch.empty_like(x)
    functions = {"copy": lambda: y.copy_(x), "read": x.sum, "add": lambda: y.add_(1e-3)}
    found = in_turn_for(functions, 1.0, device, most=most)
    moved = {"copy": 2, "read": 1, "add": 2}
    return {name: moved[name] * 4 * n / timed.median for name, timed in found.items()}


def now(device: str) -> float:
    """Return the time in seconds, after waiting for the device."""
    synchronize(device)
    return time.perf_counter()

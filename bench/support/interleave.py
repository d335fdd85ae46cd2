"""Times several functions in turn, so that disturbances affect all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle

from .devices import seconds_on_cpu


def measure(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    min_time: float = 0.02,
    warmup: int = 2,
    clock: Callable[[Callable[[], object], float], float] = seconds_on_cpu,
) -> dict[str, list[float]]:
    """Return ``rounds`` durations in seconds per call for each of ``functions``.

    In every round each function runs once to bring the cache into the state in which it is
    repeated, then as often as ``clock`` wants for ``min_time`` seconds; the mean of these calls is
    one duration.
    """
    for function in functions.values():
        for _ in range(warmup):
            function()
    durations: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            function()
            durations[name].append(clock(function, min_time))
    return durations


def measure_steps(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    seconds: float = 0.02,
    warmup: int = 3,
    most: int = 25,
) -> dict[str, list[float]]:
    """Return the durations in seconds of single calls of each of ``functions``, on a CPU.

    In every round each of them takes its turn: ``warmup`` calls, then calls for ``seconds``, but
    at least one and at most ``most``, each of which is one duration. A training loop, too, finds
    in the cache what its own step before has left there.
    """
    durations: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            for _ in range(warmup):
                function()
            begin = time.perf_counter()
            for _ in range(most):
                start = time.perf_counter()
                function()
                end = time.perf_counter()
                durations[name].append(end - start)
                if end - begin >= seconds:
                    break
    return durations


def in_turn(functions: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """Return a function that calls one of ``functions`` per call, cyclically."""
    if len(functions) == 1:
        return functions[0]
    following = cycle(functions)
    return lambda: next(following)()


class Replay:
    """A clock for pytest-benchmark that replays recorded durations."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        """Return the time; each call takes a nanosecond."""
        self.now += 1e-9
        return self.now

    def into(self, benchmark, durations: list[float]) -> None:
        """Let ``benchmark``, which must use this clock, see one round per duration."""
        left = iter(durations)

        def one_round():
            self.now += next(left)

        benchmark.pedantic(one_round, rounds=len(durations), iterations=1)

"""Times several functions in turn, so that the machine's moods hit all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


def measure(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    min_time: float = 0.02,
    warmup: int = 2,
) -> dict[str, list[float]]:
    """Return ``rounds`` durations in seconds per call for each of ``functions``.

    In every round each function runs once to bring its data into the state that its own repetition
    leaves it in, then for at least ``min_time`` seconds; the mean of these calls is one duration.
    """
    for function in functions.values():
        for _ in range(warmup):
            function()
    durations: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            function()
            calls, start = 0, time.perf_counter()
            while True:
                function()
                calls += 1
                elapsed = time.perf_counter() - start
                if elapsed >= min_time:
                    break
            durations[name].append(elapsed / calls)
    return durations


class Replay:
    """A clock for pytest-benchmark on which recorded durations pass again."""

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

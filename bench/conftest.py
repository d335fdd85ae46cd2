"""Options of the suites, and the fixture that measures a group of contenders together."""

import platform

import pytest
import torch

from .interleave import Replay, measure

REPLAY = Replay()


def pytest_addoption(parser):
    """Add --smoke and --rounds."""
    group = parser.getgroup("spectral_kernels")
    group.addoption("--smoke", action="store_true", help="only the smallest case, two rounds")
    group.addoption("--rounds", type=int, default=15, help="durations per contender")


def pytest_collection_modifyitems(config, items):
    """Give every benchmark the clock of recorded durations; keep the smallest case for --smoke."""
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=REPLAY, warmup=False, disable_gc=True))
    if config.getoption("--smoke"):
        small = [item for item in items if item.callspec.params.get("case") in ("mlp", None)]
        config.hook.pytest_deselected(items=[item for item in items if item not in small])
        items[:] = small


def pytest_benchmark_update_machine_info(config, machine_info):
    """Record what a reader needs to judge the figures."""
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["device"] = cpu_name()


def cpu_name() -> str:
    """Name of the processor, as the operating system gives it."""
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.partition(":")[2].strip() for line in info if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


class Group:
    """Contenders of one case, checked, then timed in turn when the first of them is asked for."""

    def __init__(self, rounds: int, smoke: bool):
        self.rounds, self.smoke = (2 if smoke else rounds), smoke
        self.durations: dict[str, list[float]] = {}
        self.wrong: dict[str, str] = {}

    def run(self, functions, wrong):
        """Time ``functions`` by name in turn; ``wrong`` says why others are not among them."""
        self.wrong = wrong
        self.durations = measure(functions, self.rounds, 0.002 if self.smoke else 0.05)

    def replay(self, contender: str, benchmark) -> None:
        """Hand the contender's durations to pytest-benchmark, or fail if it was found wrong."""
        if contender in self.wrong:
            pytest.fail(f"{contender} is wrong and was not timed: {self.wrong[contender]}")
        REPLAY.into(benchmark, self.durations[contender])


@pytest.fixture(scope="session")
def groups():
    """Measured groups by key; only the last one is kept, since each holds its weights."""
    return {}


@pytest.fixture
def contenders_of(request):
    """Return the contenders of this test's group that this run has not deselected."""
    params = request.node.callspec.params
    key = {name: value for name, value in params.items() if name != "contender"}

    def same_group(item):
        others = getattr(item, "callspec", None)
        return (
            item.function is request.function
            and others is not None
            and all(others.params[name] == value for name, value in key.items())
        )

    return [i.callspec.params["contender"] for i in request.session.items if same_group(i)]

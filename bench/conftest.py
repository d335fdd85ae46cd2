"""Options of the suites, and the fixtures that measure a group of contenders together."""

import pytest
import torch

from spectral_kernels.cli import processor

from .gate import Group
from .interleave import Replay

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
        left_out = [i for i in items if i.callspec.params.get("case", "mlp") != "mlp"]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_benchmark_update_machine_info(config, machine_info):
    """Record what a reader needs to judge the figures."""
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["device"] = processor()


@pytest.fixture(scope="session")
def _groups():
    return {}


@pytest.fixture
def compete(request, benchmark, _groups):
    """Return ``compete(fill, **info)``: this test's contender, timed with the others of its group.

    A group are the tests of one function that differ in ``contender`` alone. The first of them
    calls ``fill(group, names)`` with an empty Group and the contenders that this run has not
    deselected; each then hands its own durations to pytest-benchmark.
    """
    params = dict(request.node.callspec.params)
    contender = params.pop("contender")
    key = (request.function.__name__, *params.items())

    def of_this_group(item):
        others = getattr(getattr(item, "callspec", None), "params", {})
        return item.function is request.function and params.items() <= others.items()

    def run(fill, **info):
        if key not in _groups:
            _groups.clear()
            smoke = request.config.getoption("--smoke")
            rounds = 2 if smoke else request.config.getoption("--rounds")
            group = Group(rounds, 0.002 if smoke else 0.05)
            names = [i.callspec.params["contender"] for i in request.session.items
                     if of_this_group(i)]  # fmt: skip
            fill(group, names)
            _groups[key] = group
        group = _groups[key]
        benchmark.group = " ".join(map(str, (info["suite"], *params.values())))
        benchmark.extra_info.update(info, **params, contender=contender, device="cpu")
        if contender in group.wrong:
            pytest.fail(f"{contender} is wrong and was not timed: {group.wrong[contender]}")
        REPLAY.into(benchmark, group.durations[contender])

    return run

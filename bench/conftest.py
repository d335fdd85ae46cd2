"""Options of the suites, and the fixture that measures a group of contenders together."""

import pytest
import torch

from spectral_kernels.cli.env import processor, triton_version

from .support import devices
from .support.gate import Group
from .support.interleave import Replay

REPLAY = Replay()


def pytest_addoption(parser):
    """Add --smoke and --rounds."""
    group = parser.getgroup("spectral_kernels")
    group.addoption("--smoke", action="store_true", help="only the smallest case, two rounds")
    group.addoption("--rounds", type=int, default=15, help="durations per contender")


def pytest_report_header():
    """Say what is timed, before an hour of it."""
    return f"spectral_kernels: {devices.cpp_kernels()}"


def pytest_collection_modifyitems(config, items):
    """Give every benchmark the clock that replays durations; --smoke keeps the smallest case."""
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=REPLAY, warmup=False, disable_gc=True))
        device = item.callspec.params["device"]
        if device == "cuda":
            item.add_marker(pytest.mark.gpu)
        if (reason := devices.missing(device)) is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
    if config.getoption("--smoke"):
        smallest = {item.function: item.callspec.params["case"] for item in reversed(items)}
        left_out = [i for i in items if i.callspec.params["case"] != smallest[i.function]]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_benchmark_update_machine_info(config, machine_info):
    """Record what a reader needs to judge the figures."""
    found = {"torch": torch.__version__, "triton": triton_version()}
    machine_info["versions"] = ", ".join(f"{name} {version}" for name, version in found.items())
    machine_info["device"] = processor()
    machine_info["cpp_kernels"] = devices.cpp_kernels()


@pytest.fixture(scope="session")
def _groups():
    return {}


@pytest.fixture
def compete(request, benchmark, _groups):
    """Return ``compete(fill, **info)``: this test's contender, timed with the others of its group.

    A group is the tests of one function that differ only in ``contender``. The first of them calls
    ``fill(group, names)`` with an empty Group and the contenders that are not deselected; each test
    then passes its own durations to pytest-benchmark.
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
            group = Group(rounds, 0.002 if smoke else 0.05, params["device"])
            names = [i.callspec.params["contender"] for i in request.session.items
                     if of_this_group(i)]  # fmt: skip
            fill(group, names)
            _groups[key] = group
        group = _groups[key]
        benchmark.group = " ".join(map(str, (info["suite"], *params.values())))
        benchmark.extra_info.update({
            "threads": torch.get_num_threads(), **info, **params, "contender": contender,
            "device_name": devices.name(params["device"]),
        })  # fmt: skip
        if contender in group.wrong:
            pytest.fail(f"{contender} was not timed: {group.wrong[contender]}")
        durations = sorted(group.durations[contender])
        benchmark.extra_info["p99_seconds"] = durations[int(0.99 * (len(durations) - 1))]
        if contender in group.first:
            benchmark.extra_info["first_step_seconds"] = group.first[contender]
        if contender in group.peak_bytes:
            benchmark.extra_info["peak_bytes"] = group.peak_bytes[contender]
        REPLAY.into(benchmark, group.durations[contender])

    return run

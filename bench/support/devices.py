"""The devices that a suite can run on: name, clock, and how to keep caches cold."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from spectral_kernels.backends import choice
from spectral_kernels.cli.env import processor
from spectral_kernels.tables.native import native_module

DEVICES = ("cpu", "cuda")


def missing(device: str) -> str | None:
    """Return why nothing can run on ``device`` here, or None."""
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    return None


def name(device: str) -> str:
    """Return the device's name, for the report."""
    return torch.cuda.get_device_name() if device == "cuda" else processor()


def cpp_kernels() -> str:
    """Return at which instruction set the C++ kernels run here, or why they do not."""
    if (reason := choice.unavailable("cpu")) is not None:
        return f"without the C++ kernels: {reason}"
    return f"C++ kernels at instruction set {native_module().cpu.level()}"


def input_sets(device: str, n_bytes: int) -> int:
    """Return how many sets of inputs of ``n_bytes`` to take in turn.

    On a GPU enough that none is left in the L2 cache when its turn comes again. On a CPU one: small
    models are trained from its cache.
    """
    if device == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return -(-4 * cache // n_bytes)


def seconds_on_cpu(function: Callable[[], object], min_time: float) -> float:
    """Return the mean duration of the calls that fit into ``min_time`` seconds."""
    calls, start = 0, time.perf_counter()
    while True:
        function()
        calls += 1
        elapsed = time.perf_counter() - start
        if elapsed >= min_time:
            return elapsed / calls


def seconds_on_cuda(function: Callable[[], object], min_time: float) -> float:
    """As seconds_on_cpu, between two events of the stream, with one synchronization at the end."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    calls = 1
    while True:
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        elapsed = start.elapsed_time(end) / 1e3
        if elapsed >= min_time:
            return elapsed / calls
        calls = max(2 * calls, int(1.1 * calls * min_time / max(elapsed, 1e-6)))


CLOCKS = {"cpu": seconds_on_cpu, "cuda": seconds_on_cuda}

"""An optimizer's step of a small network while other processes keep the cores busy."""

import multiprocessing
from contextlib import contextmanager

import pytest
import torch

from ..support import optimizers

models = pytest.importorskip("bench.support.models", reason="needs the bench extra")

PROCESSES = 10
THREADS = {"torch_adamw": None, "torch_adamw_one_thread": 1, "spectral_adamw": None}
PARAMETERS = [(case, "cpu", "float32", name) for case in ("policy", "mlp") for name in THREADS]


def spin(started):
    """Do nothing useful for ever."""
    started.release()
    while True:
        pass


@contextmanager
def busy_cores(n):
    """Let ``n`` processes spin."""
    context = multiprocessing.get_context("spawn")
    started = context.Semaphore(0)
    processes = [context.Process(target=spin, args=(started,), daemon=True) for _ in range(n)]
    try:
        for process in processes:
            process.start()
        for _ in processes:
            started.acquire()
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def with_threads(step, n):
    """Return ``step`` with ``n`` threads of torch, or with as many as before."""
    before = torch.get_num_threads()

    def run():
        torch.set_num_threads(n)
        step()
        torch.set_num_threads(before)

    return step if n is None else run


@pytest.mark.parametrize(("case", "device", "dtype", "contender"), PARAMETERS)
def test_busy_step(case, device, dtype, contender, compete):
    build = models.MODELS[case].build

    def fill(group, names):
        steps = {}
        for name in names:
            make = optimizers.CONTENDERS[name.removesuffix("_one_thread")]
            ready = optimizers.ready(make, build, getattr(torch, dtype), device)
            steps[name] = with_threads(ready, THREADS[name])
        with busy_cores(PROCESSES):
            group.time_steps(steps, most=400)

    compete(fill, suite="busy_step", weights=optimizers.n_parameters(build), processes=PROCESSES)

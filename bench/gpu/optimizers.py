"""Stage "optimizers": AdamW's step with the penalty inside, attached, and without it."""

from __future__ import annotations

import gc

import torch

from spectral_kernels import SpectralAdamW

from ..support import devices, optimizers
from ..support.interleave import in_turn
from . import inputs, measure
from .job import Job, name_of


def spectral_adamw(backend: str):
    """Return a function like those in ``bench.support.optimizers`` for ours on a backend."""

    def make(model, strength: float) -> optimizers.Contender:
        optimizer = SpectralAdamW(model, optimizers.LR, strength=strength, backend=backend)
        return optimizers.Contender(model, optimizer, optimizer.step)

    return make


def run(job: Job) -> None:
    """Measure every case."""
    for case, dtype, seconds in job.groups(inputs.OPTIMIZERS):
        try:
            _group(job, case, dtype, seconds)
        except Exception as error:
            job.lines.failed("group", error, case=case, dtype=name_of(dtype))
            job.go_on_where_the_device_broke(case, dtype, *job.backends)


def _group(job: Job, case: str, dtype: torch.dtype, seconds: float) -> None:
    """Check our optimizers against the attached regularizer, then time all of them in turn."""
    build = inputs.layers(case, job.dry_run, job.device, dtype)
    where = {"case": case, "dtype": name_of(dtype)}
    ours = {name: spectral_adamw(name) for name in job.backends
            if job.takes_part(case, dtype, name)}  # fmt: skip
    makers = {"torch": optimizers.torch_adamw}
    for name, make in {**ours, "attached": optimizers.attach}.items():
        try:
            problem = None
            if name != "attached":
                problem = optimizers.disagreement(make, build, dtype, job.device)
            measure.synchronize(job.device)
        except Exception as error:
            problem = error
        if problem is None:
            makers[name] = make
            continue
        job.lines.failed("AdamW step", problem, backend=name, **where)
        job.go_on_where_the_device_broke(case, dtype, name)
    gc.collect()
    functions = {name: _steps(job, make, build, case, dtype) for name, make in makers.items()}
    found = measure.in_turn_for(functions, seconds / 2, job.device, most=job.rounds)
    for name, timed in found.items():
        job.lines.put(
            "AdamW step", 1e6 * timed.median, "us", backend=name, **where,
            times_torch=timed.median / found["torch"].median, **timed.spread(),
        )  # fmt: skip
        host = 1e6 * measure.host_seconds(functions[name], job.device)
        job.lines.put("host", host, "us", backend=name, **where)


def _steps(job: Job, make, build, case: str, dtype: torch.dtype):
    """Return a function that steps several models in turn; they have taken their first step.

    Enough models to exceed the L2 cache, at most MOST_SETS.
    """
    n_bytes = 4 * sum(m * n + m for m, n in inputs.shapes(case, job.dry_run)) * dtype.itemsize
    n_sets = min(devices.input_sets(job.device, n_bytes), inputs.MOST_SETS)
    steps = []
    for seed in range(n_sets):
        model = optimizers.with_gradients(build, dtype, job.device, seed)
        steps.append(make(model, optimizers.STRENGTH).step)
        steps[-1]()
    return in_turn(steps)

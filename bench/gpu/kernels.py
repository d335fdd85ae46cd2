"""Stage "kernels": each launch alone, the whole step, and the floors of the same run."""

from __future__ import annotations

import torch

from ..support import baselines, gate
from ..support.interleave import in_turn
from . import inputs, measure
from .job import Job, name_of
from .measure import captured

# Bytes counted, in units of the weights' bytes: W is read, .grad read and written.
BYTES = {"gram_matvec": 1, "finish": 2, "step": 3, "floor": 3, "floor_read": 1, "floor_add": 2,
         "floor_copy": 2}  # fmt: skip
_LAUNCHES = 16  # at least, in the graph of one kernel: amortizes the launch of the graph
_PART_OF_CHECKS = 0.4  # share of a group's time after which no more contenders are prepared


def run(job: Job) -> None:
    """Measure every case."""
    copy = measure.copy_bandwidth(job.device, job.rounds)
    for name, bandwidth in copy.items():
        job.lines.put(f"bandwidth of {name}", bandwidth / 1e9, "GB/s")
    for case, dtype, seconds in job.groups(inputs.KERNELS):
        where = {"case": case, "dtype": name_of(dtype)}
        try:
            _group(job, case, dtype, seconds, copy["copy"])
        except Exception as error:
            job.lines.failed("group", error, **where)
            job.go_on_where_the_device_broke(case, dtype, *job.backends)


def _group(job: Job, case: str, dtype: torch.dtype, seconds: float, copy: float) -> None:
    """Check the contenders of one case, then time the correct ones in turn."""
    shapes = inputs.shapes(case, job.dry_run)
    where = {"case": case, "dtype": name_of(dtype)}
    sets = inputs.input_sets(shapes, dtype, job.device)
    floors = [gate.floor_functions(weights) for weights in sets]
    functions = {(None, name): in_turn([own[name] for own in floors]) for name in floors[0]}
    per_call = {}
    for backend in job.backends:
        if not job.takes_part(case, dtype, backend):
            continue
        try:
            contender = baselines.Contender(baselines.ours(backend), backend)
            if not _is_right(job, contender, sets[0], where, backend):
                continue
            own, launches = _ours(job, sets, backend)
            measure.synchronize(job.device)
        except Exception as error:
            job.lines.failed("step", error, backend=backend, **where)
            job.go_on_where_the_device_broke(case, dtype, backend)
            continue
        functions.update({(backend, name): function for name, function in own.items()})
        per_call.update({(backend, name): n for name, n in launches.items()})
    loop = baselines.CONTENDERS["inplace_loop"]
    if _is_right(job, loop, sets[0], where, "inplace_loop"):
        steps = [loop.make(weights, inputs.STRENGTH) for weights in sets]
        functions[("inplace_loop", "step")] = in_turn(steps)
    for (backend, name), function in functions.items():
        if name == "step":
            host = 1e6 * measure.host_seconds(function, job.device)
            job.lines.put("host", host, "us", backend=backend, **where)
    found = measure.in_turn_for(
        functions, seconds * (1 - _PART_OF_CHECKS), job.device, per_call, job.rounds
    )
    n_bytes = sum(m * n for m, n in shapes) * dtype.itemsize
    cold = inputs.are_cold(shapes, dtype, job.device)
    for (backend, name), timed in found.items():
        moved = BYTES[name.removesuffix("_replayed")] * n_bytes
        job.lines.put(
            name, 1e6 * timed.median, "us", backend=backend, **where, bytes=moved,
            percent_of_copy=100 * moved / timed.median / copy, cold=cold, sets=len(sets),
            **timed.spread(),
        )  # fmt: skip


def _is_right(job: Job, contender, weights, where, backend: str) -> bool:
    """Compare a contender's first step with float64; record its time, or what is wrong."""
    problem, seconds = gate.first_step(contender, weights)
    if problem is not None:
        job.lines.failed("step", problem, backend=backend, **where)
        return False
    job.lines.put("first step", seconds, "s", backend=backend, **where)
    return True


def _ours(job: Job, sets, backend: str):
    """Return the parts of a backend's step by name, and the launches per call where not 1.

    A launch repeated alone finds the same inputs, except for the gradients that it adds to.
    """
    steps, grams, finishes = [], [], []
    for weights in sets:
        reg = inputs.regularizer(weights, backend)
        reg.accumulate_grad_()
        for bucket in reg._buckets.buckets:
            grams.append(_gram_matvec(bucket))
            finishes.append(_finish(bucket))
        steps.append(reg.accumulate_grad_)
    functions = {"gram_matvec": in_turn(grams), "finish": in_turn(finishes),
                 "step": in_turn(steps)}  # fmt: skip
    if job.device != "cuda":
        job.lines.left_out("replayed", "a CPU has no CUDA graphs", backend=backend)
        return functions, {}
    times = -(-_LAUNCHES // len(grams))
    launches = dict.fromkeys(("gram_matvec_replayed", "finish_replayed"), times * len(grams))
    functions["gram_matvec_replayed"] = captured(times * grams)
    functions["finish_replayed"] = captured(times * finishes)
    functions["step_replayed"] = in_turn([captured([step]) for step in steps])
    return functions, launches


def _gram_matvec(bucket):
    return lambda: bucket.backend.gram_matvec(bucket.plan, bucket.state)


def _finish(bucket):
    grads = bucket.grads()
    return lambda: bucket.backend.finish(bucket.plan, bucket.state, grads, True)

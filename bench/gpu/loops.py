"""Stage "loops": loops over layers beside ours; four vectors, and "auto" iterations."""

from __future__ import annotations

import time

import torch

from ..support import baselines, gate
from ..support.interleave import in_turn
from . import inputs, measure
from .job import Job, name_of
from .parallel import NOT_BEGUN

_EAGER = ("autograd_loop", "inplace_loop")
# Our variants besides one vector and one iteration: name, arguments of the regularizer.
_VARIANTS = {
    "step, 4 vectors": {"n_vectors": 4},
    'step, "auto"': {"iterations": "auto"},
    'step, 4 vectors, "auto"': {"n_vectors": 4, "iterations": "auto"},
}
_COMPILATION = 5.0  # seconds; with less left, a loop is not compiled
_TIMING = 1.5  # seconds of rounds at most: loops take milliseconds, so a few will do


def run(job: Job) -> None:
    """Measure the eager loops of each case, then the compiled one.

    Our variants are measured after those of the case SEVERAL.
    """
    rate = 0.0  # seconds of compilation per matrix: each has code of its own
    for case, dtype, seconds in job.groups(inputs.LOOPS):
        _guarded(job, case, dtype, _EAGER, min(_TIMING, seconds / 4))
        matrices = len(inputs.shapes(case, job.dry_run))
        if job.left() < max(_COMPILATION, rate * matrices):
            job.lines.left_out("compiled_loop", "too little time is left", case=case,
                               dtype=name_of(dtype))  # fmt: skip
        else:
            torch.compiler.reset()  # earlier compilations count against the recompilation limit
            start = time.monotonic()
            _guarded(job, case, dtype, ("compiled_loop",), min(_TIMING, seconds / 4))
            rate = max(rate, (time.monotonic() - start) / matrices)
        if (case, name_of(dtype)) == inputs.SEVERAL:
            _variants(job, case, dtype, min(_TIMING, seconds / 4))


def _guarded(job: Job, case: str, dtype: torch.dtype, loops, seconds: float) -> None:
    try:
        _group(job, case, dtype, loops, seconds)
    except Exception as error:
        job.lines.failed("group", error, case=case, dtype=name_of(dtype))
        job.go_on_where_the_device_broke(case, dtype, *job.backends)


def _group(job: Job, case: str, dtype: torch.dtype, loops, seconds: float) -> None:
    """Check the loops and ours, then time the correct ones and the floor in turn."""
    where = {"case": case, "dtype": name_of(dtype)}
    sets = inputs.input_sets(inputs.shapes(case, job.dry_run), dtype, job.device)
    functions = {None: in_turn([gate.floor_functions(weights)["floor"] for weights in sets])}
    contenders = {name: baselines.Contender(baselines.ours(name), name) for name in job.backends
                  if job.takes_part(case, dtype, name)}  # fmt: skip
    contenders.update({name: baselines.CONTENDERS[name] for name in loops})
    for name, contender in contenders.items():
        try:
            problem, first = gate.first_step(contender, sets[0])
            if problem is None:
                job.lines.put("first step", first, "s", backend=name, **where)
                steps = [contender.make(weights, inputs.STRENGTH) for weights in sets]
                functions[name] = in_turn(steps)
        except Exception as error:
            problem = error
        if problem is not None:
            job.lines.failed("step", problem, backend=name, **where)
            job.go_on_where_the_device_broke(case, dtype, name)
    found = measure.in_turn_for(functions, seconds, job.device, most=job.rounds)
    for name, timed in found.items():
        what = "floor" if name is None else "step"
        job.lines.put(what, 1e6 * timed.median, "us", backend=name, **where, **timed.spread(),
                      beside="+".join(loops))  # fmt: skip


def _variants(job: Job, case: str, dtype: torch.dtype, seconds: float) -> None:
    """Time ours with more vectors and iterations, which earlier stages have checked."""
    where = {"case": case, "dtype": name_of(dtype)}
    sets = inputs.input_sets(inputs.shapes(case, job.dry_run), dtype, job.device)
    functions, longest = {}, 0.0
    for backend in job.backends:
        if not job.takes_part(case, dtype, backend):
            continue
        for name, arguments in {"step": {}, **_VARIANTS}.items():
            if job.left() < longest:  # else a kill could lose the measurement
                job.lines.left_out(name, NOT_BEGUN, backend=backend, **where)
                continue
            try:
                regs = [inputs.regularizer(weights, backend, **arguments) for weights in sets]
                start = measure.now(job.device)
                regs[0].accumulate_grad_()
                first = measure.now(job.device) - start
                longest = max(longest, first)
                functions[backend, name] = in_turn([reg.accumulate_grad_ for reg in regs])
                functions[backend, name]()
            except Exception as error:
                job.lines.failed(name, error, backend=backend, **where)
                job.go_on_where_the_device_broke(case, dtype, backend)
                continue
            job.lines.put("first step", first, "s", backend=backend, of=name, **where)
    found = measure.in_turn_for(functions, seconds, job.device, most=job.rounds)
    for (backend, name), timed in found.items():
        job.lines.put(name, 1e6 * timed.median, "us", backend=backend, **where, **timed.spread(),
                      times_one=timed.median / found[backend, "step"].median,
                      beside="variants")  # fmt: skip

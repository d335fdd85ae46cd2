"""Stages "versions", "compile", "cuda" and "triton": what loads, what compiles, what is right."""

from __future__ import annotations

import importlib
import itertools
import os
import time
from collections.abc import Callable

import torch

from spectral_kernels import SpectralAdamW, SpectralSGD, backends, optim_check

from .. import gate
from . import inputs, measure
from .job import Job, name_of

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
_REHEARSED = ("1 vector", "ragged shapes")  # by interpreted kernels; stages to come do the others
_PROCESSES_LEFT = 2  # processors that compilations leave to the other stages


def versions(job: Job) -> None:
    """Load what there is, and measure how fast memory is."""
    for name in ("triton", "spectral_kernels._triton.backend"):
        start = time.perf_counter()
        try:
            importlib.import_module(name)
        except Exception as error:
            job.lines.failed(f"import {name}", error)
            continue
        job.lines.put(f"import {name}", time.perf_counter() - start, "s")
    start = time.perf_counter()
    torch.ones(1, device=job.device).add_(1)
    measure.synchronize(job.device)
    job.lines.put("first use of the device", time.perf_counter() - start, "s")
    for name, bandwidth in measure.copy_bandwidth(job.device, job.rounds).items():
        job.lines.put(f"bandwidth of {name}", bandwidth / 1e9, "GB/s")


def compile_core(job: Job) -> None:
    """Compile Triton's kernels for the usual steps in parallel processes, into its cache."""
    processes = max(1, len(os.sched_getaffinity(0)) - _PROCESSES_LEFT)
    start = time.perf_counter()
    try:
        module = importlib.import_module("spectral_kernels._triton.precompile")
        for what, seconds, error in module.compile_core(
            torch.device(job.device), DTYPES, (1, 4), processes
        ):
            if error is not None:
                job.lines.failed(what, error, backend="triton")
            else:
                job.lines.put(what, seconds, "s", backend="triton")
    except Exception as error:
        if job.dry_run:
            job.lines.left_out("all compilations", error, backend="triton")
        else:
            job.lines.failed("all compilations", error, backend="triton")
        return
    job.lines.put("all compilations", time.perf_counter() - start, "s", backend="triton",
                  processes=processes)  # fmt: skip


def backend(job: Job, name: str) -> None:
    """Compare a backend with the reference, and on ragged shapes with float64."""
    reason = backends.unavailable(name)
    if reason is not None:
        job.lines.failed("available", reason, backend=name)
        return
    job.lines.put("available", 1, None, backend=name)
    checks, longest = _checks(job, name), 0.0
    for what, dtype in itertools.product(checks, DTYPES):
        where = {"dtype": name_of(dtype), "backend": name}
        reason = None
        if job.left() < longest:
            reason = "the stage's time is used up"
        elif job.dry_run and name == "triton" and what not in _REHEARSED:
            reason = "an interpreter takes minutes"
        if reason is not None:
            job.lines.left_out(what, reason, **where)
            continue
        start = time.perf_counter()
        try:
            problem = checks[what](dtype)
        except Exception as error:
            problem = error
        seconds = time.perf_counter() - start
        longest = max(longest, seconds)
        if problem is None:
            job.lines.put(what, seconds, "s", **where)
        else:
            job.lines.failed(what, problem, **where)


def _checks(job: Job, name: str) -> dict[str, Callable[[torch.dtype], str | None]]:
    """Return functions of the dtype that return what is wrong, by name, in order of worth."""
    device = torch.device(job.device)
    of_optimizers = {
        kind.__name__: lambda dtype, kind=kind: optim_check.disagreement(kind, name, device, dtype)
        for kind in (SpectralAdamW, SpectralSGD)
    }
    return {
        "1 vector": lambda dtype: backends.failed_check(name, device, dtype),
        "ragged shapes": _ragged(job, name),
        **of_optimizers,
        "4 vectors": lambda dtype: backends.failed_check(name, device, dtype, 4),
    }


def _ragged(job: Job, name: str):
    """Return a function of the dtype that compares two steps with float64, a case at a time."""

    def check(dtype: torch.dtype) -> str | None:
        for i, shape in enumerate(inputs.ragged_shapes(job.dry_run)):
            shapes = [shape, (7, 33)]
            weights = gate.leaves(shapes, dtype, job.device, seed=i)
            if (problem := two_steps(weights, name)) is not None:
                return f"{shape}: {problem}"
        return None

    return check


def two_steps(weights, name: str) -> str | None:
    """Return what is wrong with sigma and the gradients of two steps, or None."""
    reg = inputs.regularizer(weights, name)
    reg.strength = gate.STRENGTH
    reg.accumulate_grad_()
    eps, vectors = torch.finfo(weights[0].dtype).eps, reg.state_dict()["vectors"]
    before = [weight.grad.clone() for weight in weights]
    reg.accumulate_grad_()
    for i, (weight, old, sigma) in enumerate(zip(weights, before, reg.sigma, strict=True)):
        v = vectors[f"{i}.weight"][0]  # those that the second step took
        expected, whole = gate.true_gradient(weight, v, "v")
        truth = (weight.detach().double() @ v.double()).norm()
        if not abs(float(sigma) - float(truth)) <= 1e-5 * float(truth):
            return f"sigma of matrix {i} is {float(sigma):.8g} for {float(truth):.8g}"
        allowed = eps * (old.double().abs() + expected.abs()).max() + 1e-5 * whole
        off = float((weight.grad.double() - old.double() - expected).abs().max() / allowed)
        if not off <= 1:
            return f"the gradient of matrix {i} is off by {off:.3g} times what is allowed"
        if (problem := _next_vectors(weight, v, reg, i)) is not None:
            return problem
    return None


def _next_vectors(weight, v, reg, i: int) -> str | None:
    """Return how the vector after a step with ``v`` differs from W^T W v, or None."""
    w = weight.detach().double()
    expected = w.mT @ (w @ v.double())
    expected = expected / expected.norm()
    error = float((reg.state_dict()["vectors"][f"{i}.weight"][0].double() - expected).norm())
    return None if error <= 1e-4 else f"the next vector of matrix {i} is off by {error:.1e}"

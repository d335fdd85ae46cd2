"""Stages "versions", "compile", "cuda" and "triton": imports, compilation, correctness."""

from __future__ import annotations

import importlib
import itertools
import os
import time

import torch

from spectral_kernels import SpectralAdamW, SpectralSGD
from spectral_kernels.backends import choice, selfcheck

from ..support import gate
from . import inputs, measure
from .job import Job
from .parallel import CHECKS, DTYPES, NOT_BEGUN, PROCESSORS_LEFT

_REHEARSED = ("1 vector", "ragged shapes")  # by interpreted kernels; later stages cover the others
_OPTIMIZERS = {"SpectralAdamW": SpectralAdamW, "SpectralSGD": SpectralSGD}


def versions(job: Job) -> None:
    """Import Triton's backend, use the device, and measure memory bandwidth."""
    name = "spectral_kernels.backends.triton.backend"
    try:
        importlib.import_module(name)
    except Exception as error:
        job.lines.failed(f"import {name}", error)
    start = time.perf_counter()
    torch.ones(1, device=job.device).add_(1)
    measure.synchronize(job.device)
    job.lines.put("first use of the device", time.perf_counter() - start, "s")
    for name, bandwidth in measure.copy_bandwidth(job.device, job.rounds).items():
        job.lines.put(f"bandwidth of {name}", bandwidth / 1e9, "GB/s")


def compile_core(job: Job) -> None:
    """Compile Triton's kernels for the usual steps in parallel processes, into its cache."""
    processes = max(1, len(os.sched_getaffinity(0)) - PROCESSORS_LEFT)
    start = time.perf_counter()
    try:
        module = importlib.import_module("spectral_kernels.backends.triton.precompile")
        for what, seconds, error in module.compile_core(
            torch.device(job.device), [getattr(torch, name) for name in DTYPES], (1, 4), processes
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
    """Compare a backend with the reference, and on ragged shapes with float64, in a rehearsal.

    On a GPU, ``parallel.backend`` does this.
    """
    reason = choice.unavailable(name)
    if reason is not None:
        job.lines.failed("available", reason, backend=name)
        return
    job.lines.put("available", 1, None, backend=name)
    longest = 0.0
    for what, dtype in itertools.product(CHECKS, DTYPES):
        where = {"dtype": dtype, "backend": name}
        reason = None
        if job.left() < longest:
            reason = NOT_BEGUN
        elif name == "triton" and what not in _REHEARSED:
            reason = "an interpreter takes minutes"
        if reason is not None:
            job.lines.left_out(what, reason, **where)
            continue
        start = time.perf_counter()
        try:
            found = problem(what, getattr(torch, dtype), name, torch.device(job.device), True)
        except Exception as error:
            found = error
        seconds = time.perf_counter() - start
        longest = max(longest, seconds)
        if found is None:
            job.lines.put(what, seconds, "s", **where)
        else:
            job.lines.failed(what, found, **where)


def problem(
    what: str, dtype: torch.dtype, name: str, device: torch.device, dry_run: bool
) -> str | None:
    """Return what one of CHECKS finds wrong with a backend that can run here, or None."""
    if what in _OPTIMIZERS:
        return selfcheck.step_disagreement(_OPTIMIZERS[what], name, device, dtype)
    if what == "ragged shapes":
        return _ragged(dtype, name, device, dry_run)
    return choice.failed_check(name, device, dtype, {"1 vector": 1, "4 vectors": 4}[what])


def _ragged(dtype: torch.dtype, name: str, device: torch.device, dry_run: bool) -> str | None:
    """Compare two steps with float64, a shape at a time."""
    for i, shape in enumerate(inputs.ragged_shapes(dry_run)):
        weights = gate.leaves([shape, (7, 33)], dtype, device, seed=i)
        m, n = shape
        weights[0].detach().mul_(min(1.0, (n / m) ** 0.5))  # keeps gradients within float16
        if (found := two_steps(weights, name)) is not None:
            return f"{shape}: {found}"
    return None


def two_steps(weights, name: str) -> str | None:
    """Return what is wrong with sigma and the gradients of two steps, or None."""
    reg = inputs.regularizer(weights, name)
    reg.strength = gate.STRENGTH
    reg.accumulate_grad_()
    eps, vectors = torch.finfo(weights[0].dtype).eps, reg.state_dict()["vectors"]
    before = [weight.grad.clone() for weight in weights]
    reg.accumulate_grad_()
    for i, (weight, old, sigma) in enumerate(zip(weights, before, reg.sigma, strict=True)):
        v = vectors[f"{i}.weight"][0]  # those that the second step used
        expected, whole = gate.true_gradient(weight, v, "v")
        truth = (weight.detach().double() @ v.double()).norm()
        if not abs(float(sigma) - float(truth)) <= 1e-5 * float(truth):
            return f"sigma of matrix {i} is {float(sigma):.8g} for {float(truth):.8g}"
        allowed = eps * (old.double().abs() + expected.abs()).max() + 1e-5 * whole
        off = float((weight.grad.double() - old.double() - expected).abs().max() / allowed)
        if not off <= 1:
            return f"the gradient of matrix {i} is off by {off:.3g} times what is allowed"
        if (found := _next_vectors(weight, v, reg, i)) is not None:
            return found
    return None


def _next_vectors(weight, v, reg, i: int) -> str | None:
    """Return how the vector after a step with ``v`` differs from W^T W v, or None."""
    w = weight.detach().double()
    expected = w.mT @ (w @ v.double())
    expected = expected / expected.norm()
    error = float((reg.state_dict()["vectors"][f"{i}.weight"][0].double() - expected).norm())
    return None if error <= 1e-4 else f"the next vector of matrix {i} is off by {error:.1e}"

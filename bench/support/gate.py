"""The gate before timing: a contender whose first step is wrong is not timed."""

from __future__ import annotations

import gc
import math
import time
from typing import NamedTuple

import torch

from tests.support import cases

from . import devices
from .baselines import FLOORS, Contender, start_vectors
from .interleave import in_turn, measure, measure_steps

STRENGTH = 1.0  # large enough that an error of the gradient shows in .grad


def leaves(shapes, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> list[torch.Tensor]:
    """Return random weights with random gradients."""
    weights = cases.random_weights(shapes, dtype, 2 * seed, device)
    grads = cases.random_weights(shapes, dtype, 2 * seed + 1, device)
    for weight, grad in zip(weights, grads, strict=True):
        weight.requires_grad_()
        weight.grad = grad.mul_(0.01 * weight.shape[1] ** 0.5)
    return weights


def true_gradient(weight: torch.Tensor, v: torch.Tensor, at: str) -> tuple[torch.Tensor, float]:
    """Return the gradient in float64, and its largest element without cancellation in sigma^2 - 1.

    It is taken ``at`` "v" (of several the Ritz vector), at W v and the "next v", or, for "svd", at
    the exact singular vectors.
    """
    weight = weight.detach().double()
    v = v.to(weight)
    if v.dim() > 1:
        s = v @ weight.mT
        v = torch.linalg.eigh(s @ s.mT)[1][:, -1] @ v
    if at == "svd":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        u, sigma, v = u[:, 0], s[0], vh[0]
    else:
        u = weight @ (v / v.norm())
        sigma, u, v = u.norm(), u / u.norm(), v / v.norm()
        if at == "next v":
            v = weight.mT @ u
            sigma, v = v.norm(), v / v.norm()
    product = STRENGTH * 4 * sigma * torch.outer(u, v)
    return (sigma**2 - 1) * product, float((sigma**2 + 1) * product.abs().max())


class FirstStep(NamedTuple):
    """Problem of a contender's first step, if any, and the seconds it took to build and run."""

    problem: str | None
    seconds: float


def first_step(contender: Contender, weights) -> FirstStep:
    """Build ``contender``, run one step, check the gradients and restore them."""
    before = [weight.grad.clone() for weight in weights]
    vectors = start_vectors(weights, contender.r)
    start = time.perf_counter()
    contender.make(weights, STRENGTH)()
    if weights[0].is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    if contender.at == "nothing":
        return FirstStep(None, seconds)
    eps = torch.finfo(weights[0].dtype).eps
    # On 16-bit weights the loops also compute in 16 bits.
    arithmetic = 1e-5 if eps < 1e-5 else 8 * eps
    worst = 0.0
    for weight, old, v in zip(weights, before, vectors, strict=True):
        expected, whole = true_gradient(weight, v, contender.at)
        allowed = eps * (old.double().abs() + expected.abs()).max() + arithmetic * whole
        off = (weight.grad.double() - old.double() - expected).abs().max() / allowed
        worst = max(worst, math.inf if off.isnan() else float(off))
        weight.grad.copy_(old)
    if worst <= 1:
        return FirstStep(None, seconds)
    return FirstStep(f"the gradient is off by {worst:.3g} times what is allowed", seconds)


class Group:
    """Contenders and floors of one case on one device, checked, then timed in turn.

    ``durations`` are seconds per step and ``first`` seconds until the first step is done,
    compilation included, by name; ``peak_bytes`` is filled by the memory suite alone; ``wrong``
    says why a contender was not timed.
    """

    def __init__(self, rounds: int, min_time: float, device: str = "cpu"):
        self.rounds, self.min_time, self.device = rounds, min_time, device
        self.durations: dict[str, list[float]] = {}
        self.first: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}
        self.wrong: dict[str, str] = {}

    def run(self, shapes, dtype: torch.dtype, contenders: dict[str, Contender], floors) -> None:
        """Fill ``durations``, ``first`` and ``wrong`` for weights of ``shapes``."""
        torch.compiler.reset()  # earlier compilations count against the recompilation limit
        n_bytes = 2 * sum(m * n for m, n in shapes) * dtype.itemsize
        n_sets = devices.input_sets(self.device, n_bytes)
        sets = [leaves(shapes, dtype, self.device, seed) for seed in range(n_sets)]
        of_sets = [floor_functions(weights) for weights in sets]
        functions = {
            name: in_turn([own[name] for own in of_sets]) for name in FLOORS if name in floors
        }
        for name, contender in contenders.items():
            try:
                problem, self.first[name] = first_step(contender, sets[0])
                if problem is None:
                    steps = [contender.make(weights, STRENGTH) for weights in sets]
                    functions[name] = in_turn(steps)
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
            if problem is not None:
                self.wrong[name] = problem
        self.time(functions)
        del functions, of_sets, sets
        gc.collect()

    def time(self, functions) -> None:
        """Time ``functions`` by name in turn."""
        clock = devices.CLOCKS[self.device]
        self.durations = measure(functions, self.rounds, self.min_time, clock=clock)

    def time_steps(self, functions, most: int = 25) -> None:
        """Time single calls of ``functions``, up to ``most`` in turn: every step counts."""
        if self.device == "cpu":
            self.durations = measure_steps(functions, self.rounds, self.min_time, most=most)
        else:
            self.time(functions)


def floor_functions(weights):
    """Return the least work of any step as functions, by name of FLOORS.

    The floor itself is one read of as many elements as the weights have and one addition to as
    many, in turn, so that both are as cold in the cache as in a step. Its halves and a copy are for
    their bandwidth.
    """
    n, like = sum(weight.numel() for weight in weights), weights[0].detach()
    flat, grad = (like.new_empty(n).normal_() for _ in range(2))

    def floor():
        flat.sum()
        grad.add_(1e-3)

    functions = floor, flat.sum, lambda: grad.add_(1e-3), lambda: grad.copy_(flat)
    return dict(zip(FLOORS, functions, strict=True))

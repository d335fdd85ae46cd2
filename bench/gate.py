"""The gate before the stop watch: a contender whose first step is wrong is not timed."""

from __future__ import annotations

import gc
import math

import torch

from tests import cases

from .baselines import FLOORS, Contender, start_vectors
from .interleave import measure

STRENGTH = 1.0  # large enough for an error in the gradient to show beside what is in .grad


def leaves(shapes, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return weights with gradients, neither of them zero."""
    weights = cases.random_weights(shapes, dtype)
    generator = torch.Generator().manual_seed(1)
    for weight in weights:
        weight.requires_grad_()
        weight.grad = (0.01 * torch.randn(weight.shape, generator=generator)).to(dtype)
    return weights


def true_gradient(weight: torch.Tensor, v: torch.Tensor, at: str) -> tuple[torch.Tensor, float]:
    """Return the gradient in float64, and its largest element had sigma^2 - 1 not cancelled.

    ``at`` v, at W v and the next v, or at the exact singular vectors.
    """
    weight, v = weight.detach().double(), v.double()
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


def problem(contender: Contender, weights) -> str | None:
    """Run one step, restore the gradients, and say what was wrong with the step, if anything."""
    if contender.at == "nothing":
        return None
    before = [weight.grad.clone() for weight in weights]
    vectors = start_vectors(weights)
    contender.make(weights, STRENGTH)()
    eps = torch.finfo(weights[0].dtype).eps
    # In 16 bits the loops also compute in 16 bits.
    arithmetic = 1e-5 if eps < 1e-5 else 8 * eps
    worst = 0.0
    for weight, old, v in zip(weights, before, vectors, strict=True):
        expected, whole = true_gradient(weight, v, contender.at)
        allowed = eps * (old.double().abs() + expected.abs()).max() + arithmetic * whole
        off = (weight.grad.double() - old.double() - expected).abs().max() / allowed
        worst = max(worst, math.inf if off.isnan() else float(off))
        weight.grad.copy_(old)
    return None if worst <= 1 else f"the gradient is off by {worst:.3g} times what is allowed"


class Group:
    """Contenders and floors of one case, checked, then timed in turn."""

    def __init__(self, rounds: int, min_time: float):
        self.rounds, self.min_time = rounds, min_time
        self.durations: dict[str, list[float]] = {}
        self.wrong: dict[str, str] = {}

    def run(self, shapes, dtype: torch.dtype, contenders: dict[str, Contender], floors) -> None:
        """Fill ``durations`` and ``wrong`` for weights of ``shapes``."""
        weights = leaves(shapes, dtype)
        functions = {}
        for name, contender in contenders.items():
            found = problem(contender, weights)
            if found is None:
                functions[name] = contender.make(weights, STRENGTH)
            else:
                self.wrong[name] = found
        functions.update(
            (name, f) for name, f in floor_functions(weights).items() if name in floors
        )
        self.time(functions)
        del functions, weights
        gc.collect()

    def time(self, functions) -> None:
        """Time ``functions`` by name in turn."""
        self.durations = measure(functions, self.rounds, self.min_time)


def compete_on_shapes(compete, suite: str, case: str, dtype: str, contenders) -> None:
    """Let ``compete`` (the fixture) check and time ``contenders`` on the weights of a case."""
    shapes = cases.MODELS[case]()

    def fill(group: Group, names) -> None:
        chosen = {name: contenders[name] for name in names if name in contenders}
        group.run(shapes, getattr(torch, dtype), chosen, names)

    compete(fill, suite=suite, matrices=len(shapes), weights=sum(m * n for m, n in shapes))


def floor_functions(weights):
    """Return what any step must at least do, and its two halves for their bandwidth.

    One read of as many elements as the weights have and one addition to as many, in turn, so that
    both are as cold in the cache as in a step.
    """
    n, dtype = sum(weight.numel() for weight in weights), weights[0].dtype
    generator = torch.Generator().manual_seed(2)
    flat = torch.randn(n, generator=generator).to(dtype)
    grad = torch.randn(n, generator=generator).to(dtype)

    def floor():
        flat.sum()
        grad.add_(1e-3)

    return dict(zip(FLOORS, (floor, flat.sum, lambda: grad.add_(1e-3)), strict=True))

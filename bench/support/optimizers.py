"""An optimizer's step alone: the penalty inside its pass, in a pass of its own, or not at all."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from spectral_kernels import SpectralAdamW, SpectralRegularizer, SpectralSGD

from . import baselines, devices, gate
from .interleave import in_turn

LR = 1e-4
# attach() and the loop add to gradients that no backward() resets: they must not grow.
STRENGTH = 1e-6


class Contender(NamedTuple):
    """A model, its optimizer, and a function that takes one step on the gradients in ``.grad``."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Callable[[], object]


def torch_adamw(model: nn.Module, strength: float) -> Contender:
    """Torch's fused AdamW, without a penalty."""
    optimizer = torch.optim.AdamW(model.parameters(), LR, fused=True)
    return Contender(model, optimizer, optimizer.step)


def spectral_adamw(model: nn.Module, strength: float) -> Contender:
    """SpectralAdamW."""
    optimizer = SpectralAdamW(model, LR, strength=strength)
    return Contender(model, optimizer, optimizer.step)


def torch_sgd(model: nn.Module, strength: float) -> Contender:
    """Torch's fused SGD with momentum, without a penalty."""
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, fused=True)
    return Contender(model, optimizer, optimizer.step)


def spectral_sgd(model: nn.Module, strength: float) -> Contender:
    """SpectralSGD with momentum."""
    optimizer = SpectralSGD(model, LR, momentum=0.9, strength=strength)
    return Contender(model, optimizer, optimizer.step)


def attach(model: nn.Module, strength: float) -> Contender:
    """Torch's fused AdamW with the regularizer attached."""
    contender = torch_adamw(model, strength)
    SpectralRegularizer(model, strength).attach(contender.optimizer)
    return contender


def loop(model: nn.Module, strength: float) -> Contender:
    """The loop over layers with autograd, then torch's fused AdamW."""
    _, optimizer, _ = torch_adamw(model, strength)
    weights = [p for p in model.parameters() if p.dim() >= 2]
    vectors = baselines.start_vectors([w.flatten(1) for w in weights])

    def step():
        (strength * baselines.loop_penalty([w.flatten(1) for w in weights], vectors)).backward()
        optimizer.step()

    return Contender(model, optimizer, step)


CONTENDERS = {
    "torch_adamw": torch_adamw,
    "spectral_adamw": spectral_adamw,
    "attach": attach,
    "loop": loop,
    "torch_sgd": torch_sgd,
    "spectral_sgd": spectral_sgd,
}


def with_gradients(
    build: Callable[[], nn.Module], dtype: torch.dtype, device: str, seed: int = 0
) -> nn.Module:
    """Return a model with a random gradient for every parameter, the same for the same seed."""
    torch.manual_seed(seed)
    model = build().to(device, dtype)
    for p in model.parameters():
        p.grad = torch.randn_like(p).mul_(0.01)
    return model


def disagreement(make, build, dtype: torch.dtype, device: str) -> str | None:
    """Return how the first step of ``make`` differs from that of ``attach``, or None.

    Compares the weights, and the first moments: to a factor, these are the gradient with the
    penalty's (Adam's first step itself is little more than their signs).
    """
    left = []
    for maker in (attach, make):
        contender = maker(with_gradients(build, dtype, device), gate.STRENGTH)
        contender.step()
        state = contender.optimizer.state
        left.append([(p.detach(), state[p]["exp_avg"]) for p in contender.model.parameters()])
    names = [name for name, _ in contender.model.named_parameters()]
    before = with_gradients(build, dtype, device).parameters()
    eps = torch.finfo(dtype).eps
    for name, old, (weight, moment), (expected, right) in zip(
        names, before, left[1], left[0], strict=True
    ):
        # Attached, the sum is rounded before it goes into the moment.
        allowed = 2 * eps * right.abs().double() + 1e-5 * right.abs().max()
        if not ((moment.double() - right).abs() <= allowed).all():
            return f"the gradient of {name} is not that of the attached regularizer"
        allowed = 0.02 * (expected - old).norm() + eps * expected.norm()
        if not (weight - expected).norm() <= allowed:
            return f"the weights of {name} are not those of the attached regularizer"
    return None


def run(group: gate.Group, names, build: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    """Fill ``durations`` and ``wrong`` of ``group`` for the contenders of ``names``."""
    functions = {}
    for name in names:
        problem = None
        try:
            if name == "spectral_adamw":
                problem = disagreement(CONTENDERS[name], build, dtype, group.device)
                gc.collect()
            if problem is None:
                functions[name] = ready(CONTENDERS[name], build, dtype, group.device)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        if problem is not None:
            group.wrong[name] = problem
    group.time(functions)
    functions.clear()
    gc.collect()  # hooks and optimizers reference each other


def ready(make, build, dtype: torch.dtype, device: str) -> Callable[[], object]:
    """Return a step on models that have taken their first one, which makes the moments."""
    n_bytes = 4 * n_parameters(build) * dtype.itemsize  # weights, gradients and two moments
    steps = []
    for seed in range(devices.input_sets(device, n_bytes)):
        steps.append(make(with_gradients(build, dtype, device, seed), STRENGTH).step)
        steps[-1]()
    return in_turn(steps)


def n_parameters(build: Callable[[], nn.Module]) -> int:
    """Return the number of parameters, without allocating them."""
    with torch.device("meta"):
        return sum(p.numel() for p in build().parameters())

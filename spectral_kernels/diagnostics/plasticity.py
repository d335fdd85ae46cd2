"""Measures of plasticity, from a network's gradients and activations."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..selection.arguments import expected
from ..tables.device import wide, wide_dtype
from .singular_values import effective_rank

# The modules of torch.nn.modules.activation that act on each element of their input separately.
_ACTIVATIONS = tuple(
    getattr(nn, name)
    for name in ("CELU", "ELU", "GELU", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh",
                 "LeakyReLU", "LogSigmoid", "Mish", "PReLU", "RReLU", "ReLU", "ReLU6", "SELU",
                 "SiLU", "Sigmoid", "Softplus", "Softshrink", "Softsign", "Tanh", "Tanhshrink",
                 "Threshold")
)  # fmt: skip


def gradient_diversity(
    model: nn.Module,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = nn.functional.cross_entropy,
    chunk_size: int | None = None,
) -> float:
    """Return the effective rank of the matrix of per-example gradients.

    It counts the directions of the gradients: near ``n`` for a network that tells its examples
    apart, near 1 if all gradients are parallel (Lewandowski et al., arXiv 2406.06811, section 3).
    The model is evaluated in eval mode, so that examples do not depend on each other, and left in
    the mode it was in.

    Args:
        model: its parameters that require gradients have P elements together.
        inputs: inputs of ``n`` examples, [n, ...].
        targets: targets of the same examples, [n, ...].
        loss: takes outputs and targets of a batch, here of one example, and returns a 0-d tensor.
        chunk_size: examples whose gradients are computed at a time; None: all. All n x P numbers
            are held in memory in any case.

    Returns:
        between 1 and min(n, P); 0 if all gradients are zero, nan if one is not finite.

    Raises:
        ValueError: no examples, or different numbers of inputs and targets.
    """
    _check_examples(inputs, targets)
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    rest = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}
    rest |= dict(model.named_buffers())

    def of_one(parameters, x, y):
        outputs = torch.func.functional_call(model, (parameters, rest), (x[None],))
        return loss(outputs, y[None])

    gradient = torch.func.vmap(torch.func.grad(of_one), in_dims=(None, 0, 0), chunk_size=chunk_size)
    # Fused attention kernels have no vmap rule for their gradients.
    with _evaluating(model), sdpa_kernel(SDPBackend.MATH):
        found = gradient(parameters, inputs, targets).values()
    shape, dtype = (len(inputs), len(inputs)), wide_dtype(inputs.device)
    gram = torch.zeros(shape, dtype=dtype, device=inputs.device)
    for g in found:
        rows = wide(g.flatten(1))
        gram += rows @ rows.mT
    if not bool(torch.isfinite(gram).all()):
        return math.nan
    return float(effective_rank(torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()))


class Dormant(NamedTuple):
    """Numbers of dormant units and of all units of a layer."""

    dormant: int
    units: int


def dormant_units(
    model: nn.Module, inputs: torch.Tensor, threshold: float = 0.025
) -> dict[str, Dormant]:
    """Return the number of dormant units of every activation module.

    The score of a unit is the mean of |h| over inputs and positions, divided by the mean of that
    over the layer's units; a unit whose score is at most ``threshold`` is dormant, and so are all
    units of a layer that is zero (Sokar et al., "The Dormant Neuron Phenomenon in Deep
    Reinforcement Learning", ICML 2023). The model is evaluated in eval mode and left in the mode it
    was in.

    Args:
        model: has its activations as modules (nn.ReLU, nn.GELU, ...); functions are not counted.
        inputs: one batch, [n, ...], on the model's device.
        threshold: 0 counts only units that are always zero.

    Returns:
        name of the module -> Dormant; the second call of a module is counted as ``name#2`` and so
        on. Units are along dim 1 of outputs with two, four or five dimensions, along the last dim
        of those with three (n, positions, units).

    Raises:
        ValueError: a model without activation modules, or a threshold below zero.
    """
    if not threshold >= 0:
        raise ValueError(expected("threshold", "a number >= 0", threshold))
    found: dict[str, Dormant] = {}

    def hook(name: str):
        def count(_, __, output: torch.Tensor) -> None:
            dim = output.dim() - 1 if output.dim() in (1, 3) else 1
            others = [d for d in range(output.dim()) if d != dim]
            size = wide(output.detach().abs()).mean(others)
            number = sum(n == name or n.startswith(f"{name}#") for n in found)
            dormant = int((size <= threshold * size.mean()).sum())
            found[name if number == 0 else f"{name}#{number + 1}"] = Dormant(dormant, len(size))

        return count

    handles = [module.register_forward_hook(hook(name))
               for name, module in model.named_modules()
               if isinstance(module, _ACTIVATIONS)]  # fmt: skip
    if not handles:
        raise ValueError("model: expected activations that are modules, such as nn.ReLU, got none")
    try:
        with torch.no_grad(), _evaluating(model):
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def weight_norm(model: nn.Module) -> float:
    """Return the Euclidean norm of all parameters of ``model`` together."""
    norms = [torch.linalg.vector_norm(wide(p.detach())) for p in model.parameters()]
    return math.hypot(*map(float, norms))


@torch.no_grad()
def accuracy(
    model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, batch_size: int = 1024
) -> float:
    """Return the fraction of examples whose largest output is that of their class.

    On a task's own examples at its end it measures trainability, on held-out ones generalization.
    The model is evaluated in eval mode and left in the mode it was in.

    Args:
        model: returns outputs [n, classes].
        inputs: [n, ...].
        targets: classes [n], integers.
        batch_size: examples evaluated at a time.

    Raises:
        ValueError: no examples, or different numbers of inputs and targets.
    """
    _check_examples(inputs, targets)
    with _evaluating(model):
        right = sum(
            int((model(x).argmax(1) == y).sum())
            for x, y in zip(inputs.split(batch_size), targets.split(batch_size), strict=True)
        )
    return right / len(inputs)


def _check_examples(inputs: torch.Tensor, targets: torch.Tensor) -> None:
    if len(inputs) == 0 or len(inputs) != len(targets):
        raise ValueError(
            "inputs, targets: expected equally many examples, at least one, got "
            f"{len(inputs)} and {len(targets)}"
        )


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True

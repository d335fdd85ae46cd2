"""Whether a network can still learn: what its weights, gradients and activations tell."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .arguments import one_of
from .backends import check_name
from .lanczos import singular_values
from .plan import R
from .selection import Matrix, select
from .shards import whole_of

# Of torch.nn.modules.activation, what acts on every element of its input alone.
_ACTIVATIONS = tuple(
    getattr(nn, name)
    for name in ("CELU", "ELU", "GELU", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh",
                 "LeakyReLU", "LogSigmoid", "Mish", "PReLU", "RReLU", "ReLU", "ReLU6", "SELU",
                 "SiLU", "Sigmoid", "Softplus", "Softshrink", "Softsign", "Tanh", "Tanhshrink",
                 "Threshold")
)  # fmt: skip
_MATRICES = {"include", "exclude", "splits", "stacked"}


def spectral_norms(
    model_or_named_tensors: nn.Module | Iterable[tuple[str, torch.Tensor]],
    rtol: float = 1e-4,
    *,
    n_vectors: int = 1,
    backend: str = "auto",
    **selection,
) -> dict[str, float] | dict[str, tuple[float, ...]]:
    """Return the largest singular value of every matrix, within ``rtol`` of the SVD's.

    Lanczos iteration on W^T W with full reorthogonalization (Golub and Van Loan, "Matrix
    Computations", section 10.1), for several singular values its block form (section 10.3.6), with
    one read of W per step; frozen parameters are measured too.

    Args:
        model_or_named_tensors: a module, or an iterable of (name, tensor).
        rtol: relative error, at least 1e-5 (1e-12 for float64 weights).
        n_vectors: how many singular values: 1, 2, 4, 8 or 16.
        backend: as for SpectralRegularizer.
        selection: ``include``, ``exclude``, ``splits``, ``stacked`` as for SpectralRegularizer.

    Returns:
        name -> sigma_1; with several vectors name -> that many singular values, largest first, each
        within ``rtol`` times the largest, 0 where a matrix has fewer. nan for a matrix with an
        element that is not finite.

    Raises:
        ValueError: ``rtol`` out of range, a pattern that matches nothing, no matrix, a memory
            layout that cannot be used in place.
        RuntimeError: a backend that cannot run here, or no convergence.
    """
    check_name(backend)
    one_of("n_vectors", n_vectors, R)
    matrices = _matrices("spectral_norms", model_or_named_tensors, selection)
    found = {
        matrix.name: singular_values(matrix, matrix.owner.get().detach(), rtol, backend, n_vectors)
        for matrix in matrices
    }
    return {name: values[0] for name, values in found.items()} if n_vectors == 1 else found


class Spectrum(NamedTuple):
    """What the singular values of a matrix W [M, N] say about it; nan if W is not finite."""

    sigma_max: float
    sigma_min: float
    """The min(M, N)-th."""
    stable_rank: float
    """||W||_F^2 / sigma_max^2, between 1 and min(M, N); 0 for a matrix of zeros."""
    effective_rank: float
    """See :func:`effective_rank`."""
    norm: float
    """||W||_F."""


def spectra(
    model_or_named_tensors: nn.Module | Iterable[tuple[str, torch.Tensor]], **selection
) -> dict[str, Spectrum]:
    """Return what the singular values of every matrix say, from a full SVD in float64.

    It takes min(M, N)^2 max(M, N) operations per matrix; for sigma_1 alone see
    :func:`spectral_norms`.

    Args:
        model_or_named_tensors: a module, or an iterable of (name, tensor).
        selection: ``include``, ``exclude``, ``splits``, ``stacked`` as for SpectralRegularizer.

    Returns:
        name -> Spectrum; all zeros for a matrix without elements.

    Raises:
        ValueError: a pattern that matches nothing, no matrix.
    """
    found = {}
    for matrix in _matrices("spectra", model_or_named_tensors, selection):
        part = matrix.of(whole_of(matrix.owner.get().detach()))
        weight = part.movedim(matrix.row_dim, 0).flatten(1).double()
        if weight.numel() == 0:
            found[matrix.name] = Spectrum(0.0, 0.0, 0.0, 0.0, 0.0)
        elif not bool(torch.isfinite(weight).all()):
            found[matrix.name] = Spectrum(*(math.nan,) * 5)
        else:
            values = torch.linalg.svdvals(weight)
            norm, largest = float(torch.linalg.vector_norm(values)), float(values[0])
            stable = (norm / largest) ** 2 if largest > 0 else 0.0
            found[matrix.name] = Spectrum(
                largest, float(values[-1]), stable, float(effective_rank(values)), norm
            )
    return found


def effective_rank(values: torch.Tensor) -> torch.Tensor:
    """Return the effective rank of a matrix with singular values ``values``.

    exp(-sum p_i log p_i) with p_i = sigma_i / sum sigma (Roy and Vetterli, "The effective rank",
    EUSIPCO 2007): n for n equal values, 1 where one value is all there is, 0 for zeros alone.

    Args:
        values: singular values >= 0 [..., n], in any order.

    Returns:
        [...], float64.
    """
    wide = values.double()
    total = wide.sum(-1, keepdim=True)
    p = wide / torch.where(total > 0, total, 1.0)
    return torch.where(total[..., 0] > 0, torch.special.entr(p).sum(-1).exp(), total[..., 0])


def gradient_diversity(
    model: nn.Module,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = nn.functional.cross_entropy,
    chunk_size: int | None = None,
) -> float:
    """Return the effective rank of the matrix of per-example gradients.

    As many directions as the examples pull the parameters in: near ``n`` for a network that can
    tell its examples apart, near 1 where all of them say the same (Lewandowski et al.,
    arXiv 2406.06811, section 3). The model is evaluated in eval mode, so that examples do not
    depend on each other, and left in the mode it was in.

    Args:
        model: with parameters that require gradients, P numbers together.
        inputs: of ``n`` examples, [n, ...].
        targets: of the same examples, [n, ...].
        loss: takes outputs and targets of a batch, here of one example, and returns a 0-d tensor.
        chunk_size: examples whose gradients are computed at a time; None: all. n x P numbers are
            held in any case.

    Returns:
        between 1 and min(n, P); 0 where all gradients are zero, nan where one is not finite.

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
    # The fused kernels of attention have no rule for batches of gradients.
    with _evaluating(model), sdpa_kernel(SDPBackend.MATH):
        found = gradient(parameters, inputs, targets).values()
    gram = torch.zeros(len(inputs), len(inputs), dtype=torch.float64, device=inputs.device)
    for g in found:
        wide = g.flatten(1).double()
        gram += wide @ wide.mT
    if not bool(torch.isfinite(gram).all()):
        return math.nan
    return float(effective_rank(torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()))


class Dormant(NamedTuple):
    """Of the units of a layer."""

    dormant: int
    units: int


def dormant_units(
    model: nn.Module, inputs: torch.Tensor, threshold: float = 0.025
) -> dict[str, Dormant]:
    """Return how many units of every activation module hardly react to ``inputs``.

    The score of a unit is the mean of |h| over inputs and positions, divided by the mean of that
    over the layer's units; a unit whose score is at most ``threshold`` is dormant, and so are all
    of a layer that is silent (Sokar et al., "The Dormant Neuron Phenomenon in Deep Reinforcement
    Learning", ICML 2023). The model is evaluated in eval mode and left in the mode it was in.

    Args:
        model: with its activations as modules (nn.ReLU, nn.GELU, ...); functions are not seen.
        inputs: one batch, [n, ...], on the model's device.
        threshold: 0 counts units that never react.

    Returns:
        name of the module -> Dormant; a module that is called again is counted as ``name#2`` and so
        on. Units lie along dim 1 of outputs with two, four and five dimensions, along the last of
        those with three (n, positions, units).

    Raises:
        ValueError: a model without activation modules, or a threshold below zero.
    """
    if not threshold >= 0:
        raise ValueError(f"threshold: got {threshold!r}; accepted are numbers from 0 on")
    found: dict[str, Dormant] = {}

    def hook(name: str):
        def count(_, __, output: torch.Tensor) -> None:
            dim = output.dim() - 1 if output.dim() in (1, 3) else 1
            others = [d for d in range(output.dim()) if d != dim]
            size = output.detach().abs().double().mean(others)
            number = sum(n == name or n.startswith(f"{name}#") for n in found)
            dormant = int((size <= threshold * size.mean()).sum())
            found[name if number == 0 else f"{name}#{number + 1}"] = Dormant(dormant, len(size))

        return count

    handles = [module.register_forward_hook(hook(name))
               for name, module in model.named_modules()
               if isinstance(module, _ACTIVATIONS)]  # fmt: skip
    if not handles:
        raise ValueError(
            "model: no activation module was found; accepted are models whose activations are "
            "modules such as nn.ReLU"
        )
    try:
        with torch.no_grad(), _evaluating(model):
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def weight_norm(model: nn.Module) -> float:
    """Return the Euclidean norm of all parameters of ``model`` together."""
    norms = [torch.linalg.vector_norm(p.detach().double()) for p in model.parameters()]
    return math.hypot(*map(float, norms))


@torch.no_grad()
def accuracy(
    model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, batch_size: int = 1024
) -> float:
    """Return the share of examples whose largest output is that of their class.

    On the examples of a task at its end this is trainability, on held-out ones generalization. The
    model is evaluated in eval mode and left in the mode it was in.

    Args:
        model: gives outputs [n, classes].
        inputs: [n, ...].
        targets: classes [n], integers.
        batch_size: examples at a time.

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
            f"inputs, targets: got {len(inputs)} and {len(targets)} examples; accepted are equally "
            "many, one or more"
        )


def _matrices(caller: str, model_or_named_tensors, selection: dict) -> list[Matrix]:
    if unknown := set(selection) - _MATRICES:
        raise TypeError(f"{caller}() got an unexpected argument {unknown.pop()!r}")
    return select(
        model_or_named_tensors, biases=False, norms=False, trainable_only=False, **selection
    ).matrices


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True

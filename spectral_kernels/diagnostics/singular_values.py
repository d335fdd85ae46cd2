"""Singular values of the weights of a network: the largest ones to a tolerance, or all of them."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, overload

import torch
from typing_extensions import Unpack

from ..backends.base import Backend
from ..backends.choice import BackendName, check_backend
from ..engine import operators
from ..engine.initial import row_norms
from ..engine.lanczos import singular_values
from ..engine.settings import check_one_vector
from ..selection.arguments import check_choice, check_number, known_keywords
from ..selection.matrices import Elementwise, Selection
from ..selection.options import MatrixOptions, Source
from ..selection.rules import select
from ..sharding.shards import whole_of
from ..tables.device import wide
from ..tables.schema import N_VECTORS
from .readings import is_matrix


@overload
def spectral_norms(
    model_or_named_tensors: Source,
    rtol: float = 1e-4,
    *,
    n_vectors: Literal[1] = 1,
    backend: BackendName | Backend = "auto",
    **selection: Unpack[MatrixOptions],
) -> dict[str, float]: ...


@overload
def spectral_norms(
    model_or_named_tensors: Source,
    rtol: float = 1e-4,
    *,
    n_vectors: Literal[2, 4, 8, 16],
    backend: BackendName | Backend = "auto",
    **selection: Unpack[MatrixOptions],
) -> dict[str, tuple[float, ...]]: ...


@overload
def spectral_norms(
    model_or_named_tensors: Source,
    rtol: float = 1e-4,
    *,
    n_vectors: int,
    backend: BackendName | Backend = "auto",
    **selection: Unpack[MatrixOptions],
) -> dict[str, float] | dict[str, tuple[float, ...]]: ...


@known_keywords
def spectral_norms(
    model_or_named_tensors: Source,
    rtol: float = 1e-4,
    *,
    n_vectors: int = 1,
    backend: BackendName | Backend = "auto",
    **selection: Unpack[MatrixOptions],
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
        selection: ``include``, ``exclude``, ``splits``, ``stacked``, ``roles`` and ``convolutions``
            as for SpectralRegularizer. The norms of "operator" are the largest that are found by
            climbing from the local maxima of a grid of frequencies, four per tap, in float64.

    Returns:
        name -> sigma_1; with several vectors name -> that many singular values, largest first, each
        within ``rtol`` times the largest, 0 where a matrix has fewer. nan for a matrix with an
        element that is not finite. Those of a depthwise convolution, the block-diagonal matrix of
        its kernels, are the norms of these.

    Raises:
        TypeError: an argument of the wrong type, or an unknown keyword.
        ValueError: ``rtol`` out of range, a pattern that matches nothing, no matrix, a memory
            layout that cannot be used in place.
        RuntimeError: a backend that cannot run here, or no convergence.
    """
    check_backend(backend)
    n_vectors = check_choice("n_vectors", n_vectors, N_VECTORS)
    rtol = check_number("rtol", rtol)
    chosen = _selected(model_or_named_tensors, selection)
    check_one_vector(chosen, n_vectors)
    found = {}
    for matrix in chosen.matrices:
        tensor = matrix.ref.get().detach()
        if matrix.periods is None:
            found[matrix.name] = singular_values(matrix, tensor, rtol, backend, n_vectors)
        else:
            found[matrix.name] = (operators.norm(matrix, tensor, rtol).sigma,)
    for entry in filter(is_matrix, chosen.elementwise):
        norms = _row_norms(entry)[:n_vectors].tolist()
        found[entry.name] = (*norms, *[0.0] * (n_vectors - len(norms)))
    return {name: values[0] for name, values in found.items()} if n_vectors == 1 else found


class Spectrum(NamedTuple):
    """Summary of the singular values of a matrix W [M, N]; nan if W is not finite."""

    sigma_max: float
    sigma_min: float
    """The min(M, N)-th singular value."""
    stable_rank: float
    """||W||_F^2 / sigma_max^2, between 1 and min(M, N); 0 for a matrix of zeros."""
    effective_rank: float
    """See :func:`effective_rank`."""
    norm: float
    """||W||_F."""


@known_keywords
def spectra(
    model_or_named_tensors: Source, **selection: Unpack[MatrixOptions]
) -> dict[str, Spectrum]:
    """Return a summary of the singular values of every matrix, from a full SVD in float64.

    It takes about min(M, N)^2 max(M, N) operations per matrix; for sigma_1 alone see
    :func:`spectral_norms`. On a device without float64 it is in float32.

    Args:
        model_or_named_tensors: a module, or an iterable of (name, tensor).
        selection: ``include``, ``exclude``, ``splits``, ``stacked`` as for SpectralRegularizer.

    Returns:
        name -> Spectrum; all zeros for a matrix without elements.

    Raises:
        TypeError: an argument of the wrong type, or an unknown keyword.
        ValueError: a pattern that matches nothing, no matrix.
    """
    found, chosen = {}, _selected(model_or_named_tensors, selection)
    if any(matrix.periods for matrix in chosen.matrices):
        raise ValueError(
            "convolutions: expected 'flattened', got 'operator', which has a spectrum at every "
            "frequency"
        )
    for matrix in chosen.matrices:
        part = matrix.of(whole_of(matrix.ref.get().detach()))
        weight = wide(part.movedim(matrix.row_dim, 0).flatten(1))
        if weight.numel() == 0:
            values = weight.flatten()
        elif not bool(torch.isfinite(weight).all()):
            values = weight.new_full((1,), math.nan)
        else:
            values = torch.linalg.svdvals(weight)
        found[matrix.name] = _summary(values)
    for entry in filter(is_matrix, chosen.elementwise):
        found[entry.name] = _summary(_row_norms(entry))
    return found


def _summary(values: torch.Tensor) -> Spectrum:
    """Return the summary of singular values [n], the largest first; nan if one is not finite."""
    if not len(values):
        return Spectrum(0.0, 0.0, 0.0, 0.0, 0.0)
    if not bool(torch.isfinite(values).all()):
        return Spectrum(*(math.nan,) * 5)
    norm, largest = float(torch.linalg.vector_norm(values)), float(values[0])
    stable = (norm / largest) ** 2 if largest > 0 else 0.0
    return Spectrum(largest, float(values[-1]), stable, float(effective_rank(values)), norm)


def _row_norms(entry: Elementwise) -> torch.Tensor:
    """Return the norms of the rows of ``entry``, the largest first; nan if one is not finite."""
    norms = row_norms(entry, whole_of(entry.ref.get().detach()))
    if not bool(torch.isfinite(norms).all()):
        return torch.full_like(norms, math.nan)
    return norms.sort(descending=True).values


def effective_rank(values: torch.Tensor) -> torch.Tensor:
    """Return the effective rank of a matrix with singular values ``values``.

    exp(-sum p_i log p_i) with p_i = sigma_i / sum sigma (Roy and Vetterli, "The effective rank",
    EUSIPCO 2007): n for n equal values, 1 if only one is not zero, 0 if all are zero.

    Args:
        values: singular values >= 0 [..., n], in any order.

    Returns:
        [...], float64 (float32 on a device without it).
    """
    values = wide(values)
    total = values.sum(-1, keepdim=True)
    p = values / torch.where(total > 0, total, 1.0)
    return torch.where(total[..., 0] > 0, torch.special.entr(p).sum(-1).exp(), total[..., 0])


def _selected(model_or_named_tensors: Source, selection: MatrixOptions) -> Selection:
    return select(
        model_or_named_tensors, biases=False, norms=False, trainable_only=False, **selection
    )

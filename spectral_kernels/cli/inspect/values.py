"""Singular values and norm of one matrix of a tensor."""

from __future__ import annotations

import math

import torch

from ...engine.lanczos import singular_values
from ...selection.matrices import Matrix
from ...tables.layout import layout_of
from .spectrum import FullSpectrum, SpectrumOptions, full_spectrum

RTOL = 1e-4
_PIECE = 1 << 15  # elements converted to float64 at a time: 256 kB, which stay in a cache
# Up to so many elements a full SVD takes less time than the tables of an iteration.
_SMALL = 1 << 14


def measured_values(
    matrix: Matrix, tensor: torch.Tensor, backend: str, spectra: SpectrumOptions | None = None
) -> tuple[tuple[float, ...], float, FullSpectrum | None]:
    """Measure one matrix of a tensor.

    Args:
        matrix: which one.
        tensor: the whole weight.
        backend: as for SpectralRegularizer.
        spectra: how many singular values, and of which matrices all; None: sigma_1 alone.

    Returns:
        Singular values, largest first, none of an empty matrix; the Euclidean norm; numbers of all
        singular values, None if they were not computed. nan if an element is not finite.

    Raises:
        RuntimeError: no convergence.
    """
    part = matrix.of(tensor)
    norm = _norm(part)
    n_values = min(spectra.n_values if spectra else 1, *matrix.shape)
    if not math.isfinite(norm):
        return (math.nan,) * n_values, math.nan, None
    if part.numel() == 0:
        return (), norm, None
    if spectra is not None and spectra.is_full(*matrix.shape):
        values, spectrum = full_spectrum(part.movedim(matrix.row_dim, 0).flatten(1), n_values)
        return values, norm, spectrum
    if part.numel() <= _SMALL:
        whole = part.movedim(matrix.row_dim, 0).flatten(1).double()
        return tuple(torch.linalg.svdvals(whole)[:n_values].tolist()), norm, None
    try:
        layout_of(matrix, tensor)
    except ValueError:  # neither rows nor columns are contiguous
        tensor = tensor.contiguous()
    r = spectra.n_vectors if spectra else 1
    return singular_values(matrix, tensor, RTOL, backend, r)[:n_values], norm, None


def sigma_and_norm(matrix: Matrix, tensor: torch.Tensor, backend: str) -> tuple[float, float]:
    """Return sigma_1 and the Euclidean norm of a matrix of a tensor; nan if it is not finite."""
    values, norm, _ = measured_values(matrix, tensor, backend)
    return values[0] if values else 0.0, norm


def _norm(part: torch.Tensor) -> float:
    """Return the Euclidean norm in float64, piece by piece."""
    if part.is_contiguous():
        part = part.view(-1)
    dim = max(range(part.dim()), key=part.shape.__getitem__)
    length = max(1, _PIECE * part.shape[dim] // max(part.numel(), 1))
    buffer = torch.empty(max(_PIECE, part.numel() // max(part.shape[dim], 1)), dtype=torch.float64)
    total = 0.0
    for piece in part.split(length, dim):
        wide = buffer[: piece.numel()]
        wide.view(piece.shape).copy_(piece)
        total += float(torch.dot(wide, wide))
    return math.sqrt(total)

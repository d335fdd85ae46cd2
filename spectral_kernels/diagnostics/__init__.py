"""Measures of plasticity, from a network's weights, gradients and activations."""

from .plasticity import Dormant, accuracy, dormant_units, gradient_diversity, weight_norm
from .singular_values import Spectrum, effective_rank, spectra, spectral_norms
from .tails import TailFit, marchenko_pastur_edge, tail_exponent

__all__ = [
    "Dormant",
    "Spectrum",
    "TailFit",
    "accuracy",
    "dormant_units",
    "effective_rank",
    "gradient_diversity",
    "marchenko_pastur_edge",
    "spectra",
    "spectral_norms",
    "tail_exponent",
    "weight_norm",
]

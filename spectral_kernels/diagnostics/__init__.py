"""Measures of plasticity, from a network's weights, gradients and activations."""

from .plasticity import Dormant, accuracy, dormant_units, gradient_diversity, weight_norm
from .singular_values import Spectrum, effective_rank, spectra, spectral_norms

__all__ = [
    "Dormant",
    "Spectrum",
    "accuracy",
    "dormant_units",
    "effective_rank",
    "gradient_diversity",
    "spectra",
    "spectral_norms",
    "weight_norm",
]

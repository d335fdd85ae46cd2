"""Measures of plasticity, from a network's weights, gradients and activations."""

from .attention import attention_norms
from .attention_layers import attention_modules
from .plasticity import Dormant, accuracy, dormant_units, gradient_diversity, weight_norm
from .singular_values import Spectrum, effective_rank, spectra, spectral_norms
from .tails import TailFit, marchenko_pastur_edge, tail_exponent

__all__ = [
    "Dormant",
    "Spectrum",
    "TailFit",
    "accuracy",
    "attention_modules",
    "attention_norms",
    "dormant_units",
    "effective_rank",
    "gradient_diversity",
    "marchenko_pastur_edge",
    "spectra",
    "spectral_norms",
    "tail_exponent",
    "weight_norm",
]

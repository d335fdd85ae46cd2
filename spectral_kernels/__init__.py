"""Spectral regularization for PyTorch: all layers at once."""

from ._version import __version__
from .diagnostics import spectral_norms
from .optim import SpectralAdamW, SpectralSGD
from .regularizer import SpectralRegularizer

__all__ = ["SpectralAdamW", "SpectralRegularizer", "SpectralSGD", "__version__", "spectral_norms"]

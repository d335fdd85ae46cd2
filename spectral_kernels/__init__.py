"""Spectral regularization for PyTorch: all layers at once."""

from ._version import __version__
from .diagnostics import spectral_norms
from .regularizer import SpectralRegularizer

__all__ = ["SpectralRegularizer", "__version__", "spectral_norms"]

"""The command ``spectral-kernels``."""

from .app import main

__all__ = ["main"]

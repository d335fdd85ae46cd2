"""The command ``spectral-kernels inspect``."""

"""The command ``spectral-kernels demo``."""

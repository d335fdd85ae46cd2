"""The command ``spectral-kernels plot``."""

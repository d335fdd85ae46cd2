"""Spectral regularization for PyTorch: all layers at once."""

from importlib.metadata import PackageNotFoundError, version

from .diagnostics import spectral_norms
from .diagnostics.checkpoints import open_checkpoint
from .optim import SpectralAdamW, SpectralSGD
from .regularizer import SpectralRegularizer
from .selection.layers import register_layer

__all__ = [
    "SpectralAdamW", "SpectralRegularizer", "SpectralSGD", "__version__",
    "open_checkpoint", "register_layer", "spectral_norms",
]  # fmt: skip

try:
    __version__ = version("spectral_kernels")  # the repository's tag when the package was built
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"

"""Spectral regularization for PyTorch: all layers at once."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from .diagnostics import spectral_norms
from .optim import SpectralAdamW, SpectralSGD
from .regularizer import SpectralRegularizer
from .selection.layers import register_layer

if TYPE_CHECKING:
    from .diagnostics.checkpoints import open_checkpoint

__all__ = [
    "SpectralAdamW", "SpectralRegularizer", "SpectralSGD", "__version__",
    "open_checkpoint", "register_layer", "spectral_norms",
]  # fmt: skip

try:
    __version__ = version("spectral_kernels")  # the repository's tag when the package was built
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"


def __getattr__(name: str):
    if name == "open_checkpoint":  # the readers of files are loaded when they are wanted
        from .diagnostics.checkpoints import open_checkpoint

        return open_checkpoint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

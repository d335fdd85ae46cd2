"""Optimizers whose step contains the penalty, without another pass over the weights."""

from .adamw import SpectralAdamW
from .sgd import SpectralSGD

__all__ = ["SpectralAdamW", "SpectralSGD"]

"""The part that callbacks share: a regularizer that is attached while training lasts."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from ..backends.base import Backend
from ..backends.choice import BackendName
from ..engine.attach import Attachment
from ..optim.base import SpectralOptimizer
from ..regularizer import SpectralRegularizer, Strength, Target
from ..selection.options import StartOptions


class RegularizerOptions(StartOptions, total=False):
    """The arguments of SpectralRegularizer, without the model."""

    strength: Strength
    exponent: float
    target: Target
    n_power_iterations: int | Literal["auto"]
    n_vectors: int
    backend: BackendName | Backend


class Session:
    """The regularizer of one model at a time, attached to its optimizer while training lasts.

    If the optimizer is SpectralAdamW or SpectralSGD, the regularizer is that of the optimizer,
    which also saves its state (``is_own`` is False then).

    Args:
        arguments: arguments of SpectralRegularizer, without the model.
    """

    def __init__(self, arguments: RegularizerOptions):
        self.arguments = arguments
        self.regularizer: SpectralRegularizer | None = None
        self.is_own = False
        self._model: nn.Module | None = None
        self._attachment: Attachment | None = None

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> SpectralRegularizer:
        """Build the regularizer, or keep it if ``model`` is the same as before, and attach it."""
        self.end()
        optimizer = unwrapped(optimizer)
        if isinstance(optimizer, SpectralOptimizer):
            if self.arguments:
                raise ValueError(
                    f"{', '.join(self.arguments)}: {type(optimizer).__name__} has the penalty in "
                    "its step; pass these arguments to it, and none to the callback"
                )
            self.regularizer, self.is_own = optimizer.regularizer, False
            return self.regularizer
        if not self.is_own or model is not self._model:
            self.regularizer = SpectralRegularizer(model, **self.arguments)
            self.is_own, self._model = True, model
        self._attachment = self.regularizer.attach(optimizer)
        return self.regularizer

    def end(self) -> None:
        """Detach the regularizer, which stays readable."""
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer inside wrappers such as accelerate's."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer

"""Spectral regularization: ours, in its kinds."""

from __future__ import annotations

from typing import ClassVar

import torch

from spectral_kernels import SpectralAdamW, SpectralRegularizer

from .base import FOUR, Method


class Spectral(Method):
    """Spectral regularization, attached to Adam: one power iteration and exponent 2."""

    strengths = FOUR
    options: ClassVar[dict] = {}
    attached: ClassVar[dict] = {}

    def build_optimizer(self) -> torch.optim.Optimizer:
        """Return Adam with the regularizer attached."""
        optimizer = super().build_optimizer()
        regularizer = SpectralRegularizer(self.model, self.strength, **self.options)
        regularizer.attach(optimizer, **self.attached)
        return optimizer


class Spectral1(Spectral):
    """Spectral regularization with exponent 1."""

    options: ClassVar[dict] = {"exponent": 1}


class Spectral4(Spectral):
    """Spectral regularization with exponent 4."""

    options: ClassVar[dict] = {"exponent": 4}


class Spectral8(Spectral):
    """Spectral regularization with exponent 8."""

    options: ClassVar[dict] = {"exponent": 8}


class SpectralSharp(Spectral):
    """Spectral regularization with four vectors per matrix and "auto" iterations."""

    options: ClassVar[dict] = {"n_vectors": 4, "n_power_iterations": "auto"}


class SpectralOperator(Spectral):
    """Spectral regularization of convolutions as the operators that they are."""

    options: ClassVar[dict] = {"convolutions": "operator"}


class SpectralFour(Spectral):
    """Spectral regularization with four vectors per matrix."""

    options: ClassVar[dict] = {"n_vectors": 4}


class SpectralAuto(Spectral):
    """Spectral regularization with "auto" iterations."""

    options: ClassVar[dict] = {"n_power_iterations": "auto"}


class SpectralAbove(Spectral):
    """Spectral regularization of what is above 1 alone."""

    options: ClassVar[dict] = {"side": "above"}


class SpectralDecoupled(Spectral):
    """Spectral regularization beside Adam's step: W <- W - lr * strength * gradient."""

    strengths = (1e-2, 1e-1, 1.0, 10.0)
    attached: ClassVar[dict] = {"decoupled": True}


class SpectralCap(Spectral):
    """No singular value above the bound that ``strength`` is, held beside Adam's step."""

    strengths = (1.0, 1.5, 2.0, 3.0)

    def build_optimizer(self) -> torch.optim.Optimizer:
        """Return Adam, capped."""
        optimizer = Method.build_optimizer(self)
        regularizer = SpectralRegularizer(self.model, target=self.strength)
        regularizer.attach(optimizer, decoupled=True, constraint="cap")
        return optimizer


class InOptimizer(Spectral):
    """SpectralAdamW without weight decay: the penalty inside the optimizer's step."""

    def build_optimizer(self) -> torch.optim.Optimizer:
        """Return SpectralAdamW."""
        return SpectralAdamW(self.model, lr=self.lr, weight_decay=0.0, strength=self.strength)

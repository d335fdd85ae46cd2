"""SGD whose step contains the penalty."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..backends.base import Backend
from ..regularizer import Strength, Target
from .base import TORCH_OPTIONS, SpectralOptimizer
from .update import SGD


class SpectralSGD(SpectralOptimizer):
    """SGD with the spectral penalty in the same pass over weights, gradients and momentum.

    A step is, up to rounding, that of ``torch.optim.SGD`` with :class:`SpectralRegularizer`
    attached. With ``decoupled=True`` the penalty bypasses the momentum and acts on the weights:
    ``W <- W - lr * strength * dR/dW`` beside SGD's own step, where sigma is carried to its target
    at most. Otherwise there is one RuntimeWarning where lr * strength is too large for sigma; see
    :meth:`SpectralRegularizer.attach`.

    Args:
        params: see :class:`SpectralAdamW`.
        lr: learning rate; see :class:`SpectralAdamW`.
        momentum: factor of the momentum buffer; 0: there is no buffer.
        dampening: reduction of the gradient's share in the momentum buffer.
        weight_decay: coupled, as in torch.
        nesterov: Nesterov momentum.
        strength: factor of R.
        exponent: k.
        target: tau.
        model: see :class:`SpectralAdamW`.
        n_power_iterations: see :class:`SpectralAdamW`.
        n_vectors: see :class:`SpectralAdamW`.
        decoupled: let the penalty act on the weights directly, at most up to the target.
        state_dtype: torch.float32 for float32 momentum of 16-bit parameters.
        backend: see :class:`SpectralAdamW`.
        selection: see :class:`SpectralAdamW`.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a value out of range, ``maximize``, nothing to regularize.
        RuntimeError: the named backend cannot run on this machine.
    """

    _rule = SGD

    def __init__(
        self,
        params: nn.Module | Iterable,
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        strength: Strength = 1e-3,
        exponent: float = 2,
        target: Target = 1.0,
        *,
        model: nn.Module | None = None,
        n_power_iterations: int | str = 1,
        n_vectors: int = 1,
        decoupled: bool = False,
        state_dtype: torch.dtype | None = None,
        backend: str | Backend = "auto",
        **selection,
    ):
        defaults = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
            "nesterov": nesterov, **TORCH_OPTIONS,
        }  # fmt: skip
        super().__init__(
            params, defaults, strength, exponent, target, model=model, decoupled=decoupled,
            state_dtype=state_dtype, n_power_iterations=n_power_iterations, n_vectors=n_vectors,
            backend=backend, **selection,
        )  # fmt: skip

    def _check_options(self, group: Mapping[str, Any]) -> None:
        super()._check_options(group)
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("nesterov: got True; accepted with momentum > 0 and dampening 0")

    def _sgd_groups(self) -> list[Mapping[str, Any]]:
        return [] if self._decoupled else self.param_groups

    def _keeps_moments(self) -> bool:
        return any(group["momentum"] != 0 for group in self.param_groups)

    def _row(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        return (group["lr"], group["weight_decay"], group["momentum"], group["dampening"],
                0, group["nesterov"])  # fmt: skip

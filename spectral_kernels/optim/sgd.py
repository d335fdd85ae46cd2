"""SGD whose step contains the penalty."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from typing_extensions import Unpack

from ..backends.base import Backend
from ..backends.choice import BackendName
from ..regularizer import Strength, Target
from ..selection.arguments import check_flag, check_scalar, known_keywords
from ..selection.options import StartOptions
from .base import SpectralOptimizer
from .groups import Params
from .prepared import Option
from .update import SGD


class SGDOptions(StartOptions, total=False):
    """Further keywords of SpectralSGD: of the selection, and those of torch.optim.SGD."""

    maximize: Literal[False]
    foreach: bool | None
    differentiable: Literal[False]
    fused: bool | None


class SpectralSGD(SpectralOptimizer):
    """SGD with the spectral penalty in the same pass over weights, gradients and momentum.

    A step is, up to rounding, that of ``torch.optim.SGD`` with :class:`SpectralRegularizer`
    attached. With ``decoupled=True`` the penalty bypasses the momentum and acts on the weights:
    ``W <- W - lr * strength * dR/dW`` beside SGD's own step, where sigma is carried to its target
    at most. Otherwise there is one RuntimeWarning where lr * strength is too large for sigma; see
    :meth:`SpectralRegularizer.attach`.

    Attributes:
        regularizer: see :class:`SpectralAdamW`.

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
        side: see :class:`SpectralAdamW`.
        constraint: with ``decoupled``: "cap" or "sphere" in place of the penalty, see
            :class:`SpectralAdamW`.
        state_dtype: torch.float32 for float32 momentum of 16-bit parameters.
        backend: see :class:`SpectralAdamW`.
        options: see :class:`SpectralAdamW`; as ``torch.optim.SGD`` this has neither ``amsgrad`` nor
            ``capturable``.

    Raises:
        TypeError: see :class:`SpectralAdamW`.
        ValueError: a value out of range, ``maximize`` or ``differentiable``; a parameter in two
            groups; nothing to regularize; a ``constraint`` without ``decoupled``.
        RuntimeError: the named backend cannot run on this machine.
    """

    _rule, _counts_steps = SGD, False
    _options = (
        Option("lr", "lr"), Option("weight_decay", "weight_decay"),
        Option("momentum", "option_1", is_fixed=True),
        Option("dampening", "option_2", is_fixed=True),
        Option("nesterov", "nesterov", is_fixed=True),
    )  # fmt: skip
    _flags: ClassVar = {"maximize": False, "foreach": None, "differentiable": False, "fused": None}

    @known_keywords
    def __init__(
        self,
        params: Params,
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
        n_power_iterations: int | Literal["auto"] = 1,
        n_vectors: int = 1,
        decoupled: bool = False,
        side: Literal["both", "above"] = "both",
        constraint: Literal["cap", "sphere"] | None = None,
        state_dtype: torch.dtype | None = None,
        backend: BackendName | Backend = "auto",
        **options: Unpack[SGDOptions],
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
            "nesterov": nesterov,
        }  # fmt: skip
        super().__init__(
            params, defaults, strength, exponent, target, model=model, decoupled=decoupled,
            state_dtype=state_dtype, n_power_iterations=n_power_iterations, n_vectors=n_vectors,
            backend=backend, side=side, constraint=constraint, **options,
        )  # fmt: skip

    def _checked_options(self, group: Mapping[str, Any]) -> dict[str, Any]:
        found = super()._checked_options(group)
        if "dampening" in found:
            found["dampening"] = check_scalar("dampening", found["dampening"], -math.inf)
        if "nesterov" in found:
            found["nesterov"] = check_flag("nesterov", found["nesterov"])
        both = {**getattr(self, "defaults", {}), **found}
        if both["nesterov"] and (both["momentum"] <= 0 or both["dampening"] != 0):
            raise ValueError(
                "nesterov: expected False unless momentum > 0 and dampening is 0, got True"
            )
        return found

    def _sgd_groups(self) -> list[Mapping[str, Any]]:
        return [] if self._decoupled else self.param_groups

    def _keeps_moments(self) -> bool:
        return any(group["momentum"] != 0 for group in self.param_groups)

"""AdamW whose step contains the penalty."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..backends.base import Backend
from ..regularizer import Strength, Target
from .base import TORCH_OPTIONS, SpectralOptimizer
from .update import ADAMW


class SpectralAdamW(SpectralOptimizer):
    """AdamW with the spectral penalty in the same pass over weights, gradients and moments.

    A step is, up to rounding, that of ``torch.optim.AdamW`` with :class:`SpectralRegularizer`
    attached: g + strength * dR/dW goes through the moments. With ``decoupled=True`` the penalty
    acts on the weights beside decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101)::

        W <- (1 - lr * weight_decay) W - lr * strength * dR/dW - lr * AdamW's direction of g

    The penalty's part then carries sigma to its target at most, a gain to 1 or -1, a bias to 0,
    however large lr * strength is.

    ``sigma`` and ``residual`` are those of the weights after the last step.

    Args:
        params: a module; an iterable of (name, parameter); or with ``model``, anything that
            torch.optim accepts.
        lr: learning rate, a number or a 0-d tensor. A tensor on the GPU is read there, and may
            change between replays of a CUDA graph, as ``strength`` may.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled, as in torch.
        strength: factor of R, see :class:`SpectralRegularizer`.
        exponent: k.
        target: tau.
        model: the module that holds ``params``, for names and kinds of layers.
        n_power_iterations: 1 or "auto", see :class:`SpectralRegularizer`; extra iterations run
            after the step.
        n_vectors: singular vectors iterated per matrix, see :class:`SpectralRegularizer`.
        decoupled: let the penalty act on the weights directly, at most up to the target.
        state_dtype: torch.float32 for float32 moments of 16-bit parameters; None: the parameter's
            dtype, as in torch.
        backend: see :class:`SpectralRegularizer`.
        selection: ``biases``, ``norms``, ``include``, ``exclude``, ``splits``, ``stacked``,
            ``warmup``, ``seed`` of :class:`SpectralRegularizer`.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a value out of range, ``amsgrad`` or ``maximize``, nothing to regularize.
        RuntimeError: the named backend cannot run on this machine.
    """

    _rule = ADAMW

    def __init__(
        self,
        params: nn.Module | Iterable,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
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
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": False,
            "capturable": False, "decoupled_weight_decay": True, **TORCH_OPTIONS,
        }  # fmt: skip
        super().__init__(
            params, defaults, strength, exponent, target, model=model, decoupled=decoupled,
            state_dtype=state_dtype, n_power_iterations=n_power_iterations, n_vectors=n_vectors,
            backend=backend, **selection,
        )  # fmt: skip

    def _check_options(self, group: Mapping[str, Any]) -> None:
        super()._check_options(group)
        betas = group["betas"]
        if len(betas) != 2 or not all(0 <= float(beta) < 1 for beta in betas):
            raise ValueError(f"betas: got {betas!r}; accepted are two numbers in [0, 1)")
        if not group.get("decoupled_weight_decay", True):
            raise ValueError(
                "decoupled_weight_decay: got False (torch.optim.Adam); accepted is True"
            )

    def _row(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        beta1, beta2 = group["betas"]
        return (group["lr"], group["weight_decay"], beta1, beta2, group["eps"], 0)

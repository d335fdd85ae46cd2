"""AdamW whose step contains the penalty."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from typing_extensions import Unpack

from ..backends.base import Backend
from ..backends.choice import BackendName
from ..regularizer import Strength, Target
from ..selection.arguments import check_scalar, expected, known_keywords
from ..selection.options import StartOptions
from .base import SpectralOptimizer
from .groups import Params
from .prepared import Option
from .update import ADAMW


class AdamWOptions(StartOptions, total=False):
    """Further keywords of SpectralAdamW: of the selection, and those of torch.optim.AdamW."""

    amsgrad: Literal[False]
    maximize: Literal[False]
    foreach: bool | None
    capturable: bool
    differentiable: Literal[False]
    fused: bool | None


class SpectralAdamW(SpectralOptimizer):
    """AdamW with the spectral penalty in the same pass over weights, gradients and moments.

    A step is, up to rounding, that of ``torch.optim.AdamW`` with :class:`SpectralRegularizer`
    attached: g + strength * dR/dW goes through the moments. With ``decoupled=True`` the penalty
    acts on the weights beside decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101)::

        W <- (1 - lr * weight_decay) W - lr * strength * dR/dW - lr * AdamW's direction of g

    The penalty's part then carries sigma to its target at most, and gains and biases to theirs (1
    or -1, and 0), however large lr * strength is.

    With ``constraint`` it holds the weights at the bound instead of pulling them there, whatever lr
    and strength are: sigma, u and v are those of the weights before the step, and AdamW's own
    change is added::

        cap:     W <- W - max(sigma - target, 0) u v^T
        sphere:  W <- (target / sigma) W

    Both are used with bounds on the spectral norm ("Training Transformers with Enforced Lipschitz
    Constants", arXiv 2507.13338; arXiv 2601.08393). "cap" is for each of the ``n_vectors``
    largest singular values; further ones that are above the target come down in later steps.
    Elements of gains and rows of depthwise convolutions, which are singular values too, are held
    likewise, and biases are the optimizer's, but for one with a target: its norm is capped. A
    matrix of zeros stays, and so does one that is not finite.

    ``sigma`` and ``residual`` are those of the weights after the last step. ``strength``,
    ``target``, ``exponent``, ``side``, ``n_power_iterations`` and ``n_vectors`` may be assigned
    later.

    Attributes:
        regularizer: the :class:`SpectralRegularizer` whose penalty is in the steps; it says what is
            selected, and need not be attached.

    Args:
        params: a module, or ``module.parameters()`` as that call returns it, which tells its
            module; (name, parameter) pairs; with ``model``, also parameters without names; or
            groups of pairs or parameters, as torch.optim takes them. As there, the names that are
            given are kept in the groups as "param_names". Where a library makes the optimizer of a
            class and passes it lists or groups of parameters, let the class be
            ``functools.partial(SpectralAdamW, model=module)``.
        lr: learning rate, a number or a 0-d tensor. A tensor on the GPU is read there, and may
            change between replays of a CUDA graph, as ``strength`` may.
        betas: decay rates of the two moments, two numbers or two tensors; tensors are read at every
            step, for which the host waits.
        eps: added to the root of the second moment.
        weight_decay: decoupled, as in torch.
        strength: factor of R, see :class:`SpectralRegularizer`.
        exponent: k.
        target: tau.
        model: the module that holds ``params``, for names and kinds of layers. Its parameters that
            are not among ``params`` are left out.
        n_power_iterations: 1 or "auto", see :class:`SpectralRegularizer`; extra iterations run
            after the step.
        n_vectors: singular vectors iterated per matrix, see :class:`SpectralRegularizer`.
        decoupled: let the penalty act on the weights directly, at most up to the target.
        side: "both" or "above", see :class:`SpectralRegularizer`; with the constraint "sphere",
            "above" scales nothing up.
        constraint: with ``decoupled``: "cap" or "sphere" in place of the penalty. Of strength then
            only counts whether it is 0, which leaves a parameter out; other numbers change nothing.
        state_dtype: torch.float32 for float32 moments of 16-bit parameters; None: the parameter's
            dtype, as in torch.
        backend: see :class:`SpectralRegularizer`.
        options: ``biases``, ``norms``, ``include``, ``exclude``, ``splits``, ``stacked``,
            ``roles``, ``convolutions``, ``warmup``, ``seed`` of :class:`SpectralRegularizer`; and
            keywords of ``torch.optim.AdamW``: ``foreach``, ``fused`` and ``capturable`` change
            nothing, since a step is fused and can be captured anyway; ``amsgrad``, ``maximize`` and
            ``differentiable`` may be False.

    Raises:
        TypeError: an argument of the wrong type or an unknown keyword; a list or groups of
            parameters without names and without ``model``.
        ValueError: a value out of range, ``amsgrad``, ``maximize`` or ``differentiable``; a
            parameter in two groups; nothing to regularize; a ``constraint`` without
            ``decoupled``.
        RuntimeError: the named backend cannot run on this machine.
    """

    _rule, _counts_steps = ADAMW, True
    _options = (
        Option("lr", "lr"), Option("weight_decay", "weight_decay"), Option("eps", "eps"),
        Option("betas", "option_1", 0), Option("betas", "option_2", 1),
    )  # fmt: skip
    _flags: ClassVar = {
        "amsgrad": False, "maximize": False, "foreach": None, "capturable": False,
        "differentiable": False, "fused": None,
    }  # fmt: skip

    @known_keywords
    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-3,
        betas: Sequence[float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
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
        **options: Unpack[AdamWOptions],
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "decoupled_weight_decay": True,
        }  # fmt: skip
        super().__init__(
            params, defaults, strength, exponent, target, model=model, decoupled=decoupled,
            state_dtype=state_dtype, n_power_iterations=n_power_iterations, n_vectors=n_vectors,
            backend=backend, side=side, constraint=constraint, **options,
        )  # fmt: skip

    def _checked_options(self, group: Mapping[str, Any]) -> dict[str, Any]:
        found = super()._checked_options(group)
        if "betas" in found:
            found["betas"] = _checked_betas(found["betas"])
        if not found.get("decoupled_weight_decay", True):
            raise ValueError(
                "decoupled_weight_decay: expected True, got False (that is torch.optim.Adam)"
            )
        return found


def _checked_betas(betas: Any) -> tuple[float | torch.Tensor, ...]:
    """Return two decay rates as floats, or as 0-d tensors if both are tensors."""
    wanted = "two numbers in [0, 1), or two tensors of one element"
    found = list(betas) if isinstance(betas, Iterable) and not isinstance(betas, str) else []
    if len(found) != 2 or len({isinstance(beta, torch.Tensor) for beta in found}) != 1:
        raise ValueError(expected("betas", wanted, betas))
    found = [check_scalar("betas", beta) for beta in found]
    if not all(float(beta) < 1 for beta in found):
        raise ValueError(expected("betas", wanted, betas))
    return tuple(beta if isinstance(beta, torch.Tensor) else float(beta) for beta in found)

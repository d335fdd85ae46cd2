"""The part that callbacks share: a regularizer that is attached while training lasts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal
from weakref import WeakSet

import torch
from torch import nn

from ..backends.base import Backend
from ..backends.choice import BackendName
from ..engine.attach import Attachment, unwrapped
from ..engine.settings import check_constraint
from ..optim.base import SpectralOptimizer
from ..regularizer import SpectralRegularizer, Strength, Target
from ..selection.arguments import check_pattern_list
from ..selection.options import StartOptions


class RegularizerOptions(StartOptions, total=False):
    """The arguments of SpectralRegularizer, without the model."""

    strength: Strength
    exponent: float
    side: Literal["both", "above"]
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
        decoupled: see ``SpectralRegularizer.attach``.
        constraint: see there.
    """

    _all: ClassVar[WeakSet[Session]] = WeakSet()

    def __init__(
        self,
        arguments: RegularizerOptions,
        decoupled: bool = False,
        constraint: Literal["cap", "sphere"] | None = None,
    ):
        self.arguments, self._decoupled = dict(arguments), decoupled
        self._constraint = check_constraint(constraint, decoupled)
        self._all.add(self)
        self.regularizer: SpectralRegularizer | None = None
        self.is_own = False
        self._model: nn.Module | None = None
        self._attachment: Attachment | None = None

    def begin(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        all_optimizers: Sequence[torch.optim.Optimizer] = (),
        *,
        absent: Sequence[str] = (),
    ) -> SpectralRegularizer:
        """Build the regularizer, or keep it if ``model`` is the same as before, and attach it.

        Args:
            model: what is trained.
            optimizers: those that hold the parameters of the regularizer.
            all_optimizers: all that train ``model`` now. Attachments to others are left over from a
                training that was interrupted, and end.
            absent: patterns of names of parameters to leave out, beside those of the arguments.
        """
        self.end()
        optimizers = [unwrapped(optimizer) for optimizer in optimizers]
        present = [*optimizers, *(unwrapped(optimizer) for optimizer in all_optimizers)]
        for other in list(self._all):
            if other._model is model and not other._serves(present):
                other.end()
        if any(isinstance(optimizer, SpectralOptimizer) for optimizer in optimizers):
            return self._of_optimizer(*optimizers)
        if not self.is_own or model is not self._model:
            excluded = check_pattern_list("exclude", self.arguments.get("exclude")) or []
            self.regularizer = SpectralRegularizer(
                model, **{**self.arguments, "exclude": [*excluded, *absent]}
            )
            self.is_own, self._model = True, model
        self._attachment = self.regularizer.attach(
            optimizers, decoupled=self._decoupled, constraint=self._constraint
        )
        return self.regularizer

    def _of_optimizer(self, optimizer: SpectralOptimizer, *others) -> SpectralRegularizer:
        name = type(optimizer).__name__
        if self.arguments or self._decoupled or others:
            given = [*self.arguments, *(["decoupled"] if self._decoupled else [])]
            raise ValueError(
                f"{', '.join(given) or 'optimizer'}: {name} has the penalty in its step; pass "
                "these arguments to it, and none to the callback"
            )
        self.regularizer, self.is_own = optimizer.regularizer, False
        return self.regularizer

    def _serves(self, optimizers: Sequence[torch.optim.Optimizer]) -> bool:
        """Return whether it is attached to one of ``optimizers``."""
        own = [] if self._attachment is None else self._attachment.optimizers
        return any(a is b for a in own for b in optimizers)

    def stop(self) -> None:
        """Let steps no longer add the penalty; for a hook of an optimizer, which cannot detach."""
        if self._attachment is not None:
            self._attachment.stop()

    def end(self) -> None:
        """Detach the regularizer, which stays readable."""
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None

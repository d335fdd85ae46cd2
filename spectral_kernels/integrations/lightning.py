"""A callback for Lightning (package lightning or pytorch_lightning)."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from typing_extensions import Unpack

from ..regularizer import SpectralRegularizer
from ..selection.arguments import check_count, known_keywords
from .session import RegularizerOptions, Session

# If both are installed, the program has already imported the one that it uses.
if "lightning.pytorch" in sys.modules or (
    "pytorch_lightning" not in sys.modules and importlib.util.find_spec("lightning")
):
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    from pytorch_lightning import Callback, LightningModule, Trainer


class SpectralCallback(Callback):
    """Regularizes the module that a Trainer fits, logs metrics, and saves its state in checkpoints.

    ``Trainer(..., callbacks=[SpectralCallback(strength=1e-3)])``. The penalty counts once per
    optimizer step, outside of gradient clipping, as with ``SpectralRegularizer.attach``. Every
    ``log_every_n_steps`` of the Trainer, ``reg.metrics()`` go to its loggers.

    With SpectralAdamW or SpectralSGD as the module's optimizer, it only logs.

    Args:
        per_layer: log sigma and residual / sigma of every matrix too.
        prefix: what the names of the metrics begin with.
        optimizer: index of the module's optimizer to attach to, or indices of several; they must
            hold all selected parameters.
        decoupled: let the penalty act on the weights, as ``SpectralRegularizer.attach`` says.
        constraint: with ``decoupled``, "cap" or "sphere" in place of the penalty, see there.
        **arguments: arguments of SpectralRegularizer, without the model.

    Raises:
        TypeError: an argument that SpectralRegularizer does not have, or a ``constraint`` that is
            no string.
        ValueError: another ``constraint``, or one without ``decoupled``. Other values are checked
            when training begins.
    """

    @known_keywords
    def __init__(
        self,
        *,
        per_layer: bool = False,
        prefix: str = "spectral",
        optimizer: int | Sequence[int] = 0,
        decoupled: bool = False,
        constraint: Literal["cap", "sphere"] | None = None,
        **arguments: Unpack[RegularizerOptions],
    ) -> None:
        several = isinstance(optimizer, list | tuple)
        self._indices = [
            check_count("optimizer", i, 0) for i in (optimizer if several else [optimizer])
        ]
        self.per_layer, self.prefix, self.optimizer = per_layer, prefix, optimizer
        self._session = Session(arguments, decoupled, constraint)
        self._loaded: Mapping[str, Any] | None = None
        self._logged = 0

    @property
    def regularizer(self) -> SpectralRegularizer | None:
        """The regularizer; None before training has begun for the first time."""
        return self._session.regularizer

    @property
    def state_key(self) -> str:
        """The name of this callback's state in a checkpoint, one per optimizer."""
        return self._generate_state_key(optimizer=self.optimizer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build and attach the regularizer, and load the state of a checkpoint if there is one."""
        for index in self._indices:
            if index >= len(trainer.optimizers):
                raise ValueError(
                    f"optimizer: expected indices of the module's {len(trainer.optimizers)} "
                    f"optimizers, got {index}"
                )
        own = [trainer.optimizers[index] for index in self._indices]
        regularizer = self._session.begin(pl_module, own, trainer.optimizers)
        if self._loaded is not None and self._session.is_own:
            regularizer.load_state_dict(self._loaded)
        self._loaded, self._logged = None, trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Log the metrics."""
        step = trainer.global_step
        if not trainer.loggers or step == self._logged or step % trainer.log_every_n_steps:
            return
        metrics, self._logged = self.regularizer.metrics(self.per_layer, self.prefix), step
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detach the regularizer."""
        self._session.end()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Detach the regularizer."""
        self._session.end()

    def state_dict(self) -> dict[str, Any]:
        """Return the vectors of the power iteration, for the Trainer's checkpoint."""
        return self.regularizer.state_dict() if self._session.is_own else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the vectors of a checkpoint until training begins."""
        self._loaded = state_dict or None

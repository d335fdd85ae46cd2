"""A callback for transformers.Trainer."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from typing_extensions import Unpack

from ..regularizer import SpectralRegularizer
from ..selection.arguments import known_keywords
from ..selection.warn import warn
from .session import RegularizerOptions, Session

if TYPE_CHECKING:
    from transformers import Trainer

FILE = "spectral_kernels.pt"  # in a checkpoint's folder


class SpectralCallback(TrainerCallback):
    """Regularizes the model of a Trainer, logs metrics, and saves its state in checkpoints.

    ``Trainer(..., callbacks=[SpectralCallback(strength=1e-3)])``. The penalty counts once per
    optimizer step, outside of gradient clipping, as with ``SpectralRegularizer.attach``. Whenever
    the Trainer logs a loss, ``reg.metrics()`` are added to ``state.log_history`` and to the logs
    that later callbacks receive. TensorBoard, W&B and other reporters come before the callbacks
    passed to a Trainer: for them, use ``SpectralCallback(...).add_to(trainer)`` instead.

    With SpectralAdamW or SpectralSGD as the Trainer's optimizer, it only logs.

    Args:
        per_layer: log sigma and residual / sigma of every matrix too.
        prefix: what the names of the metrics begin with.
        decoupled: let the penalty act on the weights, as ``SpectralRegularizer.attach`` says.
        constraint: with ``decoupled``, "cap" or "sphere" in place of the penalty, see there.
        resume_from: folder of the checkpoint to resume from, if it is neither
            ``args.resume_from_checkpoint`` nor the one of this step in ``args.output_dir``.
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
        decoupled: bool = False,
        constraint: Literal["cap", "sphere"] | None = None,
        resume_from: str | PathLike[str] | None = None,
        **arguments: Unpack[RegularizerOptions],
    ) -> None:
        self.per_layer, self.prefix, self.resume_from = per_layer, prefix, resume_from
        self._session = Session(arguments, decoupled, constraint)

    @property
    def regularizer(self) -> SpectralRegularizer | None:
        """The regularizer; None before training has begun for the first time."""
        return self._session.regularizer

    def add_to(self, trainer: Trainer) -> SpectralCallback:
        """Put this callback before all others of ``trainer``, so that reporters see its metrics."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(self, args, state, control, *, model, optimizer, **kwargs) -> None:
        """Build and attach the regularizer, and load its state if the Trainer resumes."""
        regularizer = self._session.begin(model, [optimizer])
        if not state.global_step or not self._session.is_own:
            return
        folders = self.resume_from, args.resume_from_checkpoint, _folder(args, state)
        files = [Path(folder) / FILE for folder in folders if isinstance(folder, str | PathLike)]
        found = next((file for file in files if file.is_file()), None)
        if found is None:
            warn(
                f"SpectralCallback: no {FILE} in {_folder(args, state)}; the vectors of the power "
                "iteration are warmed up (resume_from= names another folder)",
            )
            return
        regularizer.load_state_dict(torch.load(found, map_location="cpu", weights_only=True))

    def on_log(self, args, state, control, *, logs: dict[str, Any], **kwargs) -> None:
        """Add the metrics to a log that has a loss."""
        if self.regularizer is None or "loss" not in logs:
            return
        metrics = self.regularizer.metrics(self.per_layer, self.prefix)
        logs.update(metrics)
        if state.log_history:
            state.log_history[-1].update(metrics)

    def on_save(self, args, state, control, **kwargs) -> None:
        """Write the vectors of the power iteration into the checkpoint's folder."""
        if not self._session.is_own:
            return
        found, folder = self.regularizer.state_dict(), _folder(args, state)
        if not args.should_save:
            return
        if not folder.is_dir():  # a hyperparameter search saves in other folders
            warn(
                f"SpectralCallback: no folder {folder}; its state is not saved, and a run that "
                "resumes from there warms the vectors up"
            )
            return
        torch.save(found, folder / FILE)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Detach the regularizer."""
        self._session.end()


def _folder(args, state) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"

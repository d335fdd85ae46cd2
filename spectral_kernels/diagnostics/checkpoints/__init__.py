"""Checkpoints on disk: their tensors, one at a time."""

from .checkpoint import Checkpoint, open_checkpoint
from .entries import CheckpointError, LazyTensor, Skipped

__all__ = ["Checkpoint", "CheckpointError", "LazyTensor", "Skipped", "open_checkpoint"]

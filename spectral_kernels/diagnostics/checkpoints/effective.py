"""The weights that a model computes with, made of the tensors that are stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .entries import LazyTensor, Skipped


def effective_weights(
    tensors: Sequence[LazyTensor], config: Mapping[str, Any]
) -> tuple[list[LazyTensor], list[Skipped]]:
    """Return the weights, in the order of what they are made of, and what was left out and why.

    Args:
        tensors: as they are stored.
        config: of the model, see ``Checkpoint.config``.
    """
    return list(tensors), []

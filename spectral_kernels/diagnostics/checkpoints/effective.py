"""The weights that a model computes with, made of the tensors that are stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import adapters, bitsandbytes, parametrized, quantized, torchao
from .entries import LazyTensor, Skipped
from .pool import Pool


def effective_weights(
    tensors: Sequence[LazyTensor], config: Mapping[str, Any]
) -> tuple[list[LazyTensor], list[Skipped]]:
    """Return the weights, in the order of what they are made of, and what was left out and why.

    Quantized values are multiplied by their scales, parametrizations computed, and the two factors
    of a low-rank update multiplied. The state of optimizers is returned as it is.

    Args:
        tensors: as they are stored.
        config: of the model, see ``Checkpoint.config``.
    """
    stored = Pool(tensors)
    torchao.dequantize(stored)
    bitsandbytes.dequantize(stored)
    quantized.dequantize(stored, config)
    parametrized.compute(stored)
    adapters.multiply(stored)
    return stored.weights(), stored.left_out

"""Where tensors lie: looked at in every step, so in one call where that can be had."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

try:
    from .._native import describe as _describe
except ImportError:  # backends/choice.py says why
    _describe = None


class Memory(NamedTuple):
    """Addresses of tensors, and all else that tells how they lie."""

    addresses: bytes  # an int64 per tensor; 0 for one without memory of its own
    layouts: object  # equal for equal devices, dtypes, shapes and strides

    def address_array(self) -> np.ndarray:
        """Return the addresses, int64."""
        return np.frombuffer(self.addresses, np.int64)


def memory_of(tensors: Sequence[torch.Tensor]) -> Memory:
    """Look at ``tensors``.

    Raises:
        RuntimeError: one that has no address, being sparse.
    """
    found = None if _describe is None else _describe(torch.Tensor, list(tensors))
    if found is None:
        addresses = np.array([t.data_ptr() for t in tensors], np.int64).tobytes()
        found = addresses, tuple((t.device, t.dtype, t.shape, t.stride()) for t in tensors)
    return Memory(*found)

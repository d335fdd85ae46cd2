"""Addresses and layouts of tensors, read in every step: in one native call if possible."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from .native import native_module


def _native_describe() -> Callable | None:
    try:
        return native_module().describe
    except ImportError:  # backends/choice.py says why
        return None


_describe = _native_describe()


class Memory(NamedTuple):
    """Addresses and layouts of some tensors."""

    addresses: bytes  # an int64 per tensor; 0 for one without memory of its own
    layouts: object  # equal for equal devices, dtypes, shapes and strides

    def address_array(self) -> np.ndarray:
        """Return the addresses, int64."""
        return np.frombuffer(self.addresses, np.int64)


def memory_of(tensors: Sequence[torch.Tensor]) -> Memory:
    """Return addresses and layouts of ``tensors``.

    Raises:
        RuntimeError: a tensor without an address, such as a sparse one.
    """
    found = None if _describe is None else _describe(torch.Tensor, list(tensors))
    if found is None:
        addresses = np.array([t.data_ptr() for t in tensors], np.int64).tobytes()
        found = addresses, tuple((t.device, t.dtype, t.shape, t.stride()) for t in tensors)
    return Memory(*found)

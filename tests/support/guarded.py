"""Tensors in memory regions of their own, between pages that may not be touched.

An access beyond the region ends the process with SIGSEGV, and so does one to a region whose tensors
are all gone: it is given back to the system at once. The rest of a region's pages holds CANARY.
"""

import ctypes
import math
import mmap
import weakref

import numpy as np
import torch

CANARY = 0xA5
_PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_regions: list[weakref.ref] = []


def _address(pages: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(pages))


def _forbid(address: int) -> None:
    if _libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(_PAGE), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")


def flat(n: int, dtype: torch.dtype, at_end: bool) -> torch.Tensor:
    """Return ``n`` elements, 1-D, whose end (or beginning) is that of their region."""
    if n == 0:  # torch makes no tensor of an empty buffer
        return torch.empty(0, dtype=dtype)
    inner = _PAGE * -(-n * dtype.itemsize // _PAGE)
    pages = mmap.mmap(-1, inner + 2 * _PAGE)
    address = _address(pages)
    _forbid(address)
    _forbid(address + _PAGE + inner)
    _inside(pages)[:] = CANARY
    _regions.append(weakref.ref(pages))
    start = _PAGE + (inner - n * dtype.itemsize if at_end else 0)
    return torch.frombuffer(pages, dtype=dtype, count=n, offset=start)


def empty(shape, strides, dtype: torch.dtype, at_end: bool) -> torch.Tensor:
    """Return a tensor with these strides, in a region as long as its elements reach."""
    n = reach(shape, strides)
    return flat(n, dtype, at_end).as_strided(tuple(shape), tuple(strides))


def reach(shape, strides) -> int:
    """Return the number of elements from the first to the last one, both included."""
    if math.prod(shape) == 0:
        return 0
    return 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))


def _inside(pages: mmap.mmap) -> np.ndarray:
    return np.frombuffer(pages, np.uint8, len(pages) - 2 * _PAGE, _PAGE)


class Bytes:
    """A copy of the bytes of all regions."""

    def __init__(self):
        alive = [(ref, ref()) for ref in _regions]
        _regions[:] = [ref for ref, pages in alive if pages is not None]
        self._kept = [(ref, _inside(pages).copy()) for ref, pages in alive if pages is not None]

    def written_outside(self, tensors) -> str | None:
        """Return where bytes have changed since that belong to none of ``tensors``, or None."""
        for ref, before in self._kept:
            pages = ref()
            if pages is None:
                continue
            now = _inside(pages)
            changed = now != before
            if not changed.any():
                continue
            start = _address(pages) + _PAGE
            for tensor in tensors:
                _clear(changed, start, tensor)
            if changed.any():
                first = int(np.flatnonzero(changed)[0])
                near = [
                    f"{first - (t.data_ptr() - start)} bytes after the start of {tuple(t.shape)}"
                    for t in tensors
                    if start <= t.data_ptr() < start + len(now)
                ]
                return f"{int(changed.sum())} bytes, the first {' and '.join(near) or 'alone'}"
        return None


def _clear(changed: np.ndarray, start: int, tensor: torch.Tensor) -> None:
    """Forget changes at the elements of ``tensor``, if its memory is the region at ``start``."""
    offset = tensor.data_ptr() - start
    if tensor.numel() == 0 or not 0 <= offset < len(changed):
        return
    size = tensor.itemsize
    strides = [size * step for step in tensor.stride()]
    own = np.lib.stride_tricks.as_strided(
        changed[offset:], (*tensor.shape, size), (*strides, 1), writeable=True
    )
    own[...] = False

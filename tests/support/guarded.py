"""Tensors in memory regions of their own, between pages that may not be touched.

An access beyond the region ends the process with SIGSEGV, and so does one to a region whose tensors
are all gone: its addresses are never used again. The rest of a region's pages holds CANARY.
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
# What a region's tensors hold, and its pages, which stay mapped when those are gone.
_regions: list[tuple[weakref.ref, mmap.mmap]] = []
_gone: list[mmap.mmap] = []


def _address(pages: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(pages))


def _forbid(address: int, n_bytes: int = _PAGE) -> None:
    if _libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(n_bytes), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")


def _retire(pages: mmap.mmap) -> None:
    pages.madvise(mmap.MADV_DONTNEED)
    _forbid(_address(pages), len(pages))
    _gone.append(pages)


def flat(n: int, dtype: torch.dtype, at_end: bool) -> torch.Tensor:
    """Return ``n`` elements, 1-D, whose end (or beginning) is that of their region."""
    if n == 0:  # torch makes no tensor of an empty buffer
        return torch.empty(0, dtype=dtype)
    inner = _PAGE * -(-n * dtype.itemsize // _PAGE)
    pages = mmap.mmap(-1, inner + 2 * _PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = _address(pages)
    _forbid(address)
    _forbid(address + _PAGE + inner)
    _inside(pages)[:] = CANARY
    held = memoryview(pages)
    _regions.append((weakref.ref(held, lambda _: _retire(pages)), pages))
    start = _PAGE + (inner - n * dtype.itemsize if at_end else 0)
    return torch.frombuffer(held, dtype=dtype, count=n, offset=start)


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
        alive = [(ref, ref(), pages) for ref, pages in _regions]
        _regions[:] = [(ref, pages) for ref, held, pages in alive if held is not None]
        self._kept = [(ref, pages, _inside(pages).copy()) for ref, pages in _regions]

    def written_outside(self, tensors) -> str | None:
        """Return where bytes have changed since that belong to none of ``tensors``, or None."""
        for ref, pages, before in self._kept:
            held = ref()  # kept until its bytes are compared
            if held is None:
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

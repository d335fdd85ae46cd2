"""Tensors where they lie in a file: mapped when they are read, put together of pieces."""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from .messages import CheckpointError

ByteOrder = Literal["little", "big"]
# Boundaries of pieces divide a tensor into so many cells at most.
_MOST_CELLS = 1 << 22


@dataclass(frozen=True)
class Place:
    """Bytes of a file."""

    file: Path
    start: int
    n_bytes: int


@dataclass(frozen=True)
class Piece:
    """A tensor that is a part of a larger one, such as the shard of a rank."""

    whole: tuple[int, ...]
    """Shape of the larger one."""
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    said: str
    """Which part it is: ``"shard 0 of 2 along dim 0"``."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that :meth:`read` maps into memory."""

    shape: tuple[int, ...]
    dtype: str
    place: Place | None
    """Of the storage; None if there is none to read, and then ``unusable`` says why."""
    strides: tuple[int, ...] = ()
    offset: int = 0
    """Of its first element in the storage, in elements."""
    unusable: str | None = None
    conjugated: bool = False
    negated: bool = False
    is_swapped: bool = False
    """The bytes of an element come in the other order than this machine's."""
    piece: Piece | None = None

    def read(self) -> torch.Tensor:
        """Return the tensor, whose pages come from the file as they are used."""
        if self.place is None:
            raise CheckpointError(f"it cannot be read: {self.unusable}")
        dtype = getattr(torch, self.dtype)
        flat = mapped(self.place, dtype)
        if self.is_swapped:
            flat = flat.clone()
            flat.untyped_storage().byteswap(dtype)
        tensor = flat.as_strided(self.shape, self.strides, self.offset)
        tensor = tensor.conj() if self.conjugated else tensor
        return tensor.neg() if self.negated else tensor

    @property
    def identity(self) -> tuple:
        """Equal for two names of the same elements."""
        return (self.place, self.dtype, self.shape, self.strides, self.offset, self.conjugated,
                self.negated)  # fmt: skip


def mapped(place: Place, dtype: torch.dtype) -> torch.Tensor:
    """Return the bytes as a vector; writing to it leaves the file alone."""
    n_elements = place.n_bytes // dtype.itemsize
    if n_elements == 0:
        return torch.empty(0, dtype=dtype)
    before = place.start % mmap.ALLOCATIONGRANULARITY
    with place.file.open("rb") as opened:
        pages = mmap.mmap(opened.fileno(), before + place.n_bytes, access=mmap.ACCESS_COPY,
                          offset=place.start - before)  # fmt: skip
    return torch.frombuffer(pages, dtype=dtype, count=n_elements, offset=before)


def other_order(order: ByteOrder) -> bool:
    """Return whether bytes in this order have to be swapped here."""
    return order != sys.byteorder


def assembled(
    shape: tuple[int, ...], dtype: str, pieces: Iterable[tuple[Piece, Callable[[], torch.Tensor]]]
) -> torch.Tensor:
    """Return a tensor [*shape] that is put together of pieces, one of them in memory at a time."""
    whole = torch.empty(shape, dtype=getattr(torch, dtype))
    for piece, read in pieces:
        part = whole
        for dim, (start, size) in enumerate(zip(piece.offsets, piece.sizes, strict=True)):
            part = part.narrow(dim, start, size)
        part.copy_(read())
    return whole


def gap(shape: tuple[int, ...], pieces: Sequence[Piece]) -> str | None:
    """Return why the pieces do not make a tensor of this shape, each element once; None if so."""
    filled = [p for p in pieces if math.prod(p.sizes)]
    for piece in filled:
        if not len(piece.offsets) == len(piece.sizes) == len(shape) or not all(
            0 <= start <= start + size <= n
            for start, size, n in zip(piece.offsets, piece.sizes, shape, strict=True)
        ):
            return f"a piece {list(piece.sizes)} at {list(piece.offsets)} is outside of it"
    if sum(math.prod(p.sizes) for p in filled) != math.prod(shape):
        return f"its {len(pieces)} pieces do not have its number of elements"
    bounds = [
        sorted({0, n, *(at for p in filled for at in (p.offsets[d], p.offsets[d] + p.sizes[d]))})
        for d, n in enumerate(shape)
    ]  # fmt: skip
    if math.prod(len(b) for b in bounds) > _MOST_CELLS:
        return f"its {len(pieces)} pieces are too many"
    index = [{bound: i for i, bound in enumerate(b)} for b in bounds]
    taken = np.zeros([len(b) - 1 for b in bounds], dtype=bool)
    for piece in filled:
        cells = tuple(
            slice(at[start], at[start + size])
            for at, start, size in zip(index, piece.offsets, piece.sizes, strict=True)
        )
        if taken[cells].any():
            return "its pieces overlap"
        taken[cells] = True
    return None

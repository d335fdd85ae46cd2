"""Elements of a tensor that are not finite, counted at the speed of reading it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ...diagnostics.checkpoints.entries import short

TILE = 1 << 18  # elements that are looked at together; they stay in a core's cache


@dataclass(frozen=True)
class NotFinite:
    """The elements of one tensor that are not finite."""

    name: str
    shape: tuple[int, ...]
    nan: int
    positive: int
    """How many are +inf."""
    negative: int
    """How many are -inf."""
    first: int
    """Number of the first of them, as rows lie one after the other."""

    @property
    def inf(self) -> int:
        """How many are infinite, of either sign."""
        return self.positive + self.negative

    @property
    def first_index(self) -> tuple[int, ...]:
        """The index of the first of them."""
        found, rest = [], self.first
        for size in reversed(self.shape):
            rest, at = divmod(rest, size)
            found.append(at)
        return tuple(reversed(found))

    @property
    def counts(self) -> str:
        """The counts as text: ``3 nan, 1 inf, 2 -inf``."""
        counts = ((self.nan, "nan"), (self.positive, "inf"), (self.negative, "-inf"))
        return ", ".join(f"{n} {what}" for n, what in counts if n)

    def plus(self, other: NotFinite | None) -> NotFinite:
        """Return the sum of what was found in two parts of the tensor."""
        if other is None:
            return self
        return NotFinite(
            self.name, self.shape, self.nan + other.nan, self.positive + other.positive,
            self.negative + other.negative, min(self.first, other.first),
        )  # fmt: skip


_INTEGERS = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_COMPLEX = ("complex32", "complex64", "complex128")
_FLOATS = ("float64", "float32", "float16", "bfloat16")
# Type -> the bits of each element, doubled without its sign, that are the first not finite ones.
_BYTES = {"float8_e4m3fn": 0xFE, "float8_e5m2": 0xF8}
_SCALE = "float8_e8m0fnu"
_UNSIGNED_ZERO = ("float8_e4m3fnuz", "float8_e5m2fnuz")  # -0 is their nan, and they have no inf


def is_always_finite(dtype: str) -> bool:
    """Return whether no element of this type, as torch names it, can be nan or inf."""
    return dtype in _INTEGERS


def has_kernel(dtype: str) -> bool:
    """Return whether :func:`not_finite` knows the type, as torch names it; no integers."""
    return dtype in (*_COMPLEX, *_FLOATS, *_BYTES, *_UNSIGNED_ZERO, _SCALE)


def not_finite(name: str, tensor: torch.Tensor) -> NotFinite | None:
    """Return what is not finite in a tensor, or None; it takes the memory of a tile.

    Args:
        name: of the tensor.
        tensor: on the CPU, of a dtype that :func:`has_kernel`, and any strides.
    """
    found = None
    for tile, offset in tiles(tensor):
        found = total(found, in_tile(name, tuple(tensor.shape), tile, offset))
    return found


def total(one: NotFinite | None, other: NotFinite | None) -> NotFinite | None:
    """Return the sum of what was found in two parts of a tensor."""
    return other if one is None else one.plus(other)


def tiles(tensor: torch.Tensor, size: int = TILE, offset: int = 0) -> Iterator[tuple]:
    """Yield (elements [n], number of the first one) of all parts of a tensor, n <= ``size``."""
    if tensor.numel() <= size or tensor.is_contiguous():
        flat = tensor.reshape(-1)
        for start in range(0, len(flat), size):
            yield flat[start : start + size], offset + start
        return
    length = tensor[0].numel()
    step = max(1, size // length)
    for start in range(0, len(tensor), step):
        part = tensor[start : start + step]
        yield from tiles(part[0] if step == 1 else part, size, offset + start * length)


def in_tile(name: str, shape: tuple[int, ...], tile: torch.Tensor, offset: int) -> NotFinite | None:
    """Return what is not finite in a tile [n] of a tensor whose element ``offset`` is its first."""
    if _is_finite(tile):
        return None
    values = torch.view_as_real(tile) if tile.is_complex() else tile
    if values.itemsize == 1 or values.dtype == torch.float16:
        values = values.float()
    nan, positive, negative = (values.isnan(), values == math.inf, values == -math.inf)
    bad = nan | positive | negative
    bad = bad.any(-1) if tile.is_complex() else bad
    places = bad.nonzero()
    if not len(places):
        return None
    n_nan, n_positive, n_negative = (
        int(torch.count_nonzero(mask)) for mask in (nan, positive, negative)
    )
    return NotFinite(name, shape, n_nan, n_positive, n_negative, offset + int(places[0]))


def _is_finite(tile: torch.Tensor) -> bool:
    """Return whether all elements are finite; False also where a sum of them is not.

    A sum with a nan or an inf is never finite, and torch adds as fast as it reads. In float16 the
    sum of finite numbers often overflows, so that its ends are taken instead.
    """
    dtype = short(tile.dtype)
    if not len(tile):
        return True
    if tile.is_complex():
        tile = torch.view_as_real(tile)
        dtype = short(tile.dtype)
    if dtype in _BYTES:
        bits = tile.view(torch.uint8)
        return int((bits + bits).amax()) < _BYTES[dtype]
    if dtype in _UNSIGNED_ZERO:
        return int(tile.view(torch.int8).amin()) > -128
    if dtype == _SCALE:
        return int(tile.view(torch.uint8).amax()) < 0xFF
    if dtype == "float16":
        return all(math.isfinite(end) for end in torch.aminmax(tile))
    return math.isfinite(tile.sum())

"""What tensors are in memory, asked in every step: in one native call if possible."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from .native import native_module

_WHY = {
    "freed": "no memory of its own, or less than its shape needs (freed, resized, meta or fake)",
    "negative": "its negative bit set (torch.resolve_neg copies it without)",
}


# Of TensorFunctions in csrc/tensors.h, in their order.
_FUNCTIONS = (
    "data_ptr", "dim", "sizes", "strides", "dtype", "device_type", "device_index", "layout",
    "storage_size", "storage_offset",
)  # fmt: skip


class Memory(NamedTuple):
    """Addresses and layouts of some tensors."""

    addresses: bytes  # an int64 per tensor; 0 for None and for one without elements
    layouts: object  # equal for equal devices, dtypes, shapes and strides, and None alike

    def address_array(self) -> np.ndarray:
        """Return the addresses, int64."""
        return np.frombuffer(self.addresses, np.int64)


class Look(NamedTuple):
    """What ``look`` has seen; equal to the one before as long as nothing has changed."""

    written: Memory
    read: Memory
    problem: tuple[str, int, int] | None

    def check(self, name: Callable[[int], str]) -> None:
        """Raise ValueError if kernels must not touch one of the tensors.

        Args:
            name: returns what a tensor is, such as "parameter 'weight'"; those written are first.
        """
        if self.problem is None:
            return
        what, i, j = self.problem
        if what == "overlap":
            raise ValueError(
                f"{name(i)} and {name(j)} share memory, and a step writes to one of them; give "
                "each its own memory (to tie two weights, register one parameter in both modules)"
            )
        raise ValueError(f"{name(i)}: expected a plain tensor, got one with {_WHY[what]}")


def look(
    written: Sequence[torch.Tensor | None] = (), read: Sequence[torch.Tensor | None] = ()
) -> Look:
    """Look at tensors before kernels dereference their addresses; None has no address.

    Args:
        written: tensors that kernels write to. None may share memory with another of either list.
        read: tensors that they only read.

    Raises:
        RuntimeError: a tensor without an address, such as a sparse one.
    """
    reader = tensor_reader()
    found = None if reader is None else reader.look(list(written), list(read))
    if found is None:
        return _look(list(written), list(read))
    return Look(Memory(*found[:2]), Memory(*found[2:4]), found[4])


def entries(dicts: Sequence[Mapping[str, Any]], keys: tuple[str, ...]) -> list[Any]:
    """Return the values of ``keys`` in every dict, dict by dict; None for a missing one."""
    native = native_or_none()
    if native is not None:
        return native.entries(dicts, keys)
    return [one.get(key) for one in dicts for key in keys]


class Counter:
    """A number that native code counts up, too."""

    def __init__(self):
        self._number = np.zeros(1, np.int64)
        self.address = self._number.__array_interface__["data"][0]

    @property
    def value(self) -> int:
        """The number."""
        return int(self._number[0])

    def count(self) -> None:
        """Add one."""
        self._number[0] += 1


class Column:
    """A field of a table that holds the address of a tensor, or of a part of it, in each row.

    Args:
        table: the table, a structured array.
        field: its field.
        refs: [n_rows], the index of each row's tensor.
        offsets: [n_rows], where its part starts, in bytes.
    """

    def __init__(self, table: np.ndarray, field: str, refs: np.ndarray, offsets: np.ndarray):
        self._field, self._refs = table[field], np.ascontiguousarray(refs, np.int64)
        self._offsets = np.ascontiguousarray(offsets, np.int64)
        starts = [x.__array_interface__["data"][0]
                  for x in (self._field, self._refs, self._offsets)]  # fmt: skip
        # Addresses and sizes, in the order of ``place`` in csrc/tensors.h.
        self.where = starts[0], len(table), table.itemsize, *starts[1:]

    def write(self, memory: Memory) -> None:
        """Write the addresses of the tensors in ``memory``; 0 where a tensor has none."""
        native = native_or_none()
        if native is not None:
            native.place(memory.addresses, *self.where)
            return
        found = memory.address_array()[self._refs]
        self._field[:] = np.where(found, found + self._offsets, 0)


@functools.cache
def native_or_none():
    """Return the compiled module, or None; backends/choice.py says why there is none."""
    try:
        return native_module()
    except ImportError:
        return None


@functools.cache
def tensor_reader():
    """Return what reads tensors in one call, or None where this torch does not offer the parts.

    Those are its C functions of AOTInductor, and DLPack's exchange table. It
    is used only if it sees what Python sees.
    """
    native = native_or_none()
    if native is None:
        return None
    folder = Path(torch.__file__).parent / "lib"
    names = "libtorch_cpu.so", "libtorch_cpu.dylib"
    path = next((folder / name for name in names if (folder / name).exists()), None)
    try:
        library = ctypes.CDLL(str(path))
        functions = [getattr(library, f"aoti_torch_get_{name}") for name in _FUNCTIONS]
        numbers = [ctypes.cast(function, ctypes.c_void_p).value for function in functions]
        reader = native.TensorReader((torch.Tensor, nn.Parameter), numbers, _impl_offset())
    except (OSError, AttributeError, ValueError):
        return None
    return reader if _agrees(reader) else None


def _impl_offset() -> int:
    """Return where a tensor's object holds its ``_cdata``, in bytes; -1 if that is not clear."""
    found = set()
    for x in (torch.zeros(3), nn.Parameter(torch.zeros(2, 3)), torch.zeros(4, 2)[1:]):
        places = range(object.__basicsize__, type(x).__basicsize__, ctypes.sizeof(ctypes.c_void_p))
        words = [ctypes.c_void_p.from_address(id(x) + i).value for i in places]
        found |= {tuple(i for i, word in zip(places, words, strict=True) if word == x._cdata)}
    return found.pop()[0] if len(found) == 1 and all(len(own) == 1 for own in found) else -1


def _agrees(reader) -> bool:
    """Return whether ``reader`` finds what Python finds."""
    base = torch.zeros(6, 5)
    freed = torch.zeros(8)[2:]
    freed.untyped_storage().resize_(0)
    for written, read in (
        ([base[1:3], None, base[3:]], [base[:, 1:], torch.zeros(0, 3)]),
        ([], [base, freed]),
        ([torch._neg_view(base)], []),
    ):
        found, wanted = reader.look(written, read), _look(written, read)
        if found is None or found[4] != wanted.problem:
            return False
        if (found[0], found[2]) != (wanted.written.addresses, wanted.read.addresses):
            return False
    return True


def _look(written: list[torch.Tensor | None], read: list[torch.Tensor | None]) -> Look:
    """See ``look``: in Python, tensor by tensor."""
    problem, tensors = None, [*written, *read]
    for t in tensors:
        if t is not None and not isinstance(t, torch.Tensor):
            raise RuntimeError(f"tensors: expected tensors or None, got a {type(t).__name__}")
    for i, t in enumerate(tensors):
        if t is None or problem is not None:
            continue
        if t.is_neg():
            problem = "negative", i, i
        elif t.numel():
            end = (t.storage_offset() + _extent(t)) * t.element_size()
            if end > t.untyped_storage().nbytes() or t.data_ptr() == 0:
                problem = "freed", i, i
    if problem is None and written:
        problem = _overlap(tensors, len(written))
    return Look(_memory(written), _memory(read), problem)


def _memory(tensors: list[torch.Tensor | None]) -> Memory:
    addresses = np.array([0 if t is None else t.data_ptr() for t in tensors], np.int64).tobytes()
    return Memory(
        addresses,
        tuple(None if t is None else (t.device, t.dtype, t.shape, t.stride()) for t in tensors),
    )


def _extent(t: torch.Tensor) -> int:
    """Return how many elements lie between the first and the last one, both included."""
    if t.numel() == 0:
        return 0
    return 1 + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))


def _overlap(tensors: list[torch.Tensor | None], n_written: int) -> tuple[str, int, int] | None:
    spans = []
    for i, t in enumerate(tensors):
        if t is not None and t.numel():
            begin = t.data_ptr()
            spans.append((begin, begin + _extent(t) * t.element_size(), i))
    any_end = written_end = (0, 0)
    for begin, end, i in sorted(spans):
        before = any_end if i < n_written else written_end
        if begin < before[0]:
            return "overlap", before[1], i
        any_end = max(any_end, (end, i))
        if i < n_written:
            written_end = max(written_end, (end, i))
    return None

"""The tensors among the objects of torch.save, under their dotted names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from .dtensors import placed
from .entries import short
from .names import of_optimizer
from .pickles import STORAGE, Global, PickleError, Record
from .stored import ByteOrder, Place, StoredTensor, other_order
from .values import attributes, count_of, dtype_of, shape_of

_LONGEST_NAME = 4096
# Storages that newer versions of torch still name by the old classes.
_STORAGES = {
    f"torch.{name}Storage": dtype
    for name, dtype in {
        "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16",
        "Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8",
        "Bool": "bool", "ComplexDouble": "complex128", "ComplexFloat": "complex64",
        "QUInt8": "quint8", "QInt8": "qint8", "QInt32": "qint32", "QUInt4x2": "quint4x2",
        "QUInt2x4": "quint2x4",
    }.items()
}  # fmt: skip
_STORAGES |= {"torch.storage.UntypedStorage": "uint8"}
_ITEMSIZES = {"quint8": 1, "qint8": 1, "qint32": 4, "quint4x2": 1, "quint2x4": 1}
_WRAPPERS = {
    "torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state",
    "torch.nn.parameter.Parameter", "torch._utils._rebuild_device_tensor_from_cpu_tensor",
}  # fmt: skip
# Objects whose absence nobody notices.
_PLAIN = {
    "", STORAGE, "collections.OrderedDict", "collections.defaultdict", "collections.Counter",
    "collections.deque", "builtins.set", "__builtin__.set", "builtins.bytearray", "builtins.dict",
    "builtins.list", "__builtin__.dict", "__builtin__.list", "__builtin__.bytearray",
    "_codecs.encode", "torch.Size", "torch.device", "torch.serialization._get_layout",
    "torch.nn.modules.module._IncompatibleKeys",
} | set(_STORAGES)  # fmt: skip
_DTENSOR = "torch.distributed.tensor"
_SUBCLASS = "torch._tensor._rebuild_from_type_v2"
_HOLDERS = (dict, list, tuple, Record, Global)


class TorchObjects:
    """Finds tensors in what a pickle of torch holds.

    Args:
        find: returns the place of a storage from its persistent id, whose size in bytes it is told.
        order: of the bytes of an element.

    Attributes:
        tensors: name -> tensor, and whether it is of an optimizer.
        others: names of the classes of objects that are no tensors.
    """

    def __init__(self, find: Callable[[tuple, int], Place], order: ByteOrder = "little") -> None:
        self._find = find
        self._is_swapped = other_order(order)
        self.tensors: dict[str, tuple[StoredTensor, bool]] = {}
        self.others: dict[str, None] = {}

    def collect(self, root: Any, name: str = "", in_optimizer: bool = False) -> None:
        """Find the tensors in nested containers and objects, in order."""
        seen: set[int] = set()  # a pickle may refer to a container again, even from inside it
        waiting = [(name, root, in_optimizer, False)]
        while waiting:
            name, value, in_optimizer, is_inside = waiting.pop()
            if len(name) > _LONGEST_NAME:
                raise PickleError(f"a name has more than {_LONGEST_NAME} characters")
            if isinstance(value, Record):
                if (tensor := self.tensor_of(value)) is not None:
                    self._add(name, tensor, in_optimizer)
                    if value.kind != _SUBCLASS or tensor.place is not None:
                        continue
                    is_inside = True  # its parts are listed apart
                elif value.kind not in _PLAIN and not value.kind.startswith("__torch__."):
                    if not is_inside:
                        self.others[value.kind] = None
                    is_inside = True
            elif isinstance(value, Global):
                if not is_inside and _is_foreign(value.name):
                    self.others[value.name] = None
                continue
            if id(value) in seen:
                continue
            seen.add(id(value))
            children = list(_children(value))
            keys = {key for key, _ in children if isinstance(key, str)}
            in_optimizer |= {"state", "param_groups"} <= keys
            waiting += [
                (f"{name}.{text}" if name else text, inner, in_optimizer or of_optimizer(text),
                 is_inside)
                for text, inner in ((_text(k), v) for k, v in reversed(children))
                if isinstance(inner, _HOLDERS)
            ]  # fmt: skip

    def _add(self, name: str, tensor: StoredTensor, in_optimizer: bool) -> None:
        unique, number = name, 1
        while unique in self.tensors:
            number += 1
            unique = f"{name}#{number}"
        self.tensors[unique] = (tensor, in_optimizer)

    def tensor_of(self, record: Record) -> StoredTensor | None:
        """Return the tensor that a record is, or None."""
        try:
            return self._tensor_of(record, 0)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, PickleError):
                raise
            raise PickleError(f"{record.kind} has arguments that make no tensor") from error

    def _tensor_of(self, record: Record, depth: int) -> StoredTensor | None:
        kind, arguments = record.kind, record.arguments
        if depth > 8:
            raise PickleError("a tensor is wrapped too often")
        if kind in _WRAPPERS:
            inner = arguments[0]
            return self._tensor_of(inner, depth + 1) if isinstance(inner, Record) else None
        if kind == _SUBCLASS:
            function, cls, inner, state = arguments
            if function.name == "torch._utils._rebuild_wrapper_subclass":
                return self._wrapper(cls.name, inner, state)
            return self._tensor_of(Record(function.name, inner), depth + 1)
        if kind == "torch._utils._rebuild_wrapper_subclass":
            return self._wrapper(arguments[0].name, arguments, record.state)
        if kind.startswith("torch._utils._rebuild_"):
            rebuild = _REBUILD.get(kind.removeprefix("torch._utils._rebuild_"))
            return None if rebuild is None else rebuild(self, *arguments)
        return None

    def _strided(self, storage, offset, size, stride, *more, dtype=None) -> StoredTensor:
        """``_rebuild_tensor`` and ``_rebuild_tensor_v2``: gradient, hooks, then metadata."""
        if storage.kind != STORAGE:
            raise PickleError("a tensor has no storage")
        metadata = more[2] if len(more) > 2 and isinstance(more[2], dict) else {}
        name, count = storage_of(storage)
        n_bytes = count * itemsize(name)
        name = dtype or name
        shape, strides = shape_of(size), shape_of(stride)
        if len(shape) != len(strides):
            raise PickleError(f"a tensor of shape {list(shape)} has strides {list(strides)}")
        made = StoredTensor(
            shape, name, None, strides, count_of(offset), conjugated=bool(metadata.get("conj")),
            negated=bool(metadata.get("neg")), is_swapped=self._is_swapped,
        )  # fmt: skip
        if storage.arguments[3] == "meta":
            return replace(made, unusable="device meta")
        if name in _ITEMSIZES:
            return replace(made, unusable=f"dtype {name}")
        place = self._find(storage.arguments, n_bytes)
        last = made.offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if 0 not in shape and (last + 1) * itemsize(name) > n_bytes:
            raise PickleError(f"a tensor of shape {list(shape)} is larger than its storage")
        why = None
        if math.prod(shape) * itemsize(name) > n_bytes:
            why = "elements share their memory (an expanded tensor)"
        return replace(made, place=place, unusable=why)

    def _strided_v3(self, storage, offset, size, stride, grad, hooks, dtype, *more):
        return self._strided(
            storage, offset, size, stride, grad, hooks, *more, dtype=dtype_of(dtype)
        )

    def _sparse(self, layout, data) -> StoredTensor:
        name = short(layout.arguments[0])
        index = 2 if name == "sparse_coo" else 3
        values = self._tensor_of(data[index - 1], 1)
        assert values is not None
        return StoredTensor(shape_of(data[index]), values.dtype, None, unusable=f"layout {name}")

    def _nested(self, buffer, *_) -> StoredTensor:
        inner = self._tensor_of(buffer, 1)
        assert inner is not None
        return StoredTensor((), inner.dtype, None, unusable="layout nested")

    def _quantized(self, storage, *more) -> StoredTensor:
        return self._strided(storage, *more[:3])

    def _meta(self, dtype, size, stride, *_) -> StoredTensor:
        return StoredTensor(shape_of(size), dtype_of(dtype), None, unusable="device meta")

    def _wrapper(self, cls: str, arguments: tuple, state: Any) -> StoredTensor:
        """A tensor of another class: a DTensor is its local part, others are not understood."""
        _, dtype, size = arguments[:3]
        made = StoredTensor(
            shape_of(size), dtype_of(dtype), None, unusable=f"a tensor of class {cls}"
        )
        if cls.startswith(_DTENSOR) and cls.endswith(".DTensor"):
            state = attributes(state)
            local = self._tensor_of(state["_local_tensor"], 1)
            assert local is not None
            return placed(made.shape, local, state["_spec"])
        return made


_REBUILD: dict[str, Callable[..., StoredTensor]] = {
    "tensor": TorchObjects._strided,
    "tensor_v2": TorchObjects._strided,
    "tensor_v3": TorchObjects._strided_v3,
    "qtensor": TorchObjects._quantized,
    "sparse_tensor": TorchObjects._sparse,
    "nested_tensor": TorchObjects._nested,
    "meta_tensor_no_storage": TorchObjects._meta,
}


def _children(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield what a container or an object holds, with keys that lengthen its name.

    A module's parameters, buffers and modules have the names of ``state_dict``.
    """
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, list | tuple):
        yield from enumerate(value)
    elif isinstance(value, Record) and value.kind != STORAGE:
        yield from value.items
        state = attributes(value.state)
        if isinstance(state.get("_modules"), dict | Record) and "_parameters" in state:
            for holder in ("_parameters", "_buffers", "_modules"):
                yield from _children(state.pop(holder, None))
            yield from ((k, v) for k, v in state.items() if not k.endswith(("_hooks", "_set")))
        elif value.kind != "collections.OrderedDict":
            yield from state.items()
        if value.kind == _SUBCLASS:
            yield from attributes(value.arguments[3]).items()
        elif not value.items and not state:
            yield from enumerate(value.arguments)


def _text(key: Any) -> str:
    """Return a key as a part of a name."""
    if isinstance(key, Global):
        return key.name
    return "object" if isinstance(key, Record) else str(key)


def _is_foreign(name: str) -> bool:
    """Return whether a class or function is more than a name of torch's own, such as a dtype."""
    module, _, attribute = name.rpartition(".")
    return name not in _PLAIN and not (module == "torch" and hasattr(torch, attribute))


def storage_of(storage: Record) -> tuple[str, int]:
    """Return the dtype of a storage, and its number of elements, from its persistent id."""
    _, kind, _, _, count = storage.arguments[:5]
    if len(storage.arguments) > 5 and storage.arguments[5] is not None:
        raise PickleError("a storage is a view of another one")
    return _STORAGES[kind.name.replace("torch.cuda.", "torch.")], count_of(count)


def itemsize(dtype: str) -> int:
    """Return the bytes of an element."""
    return _ITEMSIZES.get(dtype) or getattr(torch, dtype).itemsize

"""Weights of torchao: its state dicts flattened into safetensors files, and saved by torch.save.

In safetensors files ``M.weight`` is stored as ``M._weight_qdata``, ``M._weight_scale`` and others;
the metadata of the file name its class and the blocks that share a scale. In a pickle it is an
object, whose tensors the reader lists as ``M.weight.qdata``, ``M.weight.scale`` and so on.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..untrusted import printable
from .entries import LazyTensor
from .kinds import SAFETENSORS, kind_of
from .pool import Pool
from .quantized import FLOAT8
from .safetensors_file import metadata_of
from .scales import block_text, blocks_of, from_int4, scaled

_TABLES = (
    "scale", "zero_point", "act_pre_scale", "act_quant_scale", "act_quant_zero_point",
    "per_tensor_scale", "act_per_tensor_scale",
)  # fmt: skip
_OF_INT8 = ("Int8Tensor", "IntxUnpackedToInt8Tensor")


def dequantize(stored: Pool) -> None:
    """Put weights in the place of what torchao stores."""
    said: dict[Path, Mapping[str, Any]] = {}
    for place, values in stored.ending("_qdata"):
        match = re.fullmatch(r"((?:.*\.)?)_([^.]+)", place)
        if match is None:
            continue
        tables = {key: t for key in _TABLES if (t := stored.get(f"{place}_{key}")) is not None}
        if values.file not in said:
            is_safetensors = kind_of(values.file) == SAFETENSORS
            said[values.file] = metadata_of(values.file) if is_safetensors else {}
        key = values.key.removesuffix("_qdata")
        inner = re.sub(r"(^|\.)_([^.]+)$", r"\1\2", key)
        kind, blocks = _kind(said[values.file].get(inner), values)
        _put(stored, match[1] + match[2], kind, blocks, values, tables)

    for name, whole in list(stored.tensors.items()):
        named = re.fullmatch(r"a tensor of class torchao\.(?:\w+\.)*(\w+)", whole.unusable or "")
        values = stored.get(f"{name}.qdata")
        if named is not None and values is not None:
            tables = {key: t for key in _TABLES if (t := stored.get(f"{name}.{key}")) is not None}
            stored.drop([whole])
            _put(stored, name, named[1], (), values, tables)


def _kind(text: Any, values: LazyTensor) -> tuple[str, tuple[int, ...]]:
    """Return the class that the metadata name, or float8 by its dtype, and its blocks."""
    try:
        found = json.loads(text)
        kind, blocks = found["_type"], found["_data"].get("block_size") or ()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ("Float8Tensor" if values.dtype in FLOAT8 else ""), ()
    is_right = isinstance(blocks, list) and all(type(n) is int and n > 0 for n in blocks)
    return (kind if isinstance(kind, str) else ""), (tuple(blocks) if is_right else ())


def _put(
    stored: Pool, name: str, kind: str, given: tuple[int, ...],
    values: LazyTensor, tables: dict[str, LazyTensor],
) -> None:  # fmt: skip
    parts = [values, *tables.values()]
    scales, zeros = tables.get("scale"), tables.get("zero_point")
    shape, is_int4 = values.shape, kind == "Int4Tensor"
    known = {"Float8Tensor": set(FLOAT8), "Int4Tensor": {"uint8", "int8"}}
    known |= {key: {"int8"} for key in _OF_INT8}
    if values.dtype not in known.get(kind, ()) or scales is None or len(shape) < 2:
        named = printable(kind)[:40] or "a tensor without metadata"
        stored.leave_out(parts, f"{named} of torchao, whose layout is not read")
        return
    table = scales.shape
    if is_int4:
        # Scales are stored as [N / group, M], for the kernel.
        shape, table = (*shape[:-1], 2 * shape[-1]), (*table[:-2], *table[-2:][::-1])
    blocks = blocks_of(shape, table, given)
    if blocks is None or (zeros is not None and math.prod(zeros.shape) != math.prod(scales.shape)):
        stored.leave_out(parts, f"scales {list(scales.shape)} do not fit values {list(shape)}")
        return

    def read() -> torch.Tensor:
        numbers = scales.read()
        others = None if zeros is None else zeros.read()
        if not is_int4:
            return scaled(values.read(), numbers, shape, blocks, zeros=others)
        shifts = None if others is None else others.mT.contiguous()
        return scaled(values.read(), numbers.mT.contiguous(), shape, blocks, from_int4,
                      shifts=shifts)  # fmt: skip

    dtype = "int4" if is_int4 else values.dtype
    text = f"{dtype} of torchao with {block_text(shape, blocks)}"
    stored.replace(parts, name, shape, text, read)

"""Weights of bitsandbytes: LLM.int8(), and 4-bit NF4 and FP4."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import torch

from .entries import LazyTensor
from .pool import Pool
from .scales import nibbles, scaled

# The state of a weight is some 100 bytes of JSON.
_STATE_BYTES = 1 << 16


def dequantize(stored: Pool) -> None:
    """Put weights in the place of what bitsandbytes stores."""
    _int8(stored)
    for kind in ("nf4", "fp4"):
        for name, state in stored.ending(f".quant_state.bitsandbytes__{kind}"):
            _four_bits(stored, name, kind, state)


def _int8(stored: Pool) -> None:
    """W = int8 * SCB / 127, with SCB the largest absolute value of each row."""
    for module, scales in stored.ending(".SCB"):
        values, layout = stored.get(f"{module}.weight"), stored.get(f"{module}.weight_format")
        if values is None or values.dtype != "int8":
            continue
        parts = [t for t in (values, scales, layout) if t is not None]
        if len(values.shape) != 2 or scales.shape != values.shape[:1]:
            stored.leave_out(parts, f"SCB {list(scales.shape)} does not fit the rows of the weight")
            continue
        if layout is not None and math.prod(layout.shape) == 1 and int(layout.read()) != 0:
            stored.leave_out(parts, "int8 of bitsandbytes whose rows are not in order")
            continue

        def read(values=values, scales=scales) -> torch.Tensor:
            blocks = (1, values.shape[1])
            return scaled(values.read(), scales.read().float() / 127, values.shape, blocks)

        text = "int8 of bitsandbytes with a scale per row"
        stored.replace(parts, f"{module}.weight", values.shape, text, read)


@dataclass(frozen=True)
class _State:
    """What is said of a 4-bit weight in JSON."""

    shape: tuple[int, ...]
    blocksize: int
    nested_blocksize: int
    nested_offset: float


def _state_of(tensor: LazyTensor) -> _State | None:
    """Read the JSON in a tensor of bytes; None if it is not what bitsandbytes writes."""
    if tensor.dtype != "uint8" or math.prod(tensor.shape) > _STATE_BYTES:
        return None
    try:
        found = json.loads(bytes(tensor.read().flatten().tolist()))
        shape, offset = tuple(found["shape"]), float(found.get("nested_offset", 0))
        state = _State(shape, found["blocksize"], found.get("nested_blocksize", 1), offset)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return None
    numbers = (*shape, state.blocksize, state.nested_blocksize)
    is_right = bool(shape) and all(type(n) is int and 0 < n < 2**62 for n in numbers)
    return state if is_right and state.blocksize % 2 == 0 else None


def _four_bits(stored: Pool, name: str, kind: str, packed_state: LazyTensor) -> None:
    """Two numbers per byte, the high half first, into a map of 16 values; a scale per block.

    Scales may be 8-bit numbers themselves, into a map of 256 values ("double quantization",
    Dettmers et al. 2023, arXiv 2305.14314).
    """
    packed = stored.get(name)
    names = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
    tables = {key: t for key in names if (t := stored.get(f"{name}.{key}")) is not None}
    parts = [t for t in (packed, packed_state, *tables.values()) if t is not None]
    state = _state_of(packed_state)
    if packed is None or state is None or not _fits(packed, tables, state):
        stored.leave_out(parts, f"{kind} of bitsandbytes whose parts do not fit together")
        return

    def read() -> torch.Tensor:
        absmax = tables["absmax"].read()
        if "nested_absmax" in tables:
            code, scales = tables["nested_quant_map"].read(), tables["nested_absmax"].read()
            outer = scales.repeat_interleave(state.nested_blocksize)[: absmax.numel()]
            absmax = code[absmax.int()] * outer + state.nested_offset
        values = tables["quant_map"].read().float()
        return _blockwise(packed.read(), absmax, values, state)

    nested = " that are quantized too" if "nested_absmax" in tables else ""
    text = f"{kind} of bitsandbytes with scales of {state.blocksize}{nested}"
    stored.replace(parts, name, state.shape, text, read)


def _fits(packed: LazyTensor, tables: dict[str, LazyTensor], state: _State) -> bool:
    """Return whether the sizes of all parts are those of a weight."""
    sizes = {key: math.prod(t.shape) for key, t in tables.items()}
    count = math.prod(state.shape)
    blocks = -(-count // state.blocksize)
    is_right = (
        packed.dtype == "uint8"
        and math.prod(packed.shape) == -(-count // 2)
        and sizes.get("absmax") == blocks
        and sizes.get("quant_map") == 16
    )
    if is_right and tables["absmax"].dtype == "uint8":
        outer = -(-blocks // state.nested_blocksize)
        return sizes.get("nested_absmax") == outer and sizes.get("nested_quant_map") == 256
    return is_right and "nested_absmax" not in tables


def _blockwise(
    packed: torch.Tensor, absmax: torch.Tensor, values: torch.Tensor, state: _State
) -> torch.Tensor:
    """Return the weight; its blocks run over all elements, the last one may be shorter."""
    count, size = math.prod(state.shape), state.blocksize
    packed, full = packed.flatten(), count // size

    def decode(rows: torch.Tensor) -> torch.Tensor:
        return values[nibbles(rows, high_first=True)]

    inside = packed[: full * size // 2].view(full, size // 2)
    weight = scaled(inside, absmax[:full], (full, size), (1, size), decode).flatten()
    if full * size < count:
        rest = decode(packed[full * size // 2 :])[: count - full * size] * absmax[full]
        weight = torch.cat([weight, rest])
    return weight.view(state.shape)

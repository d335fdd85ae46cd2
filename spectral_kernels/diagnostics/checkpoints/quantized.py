"""Quantized weights with their scales: float8, int8, packed 4-bit and 8-bit integers, MXFP4."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..untrusted import printable
from .entries import LazyTensor
from .pool import Pool
from .scales import (
    Decode,
    block_text,
    blocks_of,
    from_fp4,
    from_packed32,
    scaled,
)

FLOAT8 = {
    "float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2,
    "float8_e4m3fnuz": torch.float8_e4m3fnuz, "float8_e5m2fnuz": torch.float8_e5m2fnuz,
}  # fmt: skip
# As safetensors names them where its reader does not give torch's name.
_OTHER_NAMES = {"F8_E8M0": "float8_e8m0fnu"}
SCALES = {
    "float32", "float64", "bfloat16", "float16", "uint8", "float8_e8m0fnu", "float8_e4m3fn",
}  # fmt: skip
# What the scales of P are called: DeepSeek and transformers; compressed-tensors, vLLM, FBGEMM and
# ModelOpt.
_OF_PARAMETER = ("_scale_inv", "_scale")
# What those of M.weight are called: DeepSeek's own code; ComfyUI.
_OF_MODULE = (".scale", ".scale_weight")
# Beside integers that are packed in ways that are not read here: GPTQ and AWQ; HQQ; AQLM; EETQ.
_FOREIGN = {
    ".qweight": (".qzeros", ".scales", ".g_idx"),
    ".W_q": (".scale", ".zero", ".meta"),
    ".codes": (".codebooks", ".scales"),
    ".weight_scales": (),
}


def dequantize(stored: Pool, config: Mapping[str, Any]) -> None:
    """Put weights in the place of quantized values and their scales.

    Args:
        stored: the tensors; those of torchao and bitsandbytes are taken before.
        config: of the model; its ``quantization_config`` names the method and the block sizes.
    """
    method, blocks = _of_config(config)
    _mxfp4(stored)
    _packed(stored)
    has_scales = _scaled(stored, blocks)
    for name, values in list(stored.tensors.items()):
        if values.dtype in FLOAT8 and len(values.shape) >= 2:
            if has_scales or method:
                stored.leave_out([values], f"{values.dtype} without its scales")
            else:
                _put(stored, [values], name, values.shape, f"{values.dtype} without scales")
    _foreign(stored, method)


def _of_config(config: Mapping[str, Any]) -> tuple[str, tuple[int, ...]]:
    """Return the method that config.json names, safe to print, and the block sizes of scales."""
    found = config.get("quantization_config")
    found = found if isinstance(found, Mapping) else {}
    method, blocks = found.get("quant_method"), found.get("weight_block_size")
    if not isinstance(blocks, list) or not all(type(n) is int and n > 0 for n in blocks):
        blocks = []
    return (printable(method)[:40] if isinstance(method, str) else ""), tuple(blocks)


def _scaled(stored: Pool, given: Sequence[int]) -> bool:
    """Put weights in the place of float8 and int8 values; return whether there are scales."""
    has_scales = False
    for name, values in list(stored.tensors.items()):
        if values.dtype not in FLOAT8 and values.dtype != "int8":
            continue
        scales = _scales_of(stored, name)
        has_scales |= scales is not None
        if scales is None or len(values.shape) < 2:
            continue
        zeros = stored.get(f"{name}_zero_point")
        parts = [values, scales] + ([zeros] if zeros is not None else [])
        blocks = blocks_of(values.shape, scales.shape, given)
        if blocks is None or (zeros is not None and zeros.shape != scales.shape):
            stored.leave_out(parts, _misfit(values, scales))
            continue
        _put(stored, parts, name, values.shape,
             f"{values.dtype} with {block_text(values.shape, blocks)}", blocks)  # fmt: skip
    return has_scales


def _scales_of(stored: Pool, name: str) -> LazyTensor | None:
    names = [name + suffix for suffix in _OF_PARAMETER]
    if name.endswith(".weight"):
        names += [name.removesuffix(".weight") + suffix for suffix in _OF_MODULE]
    for found in filter(None, map(stored.get, names)):
        if is_scales(found):
            return found
    return None


def is_scales(tensor: LazyTensor) -> bool:
    """Return whether a tensor has a dtype that scales are stored in."""
    return _OTHER_NAMES.get(tensor.dtype, tensor.dtype) in SCALES


def _misfit(values: LazyTensor, scales: LazyTensor) -> str:
    return f"scales {list(scales.shape)} do not fit values {list(values.shape)}"


def _put(
    stored: Pool,
    parts: Sequence[LazyTensor],
    name: str,
    shape: Sequence[int],
    made_by: str,
    blocks: Sequence[int] = (),
    decode: Decode = torch.Tensor.float,
) -> None:
    """Put (values - zeros) * scales in the place of ``parts``: values, scales, zeros."""

    def read() -> torch.Tensor:
        values = parts[0].read()
        if len(parts) == 1:
            return values.float()
        tables = [part.read() for part in parts[1:]]
        zeros = tables[1] if len(tables) > 1 else None
        return scaled(values, tables[0], shape, blocks, decode, zeros)

    stored.replace(parts, name, shape, made_by, read)


def _packed(stored: Pool) -> None:
    """Put weights in the place of compressed-tensors' ``weight_packed``."""
    for name, packed in stored.ending("_packed"):
        scales, whole = stored.get(f"{name}_scale"), stored.get(f"{name}_global_scale")
        shape, zeros = stored.get(f"{name}_shape"), stored.get(f"{name}_zero_point")
        order = stored.get(f"{name}_g_idx")
        if scales is None or not is_scales(scales) or len(packed.shape) < 2:
            continue
        parts = [p for p in (packed, scales, whole, shape, zeros, order) if p is not None]
        if zeros is not None or order is not None:
            stored.leave_out(parts, "packed integers with zero points or an order of the columns")
        elif packed.dtype == "uint8":
            _packed_fp4(stored, name, packed, scales, whole)
        elif packed.dtype == "int32" and shape is not None:
            _packed_integers(stored, name, packed, scales, shape)
        else:
            stored.leave_out(parts, f"packed {packed.dtype} of an unknown layout")


def _packed_integers(
    stored: Pool, name: str, packed: LazyTensor, scales: LazyTensor, shape: LazyTensor
) -> None:
    """Words of 32 bits along the last dimension; the shape of the weight is a tensor too."""
    parts = [packed, scales, shape]
    size = shape.read().tolist() if math.prod(shape.shape) == len(packed.shape) else []
    is_right = all(type(n) is int and n > 0 for n in size) and size[:-1] == [*packed.shape[:-1]]
    for bits in (4, 8, 2) if is_right else ():
        if -(-size[-1] * bits // 32) == packed.shape[-1]:
            blocks = blocks_of(size, scales.shape)
            if blocks is None:
                break
            text = f"packed int{bits} with {block_text(size, blocks)}"
            _put_packed(stored, parts, name, size, text, blocks, from_packed32(bits))
            return
    stored.leave_out(parts, _misfit(packed, scales) + f" of a weight {size}")


def _packed_fp4(
    stored: Pool, name: str, packed: LazyTensor, scales: LazyTensor, whole: LazyTensor | None
) -> None:
    """NVFP4, whose scales are divided by one for the whole tensor, or MXFP4."""
    parts = [p for p in (packed, scales, whole) if p is not None]
    size = (*packed.shape[:-1], 2 * packed.shape[-1])
    blocks = blocks_of(size, scales.shape)
    if blocks is None or (whole is not None and math.prod(whole.shape) != 1):
        stored.leave_out(parts, _misfit(packed, scales))
        return
    text = f"{'mxfp4' if whole is None else 'nvfp4'} with {block_text(size, blocks)}"
    _put_packed(stored, parts, name, size, text, blocks, from_fp4, divide=whole is not None)


def _put_packed(
    stored: Pool, parts: Sequence[LazyTensor], name: str, shape: Sequence[int], made_by: str,
    blocks: Sequence[int], decode: Decode, divide: bool = False,
) -> None:  # fmt: skip
    """Put the weight in the place of ``parts``: packed values, scales and another one."""

    def read() -> torch.Tensor:
        scales = parts[1].read()
        if divide:
            scales = scales.float() / parts[2].read().float()
        return scaled(parts[0].read(), scales, shape, blocks, decode)

    stored.replace(parts, name, shape, made_by, read)


def _mxfp4(stored: Pool) -> None:
    """Put experts [E, in, out] in the place of ``_blocks`` and ``_scales``, as transformers does.

    Blocks are bytes [E, out, in / 32, 16] with two E2M1 numbers each, scales [E, out, in / 32] are
    exponents with a bias of 127 (OCP Microscaling Formats, 1.0).
    """
    for name, blocks in stored.ending("_blocks"):
        scales = stored.get(f"{name}_scales")
        if scales is None or blocks.dtype != "uint8" or len(blocks.shape) < 3:
            continue
        if scales.shape != blocks.shape[:-1] or scales.dtype != "uint8":
            stored.leave_out([blocks, scales], _misfit(blocks, scales))
            continue
        *outer, n_blocks, n_bytes = blocks.shape
        shape = (*outer, n_blocks * n_bytes * 2)
        table = (*[1] * len(outer), 2 * n_bytes)

        def read(blocks=blocks, scales=scales, shape=shape, table=table) -> torch.Tensor:
            weight = scaled(blocks.read().flatten(-2), scales.read(), shape, table, from_fp4)
            return weight.transpose(-1, -2)

        transposed = (*shape[:-2], shape[-1], shape[-2])
        stored.replace([blocks, scales], name, transposed,
                       f"mxfp4 with scales of {2 * n_bytes}", read)  # fmt: skip


def _foreign(stored: Pool, method: str) -> None:
    """Leave out what other methods store, and tables of scales that have no weight."""
    named = f" of {method} (config.json)" if method else ""
    for suffix, others in _FOREIGN.items():
        for name, values in stored.ending(suffix):
            beside = [t for o in others if (t := stored.get(name + o)) is not None]
            if beside or not others:
                kind = "quantized values" if others else "a table of scales"
                stored.leave_out([values, *beside], f"{kind}{named}, whose layout is not read")
    for suffix in ("weight_scale_inv", "weight_scale", ".SCB", ".weight.absmax"):
        for _, table in stored.ending(suffix):
            if len(table.shape) >= 1 and math.prod(table.shape) > 1:
                stored.leave_out([table], "a table of scales, whose weight is not read")
    for tensor in list(stored.tensors.values()):
        is_integer = tensor.dtype in ("int8", "uint8", "int32")
        if method and is_integer and len(tensor.shape) >= 2:
            stored.leave_out([tensor], f"dtype {tensor.dtype}{named}, whose layout is not read")

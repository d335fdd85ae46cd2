"""Quantized values times their scales, a tile at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

# Elements of the result that are made at a time.
_TILE = 1 << 20

Decode = Callable[[torch.Tensor], torch.Tensor]


def blocks_of(
    shape: Sequence[int], scales: Sequence[int], given: Sequence[int] = ()
) -> tuple[int, ...] | None:
    """Return the shape of the blocks that share a scale, or None if the shapes do not fit.

    Args:
        shape: of the weight.
        scales: shape of the table: one number; one per leading index, as [M] for the rows of
            [M, N]; or a number per block, [ceil(M / m), ceil(N / n)].
        given: block sizes that config.json names, for the last dimensions.
    """
    if math.prod(scales) == 1:
        return tuple(max(size, 1) for size in shape)
    if len(scales) > len(shape):
        return None
    table = [*scales, *[1] * (len(shape) - len(scales))]
    named = [*[0] * len(shape), *given][-len(shape) :]
    found = []
    for size, count, block in zip(shape, table, named, strict=True):
        # 128 as DeepSeek-V3 has it; else blocks of the same length.
        equal = size // count if count > 0 and size % count == 0 else 0
        for length in (block, size if count == 1 else 0, 128, equal):
            if length > 0 and -(-size // length) == count:
                found.append(length)
                break
        else:
            return None
    return tuple(found)


def block_text(shape: Sequence[int], blocks: Sequence[int]) -> str:
    """Return the kind of scales as text: "one scale", "a scale per row", "scales of 128 x 128"."""
    if tuple(blocks) == tuple(shape):
        return "one scale"
    if len(shape) == 2 and blocks[0] == 1 and blocks[1] >= shape[1]:
        return "a scale per row"
    return f"scales of {' x '.join(map(str, blocks))}"


def scaled(
    values: torch.Tensor,
    scales: torch.Tensor,
    shape: Sequence[int],
    blocks: Sequence[int],
    decode: Decode = torch.Tensor.float,
    zeros: torch.Tensor | None = None,
    shifts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return (values - zeros) * scales + shifts, float32 of ``shape``.

    Beside the result and what is stored, memory for a tile of ``_TILE`` elements is taken.

    Args:
        values: as they are stored, with the shape of the weight; the last dimension may be shorter,
            if ``decode`` makes several values of one.
        scales: a number per block; of any shape with as many elements as there are blocks.
        shape: of the weight, with at least two dimensions.
        blocks: shape of the blocks, see :func:`blocks_of`.
        decode: makes float32 [m, n] of some rows of the stored values.
        zeros: like the scales, in the units of the values.
        shifts: like the scales, in the units of the weight.
    """
    result = torch.empty(tuple(shape), dtype=torch.float32)
    if not result.numel():
        return result
    counts = [-(-size // block) for size, block in zip(shape, blocks, strict=True)]
    tables = [None if t is None else t.reshape(counts) for t in (scales, zeros, shifts)]
    _fill(result, values, tables, blocks, decode)
    return result


def _fill(result, values, tables, blocks, decode) -> None:
    """Fill ``result`` [..., M, N]."""
    if result.dim() > 2:
        for index in range(result.shape[0]):
            inner = [None if t is None else t[index // blocks[0]] for t in tables]
            _fill(result[index], values[index], inner, blocks[1:], decode)
        return
    n_rows, n_cols = result.shape
    step = max(1, _TILE // max(1, n_cols))
    for start in range(0, n_rows, step):
        stop = min(start + step, n_rows)
        tile = decode(values[start:stop])[:, :n_cols]
        rows = torch.arange(start, stop) // blocks[0]
        scales = as_float(_columns(tables[0][rows], blocks[1], n_cols))
        zeros, shifts = (
            None if t is None else _columns(t[rows], blocks[1], n_cols) for t in tables[1:]
        )
        if zeros is not None:
            tile = tile - zeros.float()
        torch.mul(tile, scales, out=result[start:stop])
        if shifts is not None:
            result[start:stop] += shifts.float()


def _columns(table: torch.Tensor, block: int, n_cols: int) -> torch.Tensor:
    """Return the scales [m, n / block] so that they broadcast to [m, n]."""
    if table.shape[1] in (1, n_cols):
        return table
    return table.repeat_interleave(block, dim=1)[:, :n_cols]


def as_float(scales: torch.Tensor) -> torch.Tensor:
    """Return scales as float32; bytes are powers of two with a bias of 127, as in OCP MX."""
    if scales.dtype == torch.uint8:
        return torch.ldexp(torch.ones(scales.shape), scales.int() - 127)
    return scales.float()


def nibbles(packed: torch.Tensor, high_first: bool = False) -> torch.Tensor:
    """Return the numbers 0..15 of bytes [m, n], int32 [m, 2 n]; the low half comes first."""
    packed = packed.int() & 0xFF
    pair = (packed & 15, packed >> 4)
    return torch.stack(pair[::-1] if high_first else pair, dim=-1).flatten(-2)


# E2M1 of OCP MX: a sign, two bits of exponent, one of mantissa.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def from_fp4(packed: torch.Tensor) -> torch.Tensor:
    """Return the values of bytes with two E2M1 each, float32 [m, 2 n]."""
    return torch.tensor(_FP4 + tuple(-value for value in _FP4))[nibbles(packed)]


def from_int4(packed: torch.Tensor) -> torch.Tensor:
    """Return the values of bytes with two signed 4-bit numbers each, float32 [m, 2 n]."""
    numbers = nibbles(packed)
    return (numbers - ((numbers & 8) << 1)).float()


def from_packed32(bits: int) -> Decode:
    """Return what decodes int32 words of 32 / ``bits`` numbers with an offset of 2^(bits - 1)."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)

    def decode(packed: torch.Tensor) -> torch.Tensor:
        numbers = (packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
        return (numbers - (1 << (bits - 1))).flatten(-2).float()

    return decode

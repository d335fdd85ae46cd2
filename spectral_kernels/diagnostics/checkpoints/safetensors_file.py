"""A safetensors file, mapped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ..untrusted import printable
from .entries import CheckpointError, LazyTensor, Skipped, short
from .messages import broken

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool,
    "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "F8_E8M0": torch.float8_e8m0fnu, "C64": torch.complex64,
}  # fmt: skip
# Pages read from a mapped file count as used memory until it is unmapped.
MAPPED_BYTES = 1 << 30


class SafetensorsFile:
    """Lists the tensors of a file, and reads them."""

    def __init__(self, file: Path) -> None:
        try:
            from safetensors import safe_open
        except ModuleNotFoundError:
            raise CheckpointError(
                f"{file}: reading it needs safetensors: pip install 'spectral_kernels[inspect]'"
            ) from None
        self._path = file
        self._read_bytes = 0
        self.skipped: list[Skipped] = []
        try:
            self._opened = safe_open(str(file), framework="pt", device="cpu")
        except Exception as error:
            raise broken(file, error) from None

    @property
    def is_worn(self) -> bool:
        """Whether so much has been read that the file should be reopened."""
        return self._read_bytes > MAPPED_BYTES

    def entries(self) -> list[LazyTensor]:
        """Return the tensors, without a reader."""
        found = []
        for key in self._opened.keys():  # noqa: SIM118  (it is no mapping)
            piece = self._opened.get_slice(key)
            dtype = piece.get_dtype()
            name = short(_DTYPES[dtype]) if dtype in _DTYPES else str(dtype)
            found.append(
                LazyTensor(printable(key), tuple(piece.get_shape()), name, self._path, key)
            )
        return found

    def read(self, key: str) -> torch.Tensor:
        """Return a tensor in the mapped memory."""
        tensor = self._opened.get_tensor(key)
        self._read_bytes += tensor.nbytes
        return tensor


def metadata_of(file: Path) -> Mapping[str, str]:
    """Return the metadata in the header of a safetensors file; {} if there are none."""
    from safetensors import safe_open

    with safe_open(str(file), framework="pt") as opened:
        return opened.metadata() or {}

"""A folder of torch.distributed.checkpoint: tensors in chunks, which ranks have written."""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..untrusted import irregular, printable
from .entries import CheckpointError, LazyTensor, Skipped
from .messages import listing
from .names import of_optimizer
from .pickles import PickleError, Record, read_pickle
from .stored import Piece, assembled, gap
from .torch_file import TorchFile
from .torch_objects import itemsize
from .values import dtype_of, shape_of

METADATA = ".metadata"
_MODULE = "torch.distributed.checkpoint.metadata."
# About 300 bytes per chunk.
_METADATA_BYTES = 1 << 30


class DistributedFolder:
    """Lists the tensors of a folder by its ``.metadata``, and puts them together of their chunks.

    Neither the metadata nor a chunk is unpickled.
    """

    is_worn = False

    def __init__(self, file: Path) -> None:
        self._path = file
        self.skipped: list[Skipped] = []
        self._chunks: dict[tuple[str, tuple[int, ...]], tuple[str, int, int]] = {}
        self._tensors: dict[str, tuple[tuple[int, ...], str, list[Piece]]] = {}
        self._sizes: dict[str, int] = {}
        self._unusable: dict[str, str] = {}
        with listing(file, holds="names and sizes"):
            if file.stat().st_size > _METADATA_BYTES:
                raise CheckpointError(f"{file}: expected at most {_METADATA_BYTES} bytes, got more")
            with file.open("rb") as opened:
                metadata = read_pickle(opened)
            if not isinstance(metadata, Record) or metadata.kind != f"{_MODULE}Metadata":
                raise PickleError("it is no metadata of torch.distributed.checkpoint")
            for index, info in metadata.state["storage_data"].items():
                self._add_chunk(index, info)
            for name, value in metadata.state["state_dict_metadata"].items():
                if value.kind == f"{_MODULE}TensorStorageMetadata":
                    self._add_tensor(name, value.state)

    def entries(self) -> list[LazyTensor]:
        """Return the tensors, without a reader."""
        return [
            LazyTensor(printable(name), shape, dtype, self._path, name, self._unusable.get(name),
                       of_optimizer(name))
            for name, (shape, dtype, _) in self._tensors.items()
        ]  # fmt: skip

    def read(self, key: str) -> torch.Tensor:
        """Return a tensor; mapped if it is one chunk, else put together of its chunks."""
        shape, dtype, pieces = self._tensors[key]
        if len(pieces) == 1 and pieces[0].sizes == shape:
            return self._chunk(key, dtype, pieces[0])
        return assembled(shape, dtype, ((p, partial(self._chunk, key, dtype, p)) for p in pieces))

    def _add_chunk(self, index: Record, info: Record) -> None:
        at, state = index.state, info.state
        if at.get("offset") is None:  # an object, not a tensor
            return
        file, start, n_bytes = state["relative_path"], state["offset"], state["length"]
        if not isinstance(file, str) or re.search(r"[/\\\0]", file) or file in ("", ".", ".."):
            raise PickleError(f"a chunk is in {printable(str(file)[:100])!r}, no file beside it")
        if file not in self._sizes:
            self._sizes[file] = self._size_of(file)
        if type(start) is not int or type(n_bytes) is not int or not (
            0 <= start <= start + n_bytes <= self._sizes[file]
        ):  # fmt: skip
            raise PickleError(f"a chunk reaches beyond the end of {printable(file)}")
        key = (at["fqn"], shape_of(at["offset"]))
        self._chunks[key] = (file, start, n_bytes)
        if state.get("transform_descriptors"):
            self._unusable[key[0]] = "its chunks are compressed; save it without extensions"

    def _size_of(self, file: str) -> int:
        path = self._path.parent / file
        if (kind := irregular(path)) is not None:
            raise CheckpointError(f"{path}: expected a regular file, got {kind}")
        return path.stat().st_size

    def _add_tensor(self, name: Any, state: dict) -> None:
        if not isinstance(name, str):
            raise PickleError("a name is no text")
        properties = state["properties"].state
        if isinstance(properties, dict):  # before torch 2.1
            properties = (properties["dtype"],)
        dtype, shape = dtype_of(properties[0]), shape_of(state["size"])
        pieces = []
        for chunk in state["chunks"]:
            offsets, sizes = shape_of(chunk.state["offsets"]), shape_of(chunk.state["sizes"])
            place = self._chunks.get((name, offsets))
            if place is None:
                raise PickleError(f"a chunk of {printable(name)} is in no file")
            if math.prod(sizes) * itemsize(dtype) > place[2]:
                raise PickleError(f"a chunk of {printable(name)} is larger than its part of a file")
            pieces.append(Piece(shape, offsets, sizes, ""))
        if (why := gap(shape, pieces)) is not None:
            raise PickleError(f"{printable(name)} {list(shape)}: {why}")
        places = [self._chunks[name, p.offsets] for p in pieces]
        if sum(n for _, _, n in places) > sum(self._sizes[f] for f in {f for f, _, _ in places}):
            raise PickleError(f"chunks of {printable(name)} overlap in their files")
        self._tensors[name] = (shape, dtype, pieces)

    def _chunk(self, name: str, dtype: str, piece: Piece) -> torch.Tensor:
        file, start, n_bytes = self._chunks[name, piece.offsets]
        inner = TorchFile(self._path.parent / file, start, n_bytes)
        (entry,) = inner.entries()
        if (entry.shape, entry.dtype) != (piece.sizes, dtype):
            raise CheckpointError(
                f"{self._path.parent / file}: expected a chunk of {dtype} {list(piece.sizes)}, as "
                f"the metadata says, got {entry.dtype} {list(entry.shape)}"
            )
        return inner.read(entry.key)

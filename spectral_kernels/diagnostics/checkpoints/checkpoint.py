"""A checkpoint on disk: its tensors, read one at a time and never unpickled unsafely."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ..untrusted import printable
from .effective import effective_weights
from .entries import CheckpointError, LazyTensor, Skipped, natural
from .files import as_in_index, files_of
from .messages import broken
from .safetensors_file import SafetensorsFile
from .torch_file import TorchFile

# config.json of a model is a few kB.
_CONFIG_BYTES = 1 << 24


class Checkpoint:
    """The tensors of a checkpoint on disk; see :func:`open_checkpoint`.

    Iterating yields (name, LazyTensor), in the order of the layers.

    Attributes:
        path: what was opened.
        tensors: the weights.
        skipped: files and tensors that were left out, and why.
        config: ``config.json`` beside the weights; empty if there is none.
    """

    def __init__(self, path: str | PathLike[str], effective: bool = True) -> None:
        self.path = Path(path)
        self.skipped: list[Skipped] = []
        self._lock = threading.Lock()
        self._file: Path | None = None
        self._reader: SafetensorsFile | TorchFile | None = None
        files, weight_map = files_of(self.path)
        found = [entry for file in files for entry in self._open(file).entries()]
        if weight_map is not None:
            found = as_in_index(self.path, weight_map, found)
        if len(files) > 1 and len({entry.name for entry in found}) < len(found):
            found = [replace(e, name=f"{printable(e.file.name)}:{e.name}") for e in found]
        found = _distinct(found)
        if any(file.suffix == ".safetensors" for file in files):
            found.sort(key=lambda entry: natural(entry.name))  # their own order is by bytes
        self.config: Mapping[str, Any] = _config_beside(files[0])
        self.tensors = [replace(entry, reader=self._read) for entry in found]
        if effective:
            self.tensors, left_out = effective_weights(self.tensors, self.config)
            self.skipped += left_out

    def __iter__(self) -> Iterator[tuple[str, LazyTensor]]:
        return ((tensor.name, tensor) for tensor in self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Close the file that is open; a tensor that is read later opens it again."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        self._file = self._reader = None

    def _read(self, entry: LazyTensor) -> torch.Tensor:
        try:
            with self._lock:
                tensor = self._open(entry.file).read(entry.key)
            # Kernels expect elements at multiples of their size, which files do not guarantee.
            return tensor if tensor.data_ptr() % tensor.itemsize == 0 else tensor.clone()
        except CheckpointError:
            raise
        except Exception as error:
            raise broken(entry.file, error, f"'{entry.name}': ") from None

    def _open(self, file: Path) -> SafetensorsFile | TorchFile:
        if self._reader is None or self._file != file or self._reader.is_worn:
            self._close()
            try:
                str(file).encode()
            except UnicodeEncodeError:
                raise CheckpointError(
                    f"{file}: its path is not UTF-8; accepted is one that is, such as a link to it"
                ) from None
            kind = SafetensorsFile if file.suffix == ".safetensors" else TorchFile
            self._file, self._reader = file, kind(file)
        return self._reader


def open_checkpoint(path: str | PathLike[str], *, effective: bool = True) -> Checkpoint:
    """List the tensors of a checkpoint on disk, without reading them.

    One file is open at a time. safetensors files and zip archives of ``torch.save`` are mapped, so
    that only what is being read takes memory; a file in torch's older format is read as a whole.

    Args:
        path: a ``.safetensors``, ``.bin``, ``.pt``, ``.pth`` or ``.ckpt`` file, the ``.index.json``
            of a checkpoint in several files, or a directory: the index in it, else its safetensors,
            else its pickled files.
        effective: the weights as the model computes with them; False: the tensors that are stored.

    Raises:
        CheckpointError: no such file, a FIFO, socket or device, a broken file, a pickle that holds
            more than tensors, a missing package.
    """
    return Checkpoint(path, effective)


def _config_beside(file: Path) -> dict[str, Any]:
    """Return the config.json in the folder of a file; {} if there is none, or it is no object."""
    path = file.parent / "config.json"
    try:
        if not path.is_file() or path.stat().st_size > _CONFIG_BYTES:
            return {}
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _distinct(entries: Sequence[LazyTensor]) -> list[LazyTensor]:
    """Return the entries, those whose name has come before with a number after it.

    Names become the same where one has the characters that another one's are escaped with.
    """
    seen = {entry.name for entry in entries}
    if len(seen) == len(entries):
        return list(entries)
    found, taken = [], set()
    for entry in entries:
        name, number = entry.name, 1
        while name in taken or (number > 1 and name in seen):
            number += 1
            name = f"{entry.name}#{number}"
        taken.add(name)
        found.append(replace(entry, name=name))
    return found

"""A checkpoint on disk: its tensors, read one at a time and never unpickled unsafely."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ..untrusted import printable
from .distributed import DistributedFolder
from .effective import effective_weights
from .entries import CheckpointError, LazyTensor, Skipped, natural
from .files import Found, as_in_index, check_regular, file_given, no_checkpoint
from .folders import folders_in, found_in, snapshot_of, without_path
from .kinds import DISTRIBUTED, SAFETENSORS, TORCH, kind_of
from .messages import broken
from .names import is_optimizers, of_optimizer
from .ranks import merged
from .safetensors_file import SafetensorsFile
from .torch_file import TorchFile

# config.json of a model is a few kB.
_CONFIG_BYTES = 1 << 24


Reader = SafetensorsFile | TorchFile | DistributedFolder
_READERS: dict[str, type[Reader]] = {
    SAFETENSORS: SafetensorsFile, TORCH: TorchFile, DISTRIBUTED: DistributedFolder
}  # fmt: skip


class _OneFile:
    """The file that is open; its lock is held while something is read."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._file: Path | None = None
        self.reader: Reader | None = None

    def close(self) -> None:
        self._file = self.reader = None

    def open(self, file: Path) -> Reader:
        if self.reader is None or self._file != file or self.reader.is_worn:
            self.close()
            try:
                str(file).encode()
            except UnicodeEncodeError:
                raise CheckpointError(
                    f"{file}: its path is not UTF-8; name it by one that is, such as a link to it"
                ) from None
            check_regular(file)
            try:
                self._file, self.reader = file, _READERS[kind_of(file)](file)
            except OSError as error:
                raise CheckpointError(f"{file}: {error.strerror or error}") from None
        return self.reader


class Checkpoint:
    """The tensors of a checkpoint on disk; see :func:`open_checkpoint`.

    Iterating yields (name, LazyTensor), in the order of the layers.

    Attributes:
        path: what was opened: the path given, or the snapshot in a hub's cache.
        tensors: the weights.
        skipped: files, tensors and objects that were left out, and why.
        config: ``config.json`` beside the weights; empty if there is none.
    """

    def __init__(self, path: str | PathLike[str], effective: bool = True,
                 opened: _OneFile | None = None) -> None:  # fmt: skip
        self.path = Path(path)
        self.skipped: list[Skipped] = []
        self.tensors: list[LazyTensor] = []
        self.config: Mapping[str, Any] = {}
        self._opened = _OneFile() if opened is None else opened
        found: Found | None
        if os.path.isdir(self.path):
            self.path, self.skipped = snapshot_of(self.path)
            found = found_in(self.path)
        else:
            found = file_given(self.path)
        if found is None:
            self._add_folders(effective)
            return
        self.tensors = self._listed(found)
        self.skipped += found.skipped
        self.config = _config_beside(found.files[0])
        if effective:
            self.tensors, left_out = effective_weights(self.tensors, self.config)
            self.skipped += left_out

    def _listed(self, found: Found) -> list[LazyTensor]:
        """Return the tensors of the files, in the order of the layers."""
        files = list(found.files)
        entries, error, is_by_bytes = [], None, False
        for file in found.files:
            try:
                reader = self._opened.open(file)
            except CheckpointError as caught:
                if not found.is_lenient or len(found.files) == 1:
                    raise
                error = error or caught
                files.remove(file)
                self.skipped.append(Skipped(printable(file.name), without_path(caught, file)))
                continue
            is_by_bytes |= isinstance(reader, SafetensorsFile)
            of_state = is_optimizers(file.name)
            entries += [
                replace(
                    e,
                    reader=self._read,
                    in_optimizer=e.in_optimizer or of_state or of_optimizer(e.name),
                )
                for e in reader.entries()
            ]
            self.skipped += [s for s in reader.skipped if s not in self.skipped]
        if error is not None and not entries:
            raise error
        if found.weight_map is not None:
            entries = as_in_index(self.path, found.weight_map, entries)
        entries = merged(entries)
        if len(files) > 1 and len({entry.name for entry in entries}) < len(entries):
            entries = [replace(e, name=f"{printable(e.file.name)}:{e.name}") for e in entries]
        entries = _distinct(entries)
        if is_by_bytes:  # safetensors have their names in that order
            entries.sort(key=lambda entry: natural(entry.name))
        return entries

    def _add_folders(self, effective: bool) -> None:
        """Take the tensors of the folders below, with the folder before their names."""
        folders, skipped = folders_in(self.path)
        self.skipped += skipped
        errors = []
        for name, folder in folders.items():
            before, of_state = f"{printable(name)}:", is_optimizers(folder.name)
            try:
                inner = Checkpoint(folder, effective, self._opened)
            except CheckpointError as error:
                errors.append(error)
                self.skipped.append(Skipped(printable(name), without_path(error, folder)))
                continue
            self.tensors += [
                replace(t, name=before + t.name, in_optimizer=t.in_optimizer or of_state)
                for t in inner.tensors
            ]
            self.skipped += [replace(s, name=before + s.name) for s in inner.skipped]
            self.config = self.config or (inner.config if len(folders) == 1 else {})
        if not self.tensors and errors:
            raise errors[0]
        if not folders:
            if self.skipped:
                first = self.skipped[0]
                raise CheckpointError(f"{self.path}: {first.name}: {first.reason}")
            raise no_checkpoint(self.path)

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
        with self._opened.lock:
            self._opened.close()

    def _read(self, entry: LazyTensor) -> torch.Tensor:
        try:
            with self._opened.lock:
                tensor = self._opened.open(entry.file).read(entry.key)
            # Kernels expect elements at multiples of their size, which files do not guarantee.
            return tensor if tensor.data_ptr() % tensor.itemsize == 0 else tensor.clone()
        except CheckpointError:
            raise
        except Exception as error:
            raise broken(entry.file, error, f"'{entry.name}': ") from None


def open_checkpoint(path: str | PathLike[str], *, effective: bool = True) -> Checkpoint:
    """List the tensors of a checkpoint on disk, without reading them.

    One file is open at a time. Files are mapped, so that only what is being read takes memory; a
    tensor that is made of pieces takes its own size. Pickles are read as data: nothing in them is
    imported, built or run, and objects that are no tensors are named in ``skipped``.

    Args:
        path: a file, known by its content: safetensors, of ``torch.save`` (state dicts, whole
            modules, training states) or ``torch.jit.save``, an agent of Stable-Baselines3; the
            ``.index.json`` of a checkpoint in several files; or a directory. Of a directory one
            set of files is taken, in this order: safetensors, torch.distributed.checkpoint,
            pickles; else the checkpoints in the directories below, at most two deep. In the cache
            of the Hugging Face hub it is the snapshot that ``refs/main`` names.
        effective: the weights as the model computes with them; False: the tensors that are stored.

    Raises:
        CheckpointError: no such file, a FIFO, socket or device, a broken file, one of another kind,
            a pickle that would run programs, a missing package.
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

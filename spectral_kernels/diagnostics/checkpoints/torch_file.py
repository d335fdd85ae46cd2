"""A file of torch.save, in either of its formats, or of torch.jit.save: its tensors."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ..untrusted import printable
from .entries import CheckpointError, LazyTensor, Skipped
from .messages import listing
from .names import is_optimizers
from .pickles import PickleError, Record, read_pickle
from .stored import ByteOrder, Place, StoredTensor
from .torch_objects import TorchObjects, itemsize, storage_of

_MAGIC = b"\x8a\x0a" + 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
_PLAIN_BYTES = 1 << 16
_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
_NOT_LOADED = "not loaded, since it is no tensor"


class TorchFile:
    """Lists the tensors of a file of torch.save, and maps them; nothing is unpickled.

    Args:
        file: with a zip archive, or in the format that came before.
        start: where in the file it begins, in bytes.
        n_bytes: its length; None: to the end of the file.
    """

    is_worn = False

    def __init__(self, file: Path, start: int = 0, n_bytes: int | None = None) -> None:
        self._path = file
        self._tensors: dict[str, tuple[StoredTensor, bool]] = {}
        self.skipped: list[Skipped] = []
        with listing(file, holds="tensors"), file.open("rb") as opened:
            part = _Part(opened, start, n_bytes)
            if part.read(2) == b"PK":
                self._list_archive(part)
            else:
                part.seek(0)
                self._collect("", False, lambda: _legacy(file, part))

    def entries(self) -> list[LazyTensor]:
        """Return the tensors, without a reader."""
        found = []
        first: dict[tuple, str] = {}  # tied weights have two names
        for key, (tensor, in_optimizer) in self._tensors.items():
            name, why = printable(key), tensor.unusable
            if why is None and 0 not in tensor.shape:
                other = first.setdefault(tensor.identity, name)
                why = None if other == name else f"it is {other} under another name"
            found.append(
                LazyTensor(name, tensor.shape, tensor.dtype, self._path, key, why, in_optimizer,
                           piece=tensor.piece)
            )  # fmt: skip
        return found

    def read(self, key: str) -> torch.Tensor:
        """Return a tensor in mapped memory."""
        return self._tensors[key][0].read()

    def _collect(
        self, prefix: str, in_optimizer: bool, load: Callable[[], tuple[object, TorchObjects]]
    ) -> None:
        root, objects = load()
        is_tensor = isinstance(root, Record) and objects.tensor_of(root) is not None
        objects.collect(root, self._path.stem if is_tensor else "", in_optimizer)
        self._tensors |= {f"{prefix}{name}": found for name, found in objects.tensors.items()}
        self.skipped += [Skipped(printable(kind), _NOT_LOADED) for kind in objects.others]

    def _list_archive(self, part: _Part) -> None:
        archive = _Archive(self._path, part)
        if archive.root is not None:
            self._collect("", False, archive.load)
            if f"{archive.root}constants.pkl" in archive.members:  # of TorchScript
                self._collect("constants.", False, partial(archive.load, "constants"))
            return
        inner = [m for m in archive.members if Path(m).suffix in _SUFFIXES]
        if not inner:
            raise CheckpointError(f"{self._path}: {_other_archive(archive.members)}")
        # Stable-Baselines3 keeps the parts of an agent as files of torch.save.
        for name in sorted(inner, key=lambda name: name != "policy.pth"):
            place = archive.place(name)
            within = _Part(part.file, place.start, place.n_bytes)
            prefix = "" if name == "policy.pth" else f"{printable(name)}:"
            member = _Archive(self._path, within) if within.read(2) == b"PK" else None
            if member is not None and member.root is not None:
                self._collect(prefix, is_optimizers(Path(name).name), member.load)
            else:
                self.skipped.append(Skipped(printable(name), "not a file of torch.save"))


class _Part(io.RawIOBase):
    """A part of a file that is open, as a file of its own."""

    def __init__(self, file: io.BufferedReader, start: int = 0, n_bytes: int | None = None) -> None:
        self.file, self.start = file, start
        size = file.seek(0, io.SEEK_END)
        self.n_bytes = size - start if n_bytes is None else n_bytes
        if start < 0 or self.n_bytes < 0 or start + self.n_bytes > size:
            raise PickleError(f"bytes {start} to {start + self.n_bytes} of {size} are wanted")
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.n_bytes}[whence]
        if base + offset < 0:
            raise OSError("a position before the beginning of the file")
        self._at = base + offset
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(self.n_bytes - self._at, 0)
        size = left if size is None or size < 0 else min(size, left)
        self.file.seek(self.start + self._at)
        data = self.file.read(size)
        self._at += len(data)
        return data

    def readline(self, size: int | None = -1) -> bytes:
        self.file.seek(self.start + self._at)
        left = max(self.n_bytes - self._at, 0)
        line = self.file.readline(left if size is None or size < 0 else min(size, left))
        self._at += len(line)
        return line


class _Archive:
    """A zip archive whose members lie in it as they are.

    Attributes:
        members: name -> information.
        root: what comes before ``data.pkl`` in names of members; None if there is no such member.
    """

    def __init__(self, file: Path, part: _Part) -> None:
        self._file, self._part = file, part
        part.seek(0)
        try:
            with zipfile.ZipFile(part) as archive:  # type: ignore[arg-type]
                self.members = {m.filename: m for m in archive.infolist()}
        except zipfile.BadZipFile:
            raise PickleError("the end of the archive is missing") from None
        roots = [m.removesuffix("data.pkl") for m in self.members
                 if m == "data.pkl" or m.endswith("/data.pkl")]  # fmt: skip
        self.root = min(roots, key=len) if roots else None

    def place(self, name: str) -> Place:
        """Return where in the file a member lies."""
        member = self.members.get(name)
        if member is None:
            raise PickleError(f"{printable(name)} is missing in the archive")
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise CheckpointError(
                f"{self._file}: its contents are compressed, which torch.save never does; it was "
                "not unpacked"
            )
        self._part.seek(member.header_offset)
        header = self._part.read(30)
        if len(header) < 30 or header[:4] != b"PK\3\4":
            raise PickleError(f"{printable(name)} is not where the archive says")
        before = member.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if before + member.file_size > self._part.n_bytes:
            raise PickleError(f"{printable(name)} reaches beyond the end of the archive")
        return Place(self._file, self._part.start + before, member.file_size)

    def read(self, name: str) -> bytes:
        """Return the bytes of a member."""
        place = self.place(name)
        self._part.seek(place.start - self._part.start)
        return self._part.read(place.n_bytes)

    def load(self, part: str = "data") -> tuple[object, TorchObjects]:
        """Return the objects of the archive, and what finds tensors among them.

        Args:
            part: name of the pickle, and of the folder with its storages.
        """
        order: ByteOrder = "little"
        if f"{self.root}byteorder" in self.members:
            written = self.read(f"{self.root}byteorder").strip()
            if written not in (b"little", b"big"):
                raise PickleError("the order of its bytes is neither little nor big")
            order = "little" if written == b"little" else "big"
        root = read_pickle(io.BytesIO(self.read(f"{self.root}{part}.pkl")))
        return root, TorchObjects(partial(self._storage, part), order)

    def _storage(self, part: str, identity: tuple, n_bytes: int) -> Place:
        place = self.place(f"{self.root}{part}/{identity[2]}")
        if place.n_bytes < n_bytes:
            raise PickleError(f"a storage has {place.n_bytes} bytes instead of {n_bytes}")
        return Place(place.file, place.start, n_bytes)


def _legacy(file: Path, part: _Part) -> tuple[object, TorchObjects]:
    """Return the objects of a file in the format before torch 1.6.

    It has pickles of a magic number, the version, the machine, the objects and the keys of the
    storages; then each storage as its number of elements and the elements.
    """
    start = part.read(_PLAIN_BYTES)
    if _MAGIC not in start[:64]:
        if start[:1] != b"\x80" or len(start) < 64:
            raise PickleError("neither a zip archive nor a pickle of torch.save")
        raise CheckpointError(f"{file}: {_plain_pickle(start)}")
    part.seek(0)
    read_pickle(part)
    storages: list[Record] = []
    _, machine, root, keys = (read_pickle(part, storages) for _ in range(4))
    order: ByteOrder = "little" if machine.get("little_endian", True) else "big"
    held = {str(s.arguments[2]): storage_of(s) for s in storages}
    places: dict[str, Place] = {}
    for key in map(str, keys):
        dtype, count = held[key]
        n_bytes = count * itemsize(dtype)
        written = int.from_bytes(part.read(8), order)
        if written != count or part.tell() + n_bytes > part.n_bytes:
            raise PickleError("a storage reaches beyond the end of the file")
        places[key] = Place(file, part.start + part.tell(), n_bytes)
        part.seek(n_bytes, io.SEEK_CUR)

    def find(identity: tuple, n_bytes: int) -> Place:
        return replace(places[str(identity[2])], n_bytes=n_bytes)

    return root, TorchObjects(find, order)


def _plain_pickle(start: bytes) -> str:
    """Return what a pickle is that torch.save has not written."""
    what, save = "", "torch.save or safetensors"
    if b"numpy" in start:
        what, save = " with arrays of numpy", "safetensors.numpy.save_file"
    return (
        f"a plain pickle{what}, not a file of torch.save; it was not unpickled, since that could "
        f"run code of its author. If you trust it, save its weights with {save}"
    )


def _other_archive(members: dict[str, zipfile.ZipInfo]) -> str:
    """Return what a zip archive is that holds no file of torch.save."""
    if any(name.endswith(".npy") for name in members):
        return "an archive of numpy (.npz); save its arrays with safetensors.numpy.save_file"
    if any(name.endswith(".weights.h5") for name in members):
        return "an archive of Keras; load it there, and save its weights as safetensors"
    names = ", ".join(printable(name) for name in list(members)[:3])
    return f"a zip archive without a checkpoint ({names[:100]}); unpack it, and name what is inside"

"""The tensors of a checkpoint on disk, read one at a time and never unpickled unsafely."""

from __future__ import annotations

import json
import os
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

import torch

from ...diagnostics.untrusted import irregular, printable

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_ACCEPTED = "*.safetensors, *.bin, *.pt, *.pth, *.ckpt and *.index.json"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool,
    "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64,
}  # fmt: skip
# Pages read from a mapped file count as used memory until it is unmapped.
_MAPPED_BYTES = 1 << 30
# An index takes about 100 bytes per tensor.
_INDEX_BYTES = 1 << 27


class CheckpointError(Exception):
    """A checkpoint that cannot be read; the message names the file and the reason."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint, not read yet."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """As torch names it, ``"bfloat16"``; as the file does where torch has no such type."""
    file: Path
    key: str
    """The name inside the file."""
    unusable: str | None = None
    """Why it cannot be taken as a matrix, whatever its dtype."""
    in_optimizer: bool = False
    """It belongs to the state of an optimizer."""


class Checkpoint:
    """Lists the tensors of a checkpoint and reads them one by one.

    One file is open at a time. safetensors files and zip archives of ``torch.save`` are mapped, so
    that only what is being read takes memory; a file in torch's older format is read as a whole.

    Args:
        path: a ``.safetensors``, ``.bin``, ``.pt``, ``.pth`` or ``.ckpt`` file, the ``.index.json``
            of a checkpoint in several files, or a directory: the index in it, else its safetensors,
            else its pickled files.

    Raises:
        CheckpointError: no such file, a FIFO, socket or device, a broken file, a pickle that holds
            more than tensors, a missing package.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        self._file: Path | None = None
        self._reader: _Safetensors | _Pickled | None = None
        files, weight_map = _files_of(self.path)
        found = [entry for file in files for entry in self._open(file).entries()]
        if weight_map is not None:
            found = _as_in_index(self.path, weight_map, found)
        if len(files) > 1 and len({entry.name for entry in found}) < len(found):
            found = [replace(e, name=f"{printable(e.file.name)}:{e.name}") for e in found]
        found = _distinct(found)
        if any(file.suffix == ".safetensors" for file in files):
            found.sort(key=lambda entry: natural(entry.name))  # their own order is by bytes
        self.entries: list[Entry] = found

    def read(self, entry: Entry) -> torch.Tensor:
        """Return the tensor, on the CPU; release it before the next one to limit memory."""
        try:
            tensor = self._open(entry.file).read(entry.key)
            # Kernels expect elements at multiples of their size, which files do not guarantee.
            return tensor if tensor.data_ptr() % tensor.itemsize == 0 else tensor.clone()
        except CheckpointError:
            raise
        except Exception as error:
            raise _broken(entry.file, error, f"'{entry.name}': ") from None

    def close(self) -> None:
        """Close the file that is open."""
        self._file = self._reader = None

    def _open(self, file: Path):
        if self._reader is None or self._file != file or self._reader.is_worn:
            self.close()
            try:
                str(file).encode()
            except UnicodeEncodeError:
                raise CheckpointError(
                    f"{file}: its path is not UTF-8; accepted is one that is, such as a link to it"
                ) from None
            kind = _Safetensors if file.suffix == ".safetensors" else _Pickled
            self._file, self._reader = file, kind(file)
        return self._reader


class _Safetensors:
    def __init__(self, file: Path) -> None:
        try:
            from safetensors import safe_open
        except ModuleNotFoundError:
            raise CheckpointError(
                f"{file}: reading it needs safetensors: pip install 'spectral_kernels[inspect]'"
            ) from None
        self._path = file
        self._read_bytes = 0
        try:
            self._opened = safe_open(str(file), framework="pt", device="cpu")
        except Exception as error:
            raise _broken(file, error) from None

    @property
    def is_worn(self) -> bool:
        """Whether so much has been read that the file should be reopened."""
        return self._read_bytes > _MAPPED_BYTES

    def entries(self) -> list[Entry]:
        found = []
        for key in self._opened.keys():  # noqa: SIM118  (it is no mapping)
            piece = self._opened.get_slice(key)
            dtype = piece.get_dtype()
            name = _short(_DTYPES[dtype]) if dtype in _DTYPES else str(dtype)
            found.append(Entry(printable(key), tuple(piece.get_shape()), name, self._path, key))
        return found

    def read(self, key: str) -> torch.Tensor:
        tensor = self._opened.get_tensor(key)
        self._read_bytes += tensor.nbytes
        return tensor


class _Pickled:
    is_worn = False

    def __init__(self, file: Path) -> None:
        self._path = file
        self._tensors: dict[str, tuple[torch.Tensor, bool]] = {}
        loaded = _load(file)
        if isinstance(loaded, torch.Tensor):
            loaded = {file.stem: loaded}
        self._collect(loaded)

    def entries(self) -> list[Entry]:
        found = []
        first: dict[tuple, str] = {}  # place in memory -> first name; tied weights have two names
        for key, (tensor, in_optimizer) in self._tensors.items():
            name, shape = printable(key), () if tensor.is_nested else tuple(tensor.shape)
            why = _unusable(tensor)
            if why is None and tensor.numel() > 0:
                place = (tensor.data_ptr(), tensor.dtype, shape, tensor.stride())
                if (other := first.setdefault(place, name)) != name:
                    why = f"it is {other} under another name"
            dtype = _short(tensor.dtype)
            found.append(Entry(name, shape, dtype, self._path, key, why, in_optimizer))
        return found

    def read(self, key: str) -> torch.Tensor:
        return self._tensors[key][0].detach()

    def _collect(self, root) -> None:
        """Find the tensors in nested containers, under their dotted names, in order."""
        seen: set[int] = set()  # a pickle may refer to a container again, even from inside it
        waiting = [("", root, False)]
        while waiting:
            name, value, in_optimizer = waiting.pop()
            if isinstance(value, torch.Tensor):
                number = 1
                unique = name
                while unique in self._tensors:
                    number += 1
                    unique = f"{name}#{number}"
                self._tensors[unique] = (value, in_optimizer)
                continue
            if isinstance(value, Mapping):
                items = list(value.items())
                in_optimizer |= {"state", "param_groups"} <= set(map(str, value))
            elif isinstance(value, list | tuple):
                items = list(enumerate(value))
            else:
                continue
            if id(value) not in seen:
                seen.add(id(value))
                waiting += [
                    (f"{name}.{key}" if name else str(key), inner, in_optimizer)
                    for key, inner in reversed(items)
                ]


def natural(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key for names that orders numbers by value: 2 before 10."""
    pieces = re.split(r"(\d+)", name)
    return [(1, int(p), "") if p.isdecimal() and p.isascii() and len(p) < 20 else (0, 0, p)
            for p in pieces]  # fmt: skip


def _distinct(entries: Sequence[Entry]) -> list[Entry]:
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


def _check_regular(path: Path) -> None:
    """Raise CheckpointError for what is no file that ends, such as a FIFO; links are followed."""
    try:
        kind = irregular(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file or directory") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    if kind is not None:
        raise CheckpointError(f"{path}: it is {kind}; accepted are regular files")


def _files_of(path: Path) -> tuple[list[Path], Mapping[str, str] | None]:
    """Return the files of a checkpoint, and the map name -> file of its index, if any."""
    try:
        if os.path.isdir(path):
            return _files_in(path)
        _check_regular(path)
        with path.open("rb"):
            pass
    except OSError as error:
        raise CheckpointError(f"{error.filename or path}: {error.strerror or error}") from None
    if path.name.endswith(".index.json"):
        return _files_in_index(path)
    if path.suffix != ".safetensors" and path.suffix not in PICKLED:
        raise CheckpointError(f"{path}: not the name of a checkpoint; accepted are {_ACCEPTED}")
    return [path], None


def _files_in(folder: Path) -> tuple[list[Path], Mapping[str, str] | None]:
    # What is no file is left in, so that it is named instead of ignored.
    files = sorted(
        (f for f in folder.iterdir() if not os.path.isdir(f)), key=lambda f: natural(f.name)
    )
    for suffix, index in ((".safetensors", ".safetensors.index.json"), (".bin", ".bin.index.json")):
        if indices := [f for f in files if f.name.endswith(index)]:
            return _files_in_index(indices[0])
        if suffix == ".safetensors" and (found := [f for f in files if f.suffix == suffix]):
            return _regular(found), None
    # Beside transformers' weights are other pickles, such as training_args.bin.
    found = [f for f in files if f.match("pytorch_model*.bin")]
    found = found or [f for f in files if f.suffix in PICKLED]
    if not found:
        raise CheckpointError(f"{folder}: no checkpoint in this folder; accepted are {_ACCEPTED}")
    return _regular(found), None


def _regular(files: list[Path]) -> list[Path]:
    for file in files:
        _check_regular(file)
    return files


def _files_in_index(path: Path) -> tuple[list[Path], Mapping[str, str]]:
    _check_regular(path)
    with path.open("rb") as file:
        text = file.read(_INDEX_BYTES + 1)
    if len(text) > _INDEX_BYTES:
        raise CheckpointError(f"{path}: accepted is an index of at most {_INDEX_BYTES} bytes")
    try:
        weight_map = json.loads(text)["weight_map"]
        right = isinstance(weight_map, dict) and all(map(_is_name, weight_map.values()))
    except (ValueError, KeyError, TypeError, RecursionError):
        right = False
    if not right or not weight_map:
        raise CheckpointError(
            f"{path}: not an index; accepted is JSON with a weight_map from names of tensors to "
            "names of files beside it"
        )
    files = [path.parent / name for name in dict.fromkeys(weight_map.values())]
    missing = [file.name for file in files if not os.path.exists(file)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{path}: {missing[0]}{more} is missing beside it")
    return _regular(sorted(files, key=lambda f: natural(f.name))), weight_map


def _is_name(value) -> bool:
    """Return whether ``value`` is the name of a file in the same folder, in a known format."""
    return isinstance(value, str) and not re.search(r"[/\\\0]", value) and (
        Path(value).suffix in (".safetensors", *PICKLED)
    )  # fmt: skip


def _as_in_index(path: Path, weight_map: Mapping[str, str], found: Sequence[Entry]) -> list[Entry]:
    """Return the entries that the index lists, from the files that it names for them."""
    held = {(entry.file.name, entry.key): entry for entry in found}
    wanted = {(file, key) for key, file in weight_map.items()}
    if missing := sorted(wanted - set(held)):
        file, key = missing[0]
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(f"{path}: '{key}' is not in {file}{more}")
    return [entry for place, entry in held.items() if place in wanted]


def _load(file: Path):
    """Return the contents of a pickled file, with tensors mapped if the format allows."""
    try:
        with file.open("rb") as opened:
            is_zip = opened.read(2) == b"PK"
        if is_zip:
            _check_archive(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(str(file), map_location="cpu", weights_only=True, mmap=is_zip)
    except CheckpointError:
        raise
    except Exception as error:
        raise _broken(file, error) from None


def _check_archive(file: Path) -> None:
    """Raise CheckpointError for an archive that is truncated or compressed."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except zipfile.BadZipFile:
        raise CheckpointError(f"{file}: broken or truncated: the end of the archive is missing"
                              ) from None  # fmt: skip
    size = file.stat().st_size
    if sum(m.file_size for m in members) > size or any(m.compress_type for m in members):
        raise CheckpointError(
            f"{file}: its contents are compressed, which torch.save never does; it was not unpacked"
        )


def _unusable(tensor: torch.Tensor) -> str | None:
    if tensor.is_nested or tensor.layout != torch.strided:
        return f"layout {_short(tensor.layout)}"
    if tensor.device.type != "cpu":
        return f"device {tensor.device.type}"
    if not tensor.is_quantized and tensor.nbytes > tensor.untyped_storage().nbytes():
        return "elements share their memory (an expanded tensor)"
    return None


def _broken(file: Path, error: Exception, where: str = "") -> CheckpointError:
    """Return an error that says in one line why a file cannot be read."""
    text = str(error)
    if unsupported := re.search(r"GLOBAL ([\w.<>]+)", text):
        why = (
            f"it holds more than tensors ({unsupported[1]}); it was not unpickled, since that "
            "could run code of its author. If you trust it, save its state_dict() separately"
        )
    elif isinstance(error, MemoryError | RecursionError):
        why = f"it needs more memory than this machine has ({type(error).__name__})"
    elif isinstance(error, LookupError | UnicodeError | TypeError | AttributeError | EOFError):
        why = f"broken or truncated: its pickle is invalid ({type(error).__name__})"
    else:
        # torch explains at length how to load unsafely before it names the error.
        said = re.sub(r"(?s)^.*WeightsUnpickler error:", "", text).split("\n")
        first = next((line.strip() for line in said if line.strip()), type(error).__name__)
        why = f"broken or truncated: {first}"
    return CheckpointError(f"{file}: {where}{why[:300]}")


def _short(kind) -> str:
    return str(kind).removeprefix("torch.")

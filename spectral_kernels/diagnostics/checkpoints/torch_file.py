"""A file of torch.save: its tensors, without unpickling anything else."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

from ..untrusted import printable
from .entries import CheckpointError, LazyTensor, short
from .messages import broken


class TorchFile:
    """Lists the tensors of a file of torch.save, and returns them; zip archives are mapped."""

    is_worn = False

    def __init__(self, file: Path) -> None:
        self._path = file
        self._tensors: dict[str, tuple[torch.Tensor, bool]] = {}
        loaded = _load(file)
        if isinstance(loaded, torch.Tensor):
            loaded = {file.stem: loaded}
        self._collect(loaded)

    def entries(self) -> list[LazyTensor]:
        """Return the tensors, without a reader."""
        found = []
        first: dict[tuple, str] = {}  # place in memory -> first name; tied weights have two names
        for key, (tensor, in_optimizer) in self._tensors.items():
            name, shape = printable(key), () if tensor.is_nested else tuple(tensor.shape)
            why = _unusable(tensor)
            if why is None and tensor.numel() > 0:
                place = (tensor.data_ptr(), tensor.dtype, shape, tensor.stride())
                if (other := first.setdefault(place, name)) != name:
                    why = f"it is {other} under another name"
            dtype = short(tensor.dtype)
            found.append(LazyTensor(name, shape, dtype, self._path, key, why, in_optimizer))
        return found

    def read(self, key: str) -> torch.Tensor:
        """Return a tensor, without a graph."""
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
        raise broken(file, error) from None


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
        return f"layout {short(tensor.layout)}"
    if tensor.device.type != "cpu":
        return f"device {tensor.device.type}"
    if not tensor.is_quantized and tensor.nbytes > tensor.untyped_storage().nbytes():
        return "elements share their memory (an expanded tensor)"
    return None

"""The files of a checkpoint: of a folder, of an index, or one."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..untrusted import irregular
from .entries import CheckpointError, LazyTensor, natural

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_ACCEPTED = "*.safetensors, *.bin, *.pt, *.pth, *.ckpt and *.index.json"
# An index takes about 100 bytes per tensor.
_INDEX_BYTES = 1 << 27


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


def files_of(path: Path) -> tuple[list[Path], Mapping[str, str] | None]:
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


def as_in_index(
    path: Path, weight_map: Mapping[str, str], found: Sequence[LazyTensor]
) -> list[LazyTensor]:
    """Return the entries that the index lists, from the files that it names for them."""
    held = {(entry.file.name, entry.key): entry for entry in found}
    wanted = {(file, key) for key, file in weight_map.items()}
    if missing := sorted(wanted - set(held)):
        file, key = missing[0]
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(f"{path}: '{key}' is not in {file}{more}")
    return [entry for place, entry in held.items() if place in wanted]

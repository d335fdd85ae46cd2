"""The files of a checkpoint: of a folder, of an index, or one."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..untrusted import irregular, printable
from .distributed import METADATA
from .entries import CheckpointError, LazyTensor, Skipped, natural
from .kinds import ACCEPTED, PICKLED, kind_of

# An index takes about 100 bytes per tensor.
_INDEX_BYTES = 1 << 27
# So many files of unknown names in a folder are looked into.
_MOST_UNKNOWN = 100
_TEXTS = (".json", ".html", ".htm", ".xml", ".svg", ".txt", ".md", ".py")
_INDICES = ((".safetensors", ".safetensors.index.json"), (".bin", ".bin.index.json"))
# What is written beside a model in another precision, or with averaged weights.
_VARIANT = re.compile(r"\.(fp16|bf16|fp32|fp8|int8|int4|8bit|4bit|non_ema|ema)(?=[.-])")
_ZERO = re.compile(r"(bf16_)?zero_pp_rank_\d+_mp_rank_\d+_(optim|model)_states\.pt")
_ZERO_ADVICE = (
    "a shard of DeepSpeed's ZeRO; merge them with the zero_to_fp32.py in the folder above"
)


@dataclass(frozen=True)
class Found:
    """The files of a checkpoint."""

    files: Sequence[Path]
    weight_map: Mapping[str, str] | None = None
    """Of the index: name of a tensor -> name of its file."""
    is_lenient: bool = False
    """A file that cannot be read is left out, unless it is the last one."""
    skipped: list[Skipped] = field(default_factory=list)


def check_regular(path: Path) -> None:
    """Raise CheckpointError for what is no file that ends, such as a FIFO; links are followed."""
    try:
        kind = irregular(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file or directory") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    if kind is not None:
        raise CheckpointError(f"{path}: expected a regular file, got {kind}")


def file_given(path: Path) -> Found:
    """Return the checkpoint of one file, or of the index that it is.

    Raises:
        CheckpointError: it is no checkpoint.
    """
    check_regular(path)
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    if path.name.endswith(".index.json"):
        return _files_in_index(path)
    return Found([path])


def files_in(folder: Path) -> Found | None:
    """Return the checkpoint that lies in a folder itself: one set of files of one format.

    In this order: safetensors, by their index if there is one, torch.distributed.checkpoint, and
    pickles, by their index too.

    Raises:
        CheckpointError: it is broken, or its files are of another kind.
    """
    # What is no file is left in, so that it is named instead of ignored.
    files = sorted(
        (f for f in folder.iterdir() if not os.path.isdir(f)), key=lambda f: natural(f.name)
    )
    for suffix, index in _INDICES:
        if indices := [f for f in files if f.name.endswith(index)]:
            taken = min(indices, key=lambda f: (_VARIANT.search(f.name) is not None, len(f.name)))
            found = _files_in_index(taken)
            others = {f for f in files if f.suffix == suffix or f in indices}
            others -= {taken, *(f for f in found.files)}
            if suffix == ".bin":  # training_args.bin and the like are no weights
                others = {f for f in others if f.match("pytorch_model*")}
            found.skipped.extend(_beside(sorted(others), taken))
            return found
        if suffix == ".safetensors":
            if given := [f for f in files if f.suffix == suffix]:
                return _regular(*_one_set(given))
            if any(f.name == METADATA for f in files):
                return Found([folder / METADATA])
            if any(f.suffix == ".distcp" for f in files):
                raise CheckpointError(f"{folder}: files of torch.distributed.checkpoint without "
                                      f"their {METADATA}; copy it too")  # fmt: skip
    shards = [f for f in files if _ZERO.fullmatch(f.name)]
    # Beside transformers' weights are other pickles, such as training_args.bin.
    given = [f for f in files if f.match("pytorch_model*.bin")]
    given = given or [f for f in files if f.suffix in PICKLED and f not in shards]
    skipped = [Skipped(printable(f.name), _ZERO_ADVICE) for f in shards]
    if given:
        chosen, left = _one_set(given)
        return Found(chosen, None, True, [*skipped, *_beside(left, chosen[0])])
    if shards:
        raise CheckpointError(f"{folder}: {printable(shards[0].name)} is {_ZERO_ADVICE}")
    return _unknown(folder, files)


def _unknown(folder: Path, files: Sequence[Path]) -> Found | None:
    """Look into files that have no name of a checkpoint."""
    found, error = [], None
    for file in files[:_MOST_UNKNOWN]:
        if file.suffix in _TEXTS:
            continue
        try:
            if irregular(file) is None and file.stat().st_size:
                kind_of(file)
                found.append(file)
        except CheckpointError as caught:
            if "not the name of a checkpoint" not in str(caught):
                error = error or caught
        except OSError:
            continue
    if not found and error is not None:
        raise error
    return Found(found, None, True) if found else None


def _one_set(files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Divide files into those of the model and other variants of them.

    A file whose name without the variant is that of another file is one; so is consolidated.*
    beside the weights as transformers names them, and so are all variants but the first.
    """
    plain = [f for f in files if not _VARIANT.search(f.name)]
    if not plain:
        first = _VARIANT.search(files[0].name)
        assert first is not None
        taken = [f for f in files if f".{first[1]}" in f.name]
        return taken, [f for f in files if f not in taken]
    stems = {re.sub(r"-\d+-of-\d+", "", f.name) for f in plain}
    others = [
        f for f in files
        if f not in plain and _VARIANT.sub("", re.sub(r"-\d+-of-\d+", "", f.name)) in stems
    ]  # fmt: skip
    if any(f.name.startswith(("model.", "model-", "pytorch_model")) for f in plain):
        others += [f for f in plain if re.match(r"consolidated[.\d]*\.", f.name)]
    return [f for f in files if f not in others], others


def _beside(others: Sequence[Path], taken: Path) -> list[Skipped]:
    why = f"{printable(taken.name)} is taken"
    return [Skipped(printable(f.name), why) for f in others]


def _regular(files: Sequence[Path], others: Sequence[Path] = ()) -> Found:
    for file in files:
        check_regular(file)
    return Found(files, None, False, _beside(others, files[0]))


def _files_in_index(path: Path) -> Found:
    check_regular(path)
    with path.open("rb") as file:
        text = file.read(_INDEX_BYTES + 1)
    if len(text) > _INDEX_BYTES:
        raise CheckpointError(
            f"{path}: expected an index of at most {_INDEX_BYTES} bytes, got more"
        )
    try:
        weight_map = json.loads(text)["weight_map"]
        right = isinstance(weight_map, dict) and all(map(_is_name, weight_map.values()))
    except (ValueError, KeyError, TypeError, RecursionError):
        right = False
    if not right or not weight_map:
        raise CheckpointError(
            f"{path}: expected an index, JSON with a weight_map from names of tensors to names of "
            "files beside it, got something else"
        )
    files = [path.parent / name for name in dict.fromkeys(weight_map.values())]
    missing = [file.name for file in files if not os.path.exists(file)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{path}: {missing[0]}{more} is missing beside it; copy it too")
    found = _regular(sorted(files, key=lambda f: natural(f.name)))
    return Found(found.files, weight_map)


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


def no_checkpoint(folder: Path) -> CheckpointError:
    """Return the error for a folder in which nothing was found."""
    return CheckpointError(
        f"{folder}: expected a checkpoint ({ACCEPTED}), got a folder without one"
    )

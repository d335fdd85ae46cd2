"""Folders that hold checkpoints in folders: the cache of a hub, the parts of a pipeline, steps."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..untrusted import printable
from .entries import CheckpointError, Skipped, natural
from .files import Found, files_in

_DEPTH = 2
_MOST_FOLDERS = 500
_MOST_CHECKPOINTS = 64
_STEP = re.compile(r"(checkpoint|global_step|step|iter|iteration|epoch|ckpt)[-_=]?(\d+)")
_REF_BYTES = 200


def snapshot_of(folder: Path) -> tuple[Path, list[Skipped]]:
    """Return the snapshot in a repository of the Hugging Face hub's cache, else the folder itself.

    It is the one that ``refs/main`` names, else the newest; others are skipped.

    Raises:
        CheckpointError: the cache has no snapshot, or is that of several repositories.
    """
    snapshots = folder / "snapshots"
    if not os.path.isdir(snapshots) or not os.path.isdir(folder / "refs"):
        models = [f.name for f in _folders(folder) if f.name.startswith("models--")]
        if models:
            raise CheckpointError(
                f"{folder}: a cache of the Hugging Face hub with {len(models)} models; name one of "
                f"them, such as {printable(models[0])}"
            )
        return folder, []
    found = _folders(snapshots)
    if not found:
        raise CheckpointError(f"{folder}: a repository of the hub without a snapshot; download it")
    try:
        with (folder / "refs" / "main").open("rb") as ref:
            name = ref.read(_REF_BYTES).decode("ascii").strip()
    except (OSError, UnicodeDecodeError):
        name = ""
    newest = max(found, key=lambda f: f.stat().st_mtime)
    taken = next((f for f in found if f.name == name), newest)
    why = f"snapshot {printable(taken.name)} is taken"
    return taken, [Skipped(printable(f"snapshots/{f.name}"), why) for f in found if f != taken]


def folders_in(folder: Path) -> tuple[dict[str, Path], list[Skipped]]:
    """Return the folders below one, at most two deep, that have a checkpoint: name -> folder.

    Of the steps of a run, such as ``checkpoint-500``, the last is taken, others are skipped.

    Raises:
        CheckpointError: there are too many.
    """
    found: dict[str, Path] = {}
    skipped: list[Skipped] = []
    root = os.path.realpath(folder)
    seen = {root}
    waiting = [(folder, 0)]
    while waiting:
        parent, depth = waiting.pop(0)
        for inner in _folders(parent):
            real = os.path.realpath(inner)
            # Links may lead back to a folder, or above this one.
            if real in seen or os.path.join(root, "").startswith(os.path.join(real, "")):
                continue
            seen.add(real)
            if len(seen) > _MOST_FOLDERS:
                raise CheckpointError(
                    f"{folder}: expected at most {_MOST_FOLDERS} folders, got more (name one)"
                )
            name = inner.relative_to(folder).as_posix()
            try:
                holds = files_in(inner) is not None
            except CheckpointError as error:
                skipped.append(Skipped(printable(name), without_path(error, inner)))
                continue
            except OSError as error:
                skipped.append(Skipped(printable(name), error.strerror or str(error)))
                continue
            if holds:
                found[name] = inner
            elif depth + 1 < _DEPTH:
                waiting.append((inner, depth + 1))
    found = dict(sorted(found.items(), key=lambda item: natural(item[0])))
    found, steps = _last_step(found)
    if len(found) > _MOST_CHECKPOINTS:
        raise CheckpointError(
            f"{folder}: expected at most {_MOST_CHECKPOINTS} folders with checkpoints, got "
            f"{len(found)} (name one of them, such as {printable(next(iter(found)))})"
        )
    return found, skipped + steps


def _last_step(found: dict[str, Path]) -> tuple[dict[str, Path], list[Skipped]]:
    steps = {name: int(m[2]) for name in found if (m := _STEP.fullmatch(name))}
    if len(steps) < 2:
        return found, []
    last = max(steps, key=lambda name: steps[name])
    skipped = [Skipped(printable(n), f"{printable(last)} is taken") for n in steps if n != last]
    return {n: f for n, f in found.items() if n not in steps or n == last}, skipped


def without_path(error: CheckpointError, path: Path) -> str:
    """Return what an error says, without the path that it begins with."""
    before = printable(str(path))
    return str(error).removeprefix(f"{before}: ").removeprefix(f"{before}{os.sep}")


def _folders(folder: Path) -> list[Path]:
    def listed() -> Iterator[Path]:
        for inner in folder.iterdir():
            if not inner.name.startswith(".") and os.path.isdir(inner):
                yield inner

    try:
        return sorted(listed(), key=lambda f: natural(f.name))
    except OSError:
        return []


def found_in(folder: Path) -> Found | None:
    """Return the checkpoint of a folder itself; None if there is none.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return files_in(folder)
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder}: {error.strerror or error}") from None

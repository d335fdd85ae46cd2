"""``spectral-kernels inspect --check``: every tensor read once, for values that are not finite."""

from __future__ import annotations

import fnmatch
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch

from ...diagnostics.checkpoints import Checkpoint, LazyTensor, Skipped
from ..console import counted, some
from .finite import (
    NotFinite,
    has_kernel,
    in_tile,
    is_always_finite,
    tiles,
    total,
)
from .parallel import threads_of_one

_PIECE = 1 << 22  # elements that a thread looks through at a time
_MOST_PIECES = 256  # of tensors that are smaller
_Piece = tuple[LazyTensor, torch.Tensor, int]  # and the number of its first element
_Looked = tuple[LazyTensor, int, "NotFinite | None"]  # and the number of elements


@dataclass(frozen=True)
class Checked:
    """What was found in a checkpoint."""

    path: Path
    tensors: int
    """How many were looked through; those of integers are finite without."""
    n_bytes: int
    seconds: float
    bad: Sequence[NotFinite]
    skipped: Sequence[Skipped]
    """What was not looked through, and why."""
    of_optimizer: int
    """How many tensors of an optimizer's state were left out."""


def chosen(
    tensors: Sequence[LazyTensor], include: Sequence[str] | None, exclude: Sequence[str]
) -> list[LazyTensor]:
    """Return the tensors that the patterns take: without ``include``, none of an optimizer."""
    names = [entry.name for entry in tensors]
    taken = {n for pattern in include or ["*"] for n in fnmatch.filter(names, pattern)}
    taken -= {n for pattern in exclude for n in fnmatch.filter(names, pattern)}
    return [e for e in tensors if e.name in taken and (include or not e.in_optimizer)]


def check(
    checkpoint: Checkpoint,
    entries: Sequence[LazyTensor],
    step: Callable[[str, int], None] = lambda name, elements: None,
) -> Checked:
    """Look through tensors for values that are not finite, with all of torch's threads.

    Args:
        checkpoint: of the tensors.
        entries: those that :func:`chosen` returns.
        step: called with a tensor's name and how many elements more have been looked through.

    Raises:
        CheckpointError: a tensor that cannot be read.
    """
    begin = time.perf_counter()
    skipped = [*checkpoint.skipped]
    read = []
    for entry in entries:
        if (why := _why_not(entry)) is not None:
            skipped.append(Skipped.of(entry, why))
        elif has_kernel(entry.dtype) and entry.unusable is None:
            read.append(entry)
    found: dict[str, NotFinite | None] = {}
    n_bytes = 0
    waiting: deque[Future[list[_Looked]]] = deque()

    def finish_one() -> None:
        for entry, count, bad in waiting.popleft().result():
            found[entry.name] = total(found.get(entry.name), bad)
            step(entry.name, count)

    n_threads = torch.get_num_threads()
    with threads_of_one(n_threads) as pool:
        for task in _tasks(sorted(read, key=lambda entry: str(entry.file))):
            n_bytes += sum(piece.nbytes for _, piece, _ in task)
            waiting.append(pool.submit(_look_through, task))
            del task
            if len(waiting) > 2 * n_threads:
                finish_one()
        while waiting:
            finish_one()
    bad = [one for entry in read if (one := found.get(entry.name)) is not None]
    seconds = time.perf_counter() - begin
    names = {entry.name for entry in entries}
    left = sum(e.in_optimizer and e.name not in names for e in checkpoint.tensors)
    return Checked(checkpoint.path, len(read), n_bytes, seconds, bad, skipped, left)


def _why_not(entry: LazyTensor) -> str | None:
    """Return why a tensor cannot be looked through; None for one that is looked through, too."""
    if not has_kernel(entry.dtype) and not is_always_finite(entry.dtype):
        return f"dtype {entry.dtype}"
    is_twin = entry.unusable is not None and entry.unusable.endswith("under another name")
    return None if is_twin else entry.unusable


def _tasks(entries: Sequence[LazyTensor]) -> Iterator[list[_Piece]]:
    """Yield pieces of tensors for a thread: one that is large, or several that are small."""
    task: list[_Piece] = []
    size = 0
    for entry in entries:
        for piece, offset in tiles(entry.read(), _PIECE):
            task.append((entry, piece, offset))
            size += len(piece)
            if size >= _PIECE or len(task) >= _MOST_PIECES:
                yield task
                task, size = [], 0
    if task:
        yield task


def _look_through(task: list[_Piece]) -> list[_Looked]:
    """Return what is not finite in each piece; the pieces are released."""
    found: list[_Looked] = []
    while task:
        entry, piece, offset = task.pop()
        bad = None
        for tile, start in tiles(piece):
            bad = total(bad, in_tile(entry.name, entry.shape, tile, offset + start))
        found.append((entry, len(piece), bad))
    return found


# --------------------------------------------------------------------------------------- output


def values_of(path: Path, one: NotFinite) -> dict:
    """Return what JSON says of a tensor that is not finite."""
    return {
        "checkpoint": str(path), "name": one.name, "nan": one.nan, "inf": one.inf,
        "negative_inf": one.negative, "first_index": list(one.first_index),
    }  # fmt: skip


def skipped_values(path: Path, one: Skipped) -> dict:
    """Return what JSON says of what was left out."""
    return {
        "checkpoint": str(path), "name": one.name, "shape": list(one.shape), "dtype": one.dtype,
        "reason": one.reason,
    }  # fmt: skip


def as_json(results: Sequence[Checked]) -> str:
    """Return a JSON document."""
    document = {
        "checked": [
            {"checkpoint": str(r.path), "tensors": r.tensors, "bytes": r.n_bytes,
             "seconds": r.seconds, "left_out_of_optimizer": r.of_optimizer}
            for r in results
        ],
        "not_finite": [values_of(r.path, one) for r in results for one in r.bad],
        "skipped": [
            skipped_values(r.path, s) for r in results for s in r.skipped
        ],
    }  # fmt: skip
    return json.dumps(document, indent=1) + "\n"


def lines(result: Checked) -> Iterator[str]:
    """Yield a line for each tensor that is not finite, lines for what was skipped, a summary."""
    for one in result.bad:
        at = f", the first at {list(one.first_index)}" if one.shape else ""
        yield f"{one.name}: {one.counts}{at}"
    reasons: dict[str, list[str]] = {}
    for skipped in result.skipped:
        reasons.setdefault(skipped.reason, []).append(skipped.name)
    for why, names in reasons.items():
        yield f"not checked, {why}: {some(names)}"
    if result.of_optimizer:
        number = counted(result.of_optimizer, "tensor", "tensors")
        yield (f"left out: {number} of an optimizer's state "
               "(--include '*' takes them too)")  # fmt: skip
    speed = result.n_bytes / max(result.seconds, 1e-9) / 1e9
    said = f"{len(result.bad)} of them not finite" if result.bad else "all finite"
    number = counted(result.tensors, "tensor", "tensors")
    yield (
        f"{result.path}: {number}, {said}; {result.n_bytes / 1e9:.3g} GB in "
        f"{result.seconds:.2f} s, {speed:.1f} GB/s"
    )


def elements(entries: Sequence[LazyTensor]) -> int:
    """Return the number of elements that :func:`check` will look through."""
    return sum(math.prod(e.shape) for e in entries
               if has_kernel(e.dtype) and e.unusable is None)  # fmt: skip

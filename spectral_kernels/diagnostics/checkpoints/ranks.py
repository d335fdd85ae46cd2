"""Files that the ranks of a run have written: shards of tensors, put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from .entries import LazyTensor
from .stored import assembled, gap

_ADVICE = (
    "open the folder with the files of all ranks, or save get_model_state_dict(model, "
    "options=StateDictOptions(full_state_dict=True))"
)


def merged(entries: Sequence[LazyTensor]) -> list[LazyTensor]:
    """Return the tensors, those that are shards put together; each needs a reader.

    Shards without the others are marked as unusable. Of what every rank holds, the first is taken.
    """
    by_name: dict[str, list[LazyTensor]] = {}
    for entry in entries:
        by_name.setdefault(entry.name, []).append(entry)
    if not any(entry.piece for entry in entries):
        return list(entries)
    found = []
    for parts in by_name.values():
        if parts[0].piece is None:
            found.append(parts[0])
            continue
        # With replicas several ranks hold the same shard.
        shards = {p.piece.offsets: p for p in parts if p.piece is not None}
        whole = parts[0].piece.whole
        pieces = [p.piece for p in shards.values() if p.piece is not None]
        same = {(p.dtype, p.piece and p.piece.whole) for p in parts} == {(parts[0].dtype, whole)}
        if not same or gap(whole, pieces) is not None:
            found += [replace(p, unusable=f"{p.piece.said if p.piece else 'a replica'}; {_ADVICE}")
                      for p in shards.values()]  # fmt: skip
        else:
            found.append(_whole(list(shards.values())))
    return found


def _whole(shards: list[LazyTensor]) -> LazyTensor:
    first = shards[0]
    assert first.piece is not None

    def read(entry: LazyTensor) -> torch.Tensor:
        return assembled(entry.shape, entry.dtype,
                         ((s.piece, s.read) for s in shards if s.piece is not None))  # fmt: skip

    return replace(
        first, shape=first.piece.whole, piece=None, reader=read,
        parts=tuple(f"{s.file.name}:{s.name}" for s in shards),
        made_by=f"shards of {len(shards)} ranks",
    )  # fmt: skip

"""DTensors: what one rank has of a tensor."""

from __future__ import annotations

import math
from dataclasses import replace

from .pickles import Record
from .stored import Piece, StoredTensor
from .values import attributes, count_of


def placed(shape: tuple[int, ...], local: StoredTensor, spec: Record) -> StoredTensor:
    """Return the local part of a DTensor as what it is: the tensor, or a piece of it."""
    held = attributes(spec.state)
    mesh = attributes(held["mesh"].state)
    placements = [(p.kind.rpartition(".")[2], p) for p in held["placements"]]
    if all(kind == "Replicate" for kind, _ in placements):
        return local
    sharded = [(at, p.state["dim"]) for at, (kind, p) in enumerate(placements) if kind == "Shard"]
    others = {kind for kind, _ in placements} - {"Shard", "Replicate"}
    if not others and local.shape == shape:  # a mesh of one rank
        return local
    dims = [dim for _, dim in sharded]
    coordinate, counts = mesh.get("_coordinate_on_dim"), _mesh_shape(mesh)
    if others or len(set(dims)) < len(dims) or not coordinate or counts is None:
        how = ", ".join(sorted(others)) or "several shards of a dimension"
        return replace(local, unusable=f"the part of one rank ({how}); gather it before saving")
    offsets, said = [0] * len(shape), []
    for at, dim in sharded:
        rank, of = count_of(coordinate[at]), count_of(counts[at])
        # As torch.chunk divides: equal parts, rounded up.
        offsets[dim] = min(rank * -(-shape[dim] // of), shape[dim])
        said.append(f"shard {rank} of {of} along dim {dim}")
    piece = Piece(shape, tuple(offsets), local.shape, ", ".join(said))
    return replace(local, piece=piece)


def _mesh_shape(mesh: dict) -> tuple[int, ...] | None:
    """Return the sizes of a DeviceMesh, which versions of torch keep in several ways."""
    layout = mesh.get("_layout")
    if isinstance(layout, Record):
        inner = attributes(layout.state)
        if "axes" in inner:
            shapes = [attributes(axis.state)["shape"] for axis in inner["axes"]]
            return tuple(math.prod(s) if isinstance(s, tuple) else s for s in shapes)
        if isinstance(shape := inner.get("shape"), int | tuple):
            return shape if isinstance(shape, tuple) else (shape,)
    ranks = mesh.get("mesh")
    if isinstance(ranks, Record) and ranks.kind == "torch._utils._rebuild_tensor_v2":
        return ranks.arguments[2]
    return None

"""What this rank holds of matrices and vectors whose parameters are sharded (DTensor)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from ..selection.matrices import Elementwise, Matrix
from ..tables.layout import Layout, layout_of

try:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
except ImportError:  # torch was built without torch.distributed: no parameter is sharded
    DTensor = FSDPModule = None


LEAST_RANKS = 2  # of a mesh dimension over which sums are taken


@dataclass(frozen=True)
class Axis:
    """A dimension of a device mesh with several ranks: what one of its process groups spans."""

    name: str
    group: dist.ProcessGroup = field(compare=False, repr=False)


class ShardAxes(NamedTuple):
    """Over which axes the stored rows and the stored columns of some matrices are spread.

    ``mesh`` has all axes of their meshes, those over which they are replicated too. Vectors are
    spread as rows are. See ``layout.Layout`` for what is stored as a row.
    """

    rows: tuple[Axis, ...] = ()
    columns: tuple[Axis, ...] = ()
    mesh: tuple[Axis, ...] = ()


class MatrixShard(NamedTuple):
    """A matrix of which this rank holds a part."""

    local: Matrix  # of the local tensor
    whole: Layout  # its rows are the local ones, its columns all
    columns: torch.Tensor | None  # of the whole that are here, as they lie here; None: all in order
    shard_axes: ShardAxes


def is_sharded(tensor: torch.Tensor) -> bool:
    """Tell whether ``tensor`` is a DTensor."""
    return DTensor is not None and isinstance(tensor, DTensor)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this rank holds of ``tensor``: itself if it is no DTensor."""
    if not is_sharded(tensor):
        return tensor
    # What to_local() returns without grad mode, which would take longer than all else here.
    local = tensor._local_tensor
    if type(local) is not torch.Tensor and hasattr(local, "trigger_wait"):
        return local.wait()  # a gradient that is still on its way
    return local


def whole_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of ``tensor``, gathered on every rank if it is a DTensor."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def like(parameter: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """Return ``local`` as a tensor that is spread as ``parameter`` is."""
    if not is_sharded(parameter):
        return local
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False,
        shape=parameter.shape, stride=parameter.stride(),
    )  # fmt: skip


def local_grad(name: str, parameter: torch.Tensor) -> torch.Tensor | None:
    """Return what this rank has of ``parameter.grad``, which is brought to its placement.

    Raises:
        ValueError: a gradient that is no DTensor while the parameter is one.
    """
    grad = parameter.grad
    if grad is None or not is_sharded(parameter):
        return grad
    if not is_sharded(grad):
        raise ValueError(
            f"the gradient of parameter {name!r} is a {type(grad).__name__} of shape "
            f"{tuple(grad.shape)}; accepted is a DTensor, as the parameter is"
        )
    if grad.placements != parameter.placements:  # such as sums that have yet to be taken
        grad = grad.redistribute(parameter.device_mesh, parameter.placements)
        parameter.grad = grad
    return local_of(grad)


def placement(parameter: torch.Tensor) -> tuple | None:
    """Return what changes when a parameter is sharded anew."""
    return (parameter.device_mesh, parameter.placements) if is_sharded(parameter) else None


class _Placed:
    """Ranges and axes of the dimensions of a DTensor that are sharded."""

    def __init__(self, name: str, parameter: DTensor):
        mesh = parameter.device_mesh
        if mesh.get_coordinate() is None:
            raise RuntimeError(
                f"parameter {name!r} lies on {mesh}, which this rank is not part of: build one "
                "SpectralRegularizer per mesh, from parameters of that mesh alone"
            )
        shape, placements = parameter.shape, parameter.placements
        _, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
        self.local = local_of(parameter)
        self.axes: dict[int, list[Axis]] = {}
        self.mesh: list[Axis] = []
        for i, one in enumerate(placements):
            if one.is_partial():
                raise ValueError(
                    f"parameter {name!r} has placements {placements}; accepted are Shard and "
                    "Replicate"
                )
            if mesh.size(i) < LEAST_RANKS:
                continue
            axis = Axis(mesh.get_group(i).group_name, mesh.get_group(i))
            self.mesh.append(axis)
            if not one.is_replicate():
                self.axes.setdefault(one.dim, []).append(axis)
        self.ranges = {d: (offset[d], offset[d] + self.local.shape[d]) for d in self.axes}


def elementwise_axes(vector: Elementwise, parameter: torch.Tensor) -> ShardAxes:
    """Return over which axes a bias or a norm's parameter is spread."""
    if not is_sharded(parameter):
        return ShardAxes()
    placed = _Placed(vector.name, parameter)
    return ShardAxes(
        tuple(a for axes in placed.axes.values() for a in axes), (), tuple(placed.mesh)
    )


def matrix_shard(matrix: Matrix, parameter: DTensor) -> MatrixShard:
    """Return what this rank holds of a matrix of a sharded parameter.

    Raises:
        ValueError: a layout or a placement that cannot be used in place.
        RuntimeError: a parameter on a mesh without this rank.
    """
    placed = _Placed(matrix.name, parameter)
    local = placed.local
    # Shards need not lie as the DTensor says, and ranks have to agree: the whole is contiguous.
    whole = layout_of(matrix, torch.empty(parameter.shape, device="meta"))
    stacked = 0 if matrix.index is None else 1  # dimensions before those of the matrix
    row_dim = matrix.row_dim + stacked
    index, part, is_here = matrix.index, matrix.part, True
    if matrix.index is not None and 0 in placed.ranges:
        first, end = placed.ranges[0]
        is_here, index = first <= index < end, index - first
    start, n_rows = matrix.part or (0, parameter.shape[row_dim])
    rows = start, start + n_rows  # that are here
    if row_dim in placed.ranges:
        first, end = placed.ranges[row_dim]
        rows = max(first, start), min(end, start + n_rows)
        if rows[0] >= rows[1]:
            rows = first, first
        part = None if matrix.part is None else (rows[0] - first, rows[1] - rows[0])
    sizes = list(local.shape[stacked:])
    sizes[matrix.row_dim] = rows[1] - rows[0] if is_here else 0
    others = math.prod(n for d, n in enumerate(sizes) if d != matrix.row_dim)
    own = replace(
        matrix, shape=(sizes[matrix.row_dim], others), whole=tuple(local.shape), index=index,
        part=part, side=whole.side, absent=None if is_here else tuple(sizes),
    )  # fmt: skip
    found = layout_of(own, local)
    if found.side != whole.side:
        raise ValueError(
            f"parameter {matrix.name!r} has a shard of shape {tuple(local.shape)} and strides "
            f"{local.stride()}; accepted are contiguous and channels_last shards"
        )
    row_axes = [a for d, axes in placed.axes.items() for a in axes if d < stacked or d == row_dim]
    column_axes = [a for d, axes in placed.axes.items() for a in axes if a not in row_axes]
    if whole.side == "left":
        columns = torch.arange(n_rows)[rows[0] - start : rows[1] - start][: found.cols]
        row_axes, column_axes = column_axes, row_axes
    else:
        columns = torch.arange(math.prod(whole.column_sizes)).view(whole.column_sizes)
        for place, d in enumerate(whole.column_dims):
            first, end = placed.ranges.get(d + stacked, (0, parameter.shape[d + stacked]))
            columns = columns.narrow(place, first, end - first)
        order = [whole.column_dims.index(d) for d in found.column_dims]
        order += [i for i in range(columns.dim()) if i not in order]  # sizes of 1
        columns = columns.permute(order).reshape(-1)[: found.cols]
    is_all = torch.equal(columns, torch.arange(whole.cols))
    return MatrixShard(
        own, replace(whole, rows=found.rows), None if is_all else columns,
        ShardAxes(tuple(row_axes), tuple(column_axes), tuple(placed.mesh)),
    )  # fmt: skip


def is_gathered(tensor: torch.Tensor, sharded: torch.Tensor) -> bool:
    """Tell whether ``tensor`` may be what FSDP2 shows for ``sharded`` around a forward pass.

    That is the whole parameter, or one that is spread over fewer ranks.
    """
    if tensor is sharded or tensor.shape != sharded.shape:
        return False
    return not (is_sharded(tensor) and tensor.device_mesh == sharded.device_mesh)


def managed(root: nn.Module | None) -> set[nn.Module]:
    """Return the modules whose parameters FSDP2 gathers and frees."""
    if root is None or FSDPModule is None:
        return set()
    tops = [module for module in root.modules() if isinstance(module, FSDPModule)]
    return {module for top in tops for module in top.modules()}


def same_placement(parameters: Sequence[torch.Tensor], before: Sequence[tuple | None]) -> bool:
    """Tell whether parameters are spread as they were."""
    return all(placement(p) == b for p, b in zip(parameters, before, strict=True))

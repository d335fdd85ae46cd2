"""This rank's shards of matrices and elementwise parameters that are sharded (DTensor)."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from ..selection.matrices import Elementwise, Matrix
from ..tables.layout import Layout, layout_of

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_PLAIN = frozenset({torch.Tensor, nn.Parameter})
LEAST_RANKS = 2  # a mesh dimension with fewer ranks needs no sums


@dataclass(frozen=True)
class Axis:
    """A dimension of a device mesh with several ranks, and this rank's process group along it."""

    name: str
    group: dist.ProcessGroup = field(compare=False, repr=False)


class ShardAxes(NamedTuple):
    """Shard axes: the mesh axes over which stored rows and stored columns are sharded.

    ``mesh`` has all axes of the mesh, including those of replicas. The axes of elementwise
    parameters are ``rows``. See ``tables.layout.Layout`` for stored rows.
    """

    rows: tuple[Axis, ...] = ()
    columns: tuple[Axis, ...] = ()
    mesh: tuple[Axis, ...] = ()


class MatrixShard(NamedTuple):
    """This rank's shard of a matrix."""

    local: Matrix  # a matrix of the local tensor
    whole: Layout  # with the local rows and all columns
    columns: torch.Tensor | None  # indices of this rank's columns in the full matrix; None: all
    shard_axes: ShardAxes


def _loaded(module: str, name: str) -> type | tuple[()]:
    """Return a class of torch.distributed, or () if its module is not imported.

    Then it has no instances, and importing it would take ten times as long as this package.
    """
    return getattr(sys.modules.get(f"torch.distributed.{module}"), name, ())


def dtensor() -> type | tuple[()]:
    """Return the class DTensor, or () while there can be no instance."""
    return _loaded("tensor", "DTensor")


def is_sharded(tensor: torch.Tensor) -> bool:
    """Return whether ``tensor`` is a DTensor."""
    # Steps ask this about every parameter: the usual ones first.
    return type(tensor) not in _PLAIN and isinstance(tensor, dtensor())


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of ``tensor``, or ``tensor`` itself if it is not a DTensor."""
    if not is_sharded(tensor):
        return tensor
    # The same as to_local() in no-grad mode, which would take longer than everything else here.
    local = tensor._local_tensor
    if type(local) is not torch.Tensor and hasattr(local, "trigger_wait"):
        return local.wait()  # a gradient whose collective is in flight
    return local


def whole_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the full ``tensor``, gathered on every rank if it is a DTensor."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def like(parameter: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """Return ``local`` as a tensor sharded like ``parameter``."""
    if not is_sharded(parameter):
        return local
    return dtensor().from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False,
        shape=parameter.shape, stride=parameter.stride(),
    )  # fmt: skip


def local_grad(name: str, parameter: torch.Tensor) -> torch.Tensor | None:
    """Return this rank's shard of ``parameter.grad``, redistributed to the parameter's placements.

    Raises:
        ValueError: the parameter is a DTensor and its gradient is not.
    """
    grad = parameter.grad
    if grad is None or not is_sharded(parameter):
        return grad
    if not is_sharded(grad):
        raise ValueError(
            f"gradient of parameter {name!r}: expected a DTensor, as the parameter is, got a "
            f"{type(grad).__name__} of shape {tuple(grad.shape)}"
        )
    if grad.placements != parameter.placements:  # such as partial sums
        grad = grad.redistribute(parameter.device_mesh, parameter.placements)
        parameter.grad = grad
    return local_of(grad)


def placement(parameter: torch.Tensor) -> tuple | None:
    """Return mesh and placements of a DTensor, which change when it is resharded; else None."""
    return (parameter.device_mesh, parameter.placements) if is_sharded(parameter) else None


class _Placed:
    """Local index ranges and mesh axes of the sharded dimensions of a DTensor."""

    def __init__(self, name: str, parameter: DTensor):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        mesh = parameter.device_mesh
        if mesh.get_coordinate() is None:
            raise RuntimeError(
                f"parameter {name!r} lies on {mesh}, which this rank is not part of; build one "
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
                    f"parameter {name!r}: expected placements Shard and Replicate, got {placements}"
                )
            if mesh.size(i) < LEAST_RANKS:
                continue
            axis = Axis(mesh.get_group(i).group_name, mesh.get_group(i))
            self.mesh.append(axis)
            if not one.is_replicate():
                self.axes.setdefault(one.dim, []).append(axis)
        self.ranges = {d: (offset[d], offset[d] + self.local.shape[d]) for d in self.axes}


def elementwise_axes(vector: Elementwise, parameter: torch.Tensor) -> ShardAxes:
    """Return the shard axes of an elementwise parameter.

    Raises:
        ValueError: a placement that cuts rows into pieces.
        RuntimeError: the parameter is on a mesh without this rank.
    """
    if not is_sharded(parameter):
        return ShardAxes()
    placed = _Placed(vector.name, parameter)
    if vector.kind == "rows" and any(d != 0 for d in placed.axes):
        raise ValueError(
            f"parameter {vector.name!r}: expected placements Shard(0) and Replicate, which leave "
            f"its rows of {vector.length} elements whole, got {parameter.placements} (shard it so, "
            "or leave it out with exclude)"
        )
    return ShardAxes(
        tuple(a for axes in placed.axes.values() for a in axes), (), tuple(placed.mesh)
    )


def local_part(name: str, parameter: DTensor, numbers: torch.Tensor) -> torch.Tensor:
    """Return those of ``numbers`` [n] that belong to this rank's shard, [n_local].

    There is one per element of ``parameter``, called ``name``, or one per row of it, which is
    sharded along dim 0.
    """
    if not numbers.numel():
        return numbers
    is_whole = numbers.numel() == parameter.numel()
    found = numbers.view(parameter.shape if is_whole else (parameter.shape[0], -1))
    for d, (begin, end) in _Placed(name, parameter).ranges.items():
        found = found.narrow(d, begin, end - begin)
    return found.reshape(-1)


def matrix_shard(matrix: Matrix, parameter: DTensor) -> MatrixShard:
    """Return this rank's shard of a matrix of a sharded parameter.

    Raises:
        ValueError: a layout or a placement that cannot be used in place.
        RuntimeError: the parameter is on a mesh without this rank.
    """
    placed = _Placed(matrix.name, parameter)
    local = placed.local
    if matrix.part_dim is not None and placed.axes:
        raise ValueError(
            f"parameter {matrix.ref.name!r}: expected a whole one, as it is a transposed "
            f"convolution by groups, got placements {parameter.placements} (leave it out with "
            "exclude, or take it as one matrix with the role 'matrix')"
        )
    # Local strides may differ from the DTensor's, and ranks must agree on the order of columns:
    # that of a contiguous full tensor.
    whole = layout_of(matrix, torch.empty(parameter.shape, device="meta"))
    stacked = 0 if matrix.index is None else 1  # dimensions before those of the matrix
    row_dim = matrix.row_dim + stacked
    index, part, is_here = matrix.index, matrix.part, True
    if matrix.index is not None and 0 in placed.ranges:
        first, end = placed.ranges[0]
        is_here, index = first <= index < end, index - first
    start, n_rows = matrix.part or (0, parameter.shape[row_dim])
    rows = start, start + n_rows  # the local ones
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
            f"parameter {matrix.name!r}: expected a contiguous or channels_last shard, got shape "
            f"{tuple(local.shape)} and strides {local.stride()}"
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
        order += [i for i in range(columns.dim()) if i not in order]  # dimensions of size 1
        columns = columns.permute(order).reshape(-1)[: found.cols]
    is_all = torch.equal(columns, torch.arange(whole.cols))
    return MatrixShard(
        own, replace(whole, rows=found.rows), None if is_all else columns,
        ShardAxes(tuple(row_axes), tuple(column_axes), tuple(placed.mesh)),
    )  # fmt: skip


def is_gathered(tensor: torch.Tensor, sharded: torch.Tensor) -> bool:
    """Return whether ``tensor`` may be FSDP2's gathered form of ``sharded`` in a forward pass.

    That is the whole parameter, or one that is sharded over fewer ranks.
    """
    if tensor is sharded or tensor.shape != sharded.shape:
        return False
    return not (is_sharded(tensor) and tensor.device_mesh == sharded.device_mesh)


def managed(root: nn.Module | None) -> set[nn.Module]:
    """Return the modules whose parameters FSDP2 gathers and frees."""
    if root is None:
        return set()
    kind = _loaded("fsdp", "FSDPModule")
    tops = [module for module in root.modules() if isinstance(module, kind)]
    return {module for top in tops for module in top.modules()}


def same_placement(parameters: Sequence[torch.Tensor], before: Sequence[tuple | None]) -> bool:
    """Return whether the parameters have the meshes and placements of ``before``."""
    return all(placement(p) == b for p, b in zip(parameters, before, strict=True))

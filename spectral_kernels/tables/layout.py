"""The memory layout of a matrix within its parameter."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..selection.matrices import Matrix


def same_strides(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors of one shape have their elements in the same places.

    Strides of dimensions of size 1 do not count: a slice of an activation has any.
    """
    if a.stride() == b.stride():
        return True
    steps = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(x == y for size, x, y in steps if size != 1)


def row_order(tensor: torch.Tensor, length: int) -> tuple[int, ...] | None:
    """Return how the elements of a row lie in memory, as dimensions; None if rows are not apart.

    The last dimensions of ``tensor``, with ``length`` elements, are a row, and those before them
    count the rows. Rows are contiguous and lie one after the other, in their order; the elements of
    a row may be in any order.
    """
    shape, strides = tensor.shape, tensor.stride()
    if tensor.numel() == 0:
        return ()
    first = next((d for d in range(len(shape) + 1) if math.prod(shape[d:]) == length), None)
    if first is None:
        return None
    inside = sorted((d for d in range(first, len(shape)) if shape[d] != 1), key=strides.__getitem__)
    expected = 1
    for d in (*inside, *reversed(range(first))):
        if shape[d] != 1 and strides[d] != expected:
            return None
        expected *= shape[d]
    return tuple(inside)


@dataclass(frozen=True)
class Layout:
    """Memory layout of one matrix: [rows, outer * inner], inner elements contiguous.

    Columns are taken in memory order, which changes no singular value. A dense weight stored
    column by column is read as its transpose (``side = "left"``): v is then a left singular vector
    of the matrix and s a right one. ``column_sizes`` and ``column_dims`` are sizes and indices of
    the dimensions that form the matrix's columns, in memory order.
    """

    offset: int
    rows: int
    outer: int
    inner: int
    row_stride: int
    outer_stride: int
    side: str
    permutation: tuple[int, ...]
    column_sizes: tuple[int, ...]
    column_dims: tuple[int, ...]

    @property
    def cols(self) -> int:
        """Number of columns N, the length of v."""
        return self.outer * self.inner

    @property
    def strides(self) -> tuple[int, int]:
        """Strides between rows and between contiguous pieces of a row, in elements."""
        return self.row_stride, self.outer_stride

    def fits(self, other: Layout) -> bool:
        """Return whether ``other`` (a gradient's layout) has the same rows and column order."""
        return all(
            getattr(self, name) == getattr(other, name)
            for name in ("rows", "outer", "inner", "side", "permutation")
        )

    def _places(self) -> list[int]:
        """Return each column dimension's position in memory order, in the parameter's order."""
        return sorted(range(len(self.column_dims)), key=self.column_dims.__getitem__)

    def to_logical(self, v: torch.Tensor) -> torch.Tensor:
        """Reorder right singular vectors [r, N] from memory order to the parameter's own order."""
        if len(self.column_dims) < 2:
            return v
        places = self._places()
        folded = v.reshape(len(v), *self.column_sizes)
        return folded.permute(0, *(1 + p for p in places)).reshape(v.shape)

    def from_logical(self, v: torch.Tensor) -> torch.Tensor:
        """Reorder vectors [r, N] from the parameter's own order to memory order."""
        if len(self.column_dims) < 2:
            return v
        places = self._places()
        folded = v.reshape(len(v), *(self.column_sizes[p] for p in places))
        back = [places.index(i) for i in range(len(places))]
        return folded.permute(0, *(1 + p for p in back)).reshape(v.shape)


def layout_of(matrix: Matrix, tensor: torch.Tensor) -> Layout:
    """Return the layout of ``matrix`` in ``tensor``.

    Raises:
        ValueError: the matrix cannot be used in place, or ``tensor`` has another shape than the
            parameter at selection (a parameter that is one matrix may change its sizes).
    """
    whole = tensor.detach()
    is_part = matrix.index is not None or matrix.part is not None
    if whole.dim() != len(matrix.whole) or (is_part and whole.shape != matrix.whole):
        raise ValueError(
            f"parameter {matrix.name!r}: expected as many dimensions as in the shape "
            f"{tuple(matrix.whole)} that was selected, and the same sizes unless it is one matrix, "
            f"got shape {tuple(whole.shape)}"
        )
    part = matrix.of(whole)
    offset = part.storage_offset() - whole.storage_offset()
    row_dim, size, stride = matrix.row_dim, part.shape, part.stride()
    rows, row_stride = size[row_dim], stride[row_dim]
    others = [d for d in range(part.dim()) if d != row_dim]
    rest = sorted((d for d in others if size[d] != 1), key=lambda d: -stride[d])
    permutation = (row_dim, *rest, *(d for d in others if size[d] == 1))
    column_sizes = tuple(size[d] for d in rest)
    cols = math.prod(column_sizes)
    if part.numel() == 0:
        offset, side = 0, matrix.side or "right"
        if side == "left":
            rows, cols, permutation = cols, rows, (*permutation[1:], row_dim)
        return Layout(offset, rows, 1, cols, cols, cols, side, permutation, column_sizes, ())
    pieces: list[list[int]] = []  # [size, stride], coalesced
    for d in rest:
        if pieces and pieces[-1][1] == stride[d] * size[d]:
            pieces[-1] = [pieces[-1][0] * size[d], stride[d]]
        else:
            pieces.append([size[d], stride[d]])
    reach = 1
    for step, n in sorted((stride[d], n) for d, n in enumerate(size) if n != 1):
        if step < reach:
            raise _unusable(matrix, tensor, "elements share memory")
        reach += (n - 1) * step
    last_stride = pieces[-1][1] if pieces else 0
    if last_stride == 1 and len(pieces) <= 2:
        outer, outer_stride = pieces[0] if len(pieces) == 2 else (1, cols)
        return Layout(
            offset, rows, outer, pieces[-1][0], row_stride, outer_stride, "right",
            permutation, column_sizes, tuple(rest),
        )  # fmt: skip
    if matrix.periods is not None and pieces:
        raise _unusable(matrix, tensor, "the rows of the kernel of an operator are not contiguous")
    if len(pieces) <= 1 and (row_stride == 1 or rows == 1) and (pieces or matrix.side != "right"):
        step = last_stride or rows
        permutation = (*permutation[1:], row_dim)
        return Layout(
            offset, cols, 1, rows, step, rows, "left", permutation, column_sizes, tuple(rest)
        )
    if not pieces:
        return Layout(
            offset, rows, 1, 1, row_stride, 1, "right", permutation, column_sizes, tuple(rest)
        )
    raise _unusable(matrix, tensor, "neither its rows nor its columns are contiguous")


def _unusable(matrix: Matrix, tensor: torch.Tensor, why: str) -> ValueError:
    return ValueError(
        f"parameter {matrix.name!r}: expected a contiguous, channels_last or transposed dense "
        f"weight, with any stride between its rows, got shape {tuple(tensor.shape)} and strides "
        f"{tensor.stride()}, which cannot be used in place ({why})"
    )

"""Tables, tiles and flat state for the matrices and vectors of one (device, dtype) bucket."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from .selection import Matrix, Vector

# The structs of csrc/table.h, byte for byte.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
KINDS = {"shift": 0, "gain": 1}


def _struct(fields: str, **other: str) -> np.dtype:
    return np.dtype([(name, other.get(name, "i8")) for name in fields.split()])


MATRIX = _struct(
    "weight grad grad_dtype rows outer inner row_stride outer_stride grad_row_stride "
    "grad_outer_stride v_offset s_offset first_tile n_tiles"
)
TILE = _struct("matrix row_begin row_end t_offset")
VECTOR = _struct("weight grad grad_dtype size kind")
HEADER = _struct(
    "weight_dtype matrices n_matrices tiles n_tiles vectors n_vectors v v_next s t_partial "
    "norm_partial sigma residual norm penalty strength target scale exponent scratch_size n_bytes",
    exponent="f8",
)

MIN_TILE_ROWS = 128  # a tile writes a partial t of N numbers: 1/128 of what it reads
MAX_TILES = 64  # per matrix, so that partial sums stay O(N)
_NO_MEMORY = "no memory of its own (meta, fake, DTensor or freed); accepted are plain tensors"


def address(array: np.ndarray) -> int:
    """Return the address of a numpy array's first element."""
    return array.__array_interface__["data"][0]


@dataclass(frozen=True)
class Layout:
    """How one matrix lies in memory: [rows, outer * inner], inner elements contiguous.

    Columns are taken in memory order, which changes no singular value. A dense weight stored
    column by column is read as its transpose (``side = "left"``): the vector that is carried is
    then a left singular vector of the parameter.
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
        """Strides between rows and between pieces of a row, in elements."""
        return self.row_stride, self.outer_stride

    def fits(self, other: Layout) -> bool:
        """Tell whether ``other`` (a gradient's layout) has the same rows and column order."""
        return all(
            getattr(self, name) == getattr(other, name)
            for name in ("rows", "outer", "inner", "side", "permutation")
        )

    def to_logical(self, v: torch.Tensor) -> torch.Tensor:
        """Bring the last dim of ``v`` from memory order into the parameter's own order."""
        if len(self.column_dims) < 2:
            return v
        places = sorted(range(len(self.column_dims)), key=self.column_dims.__getitem__)
        folded = v.reshape(*v.shape[:-1], *self.column_sizes)
        return folded.permute(0, *(1 + p for p in places)).reshape(v.shape)

    def from_logical(self, v: torch.Tensor) -> torch.Tensor:
        """Undo :meth:`to_logical`."""
        if len(self.column_dims) < 2:
            return v
        places = sorted(range(len(self.column_dims)), key=self.column_dims.__getitem__)
        folded = v.reshape(*v.shape[:-1], *(self.column_sizes[p] for p in places))
        back = [places.index(i) for i in range(len(places))]
        return folded.permute(0, *(1 + p for p in back)).reshape(v.shape)


def layout_of(matrix: Matrix, tensor: torch.Tensor) -> Layout:
    """Describe how ``matrix`` lies in ``tensor``; ValueError when it cannot be used in place."""
    whole = tensor.detach()
    is_part = matrix.index is not None or matrix.part is not None
    if whole.dim() != len(matrix.whole) or (is_part and whole.shape != matrix.whole):
        raise ValueError(
            f"parameter {matrix.name!r} had shape {matrix.whole} when it was selected, now "
            f"{tuple(whole.shape)}; accepted are other sizes for a parameter that is one matrix"
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
        return Layout(offset, rows, 1, cols, cols, cols, "right", permutation, column_sizes, ())
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
    if len(pieces) <= 1 and (row_stride == 1 or rows == 1):
        step = last_stride or rows
        permutation = (*permutation[1:], row_dim)
        return Layout(offset, cols, 1, rows, step, rows, "left", permutation, (rows,), (row_dim,))
    if not pieces:
        return Layout(
            offset, rows, 1, 1, row_stride, 1, "right", permutation, column_sizes, tuple(rest)
        )
    raise _unusable(matrix, tensor, "neither its rows nor its columns are contiguous")


def _unusable(matrix: Matrix, tensor: torch.Tensor, why: str) -> ValueError:
    return ValueError(
        f"parameter {matrix.name!r} with shape {tuple(tensor.shape)} and strides "
        f"{tensor.stride()} cannot be used in place: {why}; accepted are contiguous, channels_last "
        "and transposed dense weights, with any stride between the rows"
    )


class State:
    """Vectors and scalars of one plan, with the header through which kernels find them.

    ``v`` made ``s`` and ``sigma``; ``v_next`` is what the next iteration starts from.
    """

    def __init__(self, plan: Plan, v, v_next, s, scalars, like: State | None = None):
        self.plan, self.v, self.v_next, self.s, self.scalars = plan, v, v_next, s, scalars
        nm, nv = len(plan.matrices), len(plan.vectors)
        parts = scalars.split((nm, nm, nv, nm + nv, nm + nv, nm))
        self.sigma, self.residual, self.norm, self.penalty, self.strength, self.target = parts
        self.scale: torch.Tensor | None = None
        self.header = plan.header.copy()
        if like is not None:
            self.header["exponent"] = like.header["exponent"]
        self.address = address(self.header)
        for name in ("v", "v_next", "s", "sigma", "residual", "norm", "penalty", "strength",
                     "target"):  # fmt: skip
            tensor = getattr(self, name)
            self.header[name] = 0 if tensor is None else tensor.data_ptr()
        if v_next is None:
            self.header["t_partial"] = 0

    @classmethod
    def fresh(cls, plan: Plan) -> State:
        """Allocate the state of ``plan``, everything unknown (NaN)."""
        nm, nv, r = len(plan.matrices), len(plan.vectors), plan.r

        def unknown(n):
            return torch.full((n,), math.nan, dtype=plan.state_dtype, device=plan.device)

        n, m = sum(x.cols for x in plan.layouts), sum(x.rows for x in plan.layouts)
        return cls(plan, unknown(r * n), unknown(r * n), unknown(r * m), unknown(5 * nm + 3 * nv))

    def swap(self) -> None:
        """Make ``v_next`` the vectors that the next iteration reads."""
        self.v, self.v_next = self.v_next, self.v
        self.header["v"], self.header["v_next"] = self.v.data_ptr(), self.v_next.data_ptr()

    def snapshot(self) -> State:
        """Copy what a gradient needs, so that later iterations do not change it."""
        return State(
            self.plan, self.v.clone(), None, self.s.clone(), self.scalars.clone(), like=self
        )

    def evaluation(self) -> State:
        """Return a state that reads ``v_next`` and writes nothing of this one."""
        return State(
            self.plan, self.v_next, None, torch.empty_like(self.s), self.scalars.clone(), like=self
        )

    def set_scale(self, scale: torch.Tensor | None) -> None:
        """Let one number on the device multiply every strength (None: no such number)."""
        if scale is not None:
            scale = scale.detach().to(dtype=self.plan.state_dtype, device=self.plan.device)
            self.header["scale"] = scale.data_ptr()
        elif self.scale is not None:
            self.header["scale"] = 0
        self.scale = scale

    def set_exponent(self, exponent: float) -> None:
        """Set k of the penalty."""
        self.header["exponent"] = exponent

    def columns(self, i: int, v: torch.Tensor) -> torch.Tensor:
        """Return the part of a flat v buffer that belongs to matrix ``i``, [r, N]."""
        r, start, n = self.plan.r, int(self.plan.table["v_offset"][i]), self.plan.layouts[i].cols
        return v[r * start : r * (start + n)].view(r, n)

    def rows(self, i: int) -> torch.Tensor:
        """Return the part of s that belongs to matrix ``i``, [r, M]."""
        r, start, m = self.plan.r, int(self.plan.table["s_offset"][i]), self.plan.layouts[i].rows
        return self.s[r * start : r * (start + m)].view(r, m)


class Plan:
    """Tables of a fixed set of matrices and vectors that share a device and a dtype.

    The addresses in the tables are compared with the tensors at every use; the cut into tiles
    depends on the shapes alone, so results do not depend on the number of threads.

    Args:
        matrices: the matrices, in order.
        vectors: the biases, gains and shifts, in order.
        tensors: the parameter of each distinct owner, in the order in which ``matrices`` and then
            ``vectors`` first name them; all on one device and of one dtype.
        r: vectors per matrix that the state has room for.

    Raises:
        ValueError: a parameter that cannot be used in place.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        vectors: Sequence[Vector],
        tensors: Sequence[torch.Tensor],
        r: int = 1,
    ):
        self.r = r
        self.matrices, self.vectors = list(matrices), list(vectors)
        self.owners = list(dict.fromkeys(x.owner for x in (*matrices, *vectors)))
        by_owner = {owner: i for i, owner in enumerate(self.owners)}
        self.matrix_owner = np.array([by_owner[x.owner] for x in matrices], dtype=np.int64)
        self.vector_owner = np.array([by_owner[x.owner] for x in vectors], dtype=np.int64)
        self.tensors = list(tensors)
        self.device, self.dtype = tensors[0].device, tensors[0].dtype
        self.state_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.layouts = [layout_of(m, tensors[by_owner[m.owner]]) for m in matrices]
        self._build_tables()
        self._weight_key = self._grad_key = None
        self.bind_weights(tensors)

    def _build_tables(self) -> None:
        table = np.zeros(len(self.matrices), MATRIX)
        tiles: list[tuple[int, int, int, int]] = []
        v_offset = s_offset = t_offset = 0
        for i, x in enumerate(self.layouts):
            tile_rows = max(MIN_TILE_ROWS, -(-x.rows // MAX_TILES))
            starts = range(0, x.rows, tile_rows) if x.cols else ()
            table[i] = (
                0, 0, DTYPES[self.dtype], x.rows, x.outer, x.inner, *x.strides, *x.strides,
                v_offset, s_offset, len(tiles), len(starts),
            )  # fmt: skip
            for start in starts:
                tiles.append((i, start, min(start + tile_rows, x.rows), t_offset))
                t_offset += x.cols
            v_offset, s_offset = v_offset + x.cols, s_offset + x.rows
        vector_table = np.zeros(len(self.vectors), VECTOR)
        for i, vector in enumerate(self.vectors):
            tensor = self.tensors[self.vector_owner[i]]
            vector_table[i] = (0, 0, DTYPES[self.dtype], tensor.numel(), KINDS[vector.kind])
        self.table, self.vector_table = table, vector_table
        self.tiles = np.array(tiles, TILE)
        self.t_partial = torch.empty(self.r * t_offset, dtype=self.state_dtype, device=self.device)
        self.norm_partial = torch.empty(len(tiles), dtype=torch.float64, device=self.device)
        elements = sum(x.rows * x.cols for x in self.layouts)
        header = np.zeros((), HEADER)
        header["weight_dtype"] = DTYPES[self.dtype]
        for name, rows in (
            ("matrices", self.table), ("tiles", self.tiles), ("vectors", self.vector_table)
        ):  # fmt: skip
            header[name], header[f"n_{name}"] = address(rows), len(rows)
        header["t_partial"] = self.t_partial.data_ptr()
        header["norm_partial"] = self.norm_partial.data_ptr()
        header["exponent"] = 2
        header["scratch_size"] = max((x.cols for x in self.layouts), default=0)
        header["n_bytes"] = elements * self.dtype.itemsize
        self.header = header
        self._offsets = np.array([x.offset for x in self.layouts], dtype=np.int64)
        self._strides = np.array([x.strides for x in self.layouts], dtype=np.int64).reshape(-1, 2)

    def bind_weights(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Point the tables at ``tensors`` (one per owner).

        Returns:
            False when a tensor's device, dtype, shape or layout is not the one that this plan was
            made for; the plan is then unchanged and a new one is needed.

        Raises:
            ValueError: a parameter that cannot be used in place.
        """
        key = [t.data_ptr() for t in tensors], [t.shape for t in tensors]
        if key == self._weight_key:
            return True
        old = self._weight_key or ([None] * len(tensors),) * 2
        changed = {i for i, x in enumerate(zip(*key, strict=True)) if x != (old[0][i], old[1][i])}
        for i in changed:
            if tensors[i].device != self.device or tensors[i].dtype != self.dtype:
                return False
            if key[0][i] == 0 and tensors[i].numel():
                raise ValueError(f"parameter {self.owners[i].name!r} has {_NO_MEMORY}")
        for i, owner in enumerate(self.vector_owner):
            if owner in changed:
                vector = tensors[owner]
                if not vector.is_contiguous():
                    raise ValueError(
                        f"parameter {self.vectors[i].name!r} has strides {vector.stride()}; "
                        "accepted are contiguous biases and norm parameters"
                    )
                if vector.numel() != self.vector_table["size"][i]:
                    return False
        for i, owner in enumerate(self.matrix_owner):
            if owner in changed and layout_of(self.matrices[i], tensors[owner]) != self.layouts[i]:
                return False
        addresses = np.array(key[0], dtype=np.int64)
        self.table["weight"] = addresses[self.matrix_owner] + self._offsets * self.dtype.itemsize
        self.vector_table["weight"] = addresses[self.vector_owner]
        self.tensors, self._weight_key = list(tensors), key
        return True

    def bind_grads(self, grads: Sequence[torch.Tensor | None]) -> None:
        """Point the tables at the gradients (one per owner; None: skip what it owns).

        Raises:
            ValueError: a gradient that is sparse, on another device, of a dtype that does not go
                with the weight's, or laid out differently from the weight.
        """
        try:
            key = [None if g is None else (g.data_ptr(), g.dtype, g.stride()) for g in grads]
        except RuntimeError:  # a gradient without plain memory, which has no address
            for i, grad in enumerate(grads):
                if grad is not None:
                    self._check_grad(i, grad)
            raise
        if key == self._grad_key:
            return
        for i, grad in enumerate(grads):
            if grad is not None and (self._grad_key is None or key[i] != self._grad_key[i]):
                self._check_grad(i, grad)
        addresses = np.array([0 if k is None else k[0] for k in key], dtype=np.int64)
        dtypes = np.array([0 if k is None else DTYPES[k[1]] for k in key], dtype=np.int64)
        sizes = np.array([0 if k is None else k[1].itemsize for k in key], dtype=np.int64)
        offsets, strides = self._offsets.copy(), self._strides.copy()
        for i, owner in enumerate(self.matrix_owner):
            if grads[owner] is not None and key[owner][2] != self.tensors[owner].stride():
                layout = self._grad_layout(i, grads[owner])
                offsets[i], strides[i] = layout.offset, layout.strides
        owned = addresses[self.matrix_owner]
        self.table["grad"] = np.where(owned, owned + offsets * sizes[self.matrix_owner], 0)
        self.table["grad_dtype"] = dtypes[self.matrix_owner]
        self.table["grad_row_stride"], self.table["grad_outer_stride"] = strides.T
        self.vector_table["grad"] = addresses[self.vector_owner]
        self.vector_table["grad_dtype"] = dtypes[self.vector_owner]
        self._grad_key = key

    def _grad_layout(self, i: int, grad: torch.Tensor) -> Layout | None:
        """Describe how ``grad`` lies if rows and columns are those of matrix ``i``, else None."""
        try:
            own, found = self.layouts[i], layout_of(self.matrices[i], grad)
        except ValueError:
            return None
        if own.cols == 1 and found.rows == 1 and found.outer == 1:
            # One column, apart in the weight and contiguous in the gradient.
            found = replace(own, offset=found.offset, row_stride=1)
        return found if own.fits(found) else None

    def _check_grad(self, owner: int, grad: torch.Tensor) -> None:
        weight, name = self.tensors[owner], self.owners[owner].name
        problem = None
        wide = self.dtype == torch.float64
        if grad.layout != torch.strided:
            problem = f"layout {grad.layout}; accepted are dense gradients"
        elif grad.device != self.device:
            problem = f"device {grad.device}; accepted is {self.device}"
        elif grad.dtype not in DTYPES or (grad.dtype == torch.float64) != wide:
            accepted = "float64" if wide else "float32, bfloat16 and float16"
            problem = f"dtype {grad.dtype}; accepted for a weight of {self.dtype}: {accepted}"
        elif grad.shape != weight.shape:
            problem = f"shape {tuple(grad.shape)}; accepted is {tuple(weight.shape)}"
        elif grad.data_ptr() == 0 and grad.numel():
            problem = _NO_MEMORY
        elif grad.stride() != weight.stride():
            owned = np.flatnonzero(self.matrix_owner == owner)
            same = all(self._grad_layout(i, grad) is not None for i in owned)
            if not same or (owner in self.vector_owner and not grad.is_contiguous()):
                problem = (
                    f"strides {grad.stride()}, those of the weight are {weight.stride()}; accepted "
                    "are gradients laid out like the weight (zero_grad(set_to_none=True) lets "
                    "autograd make such ones)"
                )
        if problem is not None:
            raise ValueError(f"the gradient of parameter {name!r} has {problem}")

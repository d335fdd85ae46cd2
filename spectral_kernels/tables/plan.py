"""Plans: tables and tiles of the matrices and elementwise parameters of one device and dtype."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from ..selection.matrices import Elementwise, Matrix, refs_of
from .addresses import Column, Counter, Memory, look
from .device import DeviceTables, wide_dtype
from .layout import Layout, layout_of, row_order, same_strides
from .operators import OperatorTables
from .schema import (
    CHUNK,
    CHUNK_COLUMNS,
    DTYPES,
    ELEMENTWISE,
    HEADER,
    KINDS,
    MATRIX,
    SCALARS,
    SLOT,
    TILE,
    address,
    scalar_sizes,
)

# On a CPU, and with several vectors: maximum rows of a tile, exceeded where a matrix would have
# more than MAX_TILES tiles. A tile writes r * N numbers of t.
TILE_ROWS, TILE_ROWS_ON_GPU, MAX_TILES = 128, 64, 64
# On a GPU with one vector: one tile per concurrent program, of LEAST_ELEMENTS to MOST_ELEMENTS
# elements, but at most about TILES in all, as starting and ending a tile costs microseconds; 8 to
# MOST_ROWS rows. In large plans at least _LEAST_ROWS rows, so that t stays in the cache.
PROGRAMS, LEAST_ELEMENTS, MOST_ELEMENTS, TILES = 528, 2048, 64 * 1024, 1056
MOST_ROWS = 256
_LEAST_ROWS = ((2**27, 32), (2**25, 16), (0, 8))  # (elements of the plan, rows)


def rows_of_tiles(shapes: Sequence[tuple[int, int]], device_type: str, r: int = 1) -> list[int]:
    """Return the rows per tile (the last tile may have fewer) for each (M, N) of ``shapes``.

    On a CPU a matrix with more than 64 rows has at least two tiles, or one thread would do most of
    the work of a small model. On a GPU tiles are equal in elements rather than in rows, and small
    plans have enough tiles to keep every multiprocessor busy. The result depends on the arguments
    alone, so that tiles are the same on every machine.
    """
    if device_type == "cpu" or r > 1:
        most = TILE_ROWS * min(r, 2) if device_type == "cpu" else TILE_ROWS_ON_GPU * r
        counts = [max(-(-m // most), 2 if m > 64 else 1) for m, _ in shapes]
        return [
            max(4, 4 * -(-m // (4 * min(n_tiles, MAX_TILES))))
            for (m, _), n_tiles in zip(shapes, counts, strict=True)
        ]
    total = sum(m * n for m, n in shapes)
    elements = min(max(total // PROGRAMS, LEAST_ELEMENTS), MOST_ELEMENTS)
    elements = max(elements, total // TILES)
    least = next(rows for size, rows in _LEAST_ROWS if total >= size)
    found = []
    for m, n in shapes:
        most = min(max(elements // max(n, 1), least), MOST_ROWS)
        n_tiles = -(-m // most)
        found.append(8 * -(-m // (8 * max(n_tiles, 1))) or 8)
    return found


def _starts(sizes: Sequence[int], cols: Sequence[int]) -> list[int]:
    """Return the offset of each matrix's numbers in a flat buffer.

    Matrices with a multiple of four columns come first: each then starts at a multiple of 16
    bytes, as vector loads of four float32 numbers need.
    """
    starts, place = [0] * len(sizes), 0
    for i in sorted(range(len(sizes)), key=lambda i: cols[i] % 4 != 0):
        starts[i], place = place, place + sizes[i]
    return starts


# Of each elementwise parameter: 1-D, in the state's dtype; None: the target of its kind.
Targets = tuple[torch.Tensor | None, ...]


class Tables:
    """Tables of a set of parameters for the kernels, without the addresses of weights.

    Args:
        matrices: the matrices, in order.
        elementwise: the elementwise parameters, in order.
        layouts: the layout of each matrix.
        sizes: the number of elements of each elementwise parameter.
        device: device of the weights.
        dtype: dtype of the weights.
        r: singular vectors per matrix, one of N_VECTORS. For operators of convolutions, of which
            one plan has either all matrices or none, it is 1, and ``r`` of the tables 2: the real
            and the imaginary part of one vector.

    Attributes:
        n_values: singular values per matrix.
        operators: their tables, or None if the matrices are no operators.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        elementwise: Sequence[Elementwise],
        layouts: Sequence[Layout],
        sizes: Sequence[int],
        device: torch.device,
        dtype: torch.dtype,
        r: int,
    ):
        self.matrices, self.elementwise, self.layouts = (
            list(matrices),
            list(elementwise),
            list(layouts),
        )
        self.operators: OperatorTables | None = None
        if any(matrix.periods for matrix in self.matrices):
            self.operators = OperatorTables(self.matrices, self.layouts)
        self.device, self.dtype, self.n_values = device, dtype, r
        self.r = r if self.operators is None else 2
        self.state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        nm, nv = len(self.matrices), len(self.elementwise)
        self.scalar_sizes = scalar_sizes(nm, nv, self.r)
        self.scalar_starts = tuple(sum(self.scalar_sizes[:i]) for i in range(len(SCALARS)))
        self.v_size = self.r * sum(x.cols for x in self.layouts)  # elements of v in the state
        self.s_size = self.r * sum(x.rows for x in self.layouts)  # of s
        # Of each elementwise parameter what it is pulled to, or None: see set_targets of a plan.
        self.targets: Targets = (None,) * nv
        self.counter = Counter()  # of changes of the tables, counted before they are made
        self._device_tables: DeviceTables | None = None
        self._operator_tables: DeviceTables | None = None
        self._build(sizes)

    def _tiles(self) -> list[list[tuple[int, int]]]:
        """Return (first row, last row + 1) of every tile of every matrix."""
        shapes = [(x.rows, x.cols) for x in self.layouts]
        steps = rows_of_tiles(shapes, self.device.type, self.r)
        return [
            [(start, min(start + step, m)) for start in (range(0, m, step) if n else ())]
            for (m, n), step in zip(shapes, steps, strict=True)
        ]

    def _partials(self, t_size: int, n_tiles: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return buffers for the tiles' parts of t and of s s^T."""
        t = torch.empty(t_size, dtype=self.state_dtype, device=self.device)
        n_products = self.r * self.r * n_tiles
        return t, torch.empty(n_products, dtype=wide_dtype(self.device), device=self.device)

    def _build(self, sizes: Sequence[int]) -> None:
        table = np.zeros(len(self.matrices), MATRIX)
        tiles: list[tuple[int, int, int, int]] = []
        chunks: list[tuple[int, int]] = []
        cols, every = [x.cols for x in self.layouts], self._tiles()
        self.widths = tuple(set(cols))  # distinct row lengths, in elements
        v_starts = _starts([self.r * n for n in cols], cols)
        t_sizes = [self.r * n * len(own) for n, own in zip(cols, every, strict=True)]
        t_starts, s_offset = _starts(t_sizes, cols), 0
        for i, (x, own) in enumerate(zip(self.layouts, every, strict=True)):
            table[i] = (
                0, 0, DTYPES[self.dtype], x.rows, x.outer, x.inner, *x.strides, *x.strides,
                v_starts[i], s_offset, len(tiles), len(own), self._reach(i),
            )  # fmt: skip
            for j, (begin, end) in enumerate(own):
                tiles.append((i, begin, end, t_starts[i] + j * self.r * x.cols))
            s_offset += self.r * x.rows
            if self.r == 1:  # a matrix without columns has one chunk too
                chunks += [(i, begin) for begin in range(0, max(x.cols, 1), CHUNK_COLUMNS)]
        elementwise_table = np.zeros(len(self.elementwise), ELEMENTWISE)
        for i, (entry, size) in enumerate(zip(self.elementwise, sizes, strict=True)):
            kind = KINDS[entry.kind]
            elementwise_table[i] = (0, 0, DTYPES[self.dtype], size, kind, entry.length, 0)
        self.table, self.elementwise_table = table, elementwise_table
        self.tiles, self.chunks = np.array(tiles, TILE), np.array(chunks, CHUNK)
        self.t_partial, self.gram_partial = self._partials(sum(t_sizes), len(tiles))
        # For the GPU programs that finish a matrix together; the last one resets arrivals.
        self.chunk_squares = torch.empty(
            len(chunks), dtype=wide_dtype(self.device), device=self.device
        )
        self.arrivals = torch.zeros(len(table), dtype=torch.int32, device=self.device)
        self.n_elements = sum(x.rows * x.cols for x in self.layouts)
        in_rows = elementwise_table["kind"] == KINDS["rows"]
        n_in_rows = int(elementwise_table["size"][in_rows].sum())
        self.header = np.zeros(len(HEADER), np.int64)
        fields = {
            "weight_dtype": DTYPES[self.dtype],
            "matrices": address(table), "n_matrices": len(table),
            "tiles": address(self.tiles), "n_tiles": len(self.tiles),
            "elementwise": address(elementwise_table), "n_elementwise": len(elementwise_table),
            "t_partial": self.t_partial.data_ptr(), "gram_partial": self.gram_partial.data_ptr(),
            "scratch_size": max((x.cols for x in self.layouts), default=0),
            "n_bytes": (self.n_elements + n_in_rows) * self.dtype.itemsize, "r": self.r,
            "chunks": address(self.chunks), "n_chunks": len(chunks),
            "chunk_squares": self.chunk_squares.data_ptr(), "arrivals": self.arrivals.data_ptr(),
        }  # fmt: skip
        if (own := self.operators) is not None:
            fields |= {"operators": address(own.operators), "taps": address(own.taps),
                       "most_taps": own.most_taps}  # fmt: skip
        for name, value in fields.items():
            self.header[SLOT[name]] = value

    def _reach(self, i: int) -> int:
        """Return by how much more than a step of a matrix one of matrix ``i`` changes its sigma."""
        if self.operators is None:
            return 1
        own = self.operators.operators[i]
        return int(own["count_0"] * own["count_1"] * own["count_2"])

    def device_tables(self) -> DeviceTables:
        """Return up-to-date device tables: matrices, tiles, elementwise, chunks."""
        if self._device_tables is None:
            tables = self.table, self.tiles, self.elementwise_table, self.chunks
            what = "an address of a weight or a gradient"
            self._device_tables = DeviceTables(tables, self.device, what)
        self._device_tables.refresh(self.counter.value)
        return self._device_tables

    def operator_tables(self) -> DeviceTables:
        """Return device tables of operators: these and taps, which do not change."""
        if self._operator_tables is None:
            own = self.operators.operators, self.operators.taps
            self._operator_tables = DeviceTables(own, self.device, "a kernel")
        self._operator_tables.refresh(0)
        return self._operator_tables


class Plan(Tables):
    """Tables of a fixed set of matrices and elementwise parameters that share a device and a dtype.

    The addresses in the tables are compared with the tensors at every use. Tiles depend on shapes
    and device type alone, so that results do not depend on the number of threads.

    Args:
        matrices: the matrices, in order.
        elementwise: the elementwise parameters, in order.
        tensors: the parameter of each distinct ref, in the order in which ``matrices`` and then
            ``elementwise`` first name them; all on one device and of one dtype.
        r: singular vectors per matrix, one of N_VECTORS.

    Raises:
        ValueError: a parameter that cannot be used in place.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        elementwise: Sequence[Elementwise],
        tensors: Sequence[torch.Tensor],
        r: int = 1,
    ):
        self.refs = refs_of(matrices, elementwise)
        by_ref = {ref: i for i, ref in enumerate(self.refs)}
        self.matrix_ref = np.array([by_ref[x.ref] for x in matrices], dtype=np.int64)
        self.elementwise_ref = np.array([by_ref[x.ref] for x in elementwise], dtype=np.int64)
        self.tensors = list(tensors)
        layouts = [layout_of(m, tensors[by_ref[m.ref]]) for m in matrices]
        sizes = [tensors[by_ref[v.ref]].numel() for v in elementwise]
        super().__init__(
            matrices, elementwise, layouts, sizes, tensors[0].device, tensors[0].dtype, r
        )
        self.offsets = np.array([x.offset for x in self.layouts], dtype=np.int64)
        self._strides = np.array([x.strides for x in self.layouts], dtype=np.int64).reshape(-1, 2)
        self.weights_seen: Memory | None = None
        self.grads_seen: Memory | None = None
        self.grad_dtypes: list[torch.dtype] = []  # distinct dtypes of the bound gradients
        none = np.zeros(len(self.elementwise), np.int64)
        offsets = self.offsets * self.dtype.itemsize
        self._weight_columns = (
            Column(self.table, "weight", self.matrix_ref, offsets),
            Column(self.elementwise_table, "weight", self.elementwise_ref, none),
        )
        self._elementwise_grads = Column(self.elementwise_table, "grad", self.elementwise_ref, none)
        # Of gradients laid out like their weights.
        self._usual_grads = Column(self.table, "grad", self.matrix_ref, offsets)
        self._matrix_grads = self._usual_grads
        self.bind_weights(tensors)
        self.set_targets([1.0 if x.kind == "rows" and x.target is None else x.target
                          for x in elementwise])  # fmt: skip

    def n_targets(self, i: int) -> int:
        """Return how many targets elementwise parameter ``i`` has."""
        return self.elementwise[i].n_targets(int(self.elementwise_table["size"][i]))

    def set_targets(self, values: Sequence[float | torch.Tensor | None]) -> None:
        """Replace what the elementwise parameters are pulled to.

        The numbers are in a new buffer: states that were copied before keep their own.

        Args:
            values: for each of them the norm of a shift, the absolute values of the elements of a
                gain, or the norms of rows: one number for all, or a tensor with one each. None, not
                for rows: 0 for a shift, 1 for a gain.
        """
        sizes = [0 if x is None else self.n_targets(i) for i, x in enumerate(values)]
        with torch.inference_mode(False):  # the buffer outlives it
            buffer = torch.empty(sum(sizes), dtype=self.state_dtype, device=self.device)
            parts = buffer.split(sizes)
            for part, value in zip(parts, values, strict=True):
                if isinstance(value, torch.Tensor):
                    part.copy_(value.reshape(-1))
                elif value is not None:
                    part.fill_(value)
        self._use_targets(tuple(
            None if value is None else part for part, value in zip(parts, values, strict=True)
        ))  # fmt: skip

    def _use_targets(self, targets: Targets) -> None:
        self.targets = targets
        found = [0 if x is None else x.data_ptr() for x in targets]
        if found != self.elementwise_table["targets"].tolist():
            self.counter.count()
            self.elementwise_table["targets"] = found

    @contextmanager
    def pulled_to(self, targets: Targets) -> Iterator[None]:
        """Let kernels use ``targets``, those of a copied state, until the end of the context."""
        before = self.targets
        if targets is not before:
            self._use_targets(targets)
        try:
            yield
        finally:
            if targets is not before:
                self._use_targets(before)

    def bind_weights(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Point the tables at ``tensors`` (one per ref).

        Returns:
            False if device, dtype, shape or layout of a tensor differ from those the plan was made
            for; the plan is then unchanged and a new one is needed.

        Raises:
            ValueError: a parameter that cannot be used in place.
        """
        found = look(read=tensors)
        now, before = found.read, self.weights_seen
        if (before is None or now.layouts != before.layouts) and not self._fits(tensors):
            return False
        found.check(self.name)
        if now == before:
            self.tensors = tensors  # possibly other objects with the same memory
            return True
        self.weights_seen = None  # until all of it is written, should that be interrupted
        self.counter.count()
        for column in self._weight_columns:
            column.write(now)
        self.tensors, self.weights_seen = list(tensors), now
        return True

    def name(self, i: int) -> str:
        """Return what tensor ``i`` is, for error messages."""
        return f"parameter {self.refs[i].name!r}"

    def _fits(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Return whether the tensors are of the kind that this plan was made for."""
        if any((t.device, t.dtype) != (self.device, self.dtype) for t in tensors):
            return False
        for entry, ref, size in zip(
            self.elementwise, self.elementwise_ref, self.elementwise_table["size"], strict=True
        ):
            if _order(entry, tensors[ref]) is None:
                found = f"strides {tensors[ref].stride()}"
                wanted = "a contiguous bias or norm parameter"
                if entry.kind == "rows":
                    found = f"shape {tuple(tensors[ref].shape)} and {found}"
                    wanted = f"contiguous rows of {entry.length} elements, one after the other"
                raise ValueError(f"parameter {entry.name!r}: expected {wanted}, got {found}")
            if tensors[ref].numel() != size:
                return False
        return all(
            layout_of(matrix, tensors[ref]) == layout
            for matrix, ref, layout in zip(
                self.matrices, self.matrix_ref, self.layouts, strict=True
            )
        )

    def bind_grads(self, grads: Sequence[torch.Tensor | None]) -> None:
        """Point the tables at the gradients (one per ref; None: the parameter is skipped).

        Raises:
            ValueError: a gradient that is sparse, on another device, of a dtype that does not fit
                the weight's, laid out differently from the weight, or without memory of its own.
        """
        try:
            found = look(written=grads)
        except RuntimeError:  # a gradient without plain memory, which has no address
            self._check_grads(grads)
            raise
        now, before = found.written, self.grads_seen
        is_new = before is None or now.layouts != before.layouts
        usual = self._check_layouts(grads, now) if is_new else None
        found.check(lambda i: f"the gradient of {self.name(i)}")
        if now == before:
            return
        self.grads_seen = None  # until all of it is written, should that be interrupted
        self.counter.count()
        if is_new:
            self._describe_grads(grads, usual)
        for column in self.grad_columns:
            column.write(now)
        self.grads_seen = now

    @property
    def grad_columns(self) -> tuple[Column, Column]:
        """The fields of the tables with the addresses of gradients, one per ref."""
        return self._matrix_grads, self._elementwise_grads

    def _check_layouts(self, grads: Sequence[torch.Tensor | None], now: Memory) -> bool:
        """Return whether ``grads`` are laid out like their weights; ValueError if unusable."""
        like = self.weights_seen
        if type(None) in set(map(type, grads)):
            present = [w if g is not None else None
                       for w, g in zip(self.tensors, grads, strict=True)]  # fmt: skip
            like = look(read=present).read
        usual = now.layouts == like.layouts
        if not usual:
            self._check_grads(grads)
        return usual

    def _describe_grads(self, grads: Sequence[torch.Tensor | None], usual: bool) -> None:
        """Write dtypes and strides of the gradients, ``usual`` ones being laid out like weights."""
        found = [self.dtype if g is None else g.dtype for g in grads]
        dtypes = np.array([DTYPES[dtype] for dtype in found], dtype=np.int64)
        sizes = np.array([dtype.itemsize for dtype in found], dtype=np.int64)
        offsets, strides = self.offsets.copy(), self._strides.copy()
        for i, ref in enumerate(() if usual else self.matrix_ref):
            grad = grads[ref]
            if grad is not None and not same_strides(grad, self.tensors[ref]):
                layout = self._grad_layout(i, grad)
                offsets[i], strides[i] = layout.offset, layout.strides
        self.table["grad_dtype"] = dtypes[self.matrix_ref]
        self.table["grad_row_stride"], self.table["grad_outer_stride"] = strides.T
        self.elementwise_table["grad_dtype"] = dtypes[self.elementwise_ref]
        self._matrix_grads = self._usual_grads
        if not usual:
            offsets *= sizes[self.matrix_ref]
            self._matrix_grads = Column(self.table, "grad", self.matrix_ref, offsets)
        self.grad_dtypes = list(dict.fromkeys(g.dtype for g in grads if g is not None))

    def _grad_layout(self, i: int, grad: torch.Tensor) -> Layout | None:
        """Return the layout of ``grad`` if its rows and columns fit matrix ``i``, else None."""
        try:
            own, found = self.layouts[i], layout_of(self.matrices[i], grad)
        except ValueError:
            return None
        if own.cols == 1 and found.rows == 1 and found.outer == 1:
            # A single column, strided in the weight and contiguous in the gradient.
            found = replace(own, offset=found.offset, row_stride=1)
        return found if own.fits(found) else None

    def _check_grads(self, grads: Sequence[torch.Tensor | None]) -> None:
        for ref, grad in enumerate(grads):
            problem = None if grad is None else self._grad_problem(ref, grad)
            if problem is not None:
                name = self.refs[ref].name
                raise ValueError(f"gradient of parameter {name!r}: {problem}")

    def _grad_problem(self, ref: int, grad: torch.Tensor) -> str | None:
        weight = self.tensors[ref]
        wide = self.dtype == torch.float64
        if grad.layout != torch.strided:
            return f"expected a dense one (Embedding(sparse=False)), got layout {grad.layout}"
        if grad.device != self.device:
            return f"expected device {self.device}, got {grad.device}"
        if grad.dtype not in DTYPES or (grad.dtype == torch.float64) != wide:
            wanted = "float64" if wide else "float32, bfloat16 or float16"
            return f"expected dtype {wanted} for a weight of {self.dtype}, got {grad.dtype}"
        if grad.shape != weight.shape:
            return f"expected shape {tuple(weight.shape)}, got {tuple(grad.shape)}"
        if not same_strides(grad, weight):
            owned = np.flatnonzero(self.matrix_ref == ref)
            same = all(self._grad_layout(i, grad) is not None for i in owned)
            same = same and all(
                _order(self.elementwise[i], grad) == _order(self.elementwise[i], weight)
                for i in np.flatnonzero(self.elementwise_ref == ref)
            )
            if not same:
                return (
                    f"expected strides {weight.stride()} like the weight's, got {grad.stride()} "
                    "(after zero_grad(set_to_none=True) autograd makes gradients like the weight)"
                )
        return None


def _order(entry: Elementwise, tensor: torch.Tensor) -> tuple[int, ...] | None:
    """Return the order of the elements in memory; None where the kernels cannot use it."""
    if entry.kind == "rows":
        return row_order(tensor, entry.length)
    return () if tensor.is_contiguous() else None

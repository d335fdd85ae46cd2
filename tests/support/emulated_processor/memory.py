"""What the tables of a call reach, copied to another process and back; see csrc/table.h."""

import bisect
import ctypes
import mmap
from pathlib import Path

import numpy as np

from spectral_kernels.tables import schema

ADDRESS, SIZE = 1 << 40, 1 << 28  # of the memory in the other process
APART = 64  # bytes between two spans, at least; addresses keep their remainder by it
BYTES = dict(zip(schema.DTYPES.values(), (x.itemsize for x in schema.DTYPES), strict=True))
BLANK = 0xFF  # of every byte between spans: a NaN of any type
# The addresses in a header that a CPU has no use for: the kernels find 0 there.
OF_A_GPU = ("chunks", "chunk_squares", "arrivals")


def at(address: int, dtype, n: int = 1) -> np.ndarray:
    """Return ``n`` elements of memory."""
    if n == 0:
        return np.zeros(0, dtype)
    size = int(n) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(int(address)), dtype)


class Reach:
    """The spans of memory that a call reaches, from the addresses of a header and an update.

    Attributes:
        h: the header, a row of HEADER.
        matrices: the rows of MATRIX.
        number: bytes of a number of the state.
        n_v: elements of v.
        n_gram: numbers in the sums of products, of all matrices.
        spans: the first byte of each, and the number of bytes.
        tables: the addresses of tables, which the kernels only read.
        pointers: the addresses of the numbers in tables that are addresses.
        unused: the addresses of those that the kernels of a CPU do not need.
    """

    def __init__(self, header: int, update: int = 0):
        self.spans: list[tuple[int, int]] = []
        self.tables: list[int] = []
        self.pointers: list[int] = []
        own = "matrices tiles elementwise operators taps"
        self.h = h = self._table(header, schema.HEADER, 1, own)[0]
        self.unused = [header + schema.HEADER.fields[name][1] for name in OF_A_GPU]
        self.number = max(BYTES[int(h["weight_dtype"])], 4)
        self._state(header)
        if update:
            self._update(update)

    def add(self, address: int, size: int) -> None:
        """Add a span, unless the address is 0."""
        if address and size:
            self.spans.append((int(address), int(size)))

    def _table(self, address: int, dtype: np.dtype, n: int, fields: str) -> np.ndarray:
        """Add ``n`` rows of a table, and its ``fields`` that are addresses; return a view of it."""
        address = int(address)
        self.add(address, n * dtype.itemsize)
        self.tables += [address] if n else []
        for i in range(n):
            self.pointers += [address + i * dtype.itemsize + dtype.fields[name][1]
                              for name in fields.split()]  # fmt: skip
        return at(address, dtype, n)

    def _field(self, table: int, dtype: np.dtype, name: str, size: int) -> None:
        """Add what a field of a single row points to."""
        self.pointers.append(table + dtype.fields[name][1])
        self.add(at(self.pointers[-1], np.int64)[0], size)

    def _state(self, header: int) -> None:
        """Add all that a header leads to."""
        h, r = self.h, int(self.h["r"])
        self.matrices = self._table(h["matrices"], schema.MATRIX, h["n_matrices"], "weight grad")
        tiles = self._table(h["tiles"], schema.TILE, h["n_tiles"], "")
        self.elementwise = self._table(
            h["elementwise"], schema.ELEMENTWISE, h["n_elementwise"], "weight grad targets"
        )
        own, n, n_others = self.matrices, len(self.matrices), len(self.elementwise)
        cols = own["outer"] * own["inner"]
        most = {
            "t_partial": (tiles["t_offset"] + r * cols[tiles["matrix"]]).max(initial=0),
            "v": (own["v_offset"] + r * cols).max(initial=0),
            "s": (own["s_offset"] + r * own["rows"]).max(initial=0),
            "sigmas": r * n, "residuals": r * n, "norm": n_others, "raw_penalty": n + n_others,
            "strength": n + n_others, "target": n, "scale": 1,
        }  # fmt: skip
        self.n_v, self.n_gram = int(most["v"]), n * r * r
        for name, size in (most | {"v_next": most["v"]}).items():
            self._field(header, schema.HEADER, name, size * self.number)
        self._field(header, schema.HEADER, "gram_partial", 8 * len(tiles) * r * r)
        if h["operators"]:
            operators = self._table(h["operators"], schema.OPERATOR, n, "")
            n_taps = (operators["first_tap"] + operators["n_taps"]).max(initial=0)
            self._table(h["taps"], schema.TAP, n_taps, "")
        for matrix in own:
            self._matrix(matrix["weight"], matrix, BYTES[int(h["weight_dtype"])])
            self._matrix(matrix["grad"], matrix, BYTES[int(matrix["grad_dtype"])], "grad_")
        self._vectors(self.elementwise)

    def _matrix(self, address, matrix, size: int, prefix: str = "") -> None:
        """Add the elements of a matrix, and what lies between them."""
        counts = [int(matrix[name]) for name in ("rows", "outer", "inner")]
        strides = *(int(matrix[f"{prefix}{name}_stride"]) for name in ("row", "outer")), 1
        if all(counts):
            last = sum((n - 1) * stride for n, stride in zip(counts, strides, strict=True))
            self.add(address, (last + 1) * size)

    def _vectors(self, table: np.ndarray) -> None:
        """Add weights, gradients and targets of elementwise parameters."""
        for x in table:
            size, kind = int(x["size"]), int(x["kind"])
            self.add(x["weight"], size * BYTES[int(self.h["weight_dtype"])])
            self.add(x["grad"], size * BYTES[int(x["grad_dtype"])])
            targets = {schema.KINDS["shift"]: 1, schema.KINDS["gain"]: size}
            n = targets[kind] if kind in targets else size // max(int(x["length"]), 1)
            self.add(x["targets"], n * self.number)

    def _update(self, update: int) -> None:
        """Add all that an update leads to."""
        own = "matrix_moments elementwise_moments others other_moments groups"
        u = self._table(update, schema.UPDATE, 1, own)[0]
        others = self._table(u["others"], schema.ELEMENTWISE, u["n_others"], "weight grad targets")
        self._vectors(others)
        size, moments = BYTES[int(u["moment_dtype"])], []
        for name, table in (("matrix", self.matrices), ("elementwise", self.elementwise),
                            ("other", others)):  # fmt: skip
            where = u[f"{name}_moments"] if len(table) else 0
            own = self._table(where, schema.MOMENT, len(table) if where else 0, "first second")
            for entry, moment in zip(table, own, strict=False):
                for field in ("first", "second"):
                    if name == "matrix":
                        self._matrix(moment[field], entry, size)
                    else:
                        self.add(moment[field], entry["size"] * size)
            moments += list(own)
        n_groups = 1 + max((int(x["group"]) for x in moments), default=-1)
        self._table(u["groups"], schema.GROUP, n_groups, "")
        n_steps = 1 + max((int(x["parameter"]) for x in moments), default=-1)
        for name, n in (("steps", n_steps), ("grad_scale", 1), ("found_inf", 1)):
            self._field(update, schema.UPDATE, name, 4 * n)


class Memory:
    """A file that another process maps at ADDRESS."""

    def __init__(self, path: Path):
        with open(path, "w+b") as file:
            file.truncate(SIZE)
            self._bytes = np.frombuffer(mmap.mmap(file.fileno(), SIZE), np.uint8)
        self._placed: list[tuple[int, int, int]] = []  # address here, size, place in the file
        self._sent = self._bytes[:0]

    def send(self, reach: Reach) -> None:
        """Copy spans into the file, their addresses changed to those of the other process."""
        self._placed, end = [], APART
        for begin, size in merged(reach.spans):
            place = end + (begin - end) % APART
            self._placed.append((begin, size, place))
            end = place + size + APART
        if end > SIZE:
            raise MemoryError(f"a call needs {end} bytes, more than {SIZE}")
        self._bytes[:end] = BLANK
        for begin, size, place in self._placed:
            self._bytes[place : place + size] = at(begin, np.uint8, size)
        for pointer in reach.pointers:
            number = self._number(pointer)
            number[0] = self.there(int(number[0]))
        for pointer in reach.unused:
            self._number(pointer)[0] = 0
        self._fixed = {self._index(table) for table in reach.tables}
        self._sent = self._bytes[:end].copy()

    def receive(self) -> None:
        """Copy back what is no table.

        Raises:
            AssertionError: a table, or memory between spans, has been written.
        """
        now, is_free = self._bytes[: len(self._sent)], np.ones(len(self._sent), bool)
        for i, (begin, size, place) in enumerate(self._placed):
            own = slice(place, place + size)
            is_free[own] = i in self._fixed
            if i not in self._fixed and (now[own] != self._sent[own]).any():
                ctypes.memmove(begin, self._bytes[own].ctypes.data, size)
        assert (now == self._sent)[is_free].all(), "the kernels wrote where they must not"

    def there(self, address: int) -> int:
        """Return what an address is in the other process; 0, and that of an empty span, are 0."""
        i = self._index(address)
        if i < 0:
            return 0
        begin, size, place = self._placed[i]
        return ADDRESS + place + address - begin if address < begin + size else 0

    def _index(self, address: int) -> int:
        return bisect.bisect_right(self._placed, address, key=lambda x: x[0]) - 1

    def _number(self, pointer: int) -> np.ndarray:
        start = self.there(pointer) - ADDRESS
        return self._bytes[start : start + 8].view(np.int64)


def merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the first byte and the size of spans that overlap or touch as one, in order."""
    found: list[tuple[int, int]] = []
    for begin, size in sorted(spans):
        if found and begin <= sum(found[-1]):
            found[-1] = found[-1][0], max(sum(found[-1]), begin + size) - found[-1][0]
        else:
            found.append((begin, size))
    return found

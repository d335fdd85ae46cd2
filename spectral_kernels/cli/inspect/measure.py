"""Measurements of the matrices of a checkpoint, one row per matrix."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ...engine import operators
from ...engine.lanczos import singular_values
from ...selection.arguments import check_patterns
from ...selection.matrices import Matrix, NothingSelected
from ...selection.options import Convolutions
from ...selection.rules import FLOAT_DTYPES, select
from ...tables.layout import layout_of
from .checkpoint import Checkpoint, Entry, natural

RTOL = 1e-4
_READABLE = {str(d).removeprefix("torch."): d for d in FLOAT_DTYPES}
_PIECE = 1 << 18  # elements converted to float64 at a time
# Up to so many elements a full SVD takes less time than the tables of an iteration.
_SMALL = 1 << 14


@dataclass(frozen=True)
class MatrixRow:
    """One matrix [rows, cols] of a checkpoint; nan where an element is not finite."""

    name: str
    kind: str
    """The name with the numbers of layers replaced by ``*``."""
    shape: tuple[int, ...]
    """Of the tensor, or of the part of it that is this matrix."""
    rows: int
    cols: int
    dtype: str
    sigma: float
    norm: float
    """||W||_F."""
    operator: float | None = None
    """Norm of the convolution with stride 1 and one group; None: not asked for, or no kernel."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.rows * self.cols

    @property
    def stable_rank(self) -> float:
        """||W||_F^2 / sigma^2; 0 for a matrix of zeros."""
        return 0.0 if self.sigma == 0 else (self.norm / self.sigma) ** 2

    @property
    def usual(self) -> float:
        """sigma_1 of such a matrix as torch initializes nn.Linear and convolutions.

        Elements have the variance 1 / (3 cols), so that sigma_1 is near (sqrt(rows) + sqrt(cols)) /
        sqrt(3 cols) (Bai and Yin, Ann. Probab. 21, 1993).
        """
        spread = math.sqrt(self.rows) + math.sqrt(self.cols)
        return spread / math.sqrt(3 * self.cols) if self.cols else 0.0

    @property
    def ratio(self) -> float:
        """Sigma over its usual value at initialization."""
        return self.sigma / self.usual if self.usual else 0.0


@dataclass
class Measured:
    """The measured matrices of a checkpoint, in the order of its layers."""

    path: Path
    rows: list[MatrixRow] = field(default_factory=list)
    skipped: list[tuple[Entry, str]] = field(default_factory=list)
    """Tensors with two or more dimensions that were not measured, and why."""
    of_optimizer: int = 0
    """How many tensors of an optimizer's state were left out."""


@dataclass(frozen=True)
class Patterns:
    """Which tensors are measured and how they are viewed, as for :class:`SpectralRegularizer`."""

    include: Sequence[str] | None = None
    exclude: Sequence[str] = ()
    splits: Mapping[str, int | Sequence[int]] = field(default_factory=dict)
    stacked: Sequence[str] = ()
    convolutions: Convolutions = "flattened"

    def check(self, names: Sequence[str]) -> None:
        """Raise ValueError for a pattern that matches none of the names."""
        for argument in ("include", "exclude", "splits", "stacked"):
            check_patterns(argument, getattr(self, argument) or (), names)

    def of(self, names: Sequence[str]) -> dict:
        """Return the arguments of ``select`` for one checkpoint: the patterns that match there."""
        include = ["*"] if self.include is None else self.include
        here = {p for p in (*include, *self.exclude, *self.splits, *self.stacked)
                if fnmatch.filter(names, p)}  # fmt: skip
        return {
            "include": [p for p in include if p in here],
            "exclude": [p for p in self.exclude if p in here],
            "splits": {p: n for p, n in self.splits.items() if p in here},
            "stacked": [p for p in self.stacked if p in here],
            "convolutions": self.convolutions,
        }


@dataclass(frozen=True)
class Plan:
    """What will be measured of a checkpoint."""

    checkpoint: Checkpoint
    matrices: Mapping[str, tuple[Entry, Sequence[Matrix]]]
    """Name of a tensor -> the tensor and its matrices, in the order of the layers."""
    skipped: Sequence[tuple[Entry, str]]
    of_optimizer: int

    @property
    def elements(self) -> int:
        """Number of elements that will be read."""
        return sum(math.prod(entry.shape) for entry, _ in self.matrices.values())


def planned(checkpoint: Checkpoint, patterns: Patterns) -> Plan:
    """Choose the matrices by the rules of ``select``, from shapes alone.

    Args:
        checkpoint: its tensors with two or more dimensions are matrices (dim 0, rest).
        patterns: which of them are measured, and how they are divided.

    Raises:
        ValueError: a split or a stack that does not fit a tensor.
    """
    entries = [e for e in checkpoint.entries if patterns.include or not e.in_optimizer]
    of_optimizer = len(checkpoint.entries) - len(entries)
    by_name = {entry.name: entry for entry in entries if len(entry.shape) >= 2}
    reasons: dict[str, str] = {}
    metas = []
    for entry in by_name.values():
        dtype, shape = _READABLE.get(entry.dtype), entry.shape
        if entry.unusable is not None or dtype is None:
            reasons[entry.name] = entry.unusable or f"dtype {entry.dtype}"
            dtype, shape = torch.bool, (0,) * len(shape)
        metas.append((entry.name, torch.empty(shape, dtype=dtype, device="meta")))
    matrices: dict[str, tuple[Entry, list[Matrix]]] = {}
    arguments = patterns.of(list(by_name))
    try:
        selection = select(metas, biases=False, norms=False, trainable_only=False, **arguments)
        skipped = selection.skipped
        for matrix in selection.matrices:
            name = matrix.ref.name
            matrices.setdefault(name, (by_name[name], []))[1].append(matrix)
    except NothingSelected as nothing:
        skipped = nothing.skipped
    shown = [
        (by_name[name], reasons.get(name, why)) for name, why in skipped
        if why != "not in include" and not why.startswith("exclude ")
    ]  # fmt: skip
    return Plan(checkpoint, matrices, shown, of_optimizer)


def measure(
    plan: Plan,
    step: Callable[[str, int], None] = lambda name, elements: None,
    backend: str = "auto",
) -> Measured:
    """Measure every matrix of a plan, one tensor in memory at a time.

    Args:
        plan: of a checkpoint.
        step: called with a tensor's name and 0 before it is read, its number of elements after.
        backend: as for SpectralRegularizer.

    Raises:
        CheckpointError: a tensor that cannot be read.
    """
    found = Measured(plan.checkpoint.path, [], list(plan.skipped), plan.of_optimizer)
    rows: dict[str, MatrixRow] = {}
    for entry, matrices in sorted(plan.matrices.values(), key=lambda pair: str(pair[0].file)):
        step(entry.name, 0)
        try:
            for row in _rows(plan.checkpoint, entry, matrices, backend):
                rows[row.name] = row
        except RuntimeError as error:  # no convergence
            found.skipped.append((entry, str(error)))
        step(entry.name, math.prod(entry.shape))
    for _, matrices in plan.matrices.values():
        found.rows += [rows[m.name] for m in matrices if m.name in rows]
    return found


def _rows(
    checkpoint: Checkpoint, entry: Entry, matrices: Sequence[Matrix], backend: str
) -> list[MatrixRow]:
    """Read one tensor and measure its matrices."""
    tensor = checkpoint.read(entry)
    rows = []
    for matrix in matrices:
        operator = None
        if matrix.periods:
            operator = operators.norm(matrix, tensor, RTOL).sigma
            matrix = replace(matrix, periods=None, side=None)
        part = matrix.of(tensor)
        norm = _norm(part)
        if not math.isfinite(norm):
            sigma = norm = math.nan
        elif part.numel() <= _SMALL:
            whole = part.flatten(1).double()
            sigma = float(torch.linalg.svdvals(whole)[0]) if part.numel() else 0.0
        else:
            try:
                layout_of(matrix, tensor)
            except ValueError:  # neither rows nor columns are contiguous
                tensor = tensor.contiguous()
            (sigma,) = singular_values(matrix, tensor, RTOL, backend)
        named = kind(entry.name) + ("" if matrix.index is None else "[*]")
        label = re.search(r"\[\w+\]$", matrix.name) if matrix.part is not None else None
        rows.append(
            MatrixRow(
                matrix.name, named + (label[0] if label else ""), tuple(part.shape), *matrix.shape,
                entry.dtype, sigma, norm, operator,
            )
        )  # fmt: skip
    return rows


def _norm(part: torch.Tensor) -> float:
    """Return the Euclidean norm in float64, piece by piece."""
    if part.numel() <= _PIECE:
        return float(torch.linalg.vector_norm(part.double()))
    dim = max(range(part.dim()), key=part.shape.__getitem__)
    length = max(1, _PIECE * part.shape[dim] // part.numel())
    norms = [torch.linalg.vector_norm(p.double()) for p in part.split(length, dim)]
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def kind(name: str) -> str:
    """Return a tensor's name with the numbers of layers replaced by ``*``.

    ``h.11.mlp.c_fc.weight`` is ``h.*.mlp.c_fc.weight`` and ``layer1.0.conv2.weight`` is
    ``layer*.*.conv2.weight``: numbers inside the last two components are kept.
    """
    parts = name.rsplit(".", 2)
    above = [re.sub(r"\d+", "*", parts[0])] if len(parts) > 2 else []
    return ".".join(above + ["*" if p.isdecimal() else p for p in parts[-2:]])


_KEYS: dict[str, Callable[[MatrixRow], float]] = {
    "sigma": lambda row: row.sigma,
    "stable-rank": lambda row: row.stable_rank,
    "ratio": lambda row: row.ratio,
    "size": lambda row: row.size,
}
SORTS = (*_KEYS, "name", "change")


def ordered(
    rows: Sequence[tuple[MatrixRow, MatrixRow | None]], sort: str | None, top: int | None
) -> list[tuple[MatrixRow, MatrixRow | None]]:
    """Sort rows, largest first (nan before all others), and keep the ``top`` ones.

    Args:
        rows: each with that of another checkpoint, or None; sorted by the first one.
        sort: one of ``SORTS``, where "change" is the absolute change of sigma; None: keep the
            order, but sort by sigma if ``top`` is given.
        top: number of rows to keep; None: all.
    """
    sort = sort or ("sigma" if top is not None else None)
    found = list(rows)
    if sort == "name":
        found.sort(key=lambda pair: natural(pair[0].name))
    elif sort is not None:

        def descending(pair: tuple[MatrixRow, MatrixRow | None]) -> float:
            one, other = pair
            value = abs(change(one.sigma, other.sigma)) if sort == "change" else _KEYS[sort](one)
            return -math.inf if math.isnan(value) else -value

        found.sort(key=descending)
    return found[:top]


def change(before: float, after: float) -> float:
    """Return the change from ``before`` to ``after`` in percent; inf or 0 if ``before`` is zero."""
    if before == 0:
        return 0.0 if after == 0 else after * math.inf
    return 100 * (after / before - 1)

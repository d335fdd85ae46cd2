"""Measurements of the matrices of a checkpoint, one row per matrix."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ...diagnostics.checkpoints import Checkpoint, LazyTensor, Skipped
from ...engine import operators
from ...engine.lanczos import singular_values
from ...selection.arguments import check_patterns
from ...selection.matrices import Matrix, NothingSelected
from ...selection.options import Convolutions
from ...selection.rules import FLOAT_DTYPES, select
from ...tables.layout import layout_of
from .attention import AttentionLayer, find_attention, measure_attention
from .rows import MatrixRow, Measured, kind
from .spectrum import SpectrumOptions, full_spectrum

RTOL = 1e-4
_READABLE = {str(d).removeprefix("torch."): d for d in FLOAT_DTYPES}
_PIECE = 1 << 18  # elements converted to float64 at a time
# Up to so many elements a full SVD takes less time than the tables of an iteration.
_SMALL = 1 << 14


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
    matrices: Mapping[str, tuple[LazyTensor, Sequence[Matrix]]]
    """Name of a tensor -> the tensor and its matrices, in the order of the layers."""
    skipped: Sequence[Skipped]
    of_optimizer: int
    attention: Sequence[AttentionLayer]
    attention_left_out: Sequence[Skipped]
    spectra: SpectrumOptions | None = None
    """None: sigma_1 alone."""

    @property
    def elements(self) -> int:
        """Number of elements that will be read."""
        return sum(math.prod(entry.shape) for entry, _ in self.matrices.values()) + sum(
            layer.size for layer in self.attention
        )


def planned(
    checkpoint: Checkpoint,
    patterns: Patterns,
    spectra: SpectrumOptions | None = None,
    n_heads: int | None = None,
) -> Plan:
    """Choose the matrices by the rules of ``select``, from shapes alone.

    Args:
        checkpoint: its tensors with two or more dimensions are matrices (dim 0, rest).
        patterns: which of them are measured, and how they are divided.
        spectra: what is measured beside sigma_1.
        n_heads: of every layer of attention; None: as the checkpoint's config.json says.

    Raises:
        ValueError: a split or a stack that does not fit a tensor.
    """
    entries = [e for e in checkpoint.tensors if patterns.include or not e.in_optimizer]
    of_optimizer = len(checkpoint.tensors) - len(entries)
    by_name = {entry.name: entry for entry in entries if len(entry.shape) >= 2}
    reasons: dict[str, str] = {}
    metas = []
    for entry in by_name.values():
        dtype, shape = _READABLE.get(entry.dtype), entry.shape
        if entry.unusable is not None or dtype is None:
            reasons[entry.name] = entry.unusable or f"dtype {entry.dtype}"
            dtype, shape = torch.bool, (0,) * len(shape)
        metas.append((entry.name, torch.empty(shape, dtype=dtype, device="meta")))
    matrices: dict[str, tuple[LazyTensor, list[Matrix]]] = {}
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
        _skipped(by_name[name], reasons.get(name, why)) for name, why in skipped
        if why != "not in include" and not why.startswith("exclude ")
    ]  # fmt: skip
    shown += checkpoint.skipped
    layers, left_out = find_attention(
        [entry for entry, _ in matrices.values()], [e.name for e in checkpoint.tensors],
        checkpoint.config, n_heads,
    )  # fmt: skip
    return Plan(checkpoint, matrices, shown, of_optimizer, layers, left_out, spectra)


def _skipped(entry: LazyTensor, why: str) -> Skipped:
    return Skipped(entry.name, why, entry.shape, entry.dtype)


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
            for row in _rows(entry, matrices, backend, plan.spectra):
                rows[row.name] = row
        except RuntimeError as error:  # no convergence
            found.skipped.append(_skipped(entry, str(error)))
        step(entry.name, math.prod(entry.shape))
    for _, matrices in plan.matrices.values():
        found.rows += [rows[m.name] for m in matrices if m.name in rows]
    found.attention = measure_attention(plan.attention, step)
    found.attention_left_out = list(plan.attention_left_out)
    return found


def _rows(
    entry: LazyTensor, matrices: Sequence[Matrix], backend: str, spectra: SpectrumOptions | None
) -> list[MatrixRow]:
    """Read one tensor and measure its matrices."""
    tensor = entry.read()
    rows = []
    for matrix in matrices:
        operator = None
        if matrix.periods:
            operator = operators.norm(matrix, tensor, RTOL).sigma
            matrix = replace(matrix, periods=None, side=None)
        part = matrix.of(tensor)
        norm = _norm(part)
        n_values = min(spectra.n_values if spectra else 1, *matrix.shape)
        values, spectrum = (), None
        if not math.isfinite(norm):
            values, norm = (math.nan,) * n_values, math.nan
        elif spectra is not None and spectra.is_full(*matrix.shape):
            values, spectrum = full_spectrum(part.flatten(1), n_values)
        elif part.numel() <= _SMALL:
            whole = part.flatten(1).double()
            values = torch.linalg.svdvals(whole)[:n_values].tolist() if part.numel() else ()
        else:
            try:
                layout_of(matrix, tensor)
            except ValueError:  # neither rows nor columns are contiguous
                tensor = tensor.contiguous()
            r = spectra.n_vectors if spectra else 1
            values = singular_values(matrix, tensor, RTOL, backend, r)[:n_values]
        named = kind(entry.name) + ("" if matrix.index is None else "[*]")
        label = re.search(r"\[\w+\]$", matrix.name) if matrix.part is not None else None
        rows.append(
            MatrixRow(
                matrix.name, named + (label[0] if label else ""), tuple(part.shape), *matrix.shape,
                entry.dtype, values[0] if len(values) else 0.0, norm, operator, entry.made_by,
                tuple(values) if spectra else (), spectrum,
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

"""Measurements of the matrices of a checkpoint, one row per matrix."""

from __future__ import annotations

import fnmatch
import glob
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ...diagnostics.checkpoints import Checkpoint, LazyTensor, Skipped
from ...diagnostics.low_rank import product_singular_values
from ...engine import operators
from ...selection.arguments import check_patterns, match_any
from ...selection.matrices import Matrix, NothingSelected
from ...selection.options import Convolutions
from ...selection.rules import FLOAT_DTYPES, select
from .attention import AttentionLayer, find_attention, measure_attention
from .check import chosen
from .finite import has_kernel, not_finite
from .fused import Recognizer, by_hand, divided
from .parallel import for_each
from .rows import MatrixRow, Measured, kind
from .spectrum import SpectrumOptions, summarized
from .stacks import expert_of
from .values import RTOL, measured_values

READABLE = {str(d).removeprefix("torch."): d for d in FLOAT_DTYPES}


@dataclass(frozen=True)
class Patterns:
    """Which tensors are measured and how they are viewed, as for :class:`SpectralRegularizer`."""

    include: Sequence[str] | None = None
    exclude: Sequence[str] = ()
    splits: Mapping[str, int | Sequence[int]] = field(default_factory=dict)
    stacked: Sequence[str] = ()
    convolutions: Convolutions = "flattened"
    dims: Mapping[str, int] = field(default_factory=dict)
    """Pattern of ``splits`` -> dimension, if not that of the outputs."""
    recognize: bool = True
    """Whether weights that are known to hold several matrices are divided; patterns go first."""

    def check(self, names: Sequence[str]) -> None:
        """Raise ValueError for a pattern that matches none of the names."""
        for argument in ("include", "exclude", "splits", "stacked"):
            check_patterns(argument, getattr(self, argument) or (), names)

    def of(self, names: Sequence[str]) -> dict:
        """Return the arguments of ``select`` for one checkpoint: the patterns that match there."""
        include = ["*"] if self.include is None else self.include
        here = {p for p in (*include, *self.exclude, *self.stacked)
                if fnmatch.filter(names, p)}  # fmt: skip
        return {
            "include": [p for p in include if p in here],
            "exclude": [p for p in self.exclude if p in here],
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
    others: Sequence[LazyTensor]
    """What holds no matrix, such as biases; it is only looked through for values not finite."""
    whole: Sequence[Skipped]
    """Weights that hold several matrices, but are measured as one, and why."""
    attention: Sequence[AttentionLayer]
    attention_left_out: Sequence[Skipped]
    spectra: SpectrumOptions | None = None
    """None: sigma_1 alone."""

    @property
    def work(self) -> int:
        """What measuring costs, in elements of which sigma_1 alone is measured."""
        pairs = [*self.matrices.values(), *((entry, ()) for entry in self.others)]
        return sum(self.work_of(entry, matrices) for entry, matrices in pairs) + sum(
            layer.size for layer in self.attention
        )

    def work_of(self, entry: LazyTensor, matrices: Sequence[Matrix]) -> int:
        """Return the part of ``work`` that is of one tensor."""
        if self.spectra is None or not matrices or entry.factors is not None:
            return math.prod(entry.shape)
        return round(sum(self.spectra.cost(*matrix.shape) for matrix in matrices))


def planned(
    checkpoint: Checkpoint,
    patterns: Patterns,
    config: Mapping[str, Any] | None = None,
    spectra: SpectrumOptions | None = None,
    n_heads: int | None = None,
) -> Plan:
    """Choose the matrices by the rules of ``select``, from shapes alone.

    Args:
        checkpoint: its tensors with two or more dimensions are matrices (dim 0, rest), but for
            those that ``fused`` knows better.
        patterns: which of them are measured, and how they are divided.
        config: of the model; None: the checkpoint's own.
        spectra: what is measured beside sigma_1.
        n_heads: of every layer of attention; None: as ``config`` says.

    Raises:
        ValueError: a split or a stack that does not fit a tensor.
    """
    entries = [e for e in checkpoint.tensors if patterns.include or not e.in_optimizer]
    of_optimizer = len(checkpoint.tensors) - len(entries)
    shapes = {entry.name: entry.shape for entry in entries}
    recognizer = Recognizer(shapes, checkpoint.config if config is None else config)
    by_name = {e.name: e for e in entries if len(e.shape) >= 2
               and not (patterns.recognize and recognizer.is_bias(e.name))}  # fmt: skip
    reasons: dict[str, str] = {}
    metas = []
    for entry in by_name.values():
        dtype, shape = READABLE.get(entry.dtype), entry.shape
        if entry.unusable is not None or dtype is None:
            reasons[entry.name] = entry.unusable or f"dtype {entry.dtype}"
            dtype, shape = torch.bool, (0,) * len(shape)
        metas.append((entry.name, torch.empty(shape, dtype=dtype, device="meta")))
    matrices: dict[str, tuple[LazyTensor, list[Matrix]]] = {}
    arguments = patterns.of(list(by_name))
    if patterns.recognize:
        arguments["stacked"] += [glob.escape(n) for n in by_name if recognizer.is_stack(n)]
    try:
        selection = select(metas, biases=False, norms=False, trainable_only=False, **arguments)
        skipped = selection.skipped
        for matrix in selection.matrices:
            name = matrix.ref.name
            matrices.setdefault(name, (by_name[name], []))[1].append(matrix)
    except NothingSelected as nothing:
        skipped = nothing.skipped
    whole = _divide(matrices, patterns, recognizer)
    shown = [
        Skipped.of(by_name[name], reasons.get(name, why)) for name, why in skipped
        if why != "not in include" and not why.startswith("exclude ")
    ]  # fmt: skip
    shown += checkpoint.skipped
    others = [e for e in chosen(entries, patterns.include, patterns.exclude)
              if e.name not in matrices and e.unusable is None and has_kernel(e.dtype)]  # fmt: skip
    layers, left_out = find_attention(
        [entry for entry, _ in matrices.values()], [e.name for e in checkpoint.tensors],
        checkpoint.config if config is None else config, n_heads,
    )  # fmt: skip
    return Plan(checkpoint, matrices, shown, of_optimizer, others, whole, layers, left_out, spectra)


def _divide(
    matrices: dict[str, tuple[LazyTensor, list[Matrix]]],
    patterns: Patterns,
    recognizer: Recognizer,
) -> list[Skipped]:
    """Divide weights by hand or by what is known of them; return those that stay whole."""
    whole = []
    for name, (entry, found) in matrices.items():
        stored = recognizer.of(name) if patterns.recognize and entry.factors is None else None
        if (pattern := match_any([name], patterns.splits)) is not None:
            dim = patterns.dims.get(pattern, 0 if stored is None else stored.row_dim)
            shape = entry.shape if found[0].index is None else entry.shape[1:]
            stored = by_hand(name, shape, pattern, patterns.splits[pattern], dim)
        if stored is None:
            continue
        if stored.whole is not None:
            whole.append(Skipped.of(entry, stored.whole))
        matrices[name] = entry, [part for one in found for part in divided(one, stored)]
    return whole


def measure(
    plan: Plan,
    step: Callable[[str, int], None] = lambda name, elements: None,
    backend: str = "auto",
) -> Measured:
    """Measure every matrix of a plan; the tensors in memory are at most as large as the largest.

    Args:
        plan: of a checkpoint.
        step: called with a tensor's name and 0 before it is read, its part of ``plan.work`` after;
            by several threads.
        backend: as for SpectralRegularizer.

    Raises:
        CheckpointError: a tensor that cannot be read.
    """
    found = Measured(plan.checkpoint.path, [], list(plan.skipped), plan.of_optimizer)
    found.whole = plan.whole
    rows: dict[str, MatrixRow] = {}

    def measured(pair: tuple[LazyTensor, Sequence[Matrix]]) -> None:
        entry, matrices = pair
        step(entry.name, 0)
        has_finite_norms = bool(matrices)
        try:
            own = _rows(entry, matrices, backend, plan.spectra) if matrices else []
            rows.update((row.name, row) for row in own)
            has_finite_norms &= all(math.isfinite(row.norm) for row in own)
        except RuntimeError as error:  # no convergence
            found.skipped.append(Skipped.of(entry, str(error)))
        if not has_finite_norms and (bad := not_finite(entry.name, entry.read())) is not None:
            found.not_finite.append(bad)
        step(entry.name, plan.work_of(entry, matrices))

    nothing: Sequence[Matrix] = ()
    pairs = [*plan.matrices.values(), *((entry, nothing) for entry in plan.others)]
    pairs.sort(key=lambda pair: str(pair[0].file))
    most = max((math.prod(entry.shape) for entry, _ in pairs), default=0)
    for_each(measured, pairs, lambda pair: math.prod(pair[0].shape), most)
    order = {entry.name: i for i, entry in enumerate(plan.checkpoint.tensors)}
    found.not_finite.sort(key=lambda one: order[one.name])
    for _, matrices in plan.matrices.values():
        found.rows += [rows[m.name] for m in matrices if m.name in rows]
    found.attention = measure_attention(plan.attention, step, most)
    found.attention_left_out = list(plan.attention_left_out)
    return found


def _rows(
    entry: LazyTensor, matrices: Sequence[Matrix], backend: str, spectra: SpectrumOptions | None
) -> list[MatrixRow]:
    """Read one tensor and measure its matrices."""
    if entry.factors is not None and len(matrices) == 1 and _is_whole(matrices[0]):
        return [_product_row(entry, matrices[0], spectra)]
    tensor = entry.read()
    rows = []
    for matrix in matrices:
        operator = None
        if matrix.periods:
            operator = operators.norm(matrix, tensor, RTOL).sigma
            matrix = replace(matrix, periods=None, side=None)
        values, norm, spectrum = measured_values(matrix, tensor, backend, spectra)
        part = matrix.of(tensor)
        named = kind(entry.name) + ("" if matrix.index is None else "[*]")
        label = re.search(r"\[\w+\]$", matrix.name) if matrix.part is not None else None
        rows.append(
            MatrixRow(
                matrix.name, named + (label[0] if label else ""), tuple(part.shape), *matrix.shape,
                entry.dtype, values[0] if values else 0.0, norm, operator, entry.made_by,
                values if spectra else (), spectrum, expert=expert_of(entry.name, matrix),
            )
        )  # fmt: skip
    return rows


def _is_whole(matrix: Matrix) -> bool:
    return matrix.index is None and matrix.part is None and not matrix.periods


def _product_row(entry: LazyTensor, matrix: Matrix, spectra: SpectrumOptions | None) -> MatrixRow:
    """Measure a product by its factors, without forming it."""
    assert entry.factors is not None
    found = product_singular_values(*entry.factors())
    norm, sigma = float(found.norm()), float(found[0]) if len(found) else 0.0
    values, spectrum = (), None
    if spectra is not None:
        whole = torch.nn.functional.pad(found, (0, min(matrix.shape) - len(found)))
        values, spectrum = summarized(whole, matrix.shape, spectra.n_values)
    return MatrixRow(
        matrix.name, kind(entry.name), entry.shape, *matrix.shape, entry.dtype, sigma, norm,
        made_by=entry.made_by, values=values, spectrum=spectrum,
    )  # fmt: skip

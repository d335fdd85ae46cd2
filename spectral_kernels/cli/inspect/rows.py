"""The numbers of a checkpoint's matrices: a row for each, their order and their change."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...diagnostics.checkpoints import Skipped
from ...diagnostics.checkpoints.entries import natural
from .attention import AttentionRow
from .finite import NotFinite
from .spectrum import FullSpectrum


@dataclass(frozen=True)
class Added:
    """What a low-rank update, or fine-tuning, added to a matrix W; nan as in ``MatrixRow``."""

    base: str
    """Name of W in the base model."""
    base_sigma: float
    """sigma_1 of W."""
    sum_sigma: float
    """sigma_1 of W + update."""
    update_sigma: float
    """sigma_1 of the update."""
    relative: float
    """||update||_F / ||W||_F."""
    intruders: int | None
    """Number of intruder dimensions; None: not counted."""
    reason: str | None = None
    """Why they were not counted."""


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
    made_by: str | None = None
    """How the weight is made of stored tensors, see ``LazyTensor.made_by``; None: it is stored."""
    values: tuple[float, ...] = ()
    """The largest singular values, if they were asked for."""
    spectrum: FullSpectrum | None = None
    """None: not asked for, or the matrix is too large."""
    added: Added | None = None
    """What it adds to a base model, if one was given and has the weight."""
    expert: tuple[str, int] | None = None
    """The stack that the matrix belongs to, and its number there; None: it is none of several."""

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
    skipped: list[Skipped] = field(default_factory=list)
    """Tensors with two or more dimensions that were not measured, and why."""
    of_optimizer: int = 0
    """How many tensors of an optimizer's state were left out."""
    base: Path | None = None
    """The base model that the matrices are compared with."""
    unmatched: list[Skipped] = field(default_factory=list)
    """Matrices without a weight in the base model, and why."""
    not_finite: list[NotFinite] = field(default_factory=list)
    """All tensors with values that are not finite, in the order of the layers."""
    whole: Sequence[Skipped] = ()
    """Weights that hold several matrices, but were measured as one, and why."""
    attention: list[AttentionRow] = field(default_factory=list)
    attention_left_out: list[Skipped] = field(default_factory=list)
    """Layers of attention that were not measured, and why."""


def kind(name: str) -> str:
    """Return a tensor's name with the numbers of layers replaced by ``*``.

    ``h.11.mlp.c_fc.weight`` is ``h.*.mlp.c_fc.weight``, ``layers_3_mlp.kernel`` is
    ``layers_*_mlp.kernel`` and ``layer1.0.conv2.weight`` is ``layer*.*.conv2.weight``: a number
    that follows a letter is kept in the last two components.
    """
    parts = name.rsplit(".", 2)
    above = [re.sub(r"\d+", "*", parts[0])] if len(parts) > 2 else []
    # A number that stands alone has neither a letter nor a digit beside it.
    alone = r"(?<![^\W_])\d+(?![^\W_])"
    return ".".join(above + [re.sub(alone, "*", part) for part in parts[-2:]])


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

"""The matrices and elementwise parameters of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .arguments import expected
from .layers import GATES, RECURRENT, TRANSPOSED, is_hf_conv1d
from .parameters import ParameterRef

if TYPE_CHECKING:
    from .changes import Follower

# Reasons to skip a parameter.
FROZEN = "requires_grad is False"  # which may end
COMPUTED = "made by a parametrization; only penalty() regularizes it"


@dataclass(frozen=True)
class Matrix:
    """One matrix: the 2-D view (rows, everything else) of a parameter or of a part of it.

    ``index`` selects one matrix of a stack along dim 0; ``part = (start, length)`` a range of the
    output dimension ``row_dim`` (counted after ``index``), or of ``part_dim`` if that is given.
    ``whole`` is the shape of the parameter.
    A rank's shard is a matrix of the local tensor: ``side`` is then the required side of its layout
    (see ``tables.layout.Layout``), and ``absent`` the shape of a shard that is empty on this rank.
    ``periods`` are those of the taps of a convolution that is taken as an operator (see
    ``convolutions``); the dimensions of its kernel are then rows, channels and taps.
    """

    name: str
    ref: ParameterRef
    shape: tuple[int, int]
    view: str
    whole: tuple[int, ...]
    row_dim: int = 0
    index: int | None = None
    part: tuple[int, int] | None = None
    side: str | None = None
    absent: tuple[int, ...] | None = None
    part_dim: int | None = None
    periods: tuple[int, ...] | None = None

    def shape_now(self) -> tuple[int, int]:
        """Return the current (M, N); ``shape`` is that at selection.

        Of a sharded parameter, those of the whole; ranks need not call it together.
        """
        part = self.of(torch.empty(self.ref.get().shape, device="meta"))
        others = [n for d, n in enumerate(part.shape) if d != self.row_dim]
        return part.shape[self.row_dim], torch.Size(others).numel()

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the part of ``tensor`` that is this matrix, with rows in dim ``row_dim``."""
        if self.absent is not None:
            return tensor.new_empty(self.absent)
        if self.index is not None:
            tensor = tensor.select(0, self.index)
        if self.part is not None:
            dim = self.row_dim if self.part_dim is None else self.part_dim
            tensor = tensor.narrow(dim, *self.part)
        return tensor


@dataclass(frozen=True)
class Elementwise:
    """A parameter of which not a matrix, but elements or rows are regularized.

    ``kind`` is "shift" (a bias or a norm's shift, pulled to 0), "gain" (each element pulled to 1),
    or "rows": vectors of ``length`` elements, each one a matrix with one row, whose singular value
    is its norm. Rows are pulled to the target of matrices, or to ``target`` if that is given.
    """

    name: str
    ref: ParameterRef
    kind: str
    length: int = 1
    target: float | None = None
    view: str = ""
    whole: tuple[int, ...] | None = None  # shape of the parameter at selection

    def n_targets(self, size: int) -> int:
        """Return how many targets it has with ``size`` elements: 1, or one per element or row."""
        if self.kind == "shift":
            return 1
        return size // max(self.length, 1) if self.kind == "rows" else size


def refs_of(matrices: Sequence[Matrix], elementwise: Sequence[Elementwise]) -> list[ParameterRef]:
    """Return the distinct parameters, in the order in which matrices, then the rest name them."""
    return list(dict.fromkeys(x.ref for x in (*matrices, *elementwise)))


@dataclass
class Selection:
    """The regularized parameters, and (name, reason) of those that were skipped.

    ``aliases`` has all names of the tensors that have several, ``names`` those of all parameters.
    ``frozen`` are the skipped ones that only lack ``requires_grad``, ``zeros`` the gains that were
    zero at first. ``follower`` selects again when the model ``root`` has changed.
    """

    matrices: list[Matrix] = field(default_factory=list)
    elementwise: list[Elementwise] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    root: nn.Module | None = None
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    frozen: list[ParameterRef] = field(default_factory=list)
    zeros: list[ParameterRef] = field(default_factory=list)
    names: frozenset[str] = frozenset()
    follower: Follower | None = None

    def become(self, now: Selection) -> None:
        """Have the parameters of another selection of the same model."""
        for one in fields(self):
            if one.name not in ("root", "follower"):
                setattr(self, one.name, getattr(now, one.name))

    def names_of(self, name: str) -> tuple[str, ...]:
        """Return all names of the parameter ``name``, which may be tied."""
        return self.aliases.get(name, (name,))


class NothingSelected(ValueError):
    """Nothing was selected; ``skipped`` has (name, reason) of every parameter."""

    def __init__(self, skipped: list[tuple[str, str]]) -> None:
        shown = "; ".join(f"{n}: {why}" for n, why in skipped[:8]) or "no parameters"
        super().__init__(f"model: nothing to regularize was found ({shown})")
        self.skipped = skipped


def matrices_of(
    ref: ParameterRef,
    tensor: torch.Tensor,
    kind: str,
    splits: tuple[str, Any] | None,
    periods: tuple[int, ...] | None = None,
) -> list[Matrix]:
    """Return the matrices of a parameter.

    Args:
        ref: the parameter.
        tensor: its value; only the shape counts.
        kind: "matrix", "stack" or "groups", see ``layers.Role``.
        splits: the pattern that names it and its sizes, if there is one.
        periods: of a convolution that is taken as an operator, see ``Matrix``; () if that has the
            singular values of the matrix (dim 0, rest).
    """
    shape = whole = tuple(tensor.shape)
    view = []
    stack: Sequence[int | None] = (None,)
    if kind == "stack":
        stack, shape = range(shape[0]), shape[1:]
        view.append(f"stack of {len(stack)}")
    transposed = isinstance(ref.module, TRANSPOSED)
    row_dim = part_dim = 1 if transposed or is_hf_conv1d(ref) else 0
    if splits is not None:
        sizes = _split(ref, shape[row_dim], row_dim, *splits)
        labels: Sequence[str] = [str(i) for i in range(len(sizes))]
        view.append(f"split {'+'.join(map(str, sizes))}")
    elif kind == "groups":
        # The channels of a group follow each other in dim 0, of a transposed convolution too.
        part_dim, n_groups = 0, ref.module.groups
        sizes, labels = _equal(shape[0], n_groups), [str(i) for i in range(n_groups)]
        view.append(f"a matrix for each of {n_groups} groups")
    else:
        labels = _labels(ref)
        sizes = _equal(shape[row_dim], len(labels)) if labels else []
        if labels:
            view.append(f"split {'+'.join(map(str, sizes))}")
    parts: list[tuple[str, tuple[int, int] | None]] = [("", None)]
    if labels:
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        parts = [(label, (a, n)) for label, a, n in zip(labels, starts, sizes, strict=True)]
    else:  # without parts a matrix and its transpose are the same
        row_dim = part_dim = 1 if transposed else 0
    if periods is not None:
        row_dim = 0
    if periods:
        view.append("operator of a convolution" + _shown_periods(periods))
    elif len(shape) > 2 or transposed:
        view.append(f"flattened (dim {row_dim}, rest)")
    matrices = []
    for index in stack:
        for label, part in parts:
            size = list(shape)
            if part is not None:
                size[part_dim] = part[1]
            rows = size.pop(row_dim)
            name = ref.name + ("" if index is None else f"[{index}]") + (label and f"[{label}]")
            matrices.append(
                Matrix(
                    name, ref, (rows, math.prod(size)), ", ".join(view), whole, row_dim, index,
                    part, part_dim=part_dim if part is not None and part_dim != row_dim else None,
                    side="right" if periods else None, periods=periods or None,
                )
            )  # fmt: skip
    return matrices


def _shown_periods(periods: tuple[int, ...]) -> str:
    if set(periods) == {1}:
        return ""
    return f", {' x '.join(map(str, periods))} phases by its stride"


def elementwise_of(ref: ParameterRef, tensor: torch.Tensor, kind: str) -> Elementwise | None:
    """Return the elementwise parameter of a role, or None if the parameter has matrices.

    A convolution whose groups have one output each, or one input and one tap, has rows.
    """
    whole = tuple(tensor.shape)
    if kind in ("bias", "shift", "gain"):
        return Elementwise(ref.name, ref, "gain" if kind == "gain" else "shift", whole=whole)
    if kind == "biases":
        view = "a bias per row, pulled to 0"
        return Elementwise(ref.name, ref, "rows", math.prod(whole[1:]), 0.0, view, whole)
    if kind != "groups":
        return None
    size = [whole[0] // ref.module.groups, *whole[1:]]
    length = math.prod(size)
    rows = size[1 if isinstance(ref.module, TRANSPOSED) else 0]
    if rows not in (1, length):
        return None
    view = "a group per row, its norm pulled to the target"
    return Elementwise(ref.name, ref, "rows", length, None, view, whole)


def _equal(total: int, n: int) -> list[int]:
    return [total // n] * n


def _split(ref: ParameterRef, total: int, row_dim: int, pattern: str, wanted: Any) -> list[int]:
    """Return the sizes of the parts along the output dimension."""
    if isinstance(wanted, int) and not isinstance(wanted, bool):
        sizes = _equal(total, wanted) if wanted > 0 and total % wanted == 0 else []
    else:
        sizes = list(wanted) if isinstance(wanted, Sequence) else []
    if not all(isinstance(n, int) and n > 0 for n in sizes) or sum(sizes) != total or not sizes:
        accepted = (
            f"a number of equal parts or sizes that add up to the {total} outputs (dim {row_dim}) "
            f"of {ref.name!r}"
        )
        raise ValueError(expected(f"splits[{pattern!r}]", accepted, wanted))
    return sizes


def _labels(ref: ParameterRef) -> Sequence[str]:
    """Return the names of the equal parts of a fused weight that is known, () if it is none."""
    if isinstance(ref.module, nn.MultiheadAttention) and ref.attribute == "in_proj_weight":
        return "q", "k", "v"
    if isinstance(ref.module, RECURRENT) and ref.attribute.startswith(("weight_ih", "weight_hh")):
        return next((g for t, g in GATES.items() if isinstance(ref.module, t)), ())
    return ()

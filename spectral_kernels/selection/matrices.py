"""The matrices and elementwise parameters of a model, and their listing as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from .arguments import match_any
from .parameters import ParameterRef

if TYPE_CHECKING:
    from .changes import Follower

FROZEN = "requires_grad is False"  # a reason to skip a parameter, which may end
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_GATES = {
    nn.LSTM: ("i", "f", "g", "o"), nn.LSTMCell: ("i", "f", "g", "o"),
    nn.GRU: ("r", "z", "n"), nn.GRUCell: ("r", "z", "n"),
}  # fmt: skip
_RECURRENT = (nn.RNN, nn.RNNCell, *_GATES)


@dataclass(frozen=True)
class Matrix:
    """One matrix: the 2-D view (rows, everything else) of a parameter or of a part of it.

    ``index`` selects one matrix of a stack along dim 0; ``part = (start, length)`` a range of the
    output dimension ``row_dim`` (counted after ``index``). ``whole`` is the shape of the parameter.
    A rank's shard is a matrix of the local tensor: ``side`` is then the required side of its layout
    (see ``tables.layout.Layout``), and ``absent`` the shape of a shard that is empty on this rank.
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

    def shape_now(self) -> tuple[int, int]:
        """Return the current (M, N); ``shape`` is that at selection."""
        part = self.of(self.ref.get())
        others = [n for d, n in enumerate(part.shape) if d != self.row_dim]
        return part.shape[self.row_dim], torch.Size(others).numel()

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the part of ``tensor`` that is this matrix, with rows in dim ``row_dim``."""
        if self.absent is not None:
            return tensor.new_empty(self.absent)
        if self.index is not None:
            tensor = tensor.select(0, self.index)
        if self.part is not None:
            tensor = tensor.narrow(self.row_dim, *self.part)
        return tensor


@dataclass(frozen=True)
class Elementwise:
    """A bias or a norm's shift (``kind="shift"``), or a norm's gain (``kind="gain"``)."""

    name: str
    ref: ParameterRef
    kind: str


def refs_of(matrices: Sequence[Matrix], elementwise: Sequence[Elementwise]) -> list[ParameterRef]:
    """Return the distinct parameters, in the order in which matrices, then the rest name them."""
    return list(dict.fromkeys(x.ref for x in (*matrices, *elementwise)))


@dataclass
class Selection:
    """The regularized parameters, and (name, reason) of those that were skipped.

    ``frozen`` are the skipped ones that only lack ``requires_grad``, ``names`` those of all
    parameters. ``follower`` selects again when the model ``root`` has changed.
    """

    matrices: list[Matrix] = field(default_factory=list)
    elementwise: list[Elementwise] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    root: nn.Module | None = None
    frozen: list[ParameterRef] = field(default_factory=list)
    names: frozenset[str] = frozenset()
    follower: Follower | None = None


class NothingSelected(ValueError):
    """Nothing was selected; ``skipped`` has (name, reason) of every parameter."""

    def __init__(self, skipped: list[tuple[str, str]]) -> None:
        shown = "; ".join(f"{n}: {why}" for n, why in skipped[:8]) or "no parameters"
        super().__init__(f"nothing to regularize was found ({shown})")
        self.skipped = skipped


def matrices_of(
    ref: ParameterRef, aliases: Sequence[str], tensor: torch.Tensor, splits, stacked
) -> list[Matrix]:
    """Return the matrices of a parameter whose names are ``aliases``; see ``rules.select``."""
    shape = whole = tuple(tensor.shape)
    view = []
    stack: Sequence[int | None] = (None,)
    if (pattern := match_any(aliases, stacked)) is not None:
        if len(shape) < 3:
            raise ValueError(
                f"stacked: {pattern!r} matches {ref.name!r} of shape {shape}; accepted are "
                "stacks with at least three dimensions, (E, out, in)"
            )
        stack, shape = range(shape[0]), shape[1:]
        view.append(f"stack of {len(stack)}")
    transposed = isinstance(ref.module, TRANSPOSED)
    row_dim = 1 if transposed or _is_hf_conv1d(ref) else 0
    sizes, labels = _parts(ref, aliases, shape, row_dim, splits)
    if sizes is None:
        parts: list[tuple[str, tuple[int, int] | None]] = [("", None)]
        row_dim = 1 if transposed else 0
    else:
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        parts = [(label, (a, n)) for label, a, n in zip(labels, starts, sizes, strict=True)]
        view.append(f"split {'+'.join(map(str, sizes))}")
    if len(shape) > 2 or transposed:
        view.append(f"flattened (dim {row_dim}, rest)")
    matrices = []
    for index in stack:
        for label, part in parts:
            rows = shape[row_dim] if part is None else part[1]
            others = [n for d, n in enumerate(shape) if d != row_dim]
            cols = torch.Size(others).numel()
            name = ref.name + ("" if index is None else f"[{index}]") + (label and f"[{label}]")
            matrices.append(
                Matrix(name, ref, (rows, cols), ", ".join(view), whole, row_dim, index, part)
            )
    return matrices


def _parts(
    ref: ParameterRef, aliases: Sequence[str], shape, row_dim: int, splits
) -> tuple[list[int] | None, Sequence[str]]:
    """Return sizes and labels of the parts along the output dimension; (None, ()) if not split."""
    total = shape[row_dim]
    pattern = match_any(aliases, splits)
    if pattern is not None:
        wanted = splits[pattern]
        if isinstance(wanted, int) and not isinstance(wanted, bool):
            sizes = [total // wanted] * wanted if wanted > 0 and total % wanted == 0 else []
        else:
            sizes = list(wanted) if isinstance(wanted, Sequence) else []
        if not all(isinstance(n, int) and n > 0 for n in sizes) or sum(sizes) != total or not sizes:
            raise ValueError(
                f"splits: {pattern!r}: {wanted!r} does not divide the {total} outputs (dim "
                f"{row_dim}) of {ref.name!r}; accepted are a number of equal parts or sizes "
                f"that add up to {total}"
            )
        return sizes, [str(i) for i in range(len(sizes))]
    if isinstance(ref.module, nn.MultiheadAttention) and ref.attribute == "in_proj_weight":
        return [total // 3] * 3, ("q", "k", "v")
    if isinstance(ref.module, _RECURRENT) and ref.attribute.startswith(("weight_ih", "weight_hh")):
        gates = next((g for t, g in _GATES.items() if isinstance(ref.module, t)), None)
        if gates is not None:
            return [total // len(gates)] * len(gates), gates
    return None, ()


def _is_hf_conv1d(ref: ParameterRef) -> bool:
    """Return whether ``ref`` is a weight of transformers' Conv1D, which is stored (in, out)."""
    return type(ref.module).__name__ == "Conv1D" and hasattr(ref.module, "nf")


_PULLED = {"shift": "pulled to 0", "gain": "every element pulled to 1"}


def listing(selection: Selection) -> list[str]:
    """Return lines of text with every entry of a selection, and skipped names with reasons."""
    entries = [*selection.matrices, *selection.elementwise]
    width = max((len(entry.name) for entry in entries), default=0)
    lines = [f"{len(selection.matrices)} matrices"]
    for matrix in selection.matrices:
        shape = f"{matrix.shape[0]} x {matrix.shape[1]}"
        lines.append(f"  {matrix.name:{width}}  {shape:>13}  {matrix.view}".rstrip())
    if selection.elementwise:
        lines.append(f"{len(selection.elementwise)} elementwise parameters")
        lines += [f"  {v.name:{width}}  {_PULLED[v.kind]}" for v in selection.elementwise]
    if selection.skipped:
        lines.append(f"{len(selection.skipped)} skipped")
        lines += [f"  {name:{width}}  {why}" for name, why in selection.skipped]
    return lines

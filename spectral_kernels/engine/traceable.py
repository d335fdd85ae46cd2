"""What graphs of torch.compile read of a small bucket, whose penalty is traced as plain PyTorch.

What a graph is made from must be guarded, or another regularizer would use it: all that depends on
the selection and on memory layouts is in one string, ``Traceable.key``, so that there is one guard
for it. Numbers that may change are tensors, which a graph reads at every step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..tables.plan import Plan

# A bucket with more elements in its matrices stays with the operators, whose kernels then gain more
# than their calls cost (measured: at 2^19 elements plain PyTorch is the faster one, at 2^20 it is
# not); and so does one with more matrices and elementwise parameters, because compiling them takes
# seconds for each.
MOST_ELEMENTS, MOST_ENTRIES = 2**19, 16
FIRST_TARGET = 2  # where targets start in ``Traceable.options``


class MatrixView(NamedTuple):
    """How a matrix is viewed in parameter ``ref``, and where its vectors are.

    ``index`` and ``part`` (dimension, start, length) select it, see ``Matrix``; ``permutation``
    brings it to the order of its memory, [rows, cols].
    """

    ref: int
    index: int | None
    part: tuple[int, int, int] | None
    permutation: tuple[int, ...]
    rows: int
    cols: int
    v_offset: int
    s_offset: int


class ElementwiseView(NamedTuple):
    """Elementwise parameter ``ref``, and where its targets start in ``Traceable.options``."""

    ref: int
    kind: str
    n_targets: int
    targets: int


class Recipe(NamedTuple):
    """All of a bucket that a graph depends on; sizes are numbers of elements."""

    matrices: tuple[MatrixView, ...]
    elementwise: tuple[ElementwiseView, ...]
    v_size: int
    s_size: int
    scalar_sizes: tuple[int, ...]  # of the parts of a state's scalars
    warmup: int

    def kind(self, i: int) -> str:
        """Return what entry ``i`` is; matrices come first, then the elementwise parameters."""
        n = len(self.matrices)
        return "matrix" if i < n else self.elementwise[i - n].kind


_recipes: dict[str, Recipe] = {}


def recipe_of(key: str) -> Recipe:
    """Return the recipe of a ``Traceable.key``."""
    return _recipes[key]


class Traceable:
    """What a graph reads of a bucket beside its state.

    Attributes:
        key: stands for the recipe; equal for equal ones.
        n_entries: number of matrices and elementwise parameters.
        options: the exponent, 1 for a penalty of one side and else 0, the first target of each
            elementwise parameter, and all targets of all of them, 1-D float64; replaced, not
            written, as a graph may have saved it for its backward pass.
        ratios: residual / sigma of every matrix in the last step, [n_matrices] float64.
        unsettled: whether the next step is to call the operator ``settle``, 0-d.
    """

    def __init__(self, plan: Plan, ratios: torch.Tensor, warmup: int, exponent: float, above: bool):
        matrices, elementwise, start = [], [], FIRST_TARGET + len(plan.elementwise)
        for matrix, layout, ref, own in zip(
            plan.matrices, plan.layouts, plan.matrix_ref, plan.table, strict=True
        ):
            part = None
            if matrix.part is not None:
                dim = matrix.row_dim if matrix.part_dim is None else matrix.part_dim
                part = dim, *matrix.part
            matrices.append(MatrixView(
                int(ref), matrix.index, part, layout.permutation, layout.rows, layout.cols,
                int(own["v_offset"]), int(own["s_offset"]),
            ))  # fmt: skip
        for i, (entry, ref) in enumerate(zip(plan.elementwise, plan.elementwise_ref, strict=True)):
            n = plan.n_targets(i)
            elementwise.append(ElementwiseView(int(ref), entry.kind, n, start))
            start += n
        sizes = plan.v_size, plan.s_size, plan.scalar_sizes
        recipe = Recipe(tuple(matrices), tuple(elementwise), *sizes, warmup)
        self.key = repr(tuple(recipe))
        _recipes.setdefault(self.key, recipe)
        self.ratios, self.n_entries = ratios, len(matrices) + len(elementwise)
        with torch.inference_mode(False):
            self.unsettled = torch.ones((), dtype=torch.bool, device=plan.device)
        self.set_options(plan, exponent, above)

    @torch.inference_mode(False)
    def set_options(self, plan: Plan, exponent: float, above: bool) -> None:
        """Take over exponent, side and the targets of elementwise parameters of ``plan``."""
        numbers = [exponent, float(above)]
        first, targets = torch.tensor(numbers, dtype=torch.float64, device=plan.device), []
        for i, (entry, target) in enumerate(zip(plan.elementwise, plan.targets, strict=True)):
            if target is None:
                target = first.new_full((plan.n_targets(i),), float(entry.kind == "gain"))
            targets.append(target.double())
        self.options = torch.cat((first, *[target[:1] for target in targets], *targets))


def can_be_traced(plan: Plan) -> bool:
    """Return whether plain PyTorch does what the operators do for ``plan``, and as fast."""
    sizes = [layout.rows * layout.cols for layout in plan.layouts]
    return (
        plan.device.type == "cpu"
        and plan.r == 1  # nor operators
        and 0 < sum(sizes) <= MOST_ELEMENTS
        and len(plan.matrices) + len(plan.elementwise) <= MOST_ENTRIES
        and all(tensor.numel() for tensor in plan.tensors)
        and 0 not in sizes
    )

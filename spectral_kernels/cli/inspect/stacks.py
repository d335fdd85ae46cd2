"""Stacks of experts: which matrices belong together, and one line for all of them."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...selection.matrices import Matrix
from .rows import MatrixRow, change

# experts.3.up_proj.weight; Megatron and DeepSpeed have local_experts and deepspeed_experts.
_NUMBERED = re.compile(r"(?:^|\.)\w*experts\.(\d{1,9})(?=\.)")

Pair = tuple[MatrixRow, MatrixRow | None]


def expert_of(name: str, matrix: Matrix) -> tuple[str, int] | None:
    """Return the stack of a matrix and its number there, or None if it is no expert's.

    Args:
        name: of the tensor.
        matrix: of it; one with an index is of a stack.
    """
    label = matrix.name[len(name) :]
    if matrix.index is not None:
        label = label.removeprefix(f"[{matrix.index}]")
        return f"{name}[*]{label}", matrix.index
    numbers = list(_NUMBERED.finditer(name))
    if not numbers:
        return None
    found = numbers[-1]  # the innermost one
    return f"{name[: found.start(1)]}*{name[found.end(1) :]}{label}", int(found[1])


@dataclass(frozen=True)
class Stack:
    """The matrices of a stack, of which one is shown."""

    name: str
    count: int
    shown: Pair
    """That with the largest sigma_1, or the largest change of it; one with nan before all."""
    median: float
    """Of sigma_1 over the stack, or of its change in percent; nan where one is nan."""

    @property
    def number(self) -> int:
        """The number of the expert that is shown."""
        assert self.shown[0].expert is not None
        return self.shown[0].expert[1]


def summarized(pairs: Sequence[Pair]) -> Iterator[Pair | Stack]:
    """Yield pairs and stacks in the order of the first matrix of each.

    Args:
        pairs: rows, each with that of another checkpoint, or None.
    """
    stacks: dict[str, list[Pair]] = {}
    for pair in pairs:
        if pair[0].expert is not None:
            stacks.setdefault(pair[0].expert[0], []).append(pair)
    for pair in pairs:
        expert = pair[0].expert
        if expert is None:
            yield pair
        elif (members := stacks.pop(expert[0], None)) is not None:
            yield _stack(expert[0], members) if len(members) > 1 else members[0]


def _stack(name: str, members: Sequence[Pair]) -> Stack:
    values = [one.sigma if other is None else change(one.sigma, other.sigma)
              for one, other in members]  # fmt: skip
    sizes = [math.inf if math.isnan(value) else abs(value) for value in values]
    largest = sizes.index(max(sizes))
    median = math.nan if any(map(math.isnan, values)) else statistics.median(values)
    return Stack(name, len(members), members[largest], median)

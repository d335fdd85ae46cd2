"""Settings of the power iteration."""

from __future__ import annotations

from dataclasses import dataclass

from ..backends.base import Backend
from ..selection.arguments import check_count, check_word, expected
from ..selection.matrices import Selection
from ..tables.schema import CONSTRAINTS
from .bucket import MAX_EXTRA_ITERATIONS

SIDES = ("both", "above")  # of the target, on which sigma is pulled


@dataclass(frozen=True)
class Settings:
    """Settings of the power iteration.

    Attributes:
        backend: name of a backend, or a Backend.
        exponent: k.
        side: one of SIDES.
        warmup: iterations for vectors that start from random numbers.
        seed: of those random numbers; each matrix has its own stream, keyed by its name.
        n_vectors: singular vectors per matrix.
        iterations: per step.
        extra_iterations: at most, for stale matrices, after the iterations of each step.
        is_in_optimizer: whether an optimizer's step contains the one iteration.
    """

    backend: str | Backend = "auto"
    exponent: float = 2.0
    warmup: int = 10
    seed: int = 0
    n_vectors: int = 1
    iterations: int = 1
    extra_iterations: int = 0
    is_in_optimizer: bool = False
    side: str = "both"


def check_constraint(constraint, decoupled: bool) -> str | None:
    """Return a constraint of the decoupled form: None, "cap" or "sphere".

    Raises:
        TypeError: not a string.
        ValueError: another word; one with ``decoupled`` False.
    """
    check_word("constraint", constraint, tuple(CONSTRAINTS))
    if constraint is not None and not decoupled:
        raise ValueError(
            f"constraint: expected None with decoupled=False, got {constraint!r} (decoupled=True "
            "takes it)"
        )
    return constraint


def check_one_vector(selection: Selection, n_vectors: int) -> None:
    """Raise ValueError for several vectors per matrix where there are operators."""
    if n_vectors != 1 and any(matrix.periods for matrix in selection.matrices):
        raise ValueError(expected("n_vectors", "1 with convolutions='operator'", n_vectors))


def iterations_of(n_power_iterations, is_in_optimizer: bool = False) -> tuple[int, int]:
    """Return the numbers of iterations and of extra iterations of ``n_power_iterations``.

    Raises:
        TypeError: neither an integer nor "auto".
        ValueError: an integer below 1, or in an optimizer another than 1.
    """
    if isinstance(n_power_iterations, str) and n_power_iterations == "auto":
        return 1, MAX_EXTRA_ITERATIONS
    found = check_count("n_power_iterations", n_power_iterations, 1, words=("auto",))
    if is_in_optimizer and found != 1:
        raise ValueError(expected("n_power_iterations", "1 or 'auto' in an optimizer", found))
    return found, 0

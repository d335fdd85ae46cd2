"""Arguments that may be assigned after construction, of the regularizer and of the optimizers."""

from __future__ import annotations

from typing import Literal

from ..selection.arguments import check_choice, check_number, check_word
from ..tables.schema import N_VECTORS
from .coefficients import Strength, Target
from .model_buckets import ModelBuckets
from .settings import SIDES, iterations_of
from .untraced import untraced


class Assignable:
    """Arguments of a penalty: each takes effect at the next step, and a bad value changes nothing.

    Assign them between steps: a backward pass uses the values of its own forward pass, in a
    compiled graph that holds operators except for ``exponent`` and for targets of elementwise
    parameters. A CUDA graph keeps the numbers that it was captured with.
    """

    _buckets: ModelBuckets

    @property
    def strength(self) -> Strength:
        """Factor of R; assign a number, a 0-d tensor or a mapping.

        A tensor is read at every step. The value of one on a GPU is not checked here.
        """
        return self._buckets.coefficients.strength

    @strength.setter
    @untraced
    def strength(self, strength: Strength) -> None:
        with self._buckets.lock:
            self._buckets.coefficients.strength = strength
            self._buckets.fill_strength()
            self._buckets.watch.restart()

    @property
    def target(self) -> Target:
        """Singular value that each matrix is pulled to: a number, "initial", "mup" or a mapping.

        "initial", for elementwise parameters too, is what there was when it was first asked for: at
        construction or at an assignment.
        """
        return self._buckets.coefficients.target

    @target.setter
    @untraced
    def target(self, target: Target) -> None:
        self._buckets.set_target(target)

    @property
    def exponent(self) -> float:
        """k in the penalty; assign a number from 1 on."""
        return self._buckets.settings.exponent

    @exponent.setter
    @untraced
    def exponent(self, exponent: float) -> None:
        self._buckets.set_shape(exponent=check_number("exponent", exponent, at_least=1))

    @property
    def side(self) -> str:
        """Sides of the target on which there is a penalty; assign "both" or "above"."""
        return self._buckets.settings.side

    @side.setter
    @untraced
    def side(self, side: str) -> None:
        self._buckets.set_shape(side=check_word("side", side, SIDES))

    @property
    def n_power_iterations(self) -> int | Literal["auto"]:
        """Power iterations per step; assign an integer or "auto", in an optimizer 1 or "auto"."""
        settings = self._buckets.settings
        return "auto" if settings.extra_iterations else settings.iterations

    @n_power_iterations.setter
    @untraced
    def n_power_iterations(self, n_power_iterations: int | Literal["auto"]) -> None:
        is_in_optimizer = self._buckets.settings.is_in_optimizer
        self._buckets.set_iterations(*iterations_of(n_power_iterations, is_in_optimizer))

    @property
    def n_vectors(self) -> int:
        """Singular vectors per matrix; assign 1, 2, 4, 8 or 16.

        The vectors are kept. If there are more from now on, ``warmup`` iterations follow.
        """
        return self._buckets.settings.n_vectors

    @n_vectors.setter
    @untraced
    def n_vectors(self, n_vectors: int) -> None:
        self._buckets.set_n_vectors(check_choice("n_vectors", n_vectors, N_VECTORS))

    def _assigned(self) -> dict[str, object]:
        """Return the arguments by name, and the backend's name, for a listing."""
        names = ["strength", "exponent", "target", "n_power_iterations", "n_vectors"]
        if self.side != "both":
            names.append("side")
        backend = self._buckets.settings.backend
        name = backend if isinstance(backend, str) else backend.name
        return {**{name: getattr(self, name) for name in names}, "backend": name}

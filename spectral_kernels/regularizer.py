"""SpectralRegularizer: the object that a training loop holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .backends import choice
from .backends.base import Backend
from .diagnostics.readings import LayerReading, Readings
from .engine import autograd
from .engine.attach import Attachment, attach
from .engine.bucket import MAX_EXTRA_ITERATIONS
from .engine.coefficients import Coefficients, Strength, Target
from .engine.model_buckets import LoadResult, ModelBuckets, Settings, vectors_of
from .engine.stability import StabilityWatch
from .engine.untraced import outside, untraced
from .selection import transforms
from .selection.arguments import check_choice, check_count, check_number
from .selection.matrices import listing
from .selection.rules import select
from .tables.schema import N_VECTORS

__all__ = ["Attachment", "LayerReading", "LoadResult", "SpectralRegularizer", "Strength", "Target"]


class SpectralRegularizer(Readings):
    """Keeps the largest singular value of every layer near a target.

    The penalty is ``strength * R`` with (Lewandowski et al., "Learning Continually by Spectral
    Regularization", ICLR 2025, arXiv 2406.06811)::

        R = sum over matrices (sigma_1(W)^k - target^k)^2 + sum over biases and shifts ||b||^(2k)
            + sum over norm gains sum_i (|g_i|^k - 1)^2

    There are three ways to apply it, with the same gradient: add :meth:`penalty` to the loss; call
    :meth:`accumulate_grad_` between ``backward`` and ``optimizer.step``; or call :meth:`attach`
    once.

    Args:
        model: a module, or an iterable of (name, parameter). An iterable does not identify
            embeddings, norms, gates and transposed convolutions: a parameter with two or more
            dimensions is a matrix, a 1-D one named as a bias is a bias, the rest is skipped.
        strength: factor of R; a number, a 0-d tensor, or a mapping from name patterns to numbers
            (the first matching pattern counts).
        exponent: k, at least 1.
        target: tau; a number, "initial" (sigma_1 of each matrix when the regularizer is built), or
            a mapping from name patterns to these.
        n_power_iterations: power iterations per step; each reads every weight once. "auto": one,
            plus up to 8 extra iterations for stale matrices (residual above 1 % of sigma), so that
            sigma recovers from a sudden change of the weights within a few steps.
        n_vectors: singular vectors iterated per matrix: 1, 2, 4, 8 or 16. More vectors make sigma
            more accurate where the largest singular values are close together, as they become
            under the penalty; the penalty itself uses only the largest.
        biases: regularize biases.
        norms: regularize the gains and shifts of normalization layers.
        include: glob patterns; if given, only parameters whose name matches one are selected,
            embedding tables included.
        exclude: glob patterns of names to leave out.
        splits: pattern -> number of equal parts or their sizes along the output dimension, for
            fused projections such as ``{"*.qkv.weight": 3}``.
        stacked: patterns of parameters (E, out, in) that are stacks of E matrices.
        warmup: power iterations at first use, so that the first sigma is meaningful; and on a CPU
            for every matrix whose residual jumps between two steps (above 0.3 sigma and three
            times what it was), as that of a layer that is initialized again. On a GPU, where a
            step does not wait for a residual, only the optimizers do that, after an edit.
        backend: "auto" (the fastest one that works), "cuda" (CUDA C++), "triton", "cpu" (C++),
            "reference" (PyTorch, any device), or a ``backends.base.Backend``.
        seed: seed of the random initial vectors; torch's own generators are not touched.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a value out of range, a pattern that matches nothing, nothing to regularize.
        RuntimeError: the named backend cannot run on this machine.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[tuple[str, torch.Tensor]],
        strength: Strength = 1e-3,
        exponent: float = 2,
        target: Target = 1.0,
        n_power_iterations: int | str = 1,
        *,
        n_vectors: int = 1,
        biases: bool = True,
        norms: bool = True,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        splits: Mapping[str, int | Sequence[int]] | None = None,
        stacked: Sequence[str] = (),
        warmup: int = 10,
        backend: str | Backend = "auto",
        seed: int = 0,
    ):
        choice.check_backend(backend)
        self.exponent = check_number("exponent", exponent, at_least=1)
        auto = n_power_iterations == "auto"
        if not auto:
            check_count("n_power_iterations", n_power_iterations, 1, words=("auto",))
        self.n_power_iterations = n_power_iterations
        self.n_vectors = check_choice("n_vectors", n_vectors, N_VECTORS)
        self._selection = select(
            model, biases=biases, norms=norms, include=include, exclude=exclude,
            splits=splits, stacked=stacked,
        )  # fmt: skip
        settings = Settings(
            backend, self.exponent, check_count("warmup", warmup, 0), check_count("seed", seed, 0),
            n_vectors, MAX_EXTRA_ITERATIONS if auto else 0,
        )  # fmt: skip
        self._coefficients = Coefficients(self._selection, strength, target, backend)
        self._buckets = ModelBuckets(self._selection, settings, self._coefficients)
        self._attached: list[Attachment] = []
        self._watch = StabilityWatch()
        if not any(ref.get().is_meta for ref in self._buckets.refs):
            self._coefficients.measure_initial()
        self._buckets.ready_for_graphs()

    # ------------------------------------------------------ three ways to apply the penalty

    def penalty(self) -> torch.Tensor:
        """Run the power iterations and return ``strength * R``, to be added to the loss.

        The gradient is exact given the vectors, which count as constants. Double backward works,
        and several calls may precede one backward. Gradient clipping includes the penalty. Under
        ``torch.no_grad()`` the penalty is only evaluated: the vectors do not change.

        Transforms of ``torch.func`` (``grad``, ``jvp``, ``hessian``, ``vmap`` over inputs) and
        forward-mode autograd differentiate it, too, by operations of PyTorch. It is a function of
        the parameters that the modules hold while it runs. ``functional_call`` puts others there
        only until it returns; in meta learning call it in the ``forward`` of a module that holds
        the model::

            class WithPenalty(nn.Module):
                def __init__(self, model):
                    super().__init__()
                    self.model, self.reg = model, SpectralRegularizer(model)

                def forward(self, x, y):
                    return nn.functional.cross_entropy(self.model(x), y) + self.reg.penalty()

            whole = WithPenalty(model)
            gradient = torch.func.grad(lambda p: functional_call(whole, p, (x, y)))
            gradient(dict(whole.named_parameters()))

        Returns:
            A 0-d tensor on the first parameter's device; float32 (float64 for float64 weights).

        Raises:
            RuntimeError: a parameter was removed, is on the meta device or batched by ``vmap``; a
                compiled transform, or a transform of sharded parameters.
            ValueError: a parameter whose memory layout cannot be used in place.
        """
        if torch.compiler.is_compiling():
            from .engine import compiled

            if not self._buckets.ready_to_trace():
                return outside(SpectralRegularizer.penalty, self)
            strength = self._coefficients.strength_tensor
            return compiled.traced_penalty(self._buckets, self._iterations, strength)
        return autograd.penalty(self._buckets, self._iterations)

    def accumulate_grad_(self, grad_scale: float | torch.Tensor | None = None) -> None:
        """Run the power iterations and add the gradient of ``strength * R`` to every ``.grad``.

        Call it once per optimizer step, after ``backward``, and before gradient clipping if that
        is to include the penalty. A parameter without ``.grad`` gets one. A CUDA graph can capture
        this after an eager step; gradients created in the capture start from zero in each replay.

        Args:
            grad_scale: the loss scale that ``.grad`` still contains: ``scaler.get_scale()`` if
                ``scaler.unscale_(optimizer)`` has not been called.

        Raises:
            RuntimeError: as for :meth:`penalty`, and a CUDA graph capture before any eager step.
            ValueError: as for :meth:`penalty`; a ``.grad`` that is sparse, or whose dtype or memory
                layout does not fit its weight; a parametrized weight.
        """
        if torch.compiler.is_compiling():
            return outside(SpectralRegularizer.accumulate_grad_, self, grad_scale)
        if transforms.current() is not None:
            transforms.check_inactive("accumulate_grad_()", "penalty()")
        if grad_scale is not None and not isinstance(grad_scale, torch.Tensor):
            grad_scale = check_number("grad_scale", grad_scale)
        self._buckets.accumulate_gradients(self._iterations, grad_scale)

    @untraced
    def attach(self, optimizer: torch.optim.Optimizer) -> Attachment:
        """Call :meth:`accumulate_grad_` at the start of every ``optimizer.step()``.

        The penalty then counts once per optimizer step; gradient clipping before the step does not
        include it. Under GradScaler the gradients of a fused optimizer are still scaled; the
        penalty is scaled with them. A closure is evaluated first, then the penalty added.

        With ``torch.optim.SGD`` there is one RuntimeWarning if lr * strength is too large for
        sigma: the step would end farther from the target than it began. On a CPU ten steps and
        every 100th after them are looked at, and on a GPU :meth:`metrics` looks.

        Args:
            optimizer: must hold every parameter that this regularizer has selected.

        Returns:
            A handle; ``handle.remove()`` detaches the regularizer.

        Raises:
            TypeError: not a torch.optim.Optimizer, or LBFGS (its line search needs the loss: add
                ``penalty()`` to it in the closure).
            ValueError: a selected parameter is not in ``optimizer``, or is parametrized.
            RuntimeError: already attached to this optimizer.
        """
        self._buckets.check_in_place()
        self._attached = [a for a in self._attached if a.active]
        watch = None
        if type(optimizer) is torch.optim.SGD:

            def watch() -> None:
                self._watch.step(self._buckets.buckets, optimizer.param_groups)

        attachment = attach(
            self.accumulate_grad_, optimizer, self._buckets.refs, self._attached, watch
        )
        self._attached.append(attachment)
        return attachment

    # ------------------------------------------------------------------- settings and checks

    @property
    def strength(self) -> Strength:
        """Factor of R; assign a number, a 0-d tensor or a mapping at any time."""
        return self._coefficients.strength

    @strength.setter
    @untraced
    def strength(self, strength: Strength) -> None:
        self._coefficients.strength = strength
        self._buckets.fill_strength()
        self._watch.restart()

    @property
    def target(self) -> Target:
        """Singular value that each matrix is pulled to, as given."""
        return self._coefficients.target

    @untraced
    def check_ranks(self) -> None:
        """Check that ranks agree on matrices and vectors; every rank must call it.

        Vectors are bitwise equal on all ranks of a parameter's mesh, and on all ranks for
        parameters that are not DTensors (DistributedDataParallel), unless weights, seeds or
        strengths differ between ranks.

        Raises:
            RuntimeError: ranks differ (the message names ranks and matrix), or no process group.
        """
        if not torch.distributed.is_initialized():
            raise RuntimeError("check_ranks: torch.distributed has no process group yet")
        for bucket in self._buckets.bound():
            bucket.check_ranks()

    def __repr__(self) -> str:
        head = (
            f"SpectralRegularizer(strength={self.strength}, exponent={self.exponent:g}, "
            f"target={self.target}, n_power_iterations={self.n_power_iterations}, "
            f"n_vectors={self.n_vectors}, backend={_name_of(self._buckets.settings.backend)!r})"
        )
        return "\n".join((head, *listing(self._selection)))

    # --------------------------------------------------------------------------------- state

    @untraced
    def state_dict(self) -> dict[str, Any]:
        """Return copies of all vectors, [n_vectors, N], and measured targets, by matrix name."""
        if not self._buckets.is_warm and not self._buckets.start_vectors:
            self._buckets.bound()
        return {"vectors": self._buckets.vectors(), "initial": dict(self._coefficients.initial)}

    @untraced
    def load_state_dict(self, state: Mapping[str, Any]) -> LoadResult:
        """Load a :meth:`state_dict`; vectors are normalized, and missing ones warmed up.

        If it has more vectors per matrix than ``n_vectors``, the first ones are used; if fewer,
        random ones are added and warmed up.

        Returns:
            The names missing from ``state``, and the unexpected names in it.

        Raises:
            TypeError: ``state`` is not such a dict.
            ValueError: a vector of the wrong shape, or one that is zero or not finite.
        """
        found, result = vectors_of(state, self._selection.matrices)
        self._coefficients.initial.update(
            {n: float(x) for n, x in state.get("initial", {}).items()}
        )
        self._buckets.restart(found, warm=not result.missing_keys)
        return result

    def __getstate__(self) -> dict[str, Any]:
        """Leave out attachments; copies and pickles carry the vectors."""
        return {**self.__dict__, "_attached": []}

    def _sgd_groups(self) -> list[Mapping[str, Any]]:
        optimizers = [a.optimizer for a in self._attached if a.active]
        return [g for o in optimizers if type(o) is torch.optim.SGD for g in o.param_groups]

    @property
    def _iterations(self) -> int:
        return 1 if self.n_power_iterations == "auto" else self.n_power_iterations


def _name_of(backend: str | Backend) -> str:
    return backend if isinstance(backend, str) else backend.name

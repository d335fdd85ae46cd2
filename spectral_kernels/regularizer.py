"""SpectralRegularizer: the object that a training loop holds."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from .backends import choice
from .backends.base import Backend
from .backends.choice import BackendName
from .diagnostics.readings import LayerReading, Readings
from .engine import autograd
from .engine.assignable import Assignable
from .engine.attach import Attachment, attach, attachments_of, mark_accumulated, resume, sgd_groups
from .engine.coefficients import Coefficients, Strength, Target
from .engine.initial import Initial, checked_initial, copied
from .engine.loading import Loaded, LoadResult, vectors_of, with_initial
from .engine.model_buckets import ModelBuckets
from .engine.operators import checked_next_search
from .engine.settings import SIDES, Settings, iterations_of
from .engine.shares import look_when_built
from .engine.untraced import outside, untraced
from .selection import transforms
from .selection.arguments import (
    check_choice,
    check_count,
    check_number,
    check_word,
    known_keywords,
)
from .selection.changes import selected
from .selection.options import Convolutions, Patterns, Roles, Source, Splits
from .selection.rules import select
from .tables.schema import N_VECTORS

__all__ = ["Attachment", "LayerReading", "LoadResult", "SpectralRegularizer", "Strength", "Target"]


class SpectralRegularizer(Assignable, Readings):
    """Keeps the largest singular value of every layer near a target.

    The penalty is ``strength * R`` with (Lewandowski et al., "Learning Continually by Spectral
    Regularization", ICLR 2025, arXiv 2406.06811)::

        R = sum over matrices (sigma_1(W)^k - target^k)^2 + sum over biases and shifts ||b||^(2k)
            + sum over norm gains sum_i (|g_i|^k - 1)^2

    There are three ways to apply it, with the same gradient: add :meth:`penalty` to the loss; call
    :meth:`accumulate_grad_` between ``backward`` and ``optimizer.step``; or call :meth:`attach`
    once. ``strength``, ``target``, ``exponent``, ``side``, ``n_power_iterations`` and ``n_vectors``
    may be assigned later too.

    Modules of ``model`` that are replaced, resized, deleted, frozen or unfrozen are followed at the
    next step, see docs/continual.md; :meth:`reselect` takes in those that are added.

    Args:
        model: a module, or an iterable of (name, parameter). An iterable does not identify
            embeddings, norms, gates, stacks and convolutions: names and shapes alone decide, and a
            parameter with three or more dimensions is flattened unless its name has "experts".
        strength: factor of R; a number, a 0-d tensor, or a mapping from name patterns to numbers
            (the first matching pattern counts). The value of a tensor is checked once, here. With
            the number 0, a parameter gets no gradient of the penalty, as if it were excluded.
        exponent: k, at least 1.
        target: tau; a number, "initial", "mup", or a mapping from name patterns to these. A number
            is for the matrices; biases and shifts are pulled to 0 and gains to 1. "mup" is
            sqrt(rows / cols) of each matrix, outputs over inputs, and "0.5*mup" half of that; 1 or
            0.5 for a gain. "initial" holds
            everything that is selected at what it is when the regularizer is built: sigma_1 of a
            matrix, the norm of a bias or shift, the absolute value of each element of a gain. The
            penalty then begins at 0.
        n_power_iterations: power iterations per step; each reads every weight once. "auto": one,
            plus up to 8 extra iterations for stale matrices (residual above 1 % of sigma), so that
            sigma recovers from a sudden change of the weights within a few steps.
        n_vectors: singular vectors iterated per matrix: 1, 2, 4, 8 or 16. More vectors make sigma
            more accurate where the largest singular values are close together, as they become
            under the penalty; the penalty itself uses only the largest.
        side: "both", or "above": what is at or below its target has neither penalty nor gradient,
            matrices and gains, and biases that have a target; others are pulled to 0 as before.
        biases: regularize biases of layers. The shifts of norms, named "bias" too, stay with
            ``norms``.
        norms: regularize the gains and shifts of normalization layers.
        include: a glob pattern or several; if given, only parameters whose name matches one are
            selected, and of these also what is left out by default: embedding tables, tokens,
            positions, scales and others with two or more dimensions, as matrices.
        exclude: a glob pattern or several, of names to leave out.
        splits: pattern -> number of equal parts or their sizes along the output dimension, for
            fused projections such as ``{"*.qkv.weight": 3}``.
        stacked: a pattern or several, of parameters (E, out, in) that are stacks of E matrices,
            and of their biases (E, out); short for the role "stack".
        roles: pattern -> what the parameter is, where the default is not right: "matrix" (dim 0,
            rest), "stack" (E matrices along dim 0), "bias" (pulled to 0), "gain" (each element
            pulled to 1) or "skip". :func:`register_layer` says it for a class of layers.
        convolutions: "flattened": the matrix of a convolution is its kernel, (dim 0, rest), as in
            the paper. "operator": it is the operator on images, whose norm is 1.6 to 2.7 times that
            of usual 3x3 and 5x5 kernels. Its sigma is the largest singular value over all
            frequencies, an upper bound for images of any size with zeros around them, and tight for
            large ones; the strength may have to be smaller. One complex vector and a frequency per
            operator are iterated, ``n_vectors`` is 1. See docs/convolutions.md.
        warmup: power iterations at first use, so that the first sigma is meaningful; and on a CPU
            for every matrix whose residual jumps between two steps (above 0.3 sigma and three
            times what it was), as that of a layer that is initialized again. On a GPU, where a
            step does not wait for a residual, only the optimizers do that, after an edit.
        backend: "auto" (the fastest one that works), "cuda" (CUDA C++), "triton", "cpu" (C++),
            "reference" (PyTorch, any device), or a ``backends.base.Backend``.
        seed: seed of the random initial vectors; torch's own generators are not touched.

    Raises:
        TypeError: an argument of the wrong type, an unknown keyword, parameters without names.
        ValueError: a value out of range, a pattern that matches nothing, nothing to regularize.
        RuntimeError: the named backend cannot run on this machine.
    """

    @known_keywords
    def __init__(
        self,
        model: Source,
        strength: Strength = 1e-3,
        exponent: float = 2,
        target: Target = 1.0,
        n_power_iterations: int | Literal["auto"] = 1,
        *,
        n_vectors: int = 1,
        side: Literal["both", "above"] = "both",
        biases: bool = True,
        norms: bool = True,
        include: Patterns | None = None,
        exclude: Patterns | None = (),
        splits: Splits | None = None,
        stacked: Patterns | None = (),
        roles: Roles | None = None,
        convolutions: Convolutions = "flattened",
        warmup: int = 10,
        backend: BackendName | Backend = "auto",
        seed: int = 0,
    ) -> None:
        choice.check_backend(backend)
        iterations, extra_iterations = iterations_of(n_power_iterations)
        settings = Settings(
            backend=backend,
            exponent=check_number("exponent", exponent, at_least=1),
            warmup=check_count("warmup", warmup, 0),
            seed=check_count("seed", seed, 0),
            n_vectors=check_choice("n_vectors", n_vectors, N_VECTORS),
            iterations=iterations,
            extra_iterations=extra_iterations,
            side=check_word("side", side, SIDES),
        )
        self._selection = selected(
            select, model, biases=biases, norms=norms, include=include, exclude=exclude,
            splits=splits, stacked=stacked, roles=roles, convolutions=convolutions,
        )  # fmt: skip
        self._coefficients = Coefficients(self._selection, strength, target, backend)
        self._buckets = ModelBuckets(self._selection, settings, self._coefficients)
        if not any(ref.get().is_meta for ref in self._buckets.refs):
            self._coefficients.measure_initial()
        self._buckets.ready_for_graphs()
        look_when_built(self._buckets)

    # ------------------------------------------------------ three ways to apply the penalty

    def penalty(self) -> torch.Tensor:
        """Run the power iterations and return ``strength * R``, to be added to the loss.

        The gradient is exact given the vectors, which count as constants. Double backward works,
        and several calls may precede one backward. Gradient clipping includes the penalty. Under
        ``torch.no_grad()`` the penalty is only evaluated: the vectors do not change. Not with
        :meth:`attach`, whose steps refuse gradients that contain the penalty.

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
            return compiled.traced_penalty(self._buckets, self._buckets.iterations, strength)
        with self._buckets.lock:
            return autograd.penalty(self._buckets, self._buckets.iterations)

    def accumulate_grad_(self, grad_scale: float | torch.Tensor | None = None) -> None:
        """Run the power iterations and add the gradient of ``strength * R`` to every ``.grad``.

        Call it once per optimizer step, after ``backward``, and before gradient clipping if that
        is to include the penalty; not with :meth:`attach`, whose steps refuse gradients that
        contain it. A parameter without ``.grad`` gets one, unless its strength is the number 0. A
        CUDA graph can capture this after an eager step; gradients created in the capture start from
        zero in each replay.

        Args:
            grad_scale: the loss scale that ``.grad`` still contains: ``scaler.get_scale()`` if
                ``scaler.unscale_(optimizer)`` has not been called.

        Raises:
            RuntimeError: as for :meth:`penalty`, and a CUDA graph capture before any eager step.
            ValueError: as for :meth:`penalty`; a ``.grad`` that is sparse, or whose dtype or memory
                layout does not fit its weight.
        """
        if torch.compiler.is_compiling():
            return outside(SpectralRegularizer.accumulate_grad_, self, grad_scale)
        transforms.check_inactive("accumulate_grad_()", "penalty()")
        if grad_scale is not None and not isinstance(grad_scale, torch.Tensor):
            grad_scale = check_number("grad_scale", grad_scale)
        self._buckets.accumulate_gradients(self._buckets.iterations, grad_scale)
        mark_accumulated(self._buckets)

    @untraced
    def attach(
        self,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        decoupled: bool = False,
        replace: bool = False,
        shared: bool = False,
        constraint: Literal["cap", "sphere"] | None = None,
    ) -> Attachment:
        """Let every ``optimizer.step()`` contain the penalty, once.

        The step adds its gradient to ``.grad`` first, as :meth:`accumulate_grad_` does; gradient
        clipping before the step does not include it. Under GradScaler the gradients of a fused
        optimizer are still scaled; the penalty is scaled with them. A closure is evaluated first,
        then the penalty added. If ``.grad`` contains a gradient of the penalty already, from
        :meth:`penalty` or :meth:`accumulate_grad_`, the step raises RuntimeError before anything
        changes, and so it does if the optimizer does not hold a parameter that was replaced; then
        another optimizer may be attached. Nothing is kept alive: the attachment ends with the
        optimizer.

        With ``decoupled`` the penalty acts on the weights, not through ``.grad``, after the step,
        with the values at its start, as decoupled weight decay does::

            W <- W - lr * strength * dR/dW

        for any optimizer, with the lr of the parameter's group. No step carries a singular value
        past its target: the factor of u v^T is at most |sigma - target|, and biases, shifts and
        gains are not carried past theirs. Changes below the rounding of 16-bit weights are lost.

        With ``torch.optim.SGD``, if not ``decoupled``, there is one RuntimeWarning where lr *
        strength is too large for a sigma: the step carries it farther from its target than it was.
        On a CPU ten steps and every 100th after them are looked at, and on a GPU :meth:`metrics`
        looks.

        Args:
            optimizer: one that holds every parameter which this regularizer has selected; or a list
                of optimizers, each parameter in one of them: their steps contain the penalty of
                their own parameters. Wrappers, such as those of accelerate, are unwrapped.
            decoupled: let the penalty act on the weights, beside the step.
            replace: end other attachments to these parameters first, for a cell of a notebook that
                runs again after its last handle was lost.
            shared: allow other regularizers or optimizers that add a penalty of these parameters
                too, and gradients of one in ``.grad``.
            constraint: with ``decoupled``: hold the weights at their target instead of pulling
                them to it; see :class:`SpectralAdamW`. "sphere" scales the weights before the step,
                so that a closure and weight decay see the scaled ones; the rest is added after it.

        Returns:
            A handle; ``handle.remove()`` detaches the regularizer.

        Raises:
            TypeError: no torch.optim.Optimizer, or one whose steps cannot contain the penalty, or
                do already: LBFGS (its line search needs the loss: add ``penalty()`` to it in the
                closure), optimizers with ``first_step()`` and ``second_step()``, SpectralAdamW and
                SpectralSGD.
            ValueError: a selected parameter is in no optimizer, in two of them, in a group with
                ``maximize=True``; with ``decoupled``, a group without lr; a ``constraint`` without
                ``decoupled``.
            RuntimeError: attached to this optimizer already, or a parameter gets a penalty in the
                steps of an optimizer that is still there (unless it is this regularizer's, and the
                optimizer does not hold all parameters any more).
        """
        return attach(self, optimizer, decoupled, replace, shared, constraint)

    # ------------------------------------------------------------------- settings and checks

    @untraced
    def reselect(self) -> None:
        """Take in the parameters that were added to the model, with the arguments given here.

        Modules that are replaced, resized, deleted or no longer frozen are followed at the next
        step without it. Vectors are kept by name; if a matrix is new, all are warmed up. Patterns
        may match nothing any more.

        Raises:
            ValueError: a parameter that cannot be selected, or whose name no pattern of a mapping
                matches; nothing to regularize.
            RuntimeError: ``model`` is not a module; an optimizer to which this is attached does not
                hold an added parameter. Nothing is changed then.
        """
        self._buckets.reselect()

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
            raise RuntimeError(
                "check_ranks: torch.distributed has no process group yet; call "
                "torch.distributed.init_process_group() first"
            )
        with self._buckets.lock:
            for bucket in self._buckets.bound():
                bucket.check_ranks()

    if not TYPE_CHECKING:  # with it, type checkers would allow any name

        def __setattr__(self, name: str, value: Any) -> None:
            """Refuse public names that a regularizer does not have, such as misspelt ones."""
            if (
                name[:1] != "_"
                and type(self) is SpectralRegularizer
                and not hasattr(type(self), name)
            ):
                near = difflib.get_close_matches(name, [n for n in dir(self) if n[0] != "_"], 1)
                said = (
                    f"did you mean {near[0]!r}?"
                    if near
                    else "attributes of your own need a subclass"
                )
                raise AttributeError(f"SpectralRegularizer has no attribute {name!r}; {said}")
            super().__setattr__(name, value)

    def __repr__(self) -> str:
        arguments = {**self._assigned(), "exponent": f"{self.exponent:g}"}
        shown = {**arguments, "backend": repr(arguments["backend"])}
        head = ", ".join(f"{name}={value}" for name, value in shown.items())
        return "\n".join((f"{type(self).__name__}({head})", *self._listing()))

    def _sgd_groups(self) -> list[Mapping[str, Any]]:
        return sgd_groups(self._buckets)

    # --------------------------------------------------------------------------------- state

    @untraced
    def state_dict(self) -> dict[str, Any]:
        """Return copies of all vectors, [n_vectors, N], and of measured targets, by name.

        The vector of an operator of a convolution, with its frequency in it, is [2, N]: its real
        and its imaginary part.

        "initial" has a float for a matrix, a bias or a shift, and a tensor [n] for a gain or for
        rows; of whole parameters, also where they are sharded.

        Where weights are stored column by column (transposed, or a single column), "left" has the
        left vectors, [n_vectors, M], by which these are iterated.

        With operators, "next_search" has the steps until their frequencies are searched again.
        """
        buckets = self._buckets
        with buckets.lock:
            buckets.tell_of_added()
            if not buckets.has_vectors:
                buckets.bound()
            found = {"vectors": buckets.vectors(), "initial": copied(self._coefficients.initial)}
            left = buckets.left_vectors()
            if any(matrix.periods is not None for matrix in self._selection.matrices):
                found["next_search"] = buckets.searches.left
        return {**found, "left": left} if left else found

    @untraced
    def load_state_dict(self, state: Mapping[str, Any]) -> LoadResult:
        """Load a :meth:`state_dict`; vectors are normalized, and missing ones warmed up.

        If it has more vectors per matrix than ``n_vectors``, the first ones are used; if fewer,
        random ones are added and warmed up.

        Returns:
            The names missing from ``state``, of vectors or of targets that are "initial" now, and
            the unexpected names in it.

        Raises:
            TypeError: ``state`` is not such a dict, a target is neither a number nor a tensor, or
                "next_search" is no int.
            ValueError: a vector of the wrong shape, or one that is zero or not finite, a target of
                the wrong shape, not finite or below 0, or a "next_search" that is not from 1 to
                200; nothing is changed then.
        """
        self._buckets.follow()
        found = vectors_of(state, self._selection.matrices)
        initial = checked_initial(state.get("initial", {}), self._selection)
        next_search = checked_next_search(state.get("next_search"))
        with self._buckets.lock:
            self._load(found, initial, next_search)
        entries = *self._selection.matrices, *self._selection.elementwise
        wanted, known = self._coefficients.initial_names(), [entry.name for entry in entries]
        return with_initial(found.result, initial, wanted, known)

    def _load(self, found: Loaded, initial: Mapping[str, Initial], next_search: int | None) -> None:
        """Continue from checked vectors and measured targets."""
        self._coefficients.initial.update(initial)
        if next_search is not None:
            self._buckets.searches.left = next_search
        self._buckets.restart(found, warm=not found.result.missing_keys)

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles carry: the vectors, and the optimizers it is attached to.

        The copy is attached to the copies of these optimizers. If it is copied without them they
        are copied all the same, and dropped again; it then warns at its first use.
        """
        return {**self.__dict__, "_attachments": attachments_of(self._buckets)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        attachments = state.get("_attachments", ())
        self.__dict__.update({k: v for k, v in state.items() if k != "_attachments"})
        resume(self, attachments)

"""SpectralRegularizer: the object that a training loop holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import nn

from . import autograd, backends, checkpoint, device_tables, readings
from .arguments import count, number, one_of
from .attach import Attachment, attach
from .bucket import MOST_FURTHER, Bucket
from .buckets import Buckets
from .lanczos import singular_values
from .listing import listing
from .logs import Log
from .named_values import by_name
from .plan import R
from .readings import Row
from .selection import select
from .shards import local_of
from .untraced import outside, untraced

Strength = float | torch.Tensor | Mapping[str, float]
Target = float | str | Mapping[str, float | str]


class SpectralRegularizer:
    """Keeps the largest singular value of every layer near a target.

    The penalty is ``strength * R`` with (Lewandowski et al., "Learning Continually by Spectral
    Regularization", ICLR 2025, arXiv 2406.06811)::

        R = sum over matrices (sigma_1(W)^k - target^k)^2 + sum over biases and shifts ||b||^(2k)
            + sum over norm gains sum_i (|g_i|^k - 1)^2

    Use one of three ways per step: add :meth:`penalty` to the loss; or call
    :meth:`accumulate_grad_` between ``backward`` and ``optimizer.step``; or call :meth:`attach`
    once. They give the same gradient.

    Args:
        model: a module, or an iterable of (name, parameter). Without modules nothing is known of
            embeddings, norms, gates and transposed convolutions: what has two dimensions or more is
            a matrix, what is called a bias is one, and the rest is skipped.
        strength: factor of R; a number, a 0-d tensor, or a mapping from name patterns to numbers
            in which the first match counts.
        exponent: k, at least 1.
        target: tau; a number, "initial" (sigma_1 of each matrix when the regularizer is built), or
            a mapping from name patterns to these.
        n_power_iterations: per step; each reads every weight once. "auto": one, and up to 8
            further ones for those matrices whose residual is more than 1 % of sigma, so that a
            sudden change of the weights is caught up in a few steps.
        n_vectors: singular vectors that are iterated per matrix: 1, 2, 4, 8 or 16. More are
            sharper where the largest singular values are close together, which the penalty brings
            about; the penalty is about the largest one all the same.
        biases: regularize biases.
        norms: regularize the gains and shifts of normalization layers.
        include: glob patterns; when given, only parameters whose name matches one are taken, and
            embedding tables among them.
        exclude: glob patterns of names to leave out.
        splits: pattern -> number of equal parts or their sizes along the output dimension, for
            fused projections such as ``{"*.qkv.weight": 3}``.
        stacked: patterns of stacks (E, out, in) that are E matrices.
        warmup: power iterations at first use, so that the first sigma means something.
        backend: "auto", "cpu" (C++) or "reference" (PyTorch, any device).
        seed: of the random vectors to start from; torch's own generators are not touched.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a value out of range, a pattern that matches nothing, nothing to regularize.
        RuntimeError: a backend asked for by name that cannot run here.
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
        backend: str = "auto",
        seed: int = 0,
    ):
        backends.check_name(backend)
        self.exponent = number("exponent", exponent, at_least=1)
        auto = n_power_iterations == "auto"
        if not auto:
            count("n_power_iterations", n_power_iterations, 1, words=("auto",))
        self.n_power_iterations = n_power_iterations
        self.n_vectors = one_of("n_vectors", n_vectors, R)
        self._selection = select(
            model, biases=biases, norms=norms, include=include, exclude=exclude,
            splits=splits, stacked=stacked,
        )  # fmt: skip
        self._buckets = Buckets(
            self._selection, backend, self.exponent, count("warmup", warmup, 0),
            count("seed", seed, 0), n_vectors, MOST_FURTHER if auto else 0, self._fill,
        )  # fmt: skip
        self._attached: list[Attachment] = []
        self.strength = strength
        self.target = target
        self._targets = by_name("target", target, self._selection, words=("initial",))
        self._initial: dict[str, float] = {}
        if not any(owner.get().is_meta for owner in self._buckets.owners):
            self._measure_initial()
        self._buckets.ready_for_graphs()

    # ---------------------------------------------------------------------- the three ways

    def penalty(self) -> torch.Tensor:
        """Run the power iterations and return ``strength * R``, to be added to the loss.

        The gradient is exact given the iterations' vectors; double backward works, and several
        calls may come before one backward. Inside gradient clipping. Under ``torch.no_grad()`` the
        penalty is evaluated and the vectors stay where they are.

        Returns:
            A 0-d tensor on the first parameter's device; float32 (float64 for float64 weights).

        Raises:
            RuntimeError: a parameter that is gone or on the meta device.
            ValueError: a parameter whose memory layout cannot be used in place.
        """
        if torch.compiler.is_compiling():
            from . import ops

            if not self._buckets.ready_to_trace():
                return outside(SpectralRegularizer.penalty, self)
            strength = self._strength if self._strength_is_tensor else None
            return ops.traced_penalty(self._buckets, self._iterations, strength)
        return autograd.penalty(self._ready(), self._iterations)

    def accumulate_grad_(self, grad_scale: float | torch.Tensor | None = None) -> None:
        """Run the power iterations and add the gradient of ``strength * R`` to every ``.grad``.

        Call it once per optimizer step, after ``backward``: before clipping to be inside it. A
        parameter without ``.grad`` gets one; in a CUDA graph, which may capture this after a step
        outside of it, each replay starts it from zero.

        Args:
            grad_scale: the factor by which the gradients in ``.grad`` are still multiplied:
                ``scaler.get_scale()`` if ``scaler.unscale_(optimizer)`` has not been called.

        Raises:
            RuntimeError: as :meth:`penalty`, and in a CUDA graph before any step outside of it.
            ValueError: as :meth:`penalty`, for a ``.grad`` that is sparse, or of a dtype or memory
                layout that does not go with its weight, and for a parametrized weight.
        """
        if torch.compiler.is_compiling():
            return outside(SpectralRegularizer.accumulate_grad_, self, grad_scale)
        self._buckets.check_in_place()
        if grad_scale is not None and not isinstance(grad_scale, torch.Tensor):
            grad_scale = number("grad_scale", grad_scale)
        buckets = self._ready()
        grads = [bucket.grads() for bucket in buckets]
        for bucket, own in zip(buckets, grads, strict=True):
            bucket.plan.bind_grads(own)
        for bucket, own in zip(buckets, grads, strict=True):
            if type(None) in set(map(type, own)):
                _make_missing(bucket, own)
            bucket.state.set_scale(grad_scale)
        for bucket in buckets:
            bucket.begin(self._iterations)
        for bucket, own in zip(buckets, grads, strict=True):
            bucket.finish(self._iterations, own)

    @untraced
    def attach(self, optimizer: torch.optim.Optimizer) -> Attachment:
        """Call :meth:`accumulate_grad_` at the start of every ``optimizer.step()``.

        The penalty then counts once per optimizer step and is outside of gradient clipping done
        before the step. Under GradScaler the gradients of a fused optimizer are still scaled; the
        penalty is scaled with them. A closure is evaluated first, then the penalty added.

        Args:
            optimizer: holds every parameter that this regularizer has selected.

        Returns:
            A handle; ``handle.remove()`` ends it.

        Raises:
            TypeError: not a torch.optim.Optimizer, or LBFGS (its line search needs the loss: add
                ``penalty()`` to it in the closure).
            ValueError: a selected parameter is not in ``optimizer``.
            RuntimeError: attached to this optimizer already.
        """
        self._buckets.check_in_place()
        self._attached = [a for a in self._attached if a.active]
        attachment = attach(self, optimizer, self._buckets.owners, self._attached)
        self._attached.append(attachment)
        return attachment

    # ------------------------------------------------------------------------- what it knows

    @property
    def strength(self) -> Strength:
        """Factor of the penalty; assign a number, a 0-d tensor or a mapping at any time."""
        return self._strength

    @strength.setter
    @untraced
    def strength(self, strength: Strength) -> None:
        is_tensor = isinstance(strength, torch.Tensor)
        if is_tensor:
            if strength.dim() != 0 or not strength.is_floating_point():
                raise ValueError(
                    f"strength: got a tensor of shape {tuple(strength.shape)} and dtype "
                    f"{strength.dtype}; accepted are 0-d floating-point tensors"
                )
        else:
            self._strengths = by_name("strength", strength, self._selection)
        self._strength, self._strength_is_tensor = strength, is_tensor
        for bucket in self._buckets.buckets or ():
            self._fill_strength(bucket)

    @property
    def names(self) -> list[str]:
        """Names of the matrices; parts of a split or stacked parameter carry a suffix."""
        return [matrix.name for matrix in self._selection.matrices]

    @property
    def sigma(self) -> torch.Tensor:
        """Estimates of sigma_1, [n_matrices], in the order of ``names``, on the device; a copy."""
        return self.singular_values[:, 0]

    @property
    def residual(self) -> torch.Tensor:
        """Some singular value of W lies within ``residual`` of ``sigma``; [n_matrices], a copy."""
        return self.residuals[:, 0]

    @property
    @untraced
    def singular_values(self) -> torch.Tensor:
        """Estimates of the ``n_vectors`` largest ones of each matrix, [n_matrices, n_vectors].

        Largest first, in the order of ``names``; a copy. None is above the singular value that it
        stands for. What a matrix has fewer of, or is below a millionth of the largest, is 0.
        """
        return readings.gather(self._ready(), self.names, "sigmas")

    @property
    @untraced
    def residuals(self) -> torch.Tensor:
        """Some singular value of W lies within each of them; [n_matrices, n_vectors], a copy."""
        return readings.gather(self._ready(), self.names, "residuals")

    @untraced
    def check_ranks(self) -> None:
        """Compare matrices and vectors of all ranks that share parameters; every rank calls it.

        Vectors are the same bits on every rank of a parameter's mesh, and on all ranks for
        parameters that are no DTensors (DistributedDataParallel). They come apart where ranks have
        other weights, seeds or strengths.

        Raises:
            RuntimeError: what differs, between which ranks, or no process group.
        """
        if not torch.distributed.is_initialized():
            raise RuntimeError("check_ranks: torch.distributed has no process group yet")
        for bucket in self._ready():
            bucket.check_ranks()

    @untraced
    def report(self) -> list[Row]:
        """Return (name, shape, sigma, residual) of every matrix; this synchronizes a GPU."""
        values = torch.stack((self.sigma, self.residual)).tolist()
        return [
            Row(matrix.name, matrix.shape_now(), sigma, residual)
            for matrix, sigma, residual in zip(self._selection.matrices, *values, strict=True)
        ]

    @untraced
    def metrics(self, per_layer: bool = False) -> dict[str, float]:
        """Return numbers for a logger, as of the last step; this synchronizes a GPU once.

        "spectral/sigma_max", "spectral/sigma_median" and "spectral/sigma_min" over the matrices,
        "spectral/residual_max", the largest residual / sigma, "spectral/above_target", how many
        sigma are above their target by more than the residual, and "spectral/penalty",
        ``strength * R``. Without a matrix those of sigma and residual are left out.

        Args:
            per_layer: add "spectral/sigma/NAME" and "spectral/residual/NAME" of every matrix.
        """
        return readings.metrics(self._ready(), self.names, per_layer)

    @untraced
    def log_to(self, path: str | PathLike[str], every: int = 1) -> Log:
        """Return ``log``: ``log(step)`` in the loop appends sigma and residual of every matrix.

        To a ``.csv`` or ``.jsonl`` file; one of the same matrices is continued. See ``logs.Log``.
        """
        return Log(path, self.names, lambda: torch.stack((self.sigma, self.residual)), every)

    def __repr__(self) -> str:
        head = (
            f"SpectralRegularizer(strength={self.strength}, exponent={self.exponent:g}, "
            f"target={self.target}, n_power_iterations={self.n_power_iterations}, "
            f"n_vectors={self.n_vectors}, backend={self._buckets.backend!r})"
        )
        return "\n".join((head, *listing(self._selection)))

    # --------------------------------------------------------------------------------- state

    @untraced
    def state_dict(self) -> dict[str, Any]:
        """Return the vectors of every matrix and the measured targets, by name.

        Copies, [n_vectors, N].
        """
        if not self._buckets.is_warm and not self._buckets.known:
            self._buckets.fresh()
        return {"vectors": self._buckets.vectors(), "initial": dict(self._initial)}

    @untraced
    def load_state_dict(self, state: Mapping[str, Any]) -> checkpoint.LoadResult:
        """Continue from a :meth:`state_dict`; vectors are normalized, missing names warmed up.

        If it has more vectors than ``n_vectors``, the first ones count; if fewer, random ones are
        added and warmed up.

        Returns:
            The names that ``state`` lacks and those it has in addition.

        Raises:
            TypeError: not such a dict.
            ValueError: a vector of the wrong shape, or one that is zero or not finite.
        """
        found, result = checkpoint.vectors_of(state, self._selection.matrices)
        self._initial.update({n: float(x) for n, x in state.get("initial", {}).items()})
        self._buckets.restart(found, warm=not result.missing)
        return result

    def __getstate__(self) -> dict[str, Any]:
        """Leave out addresses and attachments; copies and pickles carry the vectors."""
        state = self.__dict__.copy()
        del state["_buckets"], state["_attached"]
        b = self._buckets
        state["_buckets_arguments"] = (
            b.selection, b.backend, b.exponent, b.warmup, b.seed, b.r, b.further
        )  # fmt: skip
        state["_vectors"] = b.vectors()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        arguments, vectors = state.pop("_buckets_arguments"), state.pop("_vectors")
        self.__dict__.update(state)
        self._attached = []
        self._buckets = Buckets(*arguments, self._fill)
        self._buckets.known = vectors

    # ------------------------------------------------------------------------------ internals

    @property
    def _iterations(self) -> int:
        return 1 if self.n_power_iterations == "auto" else self.n_power_iterations

    def _ready(self) -> list[Bucket]:
        buckets = self._buckets.fresh()
        if self._strength_is_tensor:
            for bucket in buckets:
                self._fill_strength(bucket)
        return buckets

    def _fill(self, bucket: Bucket) -> None:
        """Write strength and target of a new bucket."""
        self._fill_strength(bucket)
        self._measure_initial()
        values = [
            self._initial[matrix.name] if target == "initial" else target
            for matrix, target in ((m, self._targets[m.name]) for m in bucket.plan.matrices)
        ]
        device_tables.fill(bucket.state.target, values)

    def _fill_strength(self, bucket: Bucket) -> None:
        values = self._strength
        if not self._strength_is_tensor:
            entries = (*bucket.plan.matrices, *bucket.plan.vectors)
            values = [self._strengths[entry.name] for entry in entries]
        device_tables.fill(bucket.state.strength, values)

    def _measure_initial(self) -> None:
        for matrix in self._selection.matrices:
            if self._targets[matrix.name] == "initial" and matrix.name not in self._initial:
                tensor = matrix.owner.get().detach()
                (self._initial[matrix.name],) = singular_values(
                    matrix, tensor, rtol=1e-4, backend=self._buckets.backend
                )


def _make_missing(bucket: Bucket, grads: list[torch.Tensor | None]) -> None:
    """Give every trainable parameter without a gradient one, and put it into ``grads``.

    While a CUDA graph is being captured they are in its memory, and replays start from zeros.
    """
    for i, tensor in enumerate(bucket.parameters):
        if grads[i] is None and tensor.requires_grad:
            with torch.inference_mode(False):  # which a gradient outlives
                tensor.grad = torch.zeros_like(tensor, requires_grad=False)
            grads[i] = local_of(tensor.grad)
    bucket.plan.bind_grads(grads)

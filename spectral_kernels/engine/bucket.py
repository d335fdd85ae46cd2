"""Buckets: a plan with its state and backend, and the operations of a step on them."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import nn

from ..backends.base import Backend
from ..backends.reference import jumped, ratios_of
from ..selection.matrices import Elementwise, Matrix, refs_of
from ..sharding import shards
from ..sharding.backend import ShardedBackend, check_ranks
from ..tables import device as device_tables
from ..tables.plan import Plan
from ..tables.schema import SLOT
from ..tables.state import Ratios, State
from .operators import search_again
from .traceable import Traceable, can_be_traced

# With n_power_iterations="auto", stale matrices (residual / sigma above TOLERANCE) get up to
# MAX_EXTRA_ITERATIONS per step. An estimate that is 1 % off has a residual / sigma of 1 to 3 %.
TOLERANCE, MAX_EXTRA_ITERATIONS = 0.01, 8
# A matrix whose residual / sigma is above JUMP, and JUMP_FACTOR times what it was in the step
# before, has been replaced: its vectors are those of other weights, and they are warmed up again.
# Optimizers' steps of usual sizes do not get there (Adam up to lr = 0.01: at most twice that of the
# step before, where it is above 0.3); a matrix [M, N] initialized again has about sqrt(N / M).
JUMP, JUMP_FACTOR = 0.3, 3.0
_requires_grad = operator.attrgetter("requires_grad")


class Bucket:
    """The parameters of one device and dtype: a plan with its state and backend.

    For sharded parameters the plan describes this rank's shards, and the state has the vectors of
    whole matrices. ``extra_iterations`` is the limit for stale matrices; ``warmup`` is the number
    of iterations for vectors that do not fit their matrix. ``idle`` has the indices of the
    parameters whose strength is the number 0, ``frozen`` those of the ones that do not require a
    gradient, whose strength is 0 while that lasts: they get no gradient of the penalty.
    """

    def __init__(
        self,
        plan: Plan,
        backend,
        exponent: float,
        extra_iterations: int = 0,
        warmup: int = 0,
        above: bool = False,
    ):
        self.plan, self.backend, self.extra_iterations = plan, backend, extra_iterations
        self.warmup = warmup
        self.is_sharded = isinstance(backend, ShardedBackend)
        self.state = State.allocate(backend.reduced if self.is_sharded else plan, exponent)
        self._parameters: list[torch.Tensor] | None = None
        self._placements: list[tuple | None] = []
        self.matrices = plan.matrices  # whole ones, where the plan has shards
        self.warm = self.measured = self._only_measured = self._captured = False
        self.idle: frozenset[int] = frozenset()
        self.frozen: frozenset[int] = frozenset()
        self._free = [True] * len(plan.refs)  # whether each parameter requires a gradient
        self._acts: torch.Tensor | None = None  # 0 for entries of frozen parameters, or else 1
        self.is_ahead = False  # v, s and v_next are already those of the next step
        # Whether the host can read sigmas without waiting for a GPU.
        self.on_host = plan.device.type == "cpu" and not backend.scalars_on_device
        self._kept: list = []  # targets that CUDA graphs read
        self._was_edited = False  # whether the weights had been edited before the last step
        self._ratios = Ratios(len(plan.matrices))
        self.traceable: Traceable | None = None  # what graphs read, where they need no operators
        self.set_shape(exponent, above)

    @classmethod
    def of(
        cls,
        matrices: Sequence[Matrix],
        elementwise: Sequence[Elementwise],
        parameters: Sequence[torch.Tensor],
        backend,
        exponent: float,
        r: int = 1,
        extra_iterations: int = 0,
        warmup: int = 0,
        above: bool = False,
    ) -> Bucket:
        """Return the bucket of ``parameters``, one per ref, all with the same shard axes."""
        if not any(map(shards.is_sharded, parameters)):
            plan = Plan(matrices, elementwise, parameters, r)
            return cls(plan, backend, exponent, extra_iterations, warmup, above)
        by_ref = dict(zip(refs_of(matrices, elementwise), parameters, strict=True))
        own = [shards.matrix_shard(matrix, by_ref[matrix.ref]) for matrix in matrices]
        if own:
            axes = own[0].shard_axes
        else:
            axes = shards.elementwise_axes(elementwise[0], by_ref[elementwise[0].ref])
        local = [shards.local_of(p) for p in parameters]
        plan = Plan([one.local for one in own], elementwise, local, r)
        backend = ShardedBackend(backend, plan, own, axes)
        found = cls(plan, backend, exponent, extra_iterations, warmup, above)
        found._parameters, found.matrices = list(parameters), list(matrices)
        found._placements = [shards.placement(p) for p in parameters]
        return found

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The parameters, one per ref; ``plan.tensors`` are this rank's shards of them."""
        return self.plan.tensors if self._parameters is None else self._parameters

    @property
    def kernels(self):
        """The backend that computes this rank's products."""
        return self.backend.inner if self.is_sharded else self.backend

    @kernels.setter
    def kernels(self, backend) -> None:
        if self.is_sharded:
            self.backend.inner = backend
        else:
            self.backend = backend

    def bind(self, parameters: Sequence[torch.Tensor]) -> bool:
        """Point the tables at ``parameters``; see ``Plan.bind_weights``."""
        if self.is_sharded:
            if not shards.same_placement(parameters, self._placements):
                return False
        elif shards.dtensor() in set(map(type, parameters)):
            return False
        else:
            return self.plan.bind_weights(parameters)
        self._parameters = list(parameters)
        return self.plan.bind_weights([shards.local_of(p) for p in parameters])

    def set_targets(self, values: Sequence[float | torch.Tensor | None]) -> None:
        """Replace the targets of elementwise parameters; see ``Plan.set_targets``.

        A tensor has the numbers of the whole parameter.
        """
        plan = self.plan
        if self.is_sharded:
            values = [
                shards.local_part(entry.name, self.parameters[ref], value)
                if isinstance(value, torch.Tensor) else value
                for entry, ref, value
                in zip(plan.elementwise, plan.elementwise_ref, values, strict=True)
            ]  # fmt: skip
        if self._is_in_graphs():
            self._kept.append(plan.targets)
        plan.set_targets(values)
        self.state.targets = self.state.plan.targets = plan.targets
        self._update_options()

    def set_shape(self, exponent: float, above: bool) -> None:
        """Replace the exponent k, and whether the penalty has one side; see ``State.above``."""
        for tables in (self.plan, self.state.plan):  # states to come
            tables.header[SLOT["above"]] = above
        self.state.set_exponent(exponent)
        self.state.set_above(above)
        self._update_options()

    def make_traceable(self, backend: str | Backend) -> None:
        """Set ``traceable``, if graphs of torch.compile can do without operators.

        A ``backend`` other than "auto" does the work in graphs too.
        """
        if backend == "auto" and not self.is_sharded and can_be_traced(self.plan):
            state = self.state
            own = self.plan, self._ratios.values, self.warmup, state.exponent, state.above
            self.traceable = self.traceable or Traceable(*own)

    def _update_options(self) -> None:
        """Have graphs of torch.compile read the present exponent, side and targets."""
        if self.traceable is not None:
            self.traceable.set_options(self.plan, self.state.exponent, self.state.above)

    def sum_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of ``x`` over the ranks that hold other rows."""
        return self.backend.sum_rows(x) if self.is_sharded else x

    @property
    def ratios_address(self) -> int:
        """Address of the residual / sigma of the last step; 0: jumps are not looked for."""
        return self._ratios.address if self._sees_jumps else 0

    @property
    def _sees_jumps(self) -> bool:
        return self.on_host and self.warmup > 0 and not self.extra_iterations

    def iterate(self, n: int) -> None:
        """Run ``n`` power iterations; ``state`` then holds v, s and sigma of the last one."""
        for _ in range(n):
            self._products()
            self.backend.normalize(self.plan, self.state)
        self._catch_up()

    def put_vectors(self, i: int, v: torch.Tensor) -> None:
        """Let matrix ``i`` go on from ``v`` [r, N], in memory order."""
        for vectors in (self.state.v_next, self.state.v):  # an interrupted step starts from v
            self.state.columns(i, vectors).copy_(v)

    def warm_up(self) -> None:
        """Run the iterations of the warm-up."""
        self.iterate(self.warmup)
        self.warm = True
        if self._sees_jumps:
            self._ratios.values.copy_(ratios_of(self.state))

    def expect_jumps(self) -> None:
        """Warm up matrices with a large residual at the next step: they may have been replaced."""
        self._ratios.reset()

    def advance(self, n: int) -> None:
        """Run the ``n`` power iterations of a step, and more for matrices that were replaced."""
        self.iterate(n)
        self.recover()

    def looks_other_frozen(self) -> bool:
        """See which parameters are frozen; return whether others are than before.

        Only a Parameter is: in functional_call, other tensors may stand for it.
        """
        free = [*map(_requires_grad, self.parameters)]
        if free == self._free:
            return False
        frozen = [not is_free and isinstance(p, nn.Parameter)
                  for p, is_free in zip(self.parameters, free, strict=True)]  # fmt: skip
        self.frozen, self._free = frozenset(i for i, is_one in enumerate(frozen) if is_one), free
        self._acts = None
        if self.frozen:
            refs = *self.plan.matrix_ref.tolist(), *self.plan.elementwise_ref.tolist()
            self._acts = torch.empty_like(self.state.strength)
            device_tables.fill(self._acts, [float(not frozen[ref]) for ref in refs])
        return True

    def leave_out_frozen(self, strength: torch.Tensor) -> None:
        """Set those elements of ``strength``, one per entry, to 0 that are of frozen parameters."""
        if self._acts is not None:
            strength.mul_(self._acts)

    @property
    def left_out(self) -> frozenset[int]:
        """Indices of the parameters that get no gradient of the penalty."""
        return self.idle | self.frozen

    def grads(self) -> list[torch.Tensor | None]:
        """Return this rank's shard of every parameter's ``.grad``; None for those left out."""
        out = self.left_out
        if not self.is_sharded:
            found = [p.grad for p in self.parameters]
            return [None if i in out else x for i, x in enumerate(found)] if out else found
        names = [ref.name for ref in self.plan.refs]
        return [None if i in out else shards.local_grad(names[i], p)
                for i, p in enumerate(self.parameters)]  # fmt: skip

    def make_missing_grads(self, grads: list[torch.Tensor | None]) -> None:
        """Create the missing gradients of trainable, not idle parameters in ``grads``.

        Those created while a CUDA graph is being captured are in its memory, and each replay
        starts them from zero.
        """
        if type(None) in set(map(type, grads)):
            self.create_missing_grads(grads)
            self.plan.bind_grads(grads)

    def create_missing_grads(self, grads: list[torch.Tensor | None]) -> None:
        """See :meth:`make_missing_grads`; the tables do not have the new ones yet."""
        for i, tensor in enumerate(self.parameters):
            if grads[i] is None and tensor.requires_grad and i not in self.idle:
                with torch.inference_mode(False):  # the gradient outlives it
                    tensor.grad = torch.zeros_like(tensor, requires_grad=False)
                grads[i] = shards.local_of(tensor.grad)

    def begin(self, n: int) -> None:
        """Run ``n`` power iterations; :meth:`finish` completes the last one.

        Meanwhile its sums over ranks are in flight, together with those of other buckets.
        """
        self.iterate(n if self.extra_iterations else n - 1)
        if not self.extra_iterations:
            self._products()

    def finish(self, n: int, grads) -> None:
        """Complete the ``n`` iterations of :meth:`begin`, and add their gradient to ``grads``."""
        if self._sees_jumps:
            self.backend.normalize(self.plan, self.state)
            self.recover()
            self.backend.rank_one(self.plan, self.state, grads, True)
        elif self.extra_iterations:
            self.add_gradient(self.state, grads, accumulate=True)
        else:
            self.backend.finish(self.plan, self.state, grads, accumulate=True)
        self.count_edits(grads)
        self.settle(n)

    def finish_after_jump(self, grads) -> None:
        """Complete a step whose vectors, after its power iteration, are known to have jumped."""
        self.warm_up_jumped()
        self.backend.rank_one(self.plan, self.state, grads, True)
        self.count_edits(grads)

    def count_edits(self, grads) -> None:
        """Tell autograd that gradients have changed, should a graph have saved one of them."""
        if self.is_sharded:
            grads = [p.grad for i, p in enumerate(self.parameters) if i not in self.left_out]
        present = [grad for grad in grads if grad is not None]
        if torch.is_inference_mode_enabled():  # its own tensors have no version
            present = [grad for grad in present if not grad.is_inference()]
        torch.autograd.graph.increment_version(present)

    def settle(self, n: int) -> None:
        """Copy the next v to where it was before ``n`` iterations, if CUDA graphs read it there.

        A CUDA graph replays fixed addresses, and each replay continues from the one before it.
        ``v`` may then hold the next vectors too.
        """
        if self._is_in_graphs() and n % 2:
            self.state.v.copy_(self.state.v_next)
            self.state.swap()

    def _products(self) -> None:
        if self.state.tolerance:  # extra iterations were interrupted
            self.state.set_tolerance(0)
        self.state.swap()
        try:
            self.backend.gram_matvec(self.plan, self.state)
        except BaseException:
            self.state.swap()
            raise
        self.measured, self._only_measured = True, False

    def _catch_up(self) -> None:
        """Run extra iterations for stale matrices.

        On a GPU the kernels decide which these are, and all calls are made, so that the host does
        not wait.
        """
        if self.extra_iterations:
            self._iterate_stale(self.extra_iterations)

    def _iterate_stale(self, most: int) -> None:
        state, device = self.state, self.plan.device
        on_host = device.type == "cpu" and device_tables.shares_memory(device)
        try:
            state.set_tolerance(TOLERANCE)
            for _ in range(most):
                if on_host and not bool((state.residual > TOLERANCE * state.sigma).any()):
                    break
                self.backend.gram_matvec(self.plan, state)
                self.backend.normalize(self.plan, state)
        finally:
            state.set_tolerance(0)

    def recover(self) -> None:
        """Warm up the vectors of matrices whose residual has jumped."""
        if not self._sees_jumps:
            return
        self._ratios.n_steps += 1
        if self.backend.jumps(self.state, self._ratios, JUMP, JUMP_FACTOR):
            self.warm_up_jumped()

    def warm_up_jumped(self) -> None:
        """Warm up the vectors that have jumped from what they were in the step before."""
        have_jumped = jumped(ratios_of(self.state), self._ratios.values, JUMP, JUMP_FACTOR)
        self._warm_up_again(self._ratios.due(have_jumped))
        self._ratios.values.copy_(ratios_of(self.state))

    def _warm_up_again(self, is_new: torch.Tensor) -> None:
        """Run the warm-up for some matrices."""
        residual = self.state.residual
        kept = residual.clone()
        if self.plan.operators is not None:
            search_again(self, torch.where(is_new, torch.nan, torch.inf))
        residual.masked_fill_(~is_new, 0)  # the others are not stale
        self._iterate_stale(self.warmup)
        residual.copy_(torch.where(is_new, residual, kept))

    def look_ahead(self, changed: bool) -> None:
        """Bring s, sigma and v_next up to date with the weights.

        Matrices that were replaced are warmed up; on a GPU, where the host does not know whether
        there are any, that is left out if the weights had been edited before the last step, too.

        Args:
            changed: whether the weights have changed since the last step.
        """
        if not self.is_ahead:
            self.advance(1)
            self.is_ahead = True
        elif changed:
            before = ratios_of(self.state) if self._warms_up_unseen() else None
            self.backend.gram_matvec(self.plan, self.state)
            self.backend.normalize(self.plan, self.state)
            self.recover()
            if before is not None:
                now = ratios_of(self.state)
                self._warm_up_again(jumped(now, before, JUMP, JUMP_FACTOR))
        self._was_edited = changed

    def _warms_up_unseen(self) -> bool:
        """Return whether kernels on a GPU are to look for matrices that an edit has replaced."""
        if self.on_host or self.extra_iterations or not self.warmup:
            return False
        return not (self._was_edited or self._is_in_graphs())

    def after_update(self) -> None:
        """Finish the iteration whose products an optimizer's step has computed with ``v_next``."""
        state = self.state
        state.swap()
        self.backend.normalize(self.plan, state)
        self._catch_up()
        self.recover()
        if self._is_in_graphs():  # as in settle
            own = state.v.clone()
            state.v.copy_(state.v_next)
            state.v_next.copy_(own)
            state.swap()
        self.is_ahead = True

    def _is_in_graphs(self) -> bool:
        """Return whether a CUDA graph, captured or being captured, iterates these vectors."""
        self._captured = self._captured or device_tables.is_capturing(self.plan.device)
        return self._captured

    def measure(self) -> None:
        """Compute s, sigma and residual if no iteration has yet; ``v_next`` does not change."""
        if not self.measured:
            self.iterate(1)
            self.state.swap()
            self._only_measured = True

    @property
    def v_of_s(self) -> torch.Tensor:
        """The flat buffer of vectors that s was computed from."""
        return self.state.v_next if self._only_measured else self.state.v

    def check_ranks(self) -> None:
        """See ``SpectralRegularizer.check_ranks``."""
        plan, state = self.plan, self.state
        names = [entry.name for entry in (*plan.matrices, *plan.elementwise)]
        vectors = [state.columns(i, state.v_next) for i in range(len(plan.matrices))]
        targets = state.strength.new_zeros(len(plan.elementwise))
        for i, own in enumerate(() if self.is_sharded else plan.targets):
            if own is not None:
                targets[i] = own.sum()
        coefficients = torch.stack((state.strength, torch.cat((state.target, targets))), 1)
        axes = self.backend.shard_axes.mesh if self.is_sharded else ()
        check_ranks(names, vectors, coefficients, axes)

    def evaluated(self, state: State | None = None) -> State:
        """Return a state with sigma and penalty at ``v_next``, of ``state`` if that is given."""
        state = (state or self.state).evaluation()
        self.backend.gram_matvec(self.plan, state)
        self.backend.normalize(self.plan, state)
        return state

    def value(self, state: State) -> torch.Tensor:
        """Return the sum of strength * R, 0-d, in the dtype of the state."""
        return torch.dot(state.strength, state.raw_penalty)

    def add_gradient(self, state: State, grads, accumulate: bool) -> None:
        """Add the gradient at ``state`` to ``grads``, bound to the plan, or overwrite them."""
        with self.plan.pulled_to(state.targets):
            self.backend.rank_one(self.plan, state, grads, accumulate)


def add_gradients(
    buckets: Sequence[Bucket], n: int, scale: float | torch.Tensor | None = None
) -> None:
    """Run ``n`` power iterations of all buckets, and add their gradients to every ``.grad``.

    Nothing is changed before all gradients are known to be usable.
    """
    grads = [bucket.grads() for bucket in buckets]
    for bucket, own in zip(buckets, grads, strict=True):
        bucket.plan.bind_grads(own)
    for bucket, own in zip(buckets, grads, strict=True):
        bucket.make_missing_grads(own)
        bucket.state.set_scale(scale)
    run_steps(buckets, grads, n)


def run_steps(buckets: Sequence[Bucket], grads: Sequence[list], n: int) -> None:
    """Run ``n`` power iterations of buckets that are bound to ``grads``, and add their gradients.

    Sums over ranks of one bucket are in flight while others begin.
    """
    for bucket in buckets:
        bucket.begin(n)
    for bucket, own in zip(buckets, grads, strict=True):
        bucket.finish(n, own)

"""One plan with its state and its backend: what a step does with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..selection.matrices import Elementwise, Matrix
from ..sharding import shards
from ..sharding.backend import ShardedBackend, check_ranks
from ..tables import device as device_tables
from ..tables.plan import Plan
from ..tables.state import State

# With "auto" power iterations, those matrices whose residual / sigma is above TOLERANCE get up to
# MAX_EXTRA_ITERATIONS more per step. An estimate that is off by 1 % has a residual of 1 to 3 %.
TOLERANCE, MAX_EXTRA_ITERATIONS = 0.01, 8


class Bucket:
    """One plan with its state and its backend, and how many extra iterations it may run.

    The plan is about what this rank has of the ``parameters``, the state about whole matrices.
    """

    def __init__(self, plan: Plan, backend, exponent: float, extra_iterations: int = 0):
        self.plan, self.backend, self.extra_iterations = plan, backend, extra_iterations
        self.is_sharded = isinstance(backend, ShardedBackend)
        self.state = State.allocate(backend.reduced if self.is_sharded else plan, exponent)
        self._parameters: list[torch.Tensor] | None = None
        self._placements: list[tuple | None] = []
        self.warm = self.measured = self._captured = False
        self.is_ahead = False  # v, s and v_next belong to the next step already, weights unchanged

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
    ) -> Bucket:
        """Return the bucket of some parameters, one per parameter, all of them axes alike."""
        if not any(map(shards.is_sharded, parameters)):
            return cls(
                Plan(matrices, elementwise, parameters, r), backend, exponent, extra_iterations
            )
        refs = list(dict.fromkeys(x.ref for x in (*matrices, *elementwise)))
        by_ref = dict(zip(refs, parameters, strict=True))
        own = [shards.matrix_shard(matrix, by_ref[matrix.ref]) for matrix in matrices]
        if own:
            axes = own[0].shard_axes
        else:
            axes = shards.elementwise_axes(elementwise[0], by_ref[elementwise[0].ref])
        local = [shards.local_of(p) for p in parameters]
        plan = Plan([one.local for one in own], elementwise, local, r)
        found = cls(plan, ShardedBackend(backend, plan, own, axes), exponent, extra_iterations)
        found._parameters = list(parameters)
        found._placements = [shards.placement(p) for p in parameters]
        return found

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The parameter of every parameter; ``plan.tensors`` are what this rank has of them."""
        return self.plan.tensors if self._parameters is None else self._parameters

    @property
    def kernels(self):
        """The backend of this rank's products."""
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
        elif shards.DTensor in set(map(type, parameters)):
            return False
        else:
            return self.plan.bind_weights(parameters)
        self._parameters = list(parameters)
        return self.plan.bind_weights([shards.local_of(p) for p in parameters])

    @property
    def local(self) -> State:
        """The state as the plan sees it."""
        return self.backend.local(self.plan, self.state) if self.is_sharded else self.state

    def sum_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of ``x`` over the ranks that have other rows."""
        return self.backend.sum_rows(x) if self.is_sharded else x

    def iterate(self, n: int) -> None:
        """Run ``n`` power iterations; ``state`` then holds s, sigma of the last and its v."""
        for _ in range(n):
            self._products()
            self.backend.normalize(self.plan, self.state)
        self._catch_up()

    def grads(self) -> list[torch.Tensor | None]:
        """Return what this rank has of every parameter's ``.grad``."""
        if not self.is_sharded:
            return [parameter.grad for parameter in self.parameters]
        return [shards.local_grad(o.name, p)
                for o, p in zip(self.plan.refs, self.parameters, strict=True)]  # fmt: skip

    def make_missing_grads(self, grads: list[torch.Tensor | None]) -> None:
        """Give every trainable parameter without a gradient one, and put it into ``grads``.

        While a CUDA graph is being captured they are in its memory, and replays start from zeros.
        """
        if type(None) not in set(map(type, grads)):
            return
        for i, tensor in enumerate(self.parameters):
            if grads[i] is None and tensor.requires_grad:
                with torch.inference_mode(False):  # which a gradient outlives
                    tensor.grad = torch.zeros_like(tensor, requires_grad=False)
                grads[i] = shards.local_of(tensor.grad)
        self.plan.bind_grads(grads)

    def begin(self, n: int) -> None:
        """Run ``n`` power iterations, the last one to where sums over ranks are on their way."""
        self.iterate(n if self.extra_iterations else n - 1)
        if not self.extra_iterations:
            self._products()

    def finish(self, n: int, grads) -> None:
        """Add the gradient of the last of ``n`` iterations that have begun to ``grads``."""
        if self.extra_iterations:
            self.add_gradient(self.state, grads, accumulate=True)
        else:
            self.backend.finish(self.plan, self.state, grads, accumulate=True)
        self.settle(n)

    def settle(self, n: int) -> None:
        """Have the next vectors where CUDA graphs read them, whose replays go on from each other.

        That is where they were before ``n`` iterations. ``v`` is then the next one too.
        """
        if self._is_in_graphs() and n % 2:
            self.state.v.copy_(self.state.v_next)
            self.state.swap()

    def _products(self) -> None:
        self.state.swap()
        self.backend.gram_matvec(self.plan, self.state)
        self.measured = True

    def _catch_up(self) -> None:
        """Run extra iterations for matrices that are stale.

        On a GPU the kernels tell which these are, and all calls are made, so that nothing waits.
        """
        if not self.extra_iterations:
            return
        state = self.state
        state.set_tolerance(TOLERANCE)
        for _ in range(self.extra_iterations):
            on_host = self.plan.device.type == "cpu"
            if on_host and not bool((state.residual > TOLERANCE * state.sigma).any()):
                break
            self.backend.gram_matvec(self.plan, state)
            self.backend.normalize(self.plan, state)
        state.set_tolerance(0)

    def look_ahead(self, changed: bool) -> None:
        """Have s, sigma and v_next of the weights as they are, ``changed`` from outside or not."""
        if not self.is_ahead:
            self.iterate(1)
            self.is_ahead = True
        elif changed:
            self.backend.gram_matvec(self.plan, self.state)
            self.backend.normalize(self.plan, self.state)

    def after_update(self) -> None:
        """Go on after an optimizer's step, which has left the products with ``v_next``."""
        state = self.state
        state.swap()
        self.backend.normalize(self.plan, state)
        self._catch_up()
        if self._is_in_graphs():  # as in settle
            own = state.v.clone()
            state.v.copy_(state.v_next)
            state.v_next.copy_(own)
            state.swap()

    def _is_in_graphs(self) -> bool:
        """Tell whether CUDA graphs iterate these vectors, one that is being captured among them."""
        self._captured = self._captured or device_tables.is_capturing(self.plan.device)
        return self._captured

    def measure(self) -> None:
        """Fill s, sigma and residual if no iteration has; ``v_next`` stays where it is."""
        if not self.measured:
            self.iterate(1)
            self.state.swap()

    def check_ranks(self) -> None:
        """See ``SpectralRegularizer.check_ranks``."""
        names = [matrix.name for matrix in self.plan.matrices]
        vectors = [self.state.columns(i, self.state.v_next) for i in range(len(names))]
        if names:
            check_ranks(names, vectors, self.backend.shard_axes.mesh if self.is_sharded else ())

    def evaluated(self, state: State | None = None) -> State:
        """Return sigma and penalty at the vectors the next iteration would use, or at ``state``."""
        state = (state or self.state).evaluation()
        self.backend.gram_matvec(self.plan, state)
        self.backend.normalize(self.plan, state)
        return state

    def value(self, state: State) -> torch.Tensor:
        """Return sum of strength * R, 0-d, in the dtype of the state."""
        return torch.dot(state.strength, state.raw_penalty)

    def add_gradient(self, state: State, grads, accumulate: bool) -> None:
        """Add the gradient at ``state`` to ``grads``, which the plan is bound to, or overwrite."""
        self.backend.rank_one(self.plan, state, grads, accumulate)

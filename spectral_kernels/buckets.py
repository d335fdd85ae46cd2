"""The plans of a selection, one per device and dtype, kept in step with the parameters."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence

import torch

from . import backends, reference, shards
from .distributed import Sharded, check_ranks
from .plan import Plan
from .selection import Matrix, Selection, Vector
from .shards import Spread
from .state import State

# With "auto" power iterations, those matrices whose residual / sigma is above TOLERANCE get up to
# MOST_FURTHER further ones per step. An estimate that is off by 1 % has a residual of 1 to 3 %.
TOLERANCE, MOST_FURTHER = 0.01, 8


class Bucket:
    """One plan with its state and its backend, and how many ``further`` iterations may be run.

    The plan is about what this rank has of the ``parameters``, the state about whole matrices.
    """

    def __init__(self, plan: Plan, backend, exponent: float, further: int = 0):
        self.plan, self.backend, self.further = plan, backend, further
        self.is_sharded = isinstance(backend, Sharded)
        self.state = State.fresh(backend.whole if self.is_sharded else plan, exponent)
        self._parameters: list[torch.Tensor] | None = None
        self._placements: list[tuple | None] = []
        self.warm = self.measured = False
        self.ahead = False  # v, s and v_next belong to the next step already, weights unchanged

    @classmethod
    def of(
        cls,
        matrices: Sequence[Matrix],
        vectors: Sequence[Vector],
        parameters: Sequence[torch.Tensor],
        backend,
        exponent: float,
        r: int = 1,
        further: int = 0,
    ) -> Bucket:
        """Return the bucket of some parameters, one per owner, all of them spread alike."""
        if not any(map(shards.is_sharded, parameters)):
            return cls(Plan(matrices, vectors, parameters, r), backend, exponent, further)
        owners = list(dict.fromkeys(x.owner for x in (*matrices, *vectors)))
        by_owner = dict(zip(owners, parameters, strict=True))
        held = [shards.held(matrix, by_owner[matrix.owner]) for matrix in matrices]
        if held:
            spread = held[0].spread
        else:
            spread = shards.spread_of_vector(vectors[0], by_owner[vectors[0].owner])
        local = [shards.local_of(p) for p in parameters]
        plan = Plan([one.local for one in held], vectors, local, r)
        found = cls(plan, Sharded(backend, plan, held, spread), exponent, further)
        found._parameters = list(parameters)
        found._placements = [shards.placement(p) for p in parameters]
        return found

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The parameter of every owner; ``plan.tensors`` are what this rank has of them."""
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
        """Return what this rank has of every owner's ``.grad``."""
        if not self.is_sharded:
            return [parameter.grad for parameter in self.parameters]
        return [shards.local_grad(o.name, p)
                for o, p in zip(self.plan.owners, self.parameters, strict=True)]  # fmt: skip

    def begin(self, n: int) -> None:
        """Run ``n`` power iterations, the last one to where sums over ranks are on their way."""
        self.iterate(n if self.further else n - 1)
        if not self.further:
            self._products()

    def finish(self, n: int, grads) -> None:
        """Add the gradient of the last of ``n`` iterations that have begun to ``grads``."""
        if self.further:
            self.add_gradient(self.state, grads, accumulate=True)
        else:
            self.backend.finish(self.plan, self.state, grads, accumulate=True)
        if n % 2 and self._capturing():
            # Replays read the vectors where this capture has read them.
            self.state.v.copy_(self.state.v_next)
            self.state.swap()

    def _products(self) -> None:
        self.state.swap()
        self.backend.gram_matvec(self.plan, self.state)
        self.measured = True

    def _catch_up(self) -> None:
        """Run further iterations for matrices that are stale.

        On a GPU the kernels tell which these are, and all calls are made, so that nothing waits.
        """
        if not self.further:
            return
        state = self.state
        state.set_tolerance(TOLERANCE)
        for _ in range(self.further):
            on_host = self.plan.device.type == "cpu"
            if on_host and not bool((state.residual > TOLERANCE * state.sigma).any()):
                break
            self.backend.gram_matvec(self.plan, state)
            self.backend.normalize(self.plan, state)
        state.set_tolerance(0)

    def look_ahead(self, changed: bool) -> None:
        """Have s, sigma and v_next of the weights as they are, ``changed`` from outside or not."""
        if not self.ahead:
            self.iterate(1)
            self.ahead = True
        elif changed:
            self.backend.gram_matvec(self.plan, self.state)
            self.backend.normalize(self.plan, self.state)

    def stepped(self) -> None:
        """Go on after an optimizer's step, which has left the products with ``v_next``."""
        state = self.state
        state.swap()
        self.backend.normalize(self.plan, state)
        self._catch_up()
        if self._capturing():
            # Replays read the vectors where this capture has read them.
            held = state.v.clone()
            state.v.copy_(state.v_next)
            state.v_next.copy_(held)
            state.swap()

    def _capturing(self) -> bool:
        return self.plan.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

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
            check_ranks(names, vectors, self.backend.spread.mesh if self.is_sharded else ())

    def evaluated(self) -> State:
        """Return sigma and penalty at the vectors the next iteration would use."""
        state = self.state.evaluation()
        self.backend.gram_matvec(self.plan, state)
        self.backend.normalize(self.plan, state)
        return state

    def value(self, state: State) -> torch.Tensor:
        """Return sum of strength * R, 0-d, in the dtype of the state."""
        return torch.dot(state.strength, state.penalty)

    def add_gradient(self, state: State, grads, accumulate: bool) -> None:
        """Add the gradient at ``state`` to ``grads``, which the plan is bound to, or overwrite."""
        self.backend.rank_one(self.plan, state, grads, accumulate)


class Buckets:
    """All buckets of a selection, built at first use and rebuilt when parameters change.

    Args:
        selection: matrices and vectors.
        backend: name of the backend.
        exponent: k.
        warmup: iterations for vectors that start from random numbers.
        seed: of those random numbers; each matrix has its own stream, keyed by its name.
        r: vectors per matrix.
        further: iterations at most for stale matrices, after every other.
        fill: called with each new bucket, to write strength and target.
    """

    def __init__(
        self,
        selection: Selection,
        backend: str,
        exponent: float,
        warmup: int,
        seed: int,
        r: int,
        further: int,
        fill: Callable[[Bucket], None],
    ):
        self.selection, self.backend, self.exponent = selection, backend, exponent
        self.warmup, self.seed, self.fill = warmup, seed, fill
        self.r, self.further = r, further
        self.buckets: list[Bucket] | None = None
        self._indices: list[list[int]] = []  # of each bucket's owners
        self._sharded: dict[int, torch.Tensor] = {}  # parameters that were DTensors last
        self._warm = True  # what is known needs no warm-up
        self._managed: set | None = None  # modules that FSDP2 looks after
        self.known: dict[str, torch.Tensor] = {}  # vectors to start from, in logical order
        # Of each owner, in their order, what it has first.
        self._first = {x.owner: x for x in (*selection.vectors[::-1], *selection.matrices[::-1])}
        self.owners = list(
            dict.fromkeys(x.owner for x in (*selection.matrices, *selection.vectors))
        )
        self._slots = [
            ({o.attribute: o.tensor}, o.attribute)
            if o.module is None
            else (o.module._parameters, o.attribute)
            for o in self.owners
        ]

    def tensors(self) -> list[torch.Tensor]:
        """Return the parameter of every owner as it is now."""
        try:
            tensors = [slot[key] for slot, key in self._slots]
        except KeyError:
            tensors = [None]
        kinds = set(map(type, tensors))
        if type(None) in kinds:
            tensors = [owner.get() for owner in self.owners]
        if self._sharded or shards.DTensor in kinds:
            tensors = [self._settled(i, tensor) for i, tensor in enumerate(tensors)]
        return tensors

    def _settled(self, i: int, tensor: torch.Tensor) -> torch.Tensor:
        """Return parameter ``i``: its shards where FSDP2 shows the gathered one for a while."""
        known = self._sharded.get(i)
        if known is not None and shards.is_gathered(tensor, known):
            if self._managed is None:
                self._managed = shards.managed(self.selection.root)
            if self.owners[i].module in self._managed:
                return known
        if shards.is_sharded(tensor) and tensor is not known:
            self._sharded[i], self._managed = tensor, None
        elif not shards.is_sharded(tensor):
            self._sharded.pop(i, None)
        return tensor

    def fresh(self) -> list[Bucket]:
        """Return buckets whose tables point at the parameters of this moment, warmed up."""
        tensors = self.tensors()
        if self.buckets is not None:
            for bucket, indices in zip(self.buckets, self._indices, strict=True):
                if not bucket.bind([tensors[i] for i in indices]):
                    self.known = self.vectors()
                    self.buckets = None
                    break
        if self.buckets is None:
            # The state outlives an inference mode in which it happens to be made.
            with torch.inference_mode(False):
                self._build(tensors)
        for bucket in self.buckets:
            if not bucket.warm:
                bucket.iterate(self.warmup)
                bucket.warm = True
        return self.buckets

    def _build(self, tensors: list[torch.Tensor]) -> None:
        place = {owner: i for i, owner in enumerate(self.owners)}
        groups: dict[tuple, list[int]] = {}
        for i, (owner, tensor) in enumerate(zip(self.owners, tensors, strict=True)):
            if tensor.is_meta:
                raise RuntimeError(
                    f"parameter {owner.name!r} is on the meta device: materialize the model before "
                    "the regularizer is first used"
                )
            groups.setdefault((tensor.device, tensor.dtype, self._spread(i, tensor)), []).append(i)
        buckets, orders = [], []
        for (device, dtype, _), members in groups.items():
            inside = set(members)
            matrices = [m for m in self.selection.matrices if place[m.owner] in inside]
            vectors = [v for v in self.selection.vectors if place[v.owner] in inside]
            order = list(dict.fromkeys(place[x.owner] for x in (*matrices, *vectors)))
            backend = backends.choose(self.backend, device, dtype, self.r)
            own = [tensors[i] for i in order]
            bucket = Bucket.of(matrices, vectors, own, backend, self.exponent, self.r, self.further)
            bucket.warm = self._start(bucket) and self._warm
            if bucket.is_sharded:
                bucket.backend.agree(bucket.state.v_next)
            self.fill(bucket)
            buckets.append(bucket)
            orders.append(order)
        self.buckets, self._indices, self.known, self._warm = buckets, orders, {}, True

    def _spread(self, i: int, parameter: torch.Tensor) -> Spread:
        """Return over which axes what owner ``i`` has is spread."""
        if not shards.is_sharded(parameter):
            return Spread()
        first = self._first[self.owners[i]]
        if isinstance(first, Matrix):
            return shards.held(first, parameter).spread
        return shards.spread_of_vector(first, parameter)

    def _start(self, bucket: Bucket) -> bool:
        """Write the vectors to start from; tell whether all of them were known."""
        state, all_known = bucket.state, True
        for i, (matrix, layout) in enumerate(
            zip(bucket.plan.matrices, state.plan.layouts, strict=True)
        ):
            v = self.known.get(matrix.name)
            if v is not None and layout.side == "left" and bucket.is_sharded:
                v = None  # its left vectors would take a sum over the ranks
            n = layout.rows if layout.side == "left" else layout.cols
            if v is not None and v.shape[-1] == n:
                v = layout.from_logical(v[: self.r].to(state.v))
                if layout.side == "left":
                    v = _unit(v @ reference.matrix(bucket.plan, i))
            else:
                v = None
            if v is None or len(v) < self.r:
                all_known = False
                random = layout.from_logical(self._random(matrix.name, layout.cols))
                if v is not None:
                    random[: len(v)] = v
                v = orthonormal(random)
            state.columns(i, state.v_next).copy_(v)
        return all_known

    def _random(self, name: str, cols: int) -> torch.Tensor:
        # torch's generator on a CPU has 32 bits of seed.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{name}".encode()))
        shape = self.r, cols
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    def vectors(self) -> dict[str, torch.Tensor]:
        """Return right singular vectors to start from again: name -> [r, N], copies.

        They do not depend on how the weight lies in memory. A zero matrix that is stored column by
        column has none.
        """
        found = dict(self.known)
        for bucket, indices in zip(self.buckets or (), self._indices, strict=False):
            layouts, state = bucket.state.plan.layouts, bucket.state
            if bucket.is_sharded:  # rows of s, left vectors, are on other ranks
                layouts = [None if x.side == "left" else x for x in layouts]
            elif not bucket.measured and any(layout.side == "left" for layout in layouts):
                # s has to be computed, from weights that may have moved since the last use.
                tensors = self.tensors()
                if bucket.bind([tensors[i] for i in indices]):
                    bucket.measure()
            for i, (matrix, layout) in enumerate(zip(bucket.plan.matrices, layouts, strict=True)):
                if layout is None:
                    continue
                is_left = layout.side == "left"
                right = state.v if bucket.ahead else state.v_next
                v = _unit(state.rows(i)) if is_left else state.columns(i, right)
                if v is not None:
                    found[matrix.name] = layout.to_logical(v).clone()
        return found

    def restart(self, vectors: Mapping[str, torch.Tensor], warm: bool) -> None:
        """Start from ``vectors`` at the next use; unless ``warm``, with a warm-up."""
        self.known = {**self.vectors(), **vectors}
        self.buckets, self._warm = None, warm


def orthonormal(v: torch.Tensor) -> torch.Tensor:
    """Return an orthonormal basis of the rows of ``v`` [r, N]; one row is divided by its norm."""
    if len(v) == 1:
        return (v / torch.linalg.vector_norm(v.double())).to(v.dtype)
    return reference.orthonormal_rows(v).to(v.dtype)


def _unit(v: torch.Tensor) -> torch.Tensor | None:
    """Return an orthonormal basis of ``v`` [r, N], or None where its first row is zero."""
    first = torch.linalg.vector_norm(v[0].double())
    good = bool(torch.isfinite(v).all() & (first > 0) & torch.isfinite(first))
    return orthonormal(v) if good else None

"""The buckets of a model, one per device, dtype, shard axes and part; rebuilt when those change.

A part is what one of several optimizers holds, see ``ModelBuckets.divide``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch

from ..backends import choice
from ..selection import transforms
from ..selection.changes import Followed, aligned, warn_of_computed, warn_of_gone
from ..selection.matrices import Matrix, Selection, refs_of
from ..selection.parameters import Computed
from ..sharding import shards
from ..sharding.shards import ShardAxes
from .bucket import Bucket, add_gradients
from .coefficients import Coefficients, Target
from .loading import NOTHING_LOADED, Loaded
from .operators import SearchClock
from .prepared import Preparation, PreparedPenalty
from .settings import Settings, check_one_vector
from .shares import ShareWatch
from .stability import StabilityWatch
from .vectors import Start, left_of, right_of

if TYPE_CHECKING:
    from .attach.once import Mark, StepPenalty


class ModelBuckets:
    """All buckets of a selection, built at first use and rebuilt when parameters change.

    Args:
        selection: matrices and elementwise parameters.
        settings: settings of the power iteration.
        coefficients: strength and target of each.
    """

    by_number: ClassVar[WeakValueDictionary[int, ModelBuckets]] = WeakValueDictionary()
    _some_traced: ClassVar[bool] = False
    _numbers = count(2)  # compilers specialize on 0 and 1

    def __init__(self, selection: Selection, settings: Settings, coefficients: Coefficients):
        check_one_vector(selection, settings.n_vectors)
        self.selection, self.settings, self.coefficients = selection, settings, coefficients
        # One step, reading or change at a time: threads wait for each other.
        self.lock = threading.RLock()
        self.iterations = settings.iterations  # here, for compilers
        self.number = next(self._numbers)
        self.by_number[self.number] = self
        self._traced = False  # whether it is in a compiled graph
        self.mark: Mark | None = None  # the last gradient of the penalty outside of a step
        self.in_steps: list[StepPenalty] = []  # which optimizers' steps add the penalty
        # The parameters that were there when these last added it.
        self.held: WeakKeyDictionary[StepPenalty, list[torch.Tensor]] = WeakKeyDictionary()
        self.watch, self.shares, self.searches = StabilityWatch(), ShareWatch(), SearchClock()
        self.preparation: Preparation[PreparedPenalty] = Preparation()
        self.at_next_build: Callable[[ModelBuckets], None] | None = None
        self.buckets: list[Bucket] | None = None
        self._indices: list[list[int]] = []  # indices into refs of each bucket's parameters
        self._part_of: list[int] = []  # the part of each bucket
        self.parts: list[int] | None = None  # the part of each ref; None: there is one
        self._sharded: dict[int, torch.Tensor] = {}  # sharded parameters, as last seen
        self._warm = True  # start_vectors need no warm-up
        self._managed: set | None = None  # modules that FSDP2 manages
        self.start_vectors: dict[str, torch.Tensor] = {}  # to start from, in logical order
        # Where matrices are stored column by column: v as it is, a left vector.
        self.start_left: dict[str, torch.Tensor] = {}
        self._refer()

    def _refer(self) -> None:
        """Refer to the parameters of the selection."""
        # The first matrix of each parameter, or its elementwise entry.
        selection = self.selection
        self._first = {x.ref: x for x in (*selection.elementwise[::-1], *selection.matrices[::-1])}
        self.refs = refs_of(selection.matrices, selection.elementwise)
        self._has_computed = any(ref.computed for ref in self.refs)
        self._slots = [
            ({o.attribute: o.tensor}, o.attribute)
            if o.module is None
            else (Computed(o) if o.computed else o.module._parameters, o.attribute)
            for o in self.refs
        ]

    def leave_out_computed(self) -> None:
        """Leave out weights that a parametrization computes, which have no ``.grad``; warn."""
        if not self._has_computed:
            return
        with self.lock:
            found = self.selection.follower.without_computed(self.selection)
            warn_of_computed([ref.name for ref in self.refs if ref.computed])
            self._take(found)

    # ------------------------------------------------------------------ a model that changes

    def follow(self) -> None:
        """Select again if modules were replaced or are no longer frozen; see selection.changes.

        Raises:
            ValueError, RuntimeError: see ``Follower.followed``; nothing is changed then.
        """
        follower = self.selection.follower
        if follower is None or not follower.has_changed():
            return
        with self.lock:
            if (found := follower.followed(self.selection)) is not None:
                self._take(found)

    def reselect(self) -> None:
        """See ``SpectralRegularizer.reselect``."""
        follower = self.selection.follower
        if follower is None:
            raise RuntimeError(
                "model: expected a module, from which parameters can be selected again, got "
                "(name, parameter) pairs"
            )
        with self.lock:
            self.follow()
            found = follower.reselected(self.selection)
            now = refs_of(found.selection.matrices, found.selection.elementwise)
            added = [ref for ref in now if ref not in self.refs and not ref.computed]
            for step in self.in_steps:
                step.check_holds(added, [ref.get() for ref in added])
            self._take(found)

    def tell_of_added(self) -> None:
        """Warn, once, about parameters that were added to the model."""
        with self.lock:
            self.follow()
            if (follower := self.selection.follower) is not None:
                follower.tell(follower.added(self.selection))

    def _take(self, found: Followed) -> None:
        """Continue with another selection, and with the vectors of its matrices by name."""
        own, now, before = self.selection, found.selection, self.refs
        is_same = (now.matrices, now.elementwise) == (own.matrices, own.elementwise)
        coefficients = self.coefficients.prepared(now)
        warm = not found.new and (self._warm if self.buckets is None else self.is_warm)
        sizes = {matrix.name: matrix.shape for matrix in now.matrices}
        left, right = (
            {n: v for n, v in vectors.items() if n in sizes and v.shape[1] == sizes[n][side]}
            for side, vectors in enumerate((self.left_vectors(), self.vectors()))
        )
        own.become(now)
        own.follower.look_at(own)
        self.coefficients.take(*coefficients, found.new)
        sharded = {before[i]: tensor for i, tensor in self._sharded.items()}
        self._refer()
        self._sharded = {i: sharded[ref] for i, ref in enumerate(self.refs) if ref in sharded}
        if is_same:  # a wrapper around a module
            return
        self.buckets, self._managed, self._warm = None, None, warm
        self.start_vectors, self.start_left = right, left
        self.parts = aligned(self.parts, before, self.refs)
        for attachment in {x.attachment for x in self.in_steps} - {None}:
            attachment.align(before, self.refs)
        self.watch.restart()
        if not any(ref.get().is_meta for ref in self.refs):
            self.coefficients.measure_initial()
        warn_of_gone(found.gone)
        if self._traced:
            self._bound()

    def _is_resized(self, tensors: Sequence[torch.Tensor]) -> bool:
        if self.selection.follower is None:
            return False
        known = [self._first[ref].whole for ref in self.refs]
        return any(x not in (None, tuple(t.shape)) for x, t in zip(known, tensors, strict=True))

    # ------------------------------------------------------------------------- the buckets

    def tensors(self) -> list[torch.Tensor]:
        """Return the current parameters, one per ref."""
        try:
            tensors = [slot[key] for slot, key in self._slots]
        except KeyError:
            tensors = [None]
        kinds = set(map(type, tensors))
        if type(None) in kinds:
            tensors = [ref.get() for ref in self.refs]
        if self._sharded or shards.dtensor() in kinds:
            tensors = [self._settled(i, tensor) for i, tensor in enumerate(tensors)]
        return tensors

    def lookups(self) -> list[tuple[Any, str, torch.Tensor]]:
        """Return (dict, key, parameter) of every parameter; see tables.guard.Watched."""
        return [(slot, key, slot[key]) for slot, key in self._slots]

    def _settled(self, i: int, tensor: torch.Tensor) -> torch.Tensor:
        """Return parameter ``i``: its sharded form while FSDP2 has it gathered."""
        known = self._sharded.get(i)
        if known is not None and shards.is_gathered(tensor, known):
            if self._managed is None:
                self._managed = shards.managed(self.selection.root)
            if self.refs[i].module in self._managed:
                return known
        if shards.is_sharded(tensor) and tensor is not known:
            self._sharded[i], self._managed = tensor, None
        elif not shards.is_sharded(tensor):
            self._sharded.pop(i, None)
        return tensor

    def bound(
        self, values: Sequence[torch.Tensor] | None = None, owner: StepPenalty | None = None
    ) -> list[Bucket]:
        """Return the buckets, warmed up, with tables that point at the current parameters.

        Args:
            values: other tensors to use as the parameters, one per ref.
            owner: whose step it is; its optimizers must hold the parameters.
        """
        buckets = self._bound(values, owner)
        cold = [bucket for bucket in buckets if not bucket.warm]
        for bucket in cold:
            bucket.warm_up()
        if len(cold) == len(buckets) and self.settings.warmup:
            self.shares.look(buckets)
        if self.coefficients.strength_tensor is not None:  # its value may have changed
            self.fill_strength()
        return buckets

    def fill_strength(self) -> None:
        """Write the strength of the coefficients into every existing bucket."""
        for bucket in self.buckets or ():
            self.coefficients.fill_strength(bucket)

    def set_target(self, target: Target) -> None:
        """Replace the target; measures what "initial" now is."""
        with self.lock:
            self.coefficients.assign_target(target)
            for bucket in self.buckets or ():
                self.coefficients.fill_target(bucket)

    def set_shape(self, **shape: float | str) -> None:
        """Replace the exponent or the side; see ``Settings``."""
        with self.lock:
            self.settings = replace(self.settings, **shape)
            for bucket in self.buckets or ():
                bucket.set_shape(self.settings.exponent, self.settings.side == "above")

    def set_iterations(self, iterations: int, extra_iterations: int) -> None:
        """Replace the numbers of iterations per step."""
        with self.lock:
            new = {"iterations": iterations, "extra_iterations": extra_iterations}
            self.settings = replace(self.settings, **new)
            self.iterations = iterations
            for bucket in self.buckets or ():
                bucket.extra_iterations = extra_iterations

    def set_n_vectors(self, n_vectors: int) -> None:
        """Replace the number of vectors per matrix; those that there are go on."""
        with self.lock:
            check_one_vector(self.selection, n_vectors)
            if n_vectors == self.settings.n_vectors:
                return
            warm = self._warm if self.buckets is None else self.is_warm
            self.settings = replace(self.settings, n_vectors=n_vectors)
            self.restart(NOTHING_LOADED, warm)

    def divide(self, parts: Sequence[int] | None) -> None:
        """Keep parameters of different ``parts``, a number for each ref, in different buckets."""
        parts = None if parts is None else list(parts)
        with self.lock:
            if parts == self.parts:
                return
            self.parts = parts
            if self.buckets is not None:
                self.restart(NOTHING_LOADED, warm=self.is_warm)

    def of_owner(self, owner: StepPenalty | None) -> list[Bucket]:
        """Return :meth:`bound` buckets: those of the part of ``owner``, or all."""
        buckets = self.bound(owner=owner)
        if owner is None or owner.part is None:
            return buckets
        return [b for b, own in zip(buckets, self._part_of, strict=True) if own == owner.part]

    def accumulate_gradients(
        self,
        n_iterations: int,
        scale: float | torch.Tensor | None,
        owner: StepPenalty | None = None,
    ) -> None:
        """Run power iterations and add the gradient of ``strength * R`` to every ``.grad``.

        Args:
            n_iterations: number of power iterations, 1 or more.
            scale: a factor of the gradient, or None.
            owner: restricts it to the parameters of its part.

        Raises:
            ValueError, RuntimeError: see ``SpectralRegularizer.accumulate_grad_``.
        """
        preparation = (self if owner is None else owner).preparation
        with self.lock:
            self.searches.count(self.buckets)
            if (prepared := preparation.step) is not None:
                if prepared.take(self, n_iterations, scale):
                    return
                preparation.drop()
            self.leave_out_computed()
            buckets = self.of_owner(owner)
            add_gradients(buckets, n_iterations, scale)
            preparation.renew(lambda: PreparedPenalty(self, buckets))

    def _bound(
        self, values: Sequence[torch.Tensor] | None = None, owner: StepPenalty | None = None
    ) -> list[Bucket]:
        """Return the buckets, with tables that point at the parameters, or at ``values``."""
        if values is None:
            self.follow()
        tensors = self.tensors() if values is None else values
        if owner is not None:
            owner.hold(tensors)
        try:
            for bucket, indices in zip(self.buckets or (), self._indices, strict=False):
                is_all = len(self.buckets) == 1  # in the order of the refs
                if bucket.bind(tensors if is_all else [tensors[i] for i in indices]):
                    continue
                if values is None and self._is_resized(tensors):
                    self._take(self.selection.follower.followed(self.selection, is_resized=True))
                    tensors = self.tensors()
                else:
                    self._rebuild(tensors)
                break
            if self.buckets is None:
                self._build(tensors)
        except RuntimeError:
            for ref, tensor in zip(self.refs, tensors, strict=True):
                transforms.check_plain(f"parameter {ref.name!r}", tensor, "use penalty() there")
            raise
        for bucket in self.buckets if values is None else ():
            if bucket.looks_other_frozen():
                self.coefficients.fill_strength(bucket)
        return self.buckets

    def _rebuild(self, tensors: Sequence[torch.Tensor]) -> None:
        """Build new buckets for parameters of other shapes, layouts or dtypes."""
        self._warm, vectors = self.is_warm, self.vectors()
        self.start_vectors, self.start_left, self.buckets = vectors, self.left_vectors(), None
        self._build(tensors)
        for bucket in self.buckets:
            bucket.expect_jumps()

    @property
    def has_vectors(self) -> bool:
        """Whether each matrix has vectors, of its own or to start from."""
        known = {*self.start_vectors, *self.start_left}
        return self.is_warm or known.issuperset(m.name for m in self.selection.matrices)

    @property
    def is_warm(self) -> bool:
        """Whether the buckets are built and their vectors warmed up."""
        return self.buckets is not None and all(bucket.warm for bucket in self.buckets)

    def ready_to_trace(self) -> bool:
        """Build the buckets for a graph being traced; return whether it can contain the penalty."""
        transforms.check_inactive("a compiled penalty()", "penalty() in a function run eagerly")
        ModelBuckets._some_traced = self._traced = True
        with self.lock:
            for bucket in self._bound():
                bucket.make_traceable(self.settings.backend)
            return not any(bucket.is_sharded for bucket in self.buckets)

    def ready_for_graphs(self) -> None:
        """Build the buckets at once if a penalty has been compiled in this process.

        Its graph may be used for these buckets too, and would be recompiled if they did not exist.
        """
        if not self._some_traced:
            return
        tensors = [ref.get() for ref in self.refs]
        cannot = transforms.is_active() or any(t.is_meta or shards.is_sharded(t) for t in tensors)
        if not cannot:
            self._bound()

    def with_tensors(
        self, tensors: Sequence[torch.Tensor] | None = None
    ) -> Iterator[tuple[Bucket, list[torch.Tensor]]]:
        """Yield every bucket with those of ``tensors``, one per ref, that belong to it.

        None: the current parameters.
        """
        tensors = self.tensors() if tensors is None else tensors
        for bucket, indices in zip(self.buckets, self._indices, strict=True):
            yield bucket, [tensors[i] for i in indices]

    @torch.inference_mode(False)  # the state outlives an inference mode that is active here
    def _build(self, tensors: Sequence[torch.Tensor]) -> None:
        place = {ref: i for i, ref in enumerate(self.refs)}
        groups: dict[tuple, list[int]] = {}
        for i, (ref, tensor) in enumerate(zip(self.refs, tensors, strict=True)):
            if tensor.is_meta:
                raise RuntimeError(
                    f"parameter {ref.name!r} is on the meta device; materialize the model before "
                    "the regularizer is first used"
                )
            part = 0 if self.parts is None else self.parts[i]
            is_operator = getattr(self._first[ref], "periods", None) is not None
            key = tensor.device, tensor.dtype, self._axes_of(i, tensor), is_operator, part
            groups.setdefault(key, []).append(i)
        settings, buckets, orders = self.settings, [], []
        measured = self.coefficients
        measured.measure_initial()
        right, left = measured.right | self.start_vectors, measured.left | self.start_left
        start = Start(settings.seed, settings.n_vectors, right, left)
        known = {*self.start_vectors, *self.start_left}
        warm = self._warm and known.issuperset((*measured.right, *measured.left))
        for (device, dtype, _, is_operator, _), members in groups.items():
            inside = set(members)
            matrices = [m for m in self.selection.matrices if place[m.ref] in inside]
            elementwise = [v for v in self.selection.elementwise if place[v.ref] in inside]
            order = list(dict.fromkeys(place[x.ref] for x in (*matrices, *elementwise)))
            kind, above = (settings.n_vectors, is_operator), settings.side == "above"
            backend = choice.choose(settings.backend, device, dtype, *kind)
            bucket = Bucket.of(
                matrices, elementwise, [tensors[i] for i in order], backend, settings.exponent,
                settings.n_vectors, settings.extra_iterations, settings.warmup, above,
            )  # fmt: skip
            bucket.warm = start.write(bucket) and warm
            if bucket.is_sharded:
                bucket.backend.agree(bucket.state.v_next)
            self.coefficients.fill(bucket)
            if self._some_traced:
                bucket.make_traceable(settings.backend)
            buckets.append(bucket)
            orders.append(order)
        self._part_of = [part for *_, part in groups]
        self._indices, self.buckets = orders, buckets
        self.start_vectors, self.start_left, self._warm = {}, {}, True
        if self.at_next_build is not None:
            then, self.at_next_build = self.at_next_build, None
            then(self)

    def _axes_of(self, i: int, parameter: torch.Tensor) -> ShardAxes:
        """Return the shard axes of parameter ``i``."""
        if not shards.is_sharded(parameter):
            return ShardAxes()
        first = self._first[self.refs[i]]
        if isinstance(first, Matrix):
            return shards.matrix_shard(first, parameter).shard_axes
        return shards.elementwise_axes(first, parameter)

    @torch.inference_mode(False)  # copies may go into an optimizer's state, which outlives one
    def vectors(self) -> dict[str, torch.Tensor]:
        """Return copies of the right singular vectors to continue from: name -> [r, N].

        They do not depend on the memory layout of the weight. A matrix that is stored column by
        column has none if it is zero or sharded. Those of an operator have two parts.
        """
        found = {name: v.clone() for name, v in self.start_vectors.items()}
        for bucket, indices in zip(self.buckets or (), self._indices, strict=False):
            is_known = bucket.is_sharded or bucket.measured
            if not is_known and any(x.side == "left" for x in bucket.state.plan.layouts):
                # s must be computed, from weights that may have moved since the last use.
                tensors = self.tensors()
                if bucket.bind([tensors[i] for i in indices]):
                    bucket.measure()
            found.update(right_of(bucket))
        return found

    @torch.inference_mode(False)
    def left_vectors(self) -> dict[str, torch.Tensor]:
        """Return copies of the left singular vectors to continue from: name -> [r, M].

        Only of matrices that are stored column by column, which are iterated by them.
        """
        found = dict(self.start_left)
        for bucket in self.buckets or ():
            found.update(left_of(bucket))
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Leave out addresses and buffers; copies and pickles carry the vectors."""
        with self.lock:
            warm = self._warm if self.buckets is None else self.is_warm
            found = {"warm": warm, "vectors": self.vectors(), "left": self.left_vectors()}
            arguments = self.selection, self.settings, self.coefficients
            return {**found, "arguments": arguments, "searches": self.searches}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(*state["arguments"])
        self.start_vectors, self.start_left = state["vectors"], state["left"]
        self._warm, self.searches = state["warm"], state.get("searches", self.searches)

    def restart(self, loaded: Loaded, warm: bool) -> None:
        """Start from the vectors ``loaded`` at the next use, with a warm-up unless ``warm``."""
        vectors = {**self.vectors(), **loaded.vectors}
        left = {n: v for n, v in self.left_vectors().items() if n not in loaded.vectors}
        self.start_vectors, self.start_left = vectors, {**left, **loaded.left}
        self.buckets, self._warm = None, warm
        if self._traced:
            self._bound()

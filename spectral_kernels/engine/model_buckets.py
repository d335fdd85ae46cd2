"""The buckets of a model, one per device, dtype, shard axes and part; rebuilt when those change.

A part is what one of several optimizers holds, see ``ModelBuckets.divide``.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakValueDictionary

import torch

from ..backends import choice, reference
from ..backends.base import Backend
from ..backends.formulas import orthonormal, orthonormal_if_finite
from ..selection import transforms
from ..selection.arguments import check_count
from ..selection.matrices import Matrix, Selection, refs_of
from ..selection.parameters import Computed
from ..sharding import shards
from ..sharding.shards import ShardAxes
from ..tables.layout import Layout
from .bucket import MAX_EXTRA_ITERATIONS, Bucket
from .coefficients import Coefficients, Target
from .loading import NOTHING_LOADED, Loaded
from .stability import StabilityWatch

if TYPE_CHECKING:
    from .attach.once import Mark, StepPenalty


@dataclass(frozen=True)
class Settings:
    """Settings of the power iteration.

    Attributes:
        backend: name of a backend, or a Backend.
        exponent: k.
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
        raise ValueError(
            f"n_power_iterations: got {found}; accepted are 1 and 'auto' in an optimizer"
        )
    return found, 0


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
        self.selection, self.settings, self.coefficients = selection, settings, coefficients
        # One step, reading or change at a time: threads wait for each other.
        self.lock = threading.RLock()
        self.iterations = settings.iterations  # here, for compilers
        self.number = next(self._numbers)
        self.by_number[self.number] = self
        self._traced = False  # whether it is in a compiled graph
        self.mark: Mark | None = None  # the last gradient of the penalty outside of a step
        self.in_steps: list[StepPenalty] = []  # which optimizers' steps add the penalty
        self.watch = StabilityWatch()
        self.at_next_build: Callable[[ModelBuckets], None] | None = None
        self.buckets: list[Bucket] | None = None
        self._indices: list[list[int]] = []  # indices into refs of each bucket's parameters
        self._part_of: list[int] = []  # the part of each bucket
        self.parts: list[int] | None = None  # the part of each ref; None: there is one
        self._sharded: dict[int, torch.Tensor] = {}  # sharded parameters, as last seen
        self._warm = True  # start_vectors need no warm-up
        self._managed: set | None = None  # modules that FSDP2 manages
        self.start_vectors: dict[str, torch.Tensor] = {}  # vectors to start from, in logical order
        # Where matrices are stored column by column: v as it is, a left vector.
        self.start_left: dict[str, torch.Tensor] = {}
        # The first matrix of each parameter, or its elementwise entry.
        self._first = {x.ref: x for x in (*selection.elementwise[::-1], *selection.matrices[::-1])}
        self.refs = refs_of(selection.matrices, selection.elementwise)
        self._computed = next((o for o in self.refs if o.computed), None)
        self._slots = [
            ({o.attribute: o.tensor}, o.attribute)
            if o.module is None
            else (Computed(o) if o.computed else o.module._parameters, o.attribute)
            for o in self.refs
        ]

    def check_in_place(self) -> None:
        """Raise ValueError for a parametrized weight: only ``penalty()`` can regularize it."""
        if self._computed is not None:
            raise ValueError(
                f"parameter {self._computed.name!r} is made by a parametrization at every use; "
                "accepted is penalty(), whose gradient passes through it; or leave it out with "
                "exclude"
            )

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

    def bound(self, values: Sequence[torch.Tensor] | None = None) -> list[Bucket]:
        """Return the buckets, warmed up, with tables that point at the current parameters.

        Args:
            values: other tensors to use as the parameters, one per ref.
        """
        buckets = self._bound(values)
        for bucket in buckets:
            if not bucket.warm:
                bucket.warm_up()
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

    def set_exponent(self, exponent: float) -> None:
        """Replace the exponent k."""
        with self.lock:
            self.settings = replace(self.settings, exponent=exponent)
            for bucket in self.buckets or ():
                bucket.state.set_exponent(exponent)

    def set_iterations(self, iterations: int, extra_iterations: int) -> None:
        """Replace the numbers of iterations per step."""
        with self.lock:
            self.settings = replace(
                self.settings, iterations=iterations, extra_iterations=extra_iterations
            )
            self.iterations = iterations
            for bucket in self.buckets or ():
                bucket.extra_iterations = extra_iterations

    def set_n_vectors(self, n_vectors: int) -> None:
        """Replace the number of vectors per matrix; those that there are go on."""
        with self.lock:
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

    def of_part(self, part: int | None) -> list[Bucket]:
        """Return :meth:`bound` buckets: those of a part, or all."""
        buckets = self.bound()
        if part is None:
            return buckets
        return [b for b, own in zip(buckets, self._part_of, strict=True) if own == part]

    def accumulate_gradients(
        self, n_iterations: int, scale: float | torch.Tensor | None, part: int | None = None
    ) -> None:
        """Run power iterations and add the gradient of ``strength * R`` to every ``.grad``.

        Args:
            n_iterations: number of power iterations, 1 or more.
            scale: a factor of the gradient, or None.
            part: restricts it to the parameters of a part.

        Raises:
            ValueError, RuntimeError: see ``SpectralRegularizer.accumulate_grad_``.
        """
        with self.lock:
            self._accumulate_gradients(n_iterations, scale, part)

    def _accumulate_gradients(self, n_iterations: int, scale, part: int | None) -> None:
        self.check_in_place()
        buckets = self.of_part(part)
        grads = [bucket.grads() for bucket in buckets]
        for bucket, own in zip(buckets, grads, strict=True):
            bucket.plan.bind_grads(own)
        for bucket, own in zip(buckets, grads, strict=True):
            bucket.make_missing_grads(own)
            bucket.state.set_scale(scale)
        for bucket in buckets:
            bucket.begin(n_iterations)
        for bucket, own in zip(buckets, grads, strict=True):
            bucket.finish(n_iterations, own)

    def _bound(self, values: Sequence[torch.Tensor] | None = None) -> list[Bucket]:
        """Return the buckets, with tables that point at the parameters, or at ``values``."""
        tensors = self.tensors() if values is None else values
        try:
            for bucket, indices in zip(self.buckets or (), self._indices, strict=False):
                is_all = len(self.buckets) == 1  # in the order of the refs
                if not bucket.bind(tensors if is_all else [tensors[i] for i in indices]):
                    self._rebuild(tensors)
                    break
            if self.buckets is None:
                self._build(tensors)
        except RuntimeError:
            for ref, tensor in zip(self.refs, tensors, strict=True):
                transforms.check_plain(f"parameter {ref.name!r}", tensor, "there is penalty()")
            raise
        return self.buckets

    def _rebuild(self, tensors: Sequence[torch.Tensor]) -> None:
        """Build new buckets for parameters of other shapes, layouts or dtypes."""
        warm, vectors, left = self.is_warm, self.vectors(), self.left_vectors()
        self._warm, self.start_vectors, self.start_left = warm, vectors, left
        self.buckets = None
        self._build(tensors)
        for bucket in self.buckets:
            bucket.expect_jumps()

    @property
    def is_warm(self) -> bool:
        """Whether the buckets are built and their vectors warmed up."""
        return self.buckets is not None and all(bucket.warm for bucket in self.buckets)

    def ready_to_trace(self) -> bool:
        """Build the buckets for a graph being traced; return whether it can contain the penalty."""
        transforms.check_inactive("a compiled penalty()", "penalty() in a function run eagerly")
        ModelBuckets._some_traced = self._traced = True
        with self.lock:
            return not any(bucket.is_sharded for bucket in self._bound())

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
                    f"parameter {ref.name!r} is on the meta device: materialize the model before "
                    "the regularizer is first used"
                )
            part = 0 if self.parts is None else self.parts[i]
            key = tensor.device, tensor.dtype, self._axes_of(i, tensor), part
            groups.setdefault(key, []).append(i)
        settings, buckets, orders = self.settings, [], []
        for (device, dtype, _, _), members in groups.items():
            inside = set(members)
            matrices = [m for m in self.selection.matrices if place[m.ref] in inside]
            elementwise = [v for v in self.selection.elementwise if place[v.ref] in inside]
            order = list(dict.fromkeys(place[x.ref] for x in (*matrices, *elementwise)))
            backend = choice.choose(settings.backend, device, dtype, settings.n_vectors)
            own = [tensors[i] for i in order]
            bucket = Bucket.of(
                matrices, elementwise, own, backend, settings.exponent, settings.n_vectors,
                settings.extra_iterations, settings.warmup,
            )  # fmt: skip
            bucket.warm = self._start(bucket) and self._warm
            if bucket.is_sharded:
                bucket.backend.agree(bucket.state.v_next)
            self.coefficients.fill(bucket)
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

    def _start(self, bucket: Bucket) -> bool:
        """Write the vectors to start from; return whether all of them were known."""
        state, all_known = bucket.state, True
        for i, (matrix, layout) in enumerate(
            zip(bucket.plan.matrices, state.plan.layouts, strict=True)
        ):
            v = self._known(i, matrix.name, layout, bucket)
            if v is None or len(v) < self.settings.n_vectors:
                all_known = False
                random = self._random(matrix.name, layout.cols)
                if layout.side == "right":
                    random = layout.from_logical(random)
                if v is not None:
                    random[: len(v)] = v
                v = orthonormal(random)
            state.columns(i, state.v_next).copy_(v)
            state.columns(i, state.v).copy_(v)  # what an interrupted step starts from
        return all_known

    def _known(self, i: int, name: str, layout: Layout, bucket: Bucket) -> torch.Tensor | None:
        """Return vectors [r, N] to start matrix ``i`` of ``bucket`` from, if some are known."""
        state, r = bucket.state, self.settings.n_vectors
        if layout.side == "left":
            left = self.start_left.get(name)
            if left is not None and left.shape[-1] == layout.cols:
                return left[:r].to(state.v)
        v = self.start_vectors.get(name)
        n = layout.rows if layout.side == "left" else layout.cols
        if v is None or v.shape[-1] != n:
            return None
        v = layout.from_logical(v[:r].to(state.v))
        if layout.side == "right":
            return v
        if bucket.is_sharded:
            return None  # left vectors would need a sum over ranks
        return orthonormal_if_finite(v @ reference.matrix(bucket.plan, i))

    def _random(self, name: str, cols: int) -> torch.Tensor:
        # torch's CPU generator uses 32 bits of the seed.
        generator = torch.Generator().manual_seed(
            zlib.crc32(f"{self.settings.seed}/{name}".encode())
        )
        shape = self.settings.n_vectors, cols
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    def vectors(self) -> dict[str, torch.Tensor]:
        """Return copies of the right singular vectors to continue from: name -> [r, N].

        They do not depend on the memory layout of the weight. A matrix that is stored column by
        column has none if it is zero or sharded.
        """
        # Copies may go into an optimizer's state, which outlives an inference mode.
        with torch.inference_mode(False):
            return self._vectors()

    def left_vectors(self) -> dict[str, torch.Tensor]:
        """Return copies of the left singular vectors to continue from: name -> [r, M].

        Only of matrices that are stored column by column, which are iterated by them.
        """
        with torch.inference_mode(False):
            found = dict(self.start_left)
            for bucket in self.buckets or ():
                state = bucket.state
                v = state.v if bucket.is_ahead else state.v_next
                for i, (matrix, layout) in enumerate(
                    zip(bucket.plan.matrices, state.plan.layouts, strict=True)
                ):
                    if layout.side == "left":
                        found[matrix.name] = state.columns(i, v).clone()
            return found

    def _vectors(self) -> dict[str, torch.Tensor]:
        found = {name: v.clone() for name, v in self.start_vectors.items()}
        for bucket, indices in zip(self.buckets or (), self._indices, strict=False):
            layouts, state = bucket.state.plan.layouts, bucket.state
            if bucket.is_sharded:  # s, here the right vectors, is spread over ranks
                layouts = [None if x.side == "left" else x for x in layouts]
            elif not bucket.measured and any(layout.side == "left" for layout in layouts):
                # s must be computed, from weights that may have moved since the last use.
                tensors = self.tensors()
                if bucket.bind([tensors[i] for i in indices]):
                    bucket.measure()
            for i, (matrix, layout) in enumerate(zip(bucket.plan.matrices, layouts, strict=True)):
                if layout is None:
                    continue
                is_left = layout.side == "left"
                right = state.v if bucket.is_ahead else state.v_next
                v = orthonormal_if_finite(state.rows(i)) if is_left else state.columns(i, right)
                if v is not None:
                    found[matrix.name] = layout.to_logical(v).clone()
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Leave out addresses and buffers; copies and pickles carry the vectors."""
        with self.lock:
            warm = self._warm if self.buckets is None else self.is_warm
            return {"arguments": (self.selection, self.settings, self.coefficients), "warm": warm,
                    "vectors": self.vectors(), "left": self.left_vectors()}  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(*state["arguments"])
        self.start_vectors, self.start_left = state["vectors"], state["left"]
        self._warm = state["warm"]

    def restart(self, loaded: Loaded, warm: bool) -> None:
        """Start from the vectors ``loaded`` at the next use, with a warm-up unless ``warm``."""
        vectors = {**self.vectors(), **loaded.vectors}
        left = {n: v for n, v in self.left_vectors().items() if n not in loaded.vectors}
        self.start_vectors, self.start_left = vectors, {**left, **loaded.left}
        self.buckets, self._warm = None, warm
        if self._traced:
            self._bound()

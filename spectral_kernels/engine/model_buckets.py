"""The buckets of a model, one per device, dtype and shard axes, rebuilt when parameters change."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, ClassVar, NamedTuple
from weakref import WeakValueDictionary

import torch

from ..backends import choice, reference
from ..backends.base import Backend
from ..backends.formulas import orthonormal, orthonormal_if_finite
from ..selection import transforms
from ..selection.matrices import Matrix, Selection, refs_of
from ..selection.parameters import Computed
from ..sharding import shards
from ..sharding.shards import ShardAxes
from ..tables.device import wide
from .bucket import Bucket
from .coefficients import Coefficients


@dataclass(frozen=True)
class Settings:
    """Settings of the power iteration.

    Attributes:
        backend: name of a backend, or a Backend.
        exponent: k.
        warmup: iterations for vectors that start from random numbers.
        seed: of those random numbers; each matrix has its own stream, keyed by its name.
        n_vectors: singular vectors per matrix.
        extra_iterations: at most, for stale matrices, after the iterations of each step.
    """

    backend: str | Backend = "auto"
    exponent: float = 2.0
    warmup: int = 10
    seed: int = 0
    n_vectors: int = 1
    extra_iterations: int = 0


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
        self.number = next(self._numbers)
        self.by_number[self.number] = self
        self._traced = False  # whether it is in a compiled graph
        self.buckets: list[Bucket] | None = None
        self._indices: list[list[int]] = []  # indices into refs of each bucket's parameters
        self._sharded: dict[int, torch.Tensor] = {}  # sharded parameters, as last seen
        self._warm = True  # start_vectors need no warm-up
        self._managed: set | None = None  # modules that FSDP2 manages
        self.start_vectors: dict[str, torch.Tensor] = {}  # vectors to start from, in logical order
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

    def accumulate_gradients(self, n_iterations: int, scale: float | torch.Tensor | None) -> None:
        """Run power iterations and add the gradient of ``strength * R`` to every ``.grad``.

        Args:
            n_iterations: number of power iterations, 1 or more.
            scale: a factor of the gradient, or None.

        Raises:
            ValueError, RuntimeError: see ``SpectralRegularizer.accumulate_grad_``.
        """
        self.check_in_place()
        buckets = self.bound()
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
        self._warm = self.is_warm
        self.start_vectors, self.buckets = self.vectors(), None
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
            groups.setdefault((tensor.device, tensor.dtype, self._axes_of(i, tensor)), []).append(i)
        settings, buckets, orders = self.settings, [], []
        for (device, dtype, _), members in groups.items():
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
        self.buckets, self._indices, self.start_vectors, self._warm = buckets, orders, {}, True

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
            v = self.start_vectors.get(matrix.name)
            if v is not None and layout.side == "left" and bucket.is_sharded:
                v = None  # its left vectors would need a sum over ranks
            n = layout.rows if layout.side == "left" else layout.cols
            if v is not None and v.shape[-1] == n:
                v = layout.from_logical(v[: self.settings.n_vectors].to(state.v))
                if layout.side == "left":
                    v = orthonormal_if_finite(v @ reference.matrix(bucket.plan, i))
            else:
                v = None
            if v is None or len(v) < self.settings.n_vectors:
                all_known = False
                random = self._random(matrix.name, layout.cols)
                if layout.side == "right":
                    random = layout.from_logical(random)
                if v is not None:
                    random[: len(v)] = v
                v = orthonormal(random)
            state.columns(i, state.v_next).copy_(v)
        return all_known

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

    def _vectors(self) -> dict[str, torch.Tensor]:
        found = dict(self.start_vectors)
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
        return {"arguments": (self.selection, self.settings, self.coefficients),
                "vectors": self.vectors()}  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(*state["arguments"])
        self.start_vectors = state["vectors"]

    def restart(self, vectors: Mapping[str, torch.Tensor], warm: bool) -> None:
        """Start from ``vectors`` at the next use, with a warm-up unless ``warm``."""
        self.start_vectors = {**self.vectors(), **vectors}
        self.buckets, self._warm = None, warm
        if self._traced:
            self._bound()


class LoadResult(NamedTuple):
    """Names missing from a loaded state_dict, and names in it that were not used."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def vectors_of(
    state: Mapping[str, Any], matrices: Sequence[Matrix]
) -> tuple[dict[str, torch.Tensor], LoadResult]:
    """Return orthonormal vectors [r, N] by matrix name, and the names that did not match.

    Raises:
        TypeError: not a dict with "vectors".
        ValueError: vectors of the wrong shape, or zero, or not finite.
    """
    if not isinstance(state, Mapping) or not isinstance(state.get("vectors"), Mapping):
        raise TypeError('state: accepted is the dict that state_dict() returns, with "vectors"')
    by_name = {matrix.name: matrix for matrix in matrices}
    given = state["vectors"]
    found = {name: _checked(by_name[name], v) for name, v in given.items() if name in by_name}
    missing = [name for name in by_name if name not in found]
    return found, LoadResult(missing, [name for name in given if name not in by_name])


def _checked(matrix: Matrix, v) -> torch.Tensor:
    rows, cols = matrix.shape_now()
    shape = tuple(getattr(v, "shape", ()))
    if not isinstance(v, torch.Tensor) or len(shape) != 2 or shape[0] < 1 or shape[1] != cols:
        raise ValueError(
            f"state: the vectors of {matrix.name!r} have shape {shape}; accepted is (1, {cols}), "
            f"or one row per vector, for this matrix of {rows} x {cols}"
        )
    found = v.detach().to(torch.promote_types(v.dtype, torch.float32))
    norms = torch.linalg.vector_norm(wide(found), dim=1)
    if not torch.isfinite(norms).all() or (norms[0] == 0 and v.numel()):
        raise ValueError(f"state: the vectors of {matrix.name!r} have norms {norms.tolist()}")
    # Vectors that are already orthonormal keep their bits; those beyond N are zero.
    gram = wide(found) @ wide(found).mT
    off = (gram - torch.diag((norms > 0).to(gram))).abs().max()
    return found.clone() if off < 2e-6 else orthonormal(found)

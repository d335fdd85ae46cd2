"""Power iteration of sharded matrices: local products, and sums over ranks between them.

A rank holds a block of W [M, N]: some rows, some columns or both. Every rank has the whole v [N]
and the part of s [M] that belongs to its rows:

    s = W v           if columns are sharded: all-reduce of the local products over column axes
    t = W^T s         all-reduce of the local products over all shard axes
    sigma = ||s||     if rows are sharded: all-reduce of one number per matrix (r^2 for r vectors)

The s, t and numbers of all matrices are reduced together, so that number and order of the
collectives do not depend on how many matrices there are or when their gradients are ready. The
largest norm of a row, of elementwise parameters that have rows, is a maximum over ranks: one more.
Every rank computes the rest, including the next v, from the same numbers, bitwise equal on all
ranks.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from ..backends.base import Backend, Step
from ..backends.formulas import raw_penalty_at
from ..tables import device as device_tables
from ..tables.layout import Layout
from ..tables.plan import Plan, Tables, Targets
from ..tables.state import Ratios, State
from .shards import Axis, MatrixShard, ShardAxes


class ReducedTables(Tables):
    """Reduced tables: ``normalize`` reads the sums over tiles and ranks through them.

    A matrix has all of its columns, its local rows and one tile.
    """

    def __init__(self, plan: Plan, layouts: Sequence[Layout]):
        sizes = [0] * len(plan.elementwise)
        super().__init__(
            plan.matrices,
            plan.elementwise,
            layouts,
            sizes,
            plan.device,
            plan.dtype,
            plan.n_values,
        )

    def _tiles(self) -> list[list[tuple[int, int]]]:
        return [[(0, x.rows)] for x in self.layouts]

    def _partials(self, t_size: int, n_tiles: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return buffers for t and s s^T; ``numbers`` also has two per elementwise parameter.

        If both have one dtype they share one buffer, so that one all-reduce suffices.
        """
        n_products, nv = self.r * self.r * n_tiles, len(self.elementwise)
        n_numbers = n_products + 2 * nv

        def zeros(n, dtype):
            return torch.zeros(n, dtype=dtype, device=self.device)

        wide_dtype = device_tables.wide_dtype(self.device)
        if self.state_dtype == wide_dtype:
            both = zeros(t_size + n_numbers, wide_dtype)
            t, self.numbers = both.split([t_size, n_numbers])
            self.to_sum = [both]
        else:
            t, self.numbers = zeros(t_size, self.state_dtype), zeros(n_numbers, wide_dtype)
            self.to_sum = [t, self.numbers]
        products, self.squares, self.penalties = self.numbers.split([n_products, nv, nv])
        return t, products


class ShardedBackend(Backend):
    """A backend for sharded matrices, around the backend that runs the kernels.

    Args:
        inner: the backend of the local products.
        plan: the plan of this rank's shards.
        matrices: this rank's shard of each matrix.
        shard_axes: the shard axes, the same for all matrices.
    """

    def __init__(
        self, inner: Backend, plan: Plan, matrices: Sequence[MatrixShard], shard_axes: ShardAxes
    ):
        self.inner, self.name, self.shard_axes = inner, inner.name, shard_axes
        self.scalars_on_device = inner.scalars_on_device
        self.reduced = ReducedTables(plan, [one.whole for one in matrices])
        kinds = [v.kind for v in plan.elementwise]
        self._is_shift = torch.tensor([kind == "shift" for kind in kinds], device=plan.device)
        self._rows = None  # the elementwise parameters of the kind "rows", if there are any
        if "rows" in kinds:
            rows = [i for i, kind in enumerate(kinds) if kind == "rows"]
            self._rows = torch.tensor(rows, device=plan.device)
            self._largest = torch.zeros_like(self.reduced.squares[: len(rows)])
        self._targets_seen: Targets | None = None
        self._shift_targets: tuple[torch.Tensor, torch.Tensor] | None = None
        self._pending: list[tuple] = []  # collectives that normalize waits for
        self._columns = None
        if shard_axes.columns or any(one.columns is not None for one in matrices):
            self._columns = _Columns(plan, self.reduced, matrices, shard_axes.columns)

    # -------------------------------------------------------------------- the calls of a backend

    def gram_matvec(self, plan: Plan, state: State) -> None:
        """See :meth:`Backend.gram_matvec`; returns with the sums over ranks in flight."""
        local = self.local(plan, state)
        if not self.shard_axes.columns:
            self.inner.gram_matvec(plan, local)
        else:
            self.inner.gram_matvec(plan, self._columns.products(plan, local))
            self._columns.sum(self.shard_axes.columns, local, state)
            self.inner.transposed(plan, local)
        self._sum(plan, local)

    def normalize(self, plan: Plan, state: State) -> None:
        """See :meth:`Backend.normalize`."""
        self._wait()
        self.inner.normalize(self.reduced, state)
        if plan.elementwise:
            reduced = self.reduced
            norms = reduced.squares.sqrt()
            penalties = reduced.squares**state.exponent
            if (pulled := self._pulled_shifts(plan)) is not None:
                is_pulled, target = pulled
                other = raw_penalty_at(norms, state.exponent, target, state.above)
                penalties = torch.where(is_pulled, other, penalties)
            penalties = torch.where(self._is_shift, penalties, reduced.penalties)
            if self._rows is not None:
                norms[self._rows] = self._largest
            state.norm.copy_(norms)
            state.raw_penalty[len(plan.matrices) :].copy_(penalties)

    def _pulled_shifts(self, plan: Plan) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return which elementwise parameters are shifts with a target, and the targets.

        None if there are none.
        """
        if plan.targets is not self._targets_seen:
            found = [x if v.kind == "shift" else None
                     for v, x in zip(plan.elementwise, plan.targets, strict=True)]  # fmt: skip
            self._targets_seen, self._shift_targets = plan.targets, None
            if any(x is not None for x in found):
                is_pulled = torch.tensor([x is not None for x in found], device=plan.device)
                zero = torch.zeros(1, dtype=plan.state_dtype, device=plan.device)
                target = torch.cat([zero if x is None else x for x in found])
                self._shift_targets = is_pulled, device_tables.wide(target)
        return self._shift_targets

    def rank_one(self, plan: Plan, state: State, grads, accumulate: bool) -> None:
        """See :meth:`Backend.rank_one`."""
        self.inner.rank_one(plan, self.local(plan, state), grads, accumulate)

    def update(self, step: Step) -> None:
        """See :meth:`Backend.update`; returns with the sums over ranks in flight."""
        plan, state = step.plan, step.state
        if step.found_inf is not None:  # a skipped step takes the products with v
            state.v_next.copy_(torch.where(step.found_inf > 0, state.v, state.v_next))
        local = self.local(plan, state)
        self.inner.update(replace(step, state=local))
        if self.shard_axes.columns:
            self._columns.sum_in_place(self.shard_axes.columns, state)
            self.inner.transposed(plan, local)
        self._sum(plan, local)

    def jumps(self, state: State, ratios: Ratios, least: float, factor: float) -> bool:
        """See :meth:`Backend.jumps`; the same on all ranks, whose sigmas have the same bits."""
        return self.inner.jumps(state, ratios, least, factor)

    # ------------------------------------------------------------------ local states, collectives

    def local(self, plan: Plan, state: State) -> State:
        """Return ``state`` for ``plan``, its vectors restricted to the local columns."""
        found = state.__dict__.get("_local")
        if found is None:
            found = State(plan, state.v, state.v_next, state.s, state.scalars, state.exponent)
            state._local = found
        if self._columns is None:
            found.use(state.v, state.v_next)
        else:
            self._columns.cut(state, found)
        found.set_exponent(state.exponent)
        found.set_above(state.above)
        found.set_scale(state.scale)
        found.set_tolerance(state.tolerance)
        return found

    def agree(self, v: torch.Tensor) -> None:
        """Broadcast ``v`` from the first rank of the mesh to all of its ranks."""
        for axis in self.shard_axes.mesh:
            dist.broadcast(v, dist.get_global_rank(axis.group, 0), axis.group)

    def sum_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of ``x`` over the ranks that hold other rows."""
        for axis in self.shard_axes.rows:
            dist.all_reduce(x, group=axis.group)
        return x

    def _sum(self, plan: Plan, local: State) -> None:
        """Sum the parts over the tiles, and start the sums over ranks."""
        reduced, n = self.reduced, len(plan.matrices)
        with_t = local.v_next is not None
        t = reduced.t_partial if self._columns is None else self._columns.t
        self.inner.collect(plan, local, t if with_t else None, reduced.gram_partial)
        reduced.squares.copy_(device_tables.wide(local.norm) ** 2)
        reduced.penalties.copy_(local.raw_penalty[n:])
        self._wait()
        if with_t and self._columns is not None:
            reduced.t_partial.zero_()
            reduced.t_partial[self._columns.index] = t
        if self.shard_axes.columns:
            # All ranks of a column axis have the same s: count it once.
            products = reduced.gram_partial.view(n, -1)
            products.masked_fill_(~self._columns.counts[:, None], 0)
        axes = self.shard_axes.columns + self.shard_axes.rows
        for tensor in reduced.to_sum if with_t else [reduced.numbers]:
            self._start(tensor, axes)
        if self._rows is not None:
            norms = local.norm[self._rows]
            # A maximum over ranks may lose NaN.
            self._largest.copy_(torch.where(norms.isnan(), torch.inf, norms))
            self._start(self._largest, axes, dist.ReduceOp.MAX)

    def _start(self, tensor: torch.Tensor, axes: Sequence[Axis], op=dist.ReduceOp.SUM) -> None:
        if axes and tensor.numel():
            work = dist.all_reduce(tensor, op, group=axes[0].group, async_op=True)
            self._pending.append((work, tensor, axes[1:], op))

    def _wait(self) -> None:
        """Wait for the sums over the first axis, then take those over the other axes."""
        pending, self._pending = self._pending, []
        for work, tensor, other_axes, op in pending:
            work.wait()
            for axis in other_axes:
                dist.all_reduce(tensor, op, group=axis.group)


class _Columns:
    """The columns that this rank holds, and the products with them."""

    def __init__(
        self,
        plan: Plan,
        whole: ReducedTables,
        matrices: Sequence[MatrixShard],
        axes: Sequence[Axis],
    ):
        # Indices of the local columns in all of v, vector by vector.
        starts, own = (x.table["v_offset"].tolist() for x in (whole, plan))
        index = torch.empty(plan.r * sum(x.cols for x in plan.layouts), dtype=torch.int64)
        for start, place, one in zip(starts, own, matrices, strict=True):
            n = one.whole.cols
            columns = torch.arange(n) if one.columns is None else one.columns
            for j in range(plan.r):
                index[place + j * len(columns) :][: len(columns)] = start + j * n + columns
        self.index = index.to(plan.device)
        sizes = torch.tensor([plan.r * x.rows for x in plan.layouts])
        self._matrix_of = torch.arange(len(sizes)).repeat_interleave(sizes).to(plan.device)
        empty = torch.tensor([x.cols == 0 for x in plan.layouts])
        self._empty = empty.to(plan.device)[self._matrix_of]  # elements of s that no kernel writes
        # Matrices of which this is the first rank with columns.
        own = torch.where(empty, dist.get_world_size(), dist.get_rank()).to(plan.device)
        first = own.clone()
        for axis in axes:
            dist.all_reduce(first, dist.ReduceOp.MIN, axis.group)
        self.counts = (own == first) & ~empty.to(plan.device)

        def zeros(n):
            return torch.zeros(n, dtype=plan.state_dtype, device=plan.device)

        n = len(self.index)
        self._v, self._v_next, self.t = zeros(n), zeros(n), zeros(n)
        self._part = zeros(len(self._matrix_of))

    def cut(self, state: State, local: State) -> None:
        """Let ``local`` use the local columns of the vectors of ``state``."""
        torch.index_select(state.v, 0, self.index, out=self._v)
        if state.v_next is None:
            return local.use(self._v, None)
        torch.index_select(state.v_next, 0, self.index, out=self._v_next)
        return local.use(self._v, self._v_next)

    def products(self, plan: Plan, local: State) -> State:
        """Return a state for the products of the local columns only, without t."""
        v = local.v_next if local.tolerance > 0 else local.v
        return State(plan, v, None, self._part, local.scalars, local.exponent)

    def sum(self, axes: Sequence[Axis], local: State, state: State) -> None:
        """Sum the products over ``axes`` into s; with a tolerance, those of stale matrices only."""
        self._part.masked_fill_(self._empty, 0)
        for axis in axes:
            dist.all_reduce(self._part, group=axis.group)
        part = self._part
        if local.tolerance > 0:
            stale = local.residual > local.tolerance * local.sigma
            part = torch.where(stale[self._matrix_of], part, state.s)
        state.s.copy_(part)

    def sum_in_place(self, axes: Sequence[Axis], state: State) -> None:
        """Sum s over ``axes``."""
        state.s.masked_fill_(self._empty, 0)
        for axis in axes:
            dist.all_reduce(state.s, group=axis.group)


def check_ranks(
    names: Sequence[str],
    vectors: Sequence[torch.Tensor],
    coefficients: Sequence[torch.Tensor],
    axes: Sequence[Axis],
) -> None:
    """Raise RuntimeError if ranks differ in matrices, vectors or coefficients.

    Args:
        names: names of the matrices, then of the elementwise parameters.
        vectors: vectors of each matrix, which must be bitwise equal on every rank.
        coefficients: strength and target of each of ``names``, likewise.
        axes: the axes whose process groups must agree; (): all ranks.
    """
    groups = [axis.group for axis in axes] or [dist.group.WORLD]
    device = coefficients[0].device
    checks = (
        ("strength or target", "set them alike on all ranks", coefficients),
        ("vectors", "begin with the same weights and seed on all ranks", vectors),
    )
    known = zlib.crc32("\n".join(names).encode())
    for group in groups:
        ranks = dist.get_process_group_ranks(group)
        found = _gather(torch.tensor([known], device=device), group)
        for rank, other in zip(ranks, found, strict=True):
            if int(other) != known:
                raise RuntimeError(
                    f"ranks {ranks[dist.get_rank(group)]} and {rank} regularize different "
                    "matrices; build both from the same model, with the same arguments"
                )
        for what, why, numbers in checks:
            if not len(numbers):
                continue
            sums = torch.stack([_bits(x) for x in numbers])
            for rank, other in zip(ranks, _gather(sums, group), strict=True):
                different = (other != sums).any(1).nonzero().flatten().tolist()
                if different:
                    raise RuntimeError(
                        f"{what} of {names[different[0]]!r} and of {len(different) - 1} others "
                        f"differ between ranks {ranks[dist.get_rank(group)]} and {rank}; {why}"
                    )


def _gather(tensor: torch.Tensor, group) -> list[torch.Tensor]:
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, tensor, group=group)
    return found


def _bits(v: torch.Tensor) -> torch.Tensor:
    """Return two sums over the bits of ``v``, the second of which depends on their order."""
    kind = torch.int64 if v.dtype == torch.float64 else torch.int32
    bits = v.contiguous().view(kind).flatten().long()
    place = torch.arange(1, len(bits) + 1, device=v.device)
    return torch.stack((bits.sum(), (bits * place).sum()))

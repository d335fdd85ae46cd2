"""The Triton kernels as a backend."""

from __future__ import annotations

import torch

from ...tables.schema import CONSTRAINTS, DTYPES
from ..base import Backend
from .launch import capability_of, integer_exponent, neutral, variant
from .sizes import LARGE, sizes


class Triton(Backend):
    """All parameters of a plan in two launches per step; a third one for very long rows,
    and up to four for several vectors per matrix.
    """

    name = "triton"
    scalars_on_device = True  # an optimizer's step reads lr, grad_scale and found_inf there

    def gram_matvec(self, plan, state) -> None:
        """See :meth:`Backend.gram_matvec`."""
        v = state.v_next if state.tolerance > 0 else state.v
        self._products(plan, state, v, len(plan.elementwise))

    def _products(self, plan, state, v, n_elementwise) -> None:
        """Multiply matrices by ``v``; take norms of the first ``n_elementwise`` parameters."""
        device, n_tiles = plan.device, len(plan.tiles)
        matrices, tiles, elementwise, _ = plan.device_tables().views
        pointers = (
            matrices, tiles, elementwise, plan.t_partial, plan.gram_partial, v, state.s,
            state.scalars,
        )  # fmt: skip
        numbers = (
            len(plan.matrices), n_tiles, len(plan.elementwise), float(state.exponent),
            integer_exponent(state.exponent), int(state.above),
        )  # fmt: skip
        given = {"with_t": state.v_next is not None, "tolerance": float(state.tolerance)}
        if plan.r == 1:
            if grid := n_tiles + n_elementwise:
                found = _variant("gram_matvec", plan, large=plan.n_elements >= LARGE, **given)
                found.launch(device, grid, pointers, numbers)
            own = sizes(capability_of(device), plan.dtype.itemsize).gram_matvec
            if n_tiles and any(own["SHORTEST"] < n <= own["LONGEST"] for n in plan.widths):
                pointers = pointers[:2] + pointers[3:]
                found = _variant("gram_matvec_long", plan, **given)
                found.launch(device, n_tiles, pointers, numbers[:1])
            return
        group = sizes(capability_of(device), plan.dtype.itemsize, plan.r).subspace_products["GROUP"]
        groups = plan.r // group
        if grid := groups * n_tiles + n_elementwise:
            _variant("subspace_products", plan, **given).launch(device, grid, pointers, numbers)
        if groups > 1 and n_tiles:
            pointers = matrices, tiles, plan.gram_partial, state.s, state.scalars
            found = _variant("subspace_grams", plan, tolerance=float(state.tolerance))
            found.launch(device, n_tiles, pointers, numbers[:1])

    def transposed(self, plan, state) -> None:
        """See :meth:`Backend.transposed`."""
        matrices, tiles, _, _ = plan.device_tables().views
        group = sizes(capability_of(plan.device), plan.dtype.itemsize, plan.r).transposed["GROUP"]
        if grid := plan.r // group * len(plan.tiles):
            given = {"with_t": state.v_next is not None, "tolerance": float(state.tolerance)}
            found = _variant("transposed", plan, **given)
            pointers = matrices, tiles, plan.t_partial, plan.gram_partial, state.s, state.scalars
            found.launch(plan.device, grid, pointers, (len(plan.matrices),))

    def collect(self, plan, state, t, gram) -> None:
        """See :meth:`Backend.collect`."""
        matrices, tiles, _, chunks = plan.device_tables().views
        if not plan.matrices:
            return
        # Without t, this argument is not written to.
        sums = plan.t_partial, plan.gram_partial, plan.t_partial if t is None else t, gram
        if plan.r == 1:
            found = variant("collect_chunks", capability_of(plan.device), with_t=t is not None)
            found.launch(plan.device, len(plan.chunks), (matrices, tiles, chunks, *sums), ())
            return
        found = variant("collect", capability_of(plan.device), None, plan.r, with_t=t is not None)
        grid = len(plan.tiles) + len(plan.matrices)
        found.launch(plan.device, grid, (matrices, tiles, *sums), (len(plan.tiles),))

    def normalize(self, plan, state) -> None:
        """See :meth:`Backend.normalize`."""
        if plan.r == 1:
            self._rank_one(plan, state, finish=True, gradient=False, accumulate=False)
        elif plan.matrices and plan.operators is not None:
            matrices, tiles, _, _ = plan.device_tables().views
            pointers = (
                matrices, tiles, *plan.operator_tables().views, plan.t_partial, plan.gram_partial,
                state.v, state.v if state.v_next is None else state.v_next, state.scalars,
            )  # fmt: skip
            found = variant(
                "waves", capability_of(plan.device), with_t=state.v_next is not None,
                tolerance=float(state.tolerance),
            )  # fmt: skip
            found.launch(plan.device, len(plan.matrices), pointers, self._numbers(plan, state))
        elif plan.matrices:
            matrices, tiles, _, _ = plan.device_tables().views
            pointers = (
                matrices, tiles, plan.t_partial, plan.gram_partial,
                state.v, state.v if state.v_next is None else state.v_next, state.s, state.scalars,
            )  # fmt: skip
            found = variant(
                "ritz", capability_of(plan.device), None, plan.r,
                with_t=state.v_next is not None, tolerance=float(state.tolerance),
            )  # fmt: skip
            found.launch(plan.device, len(plan.matrices), pointers, self._numbers(plan, state))

    @staticmethod
    def _numbers(plan, state) -> tuple:
        k = state.exponent
        sizes = len(plan.matrices), len(plan.elementwise)
        return *sizes, float(k), integer_exponent(k), int(state.above)

    def rank_one(self, plan, state, grads, accumulate: bool) -> None:
        """See :meth:`Backend.rank_one`; the plan is bound to ``grads`` already."""
        self._rank_one(plan, state, finish=False, gradient=True, accumulate=accumulate)

    def finish(self, plan, state, grads, accumulate: bool) -> None:
        """See :meth:`Backend.finish`; one launch for one vector."""
        together = plan.r == 1 and state.tolerance == 0
        if not together:
            self.normalize(plan, state)
        self._rank_one(plan, state, finish=together, gradient=True, accumulate=accumulate)

    def _rank_one(self, plan, state, finish, gradient, accumulate) -> None:
        n_chunks = len(plan.chunks) if finish else 0
        n_others = len(plan.tiles) + len(plan.elementwise) if gradient else 0
        n_matrices, k = len(plan.matrices), state.exponent
        with_t = state.v_next is not None
        pointers = (
            *plan.device_tables().views, plan.t_partial, plan.gram_partial, plan.chunk_squares,
            plan.arrivals, state.v, state.v_next if with_t else state.v, state.s, state.scalars,
            neutral(plan.device)[0] if state.scale is None else state.scale,
        )  # fmt: skip
        # One launch per dtype of gradients; the first one finishes.
        for dtype in (plan.grad_dtypes or [plan.dtype]) if gradient else [plan.dtype]:
            if grid := n_chunks + n_others:
                numbers = (
                    n_matrices, n_chunks, len(plan.tiles), len(plan.elementwise),
                    plan.r * n_matrices, DTYPES[dtype], float(k), integer_exponent(k),
                    int(state.above),
                )  # fmt: skip
                variant(
                    "rank_one", capability_of(plan.device), plan.dtype, grad_type=dtype,
                    finish=n_chunks > 0, with_t=with_t and n_chunks > 0, gradient=gradient,
                    accumulate=accumulate,
                    tolerance=float(state.tolerance) if n_chunks else 0.0, terms=_terms(plan),
                ).launch(plan.device, grid, pointers, numbers)  # fmt: skip
            n_chunks = 0

    def update(self, step) -> None:
        """See :meth:`Backend.update`; one pass over weights, gradients and moments.

        With several vectors, the products are a separate launch.
        """
        (groups,) = step.group_table.views
        others, *moments = step.tables.views
        one, zero = neutral(step.device)
        if step.plan is None:  # nothing is regularized: arguments that the kernel ignores
            tables, numbers, k, r, scale = (others,) * 3, (1, 0, 0, 1), 1.0, 1, None
            above = False
            buffers = (step.steps, groups.view(torch.float64), *(step.steps,) * 4)
        else:
            plan, state = step.plan, step.state
            tables = plan.device_tables().views[:3]
            k, r, scale, above = state.exponent, plan.r, state.scale, state.above
            numbers = (len(plan.matrices), len(plan.tiles), len(plan.elementwise),
                       r * len(plan.matrices))  # fmt: skip
            buffers = (plan.t_partial, plan.gram_partial, state.v, state.v_next, state.s,
                       state.scalars)  # fmt: skip
        if not (grid := numbers[1] + numbers[2] + len(step.others)):
            return
        pointers = (
            *tables, others, *moments, groups.view(torch.float64), step.steps, *buffers,
            one if scale is None else scale,
            one if step.grad_scale is None else step.grad_scale,
            zero if step.found_inf is None else step.found_inf,
        )  # fmt: skip
        each = step.constraint == "cap" and step.plan is not None and step.plan.n_values > 1
        variant(
            "update", capability_of(step.device), step.dtype, 1,
            moment_type=step.moment_dtype, rule=step.rule.number,
            with_moment=bool(step.moments[0]), products=r == 1,
            decoupled=1 + CONSTRAINTS[step.constraint] if step.decoupled else 0,
            terms=r if each else 1 if step.plan is None else _terms(step.plan), each=each,
        ).launch(
            step.device, grid, pointers, (*numbers, float(k), integer_exponent(k), int(above))
        )  # fmt: skip
        if r > 1:
            self._products(plan, state, state.v_next, 0)


def _terms(plan) -> int:
    """Return how many products s v^T of vectors a gradient is the sum of."""
    return 1 if plan.operators is None else 2


def _variant(kernel: str, plan, **constants):
    return variant(kernel, capability_of(plan.device), plan.dtype, plan.r, **constants)

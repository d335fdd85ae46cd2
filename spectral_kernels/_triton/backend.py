"""The Triton kernels behind the calls of a backend."""

from __future__ import annotations

import torch
import triton.language as tl

from ..plan import DTYPES, MAX_TILES
from .gram_matvec import gram_matvec
from .partials import collect, transposed
from .rank_one import rank_one
from .ritz import ritz
from .sizes import sizes
from .subspace_products import subspace_grams, subspace_products
from .update import update

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
FUSED = {"enable_fp_fusion": True}  # a * b + c rounded once; Triton's default from 3.10 on is False
_SMALL = 16  # integers up to which a power is a product


def integer_exponent(k: float) -> int:
    """Return the constant K of the kernels."""
    return int(k) if float(k).is_integer() and 1 <= k <= _SMALL else 0


class Triton:
    """All matrices and vectors of a plan in two launches per step, or up to four with several."""

    name = "triton"
    scalars_on_device = True  # an optimizer's step reads lr, grad_scale and found_inf there

    def gram_matvec(self, plan, state) -> None:
        """See :func:`reference.gram_matvec`."""
        v = state.v_next if state.tolerance > 0 else state.v
        self._products(plan, state, v, len(plan.vectors))

    def _products(self, plan, state, v, n_vectors) -> None:
        """Take the products of ``v`` with the matrices, and norms of the first vectors."""
        own, tables, n_tiles = self._sizes(plan, plan.r), plan.device_tables(), len(plan.tiles)
        arguments = (
            *tables.views, plan.t_partial, plan.gram_partial, v, state.s, state.scalars,
            len(plan.matrices), n_tiles, len(plan.vectors), float(state.exponent),
        )  # fmt: skip
        constants = {
            "DTYPE": TYPES[plan.dtype], "K": integer_exponent(state.exponent),
            "WITH_T": state.v_next is not None, "TOLERANCE": float(state.tolerance), **FUSED,
        }  # fmt: skip
        if plan.r == 1:
            if grid := n_tiles + n_vectors:
                gram_matvec[(grid,)](
                    *arguments, **constants, **own.gram_matvec, num_warps=own.gram_matvec_warps
                )
            return
        groups = plan.r // own.subspace_products["GROUP"]
        if grid := groups * n_tiles + n_vectors:
            subspace_products[(grid,)](
                *arguments, **constants, VECTORS=plan.r,
                **own.subspace_products, num_warps=own.subspace_products_warps,
            )  # fmt: skip
        if groups > 1 and n_tiles:
            matrices, tiles, _ = tables.views
            subspace_grams[(n_tiles,)](
                matrices, tiles, plan.gram_partial, state.s, state.scalars, len(plan.matrices),
                VECTORS=plan.r, TOLERANCE=float(state.tolerance),
                **own.subspace_grams, num_warps=own.subspace_grams_warps, **FUSED,
            )  # fmt: skip

    def transposed(self, plan, state) -> None:
        """See :func:`reference.transposed`."""
        own, (matrices, tiles, _) = self._sizes(plan, plan.r), plan.device_tables().views
        if grid := plan.r // own.transposed["GROUP"] * len(plan.tiles):
            transposed[(grid,)](
                matrices, tiles, plan.t_partial, plan.gram_partial, state.s, state.scalars,
                len(plan.matrices), DTYPE=TYPES[plan.dtype], VECTORS=plan.r,
                WITH_T=state.v_next is not None, TOLERANCE=float(state.tolerance),
                **own.transposed, num_warps=own.transposed_warps, **FUSED,
            )  # fmt: skip

    def collect(self, plan, state, t, gram) -> None:
        """See :func:`reference.collect`."""
        own, (matrices, tiles, _) = self._sizes(plan), plan.device_tables().views
        if plan.matrices:
            collect[(len(plan.tiles) + len(plan.matrices),)](
                matrices, tiles, plan.t_partial, plan.gram_partial, gram if t is None else t, gram,
                len(plan.tiles), VECTORS=plan.r, WITH_T=t is not None,
                **own.collect, num_warps=own.collect_warps, **FUSED,
            )  # fmt: skip

    def normalize(self, plan, state) -> None:
        """See :func:`reference.normalize`."""
        if plan.r == 1:
            self._rank_one(plan, state, finish=True, gradient=False, accumulate=False)
        elif plan.matrices:
            tables, own = plan.device_tables(), self._sizes(plan, plan.r)
            matrices, tiles, _ = tables.views
            ritz[(len(plan.matrices),)](
                matrices, tiles, plan.t_partial, plan.gram_partial,
                state.v, state.v if state.v_next is None else state.v_next, state.s, state.scalars,
                len(plan.matrices), len(plan.vectors), float(state.exponent),
                K=integer_exponent(state.exponent), VECTORS=plan.r,
                WITH_T=state.v_next is not None, TOLERANCE=float(state.tolerance),
                **own.ritz, num_warps=own.ritz_warps, **FUSED,
            )  # fmt: skip

    def rank_one(self, plan, state, grads, accumulate: bool) -> None:
        """See :func:`reference.rank_one`; the plan is bound to ``grads`` already."""
        self._rank_one(plan, state, finish=False, gradient=True, accumulate=accumulate)

    def finish(self, plan, state, grads, accumulate: bool) -> None:
        """Do what normalize and rank_one do; of one vector, in one launch."""
        together = plan.r == 1 and state.tolerance == 0
        if not together:
            self.normalize(plan, state)
        self._rank_one(plan, state, finish=together, gradient=True, accumulate=accumulate)

    def _rank_one(self, plan, state, finish, gradient, accumulate) -> None:
        tables, own = plan.device_tables(), self._sizes(plan)
        finishing = len(plan.matrices) if finish else 0
        # One launch for each type of gradients; where there are several, the first finishes.
        for dtype in (plan.grad_dtypes or [plan.dtype]) if gradient else [plan.dtype]:
            grid = finishing + (len(plan.tiles) + len(plan.vectors) if gradient else 0)
            if not grid:
                continue
            rank_one[(grid,)](
                *tables.views, plan.t_partial, plan.gram_partial,
                state.v, state.v if state.v_next is None else state.v_next, state.s, state.scalars,
                state.scalars if state.scale is None else state.scale,
                len(plan.matrices), len(plan.tiles), len(plan.vectors), DTYPES[dtype],
                float(state.exponent),
                DTYPE=TYPES[plan.dtype], GRAD_TYPE=TYPES[dtype],
                K=integer_exponent(state.exponent), FINISH=finishing > 0,
                WITH_T=state.v_next is not None, GRADIENT=gradient, ACCUMULATE=accumulate,
                WITH_SCALE=state.scale is not None, VECTORS=plan.r,
                TOLERANCE=float(state.tolerance), MAX_TILES=MAX_TILES,
                **own.rank_one, num_warps=own.rank_one_warps, **FUSED,
            )  # fmt: skip
            finishing = 0

    def update(self, step) -> None:
        """See :func:`reference.update`; one pass over weights, gradients and moments.

        The products with several vectors are a launch of their own.
        """
        own, (groups,) = self._sizes(step), step.group_table.views
        others, *moments = step.tables.views
        if step.bucket is None:  # nothing is regularized: what the kernel does not look at
            tables, n_matrices, n_tiles, n_vectors, k = (others,) * 3, 0, 0, 0, 1.0
            buffers = (step.steps, groups.view(torch.float64), *(step.steps,) * 4)
            scale, r = None, 1
        else:
            plan, state = step.bucket.plan, step.bucket.local
            tables, k, scale = plan.device_tables().views, float(state.exponent), state.scale
            r = plan.r
            n_matrices, n_tiles, n_vectors = (len(x) for x in (plan.matrices, plan.tiles,
                                                               plan.vectors))  # fmt: skip
            buffers = (plan.t_partial, plan.gram_partial, state.v, state.v_next, state.s,
                       state.scalars)  # fmt: skip
        if not (grid := n_tiles + n_vectors + len(step.others)):
            return
        numbers = scale, step.grad_scale, step.found_inf
        update[(grid,)](
            *tables, others, *moments, groups.view(torch.float64), step.steps, *buffers,
            *(step.steps if number is None else number for number in numbers),
            n_matrices, n_tiles, n_vectors, k,
            DTYPE=TYPES[step.dtype], MOMENT_TYPE=TYPES[step.moment_dtype], RULE=step.rule.number,
            WITH_MOMENT=bool(step.moments[0]), DECOUPLED=bool(step.decoupled),
            K=integer_exponent(k), VECTORS=r, WITH_SCALE=scale is not None,
            WITH_GRAD_SCALE=step.grad_scale is not None,
            WITH_FOUND_INF=step.found_inf is not None,
            **own.update, num_warps=own.update_warps, maxnreg=own.update_registers, **FUSED,
        )  # fmt: skip
        if r > 1:
            self._products(plan, state, state.v_next, 0)

    @staticmethod
    def _sizes(plan, r: int = 1):
        if plan.device.type == "cpu":
            return sizes(0, plan.dtype.itemsize, r)
        major, minor = torch.cuda.get_device_capability(plan.device)
        return sizes(10 * major + minor, plan.dtype.itemsize, r)

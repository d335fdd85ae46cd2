"""The Triton kernels behind the calls of a backend."""

from __future__ import annotations

import torch
import triton.language as tl

from ..plan import DTYPES, MAX_TILES, MIN_TILE_ROWS_ON_GPU
from .gram_matvec import gram_matvec
from .rank_one import rank_one
from .sizes import sizes

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_SMALL = 16  # integers up to which a power is a product


def integer_exponent(k: float) -> int:
    """Return the constant K of the kernels."""
    return int(k) if float(k).is_integer() and 1 <= k <= _SMALL else 0


class Triton:
    """All matrices and vectors of a plan in two launches per step."""

    name = "triton"
    min_tile_rows = MIN_TILE_ROWS_ON_GPU

    def gram_matvec(self, plan, state) -> None:
        """See :func:`reference.gram_matvec`."""
        if not (grid := len(plan.tiles) + len(plan.vectors)):
            return
        tables, own = plan.device_tables(), self._sizes(plan)
        with_t = state.v_next is not None
        gram_matvec[(grid,)](
            tables.matrices, tables.tiles, tables.vectors, plan.t_partial, plan.norm_partial,
            state.v, state.s, state.scalars,
            len(plan.matrices), len(plan.tiles), len(plan.vectors), float(state.exponent),
            DTYPE=TYPES[plan.dtype], K=integer_exponent(state.exponent), WITH_T=with_t,
            **own.gram_matvec, num_warps=own.gram_matvec_warps,
        )  # fmt: skip

    def normalize(self, plan, state) -> None:
        """See :func:`reference.normalize`."""
        self._rank_one(plan, state, finish=True, gradient=False, accumulate=False)

    def rank_one(self, plan, state, grads, accumulate: bool) -> None:
        """See :func:`reference.rank_one`; the plan is bound to ``grads`` already."""
        self._rank_one(plan, state, finish=False, gradient=True, accumulate=accumulate)

    def finish(self, plan, state, grads, accumulate: bool) -> None:
        """Do what normalize and rank_one do, in one launch."""
        self._rank_one(plan, state, finish=True, gradient=True, accumulate=accumulate)

    def _rank_one(self, plan, state, finish, gradient, accumulate) -> None:
        tables, own = plan.device_tables(), self._sizes(plan)
        finishing = len(plan.matrices) if finish else 0
        # One launch for each type of gradients; where there are several, the first finishes.
        for dtype in (plan.grad_dtypes or [plan.dtype]) if gradient else [plan.dtype]:
            grid = finishing + (len(plan.tiles) + len(plan.vectors) if gradient else 0)
            if not grid:
                continue
            rank_one[(grid,)](
                tables.matrices, tables.tiles, tables.vectors, plan.t_partial, plan.norm_partial,
                state.v, state.v if state.v_next is None else state.v_next, state.s, state.scalars,
                state.scalars if state.scale is None else state.scale,
                len(plan.matrices), len(plan.tiles), len(plan.vectors), DTYPES[dtype],
                float(state.exponent),
                DTYPE=TYPES[plan.dtype], GRAD_TYPE=TYPES[dtype],
                K=integer_exponent(state.exponent), FINISH=finishing > 0,
                WITH_T=state.v_next is not None, GRADIENT=gradient, ACCUMULATE=accumulate,
                WITH_SCALE=state.scale is not None, MAX_TILES=MAX_TILES,
                **own.rank_one, num_warps=own.rank_one_warps,
            )  # fmt: skip
            finishing = 0

    @staticmethod
    def _sizes(plan):
        if plan.device.type == "cpu":
            return sizes(0, plan.dtype.itemsize)
        major, minor = torch.cuda.get_device_capability(plan.device)
        return sizes(10 * major + minor, plan.dtype.itemsize)

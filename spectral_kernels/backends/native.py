"""The compiled module's kernels as backends: C++ for a CPU, CUDA C++ for a GPU."""

from __future__ import annotations

import torch

from .base import Backend


class Cpu(Backend):
    """The C++ kernels, with torch's number of threads."""

    name = "cpu"

    def __init__(self, native):
        self._gram_matvec = native.gram_matvec
        self._transposed = native.transposed
        self._collect = native.collect
        self._normalize = native.normalize
        self._rank_one = native.rank_one
        self._update = native.update
        self._jumps = native.jumps

    def gram_matvec(self, plan, state) -> None:
        """See :meth:`Backend.gram_matvec`."""
        self._gram_matvec(state.address, torch.get_num_threads())

    def transposed(self, plan, state) -> None:
        """See :meth:`Backend.transposed`."""
        self._transposed(state.address, torch.get_num_threads())

    def collect(self, plan, state, t, gram) -> None:
        """See :meth:`Backend.collect`."""
        where = 0 if t is None else t.data_ptr()
        self._collect(state.address, where, gram.data_ptr(), torch.get_num_threads())

    def normalize(self, plan, state) -> None:
        """See :meth:`Backend.normalize`."""
        self._normalize(state.address, torch.get_num_threads())

    def rank_one(self, plan, state, grads, accumulate: bool) -> None:
        """See :meth:`Backend.rank_one`; the plan is bound to ``grads`` already."""
        self._rank_one(state.address, accumulate, torch.get_num_threads())

    def update(self, step) -> None:
        """See :meth:`Backend.update`; one pass over weights, gradients and moments."""
        self._update(step.header_address, step.address, torch.get_num_threads())

    def jumps(self, state, ratios, least: float, factor: float) -> bool:
        """See :meth:`Backend.jumps`."""
        return self._jumps(state.address, ratios.address, least, factor)


class Cuda(Backend):
    """The CUDA C++ kernels, in the current stream: two launches per step, three with r > 1."""

    name = "cuda"
    scalars_on_device = True  # an optimizer's step reads lr, grad_scale and found_inf there

    def __init__(self, native):
        self._gram_matvec = native.gram_matvec
        self._transposed = native.transposed
        self._collect = native.collect
        self._rank_one = native.rank_one
        self._update = native.update

    def gram_matvec(self, plan, state) -> None:
        """See :meth:`Backend.gram_matvec`."""
        self._gram_matvec(*self._where(plan, state))

    def transposed(self, plan, state) -> None:
        """See :meth:`Backend.transposed`."""
        self._transposed(*self._where(plan, state))

    def collect(self, plan, state, t, gram) -> None:
        """See :meth:`Backend.collect`."""
        where = 0 if t is None else t.data_ptr()
        self._collect(*self._where(plan, state), where, gram.data_ptr())

    def normalize(self, plan, state) -> None:
        """See :meth:`Backend.normalize`."""
        self._rank_one(*self._where(plan, state), True, False, False)

    def rank_one(self, plan, state, grads, accumulate: bool) -> None:
        """See :meth:`Backend.rank_one`; the plan is bound to ``grads`` already."""
        self._rank_one(*self._where(plan, state), False, True, accumulate)

    def finish(self, plan, state, grads, accumulate: bool) -> None:
        """See :meth:`Backend.finish`; one launch with one vector per matrix."""
        self._rank_one(*self._where(plan, state), True, True, accumulate)

    def update(self, step) -> None:
        """See :meth:`Backend.update`; one launch, and with several vectors one for the products."""
        tables = (0, 0, 0, 0) if step.plan is None else step.plan.device_tables().addresses
        self._update(step.header_address, *tables, step.address, *_stream(step.device))

    @staticmethod
    def _where(plan, state) -> tuple[int, ...]:
        return state.address, *plan.device_tables().addresses, *_stream(plan.device)


def _stream(device: torch.device) -> tuple[int, int]:
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream

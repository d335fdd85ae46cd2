"""The tables of a plan on its device, refreshed when an address has changed."""

from __future__ import annotations

import numpy as np
import torch


class DeviceTables:
    """Copies of a plan's tables as int64 tensors that stay where they are.

    On a CPU they share the memory of the plan's own tables. On a GPU a refresh is one copy from
    pinned memory in the current stream, without a synchronization.
    """

    def __init__(self, plan):
        self.plan = plan
        self.parts = [_words(table) for table in (plan.tiles, plan.table, plan.vector_table)]
        self.on_host = plan.device.type == "cpu"
        self.version = None
        sizes = [part.size for part in self.parts]
        if self.on_host:
            views = [torch.from_numpy(part) for part in self.parts]
        else:
            self.all = torch.empty(sum(sizes), dtype=torch.int64, device=plan.device)
            views = self.all.split(sizes)
        self.tiles, self.matrices, self.vectors = views
        self.addresses = tuple(x.data_ptr() for x in (self.matrices, self.tiles, self.vectors))

    def refresh(self) -> None:
        """Bring the copies up to date.

        Raises:
            RuntimeError: an address has changed during the capture of a CUDA graph.
        """
        if self.on_host or self.version == self.plan.version:
            return
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "an address of a weight or a gradient has changed since the last step, and a CUDA "
                "graph is being captured: run a step before, and keep the gradients with "
                "zero_grad(set_to_none=False)"
            )
        # The allocator of pinned memory keeps the block until the copy is done.
        self.all.copy_(torch.from_numpy(np.concatenate(self.parts)).pin_memory(), non_blocking=True)
        self.version = self.plan.version


def _words(table: np.ndarray) -> np.ndarray:
    return table.view(np.int64).reshape(-1)

"""Tables that Python writes, on the device of the kernels, refreshed when they have changed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


class DeviceTables:
    """Copies of tables as int64 tensors that stay where they are.

    On a CPU they share the memory of the tables. On a GPU a refresh is one copy from pinned memory
    in the current stream, without a synchronization.

    Args:
        tables: arrays of eight-byte fields.
        device: where the copies are.
        what: may change only when no CUDA graph is being captured, for the error.
    """

    def __init__(self, tables: Sequence[np.ndarray], device: torch.device, what: str):
        self._parts = [table.view(np.int64).reshape(-1) for table in tables]
        self._what, self._version = what, None
        self.on_host = device.type == "cpu"
        if self.on_host:
            self.views = [torch.from_numpy(part) for part in self._parts]
        else:
            sizes = [part.size for part in self._parts]
            self._all = torch.empty(sum(sizes), dtype=torch.int64, device=device)
            self.views = list(self._all.split(sizes))
        self.addresses = tuple(x.data_ptr() for x in self.views)

    def refresh(self, version: int) -> None:
        """Bring the copies up to date if the ``version`` of the tables is not theirs.

        Raises:
            RuntimeError: the tables have changed during the capture of a CUDA graph.
        """
        if self.on_host or self._version == version:
            return
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{self._what} has changed since the last step, and a CUDA graph is being "
                "captured: run a step before, and keep the gradients with "
                "zero_grad(set_to_none=False)"
            )
        # The allocator of pinned memory keeps the block until the copy is done.
        whole = torch.from_numpy(np.concatenate(self._parts)).pin_memory()
        self._all.copy_(whole, non_blocking=True)
        self._version = version

"""What Python writes for kernels: tables, and numbers, brought to their device without a wait."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch

SPARES = 4  # changes of the tables that captures of CUDA graphs may see between two eager steps


def shares_memory(device: torch.device) -> bool:
    """Tell whether what serves ``device`` may read the memory that Python writes.

    Kernels of a GPU may not; devices that are no CPU either have the reference alone.
    """
    return device.type != "cuda"


def pinned(n: int, dtype: torch.dtype) -> torch.Tensor:
    """Return page-locked memory for ``n`` numbers, from where a copy to a GPU does not wait."""
    return torch.empty(n, dtype=dtype, device="cpu", pin_memory=True)


def is_capturing(device: torch.device) -> bool:
    """Tell whether what goes into the current stream of ``device`` becomes a CUDA graph."""
    if device.type != "cuda":
        return False
    if device.index == torch.cuda.current_device():
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def fill(tensor: torch.Tensor, values: float | torch.Tensor | Sequence[float]) -> None:
    """Write ``values`` into ``tensor``, 1-D, on any device; a host does not wait for a GPU.

    Args:
        tensor: where to.
        values: a number or a 0-d tensor for all elements, or a number for each.
    """
    if isinstance(values, torch.Tensor):
        if not shares_memory(values.device):
            tensor.copy_(values.detach())
            return
        values = float(values)
    if isinstance(values, int | float):
        tensor.fill_(values)
    elif len(set(values)) == 1:
        tensor.fill_(values[0])
    elif is_capturing(tensor.device):  # a graph would copy from memory that is used again
        start = 0
        for value, equal in groupby(values):
            n = len(list(equal))
            tensor[start : start + n].fill_(value)
            start += n
    else:
        found = torch.tensor(values, dtype=tensor.dtype, device="cpu")
        if shares_memory(tensor.device):
            tensor.copy_(found)
        else:
            # The allocator of page-locked memory keeps the block until the copy is done.
            tensor.copy_(pinned(len(values), tensor.dtype).copy_(found), non_blocking=True)


def number_on(
    device: torch.device, dtype: torch.dtype, number: float | torch.Tensor
) -> torch.Tensor:
    """Return ``number`` as a 0-d tensor; a host waits only for a number that is on another device.

    A tensor that is there in that dtype is returned as it is.
    """
    if isinstance(number, torch.Tensor):
        if shares_memory(device) or not shares_memory(number.device):
            return number.detach().to(dtype=dtype, device=device)
        number = float(number)
    return torch.full((), number, dtype=dtype, device=device)


class _Copy(NamedTuple):
    """All tables on the device, one after the other."""

    whole: torch.Tensor | None  # None where they share memory
    views: list[torch.Tensor]
    addresses: tuple[int, ...]
    staged: torch.Tensor | None = None  # page-locked, for a copy that a CUDA graph takes


class DeviceTables:
    """Copies of tables as int64 tensors, one in ``views`` and ``addresses`` for each.

    On a CPU they share the memory of the tables. On a GPU a refresh is one copy from page-locked
    memory in the current stream, without a synchronization.

    What a CUDA graph reads is not written again but by the graph itself, which would otherwise go
    to addresses of another time. Copies that were up to date before a capture are left to the
    graph, and eager steps get others when the tables change. Where the tables have changed since,
    as every gradient that autograd makes in the graph's own memory changes them, the capture takes
    a spare pair of copies, on the host and on the device: the graph copies the one to the other in
    each replay. The pairs live as long as this object.

    Args:
        tables: arrays of eight-byte fields.
        device: where the copies are.
        what: makes the tables change, for the error.
    """

    def __init__(self, tables: Sequence[np.ndarray], device: torch.device, what: str):
        self._parts = [table.view(np.int64).reshape(-1) for table in tables]
        self._sizes = [part.size for part in self._parts]
        self._device, self._what = device, what
        self.on_host = shares_memory(device)
        if self.on_host:
            views = [torch.from_numpy(part) for part in self._parts]
            self._now = _Copy(None, views, tuple(x.data_ptr() for x in views))
            return
        self._version = self._captured_version = None
        self._spares: list[_Copy] = []
        self._captured: list[_Copy] = []  # spares that were taken
        self._kept: list[_Copy] = []  # former eager copies that graphs read
        self._is_read_by_graphs = False  # the eager copy
        # These outlive an inference mode in which they happen to be made.
        with torch.inference_mode(False):
            self._now = self._eager = self._room()

    @property
    def views(self) -> list[torch.Tensor]:
        """The copies of this moment, int64, 1-D."""
        return self._now.views

    @property
    def addresses(self) -> tuple[int, ...]:
        """Their addresses."""
        return self._now.addresses

    def refresh(self, version: int) -> None:
        """Bring the copies up to date if the ``version`` of the tables is not theirs.

        Raises:
            RuntimeError: the tables have changed during captures of CUDA graphs, and there is no
                spare copy left, or none yet.
        """
        if self.on_host:
            return
        if is_capturing(self._device):
            self._capture(version)
            return
        if self._version != version:
            with torch.inference_mode(False):
                self._write()
            self._version = version
        self._now = self._eager

    def _room(self, staged: torch.Tensor | None = None) -> _Copy:
        whole = torch.empty(sum(self._sizes), dtype=torch.int64, device=self._device)
        views = list(whole.split(self._sizes))
        return _Copy(whole, views, tuple(x.data_ptr() for x in views), staged)

    def _staged(self) -> torch.Tensor:
        return pinned(sum(self._sizes), torch.int64)

    def _write(self) -> None:
        """Copy the tables to where eager steps read them, and have spares."""
        if self._is_read_by_graphs:
            self._kept.append(self._eager)
            self._eager, self._is_read_by_graphs = self._room(), False
        # The allocator of page-locked memory keeps the block until the copy is done.
        staged = self._staged()
        np.concatenate(self._parts, out=staged.numpy())
        self._eager.whole.copy_(staged, non_blocking=True)
        while len(self._spares) < SPARES:
            self._spares.append(self._room(self._staged()))

    def _capture(self, version: int) -> None:
        """Let the graph that is being captured read tables that nothing else will write."""
        if self._version == version:
            self._now, self._is_read_by_graphs = self._eager, True
            return
        if self._captured_version != version:
            if not self._spares:
                raise RuntimeError(
                    f"{self._what} has changed since the last step outside of a CUDA graph, "
                    f"and each of the {SPARES} spare copies of the tables is in a graph, or there "
                    "are none yet: run a step before the capture"
                )
            found = self._spares.pop()
            np.concatenate(self._parts, out=found.staged.numpy())
            self._captured.append(found)
            self._captured_version = version
        # Nothing tells whether this is the capture in which the spare was taken or another one,
        # whose graph may be replayed first: each use is preceded by the copy.
        self._now = self._captured[-1]
        self._now.whole.copy_(self._now.staged, non_blocking=True)

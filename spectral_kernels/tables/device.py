"""Tables and numbers for kernels, copied to their device without a synchronization."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch

SPARES = 4  # table changes that captures of CUDA graphs may see between two eager steps


def shares_memory(device: torch.device) -> bool:
    """Return whether the backends of ``device`` can read host memory.

    GPU kernels cannot; devices other than CPU and GPU have only the reference.
    """
    return device.type != "cuda"


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of sums and of scalar mathematics on ``device``: float64 where it has that.

    Apple's GPUs (mps) and some of Intel's (xpu) have no float64: float32.
    """
    if device.type == "mps":
        return torch.float32
    if device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64:
        return torch.float32
    return torch.float64


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` in the :func:`wide_dtype` of its device, itself if it has that already."""
    return tensor.to(wide_dtype(tensor.device))


def pinned(n: int, dtype: torch.dtype) -> torch.Tensor:
    """Return page-locked memory for ``n`` numbers, for asynchronous copies to a GPU."""
    return torch.empty(n, dtype=dtype, device="cpu", pin_memory=True)


def is_capturing(device: torch.device) -> bool:
    """Return whether the current stream of ``device`` is being captured into a CUDA graph."""
    if device.type != "cuda":
        return False
    if device.index == torch.cuda.current_device():
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def fill(tensor: torch.Tensor, values: float | torch.Tensor | Sequence[float]) -> None:
    """Write ``values`` into ``tensor``, on any device; the host does not wait for a GPU.

    Args:
        tensor: 1-D, the destination.
        values: a number or a 0-d tensor for all elements, or one number per element.
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
    elif is_capturing(tensor.device):  # a graph would copy from memory that is reused
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
    """Return ``number`` as a 0-d tensor of ``dtype`` on ``device``, itself if it is one already.

    The host waits only for a number that is on a GPU other than ``device``.
    """
    if isinstance(number, torch.Tensor):
        if shares_memory(device) or not shares_memory(number.device):
            return number.detach().to(dtype=dtype, device=device)
        number = float(number)
    return torch.full((), number, dtype=dtype, device=device)


class _Copy(NamedTuple):
    """All tables on the device, one after the other."""

    whole: torch.Tensor | None  # None if they share the host's memory
    views: list[torch.Tensor]
    addresses: tuple[int, ...]
    staged: torch.Tensor | None = None  # page-locked source of the copy in a CUDA graph


class DeviceTables:
    """Device copies of tables as int64 tensors; ``views`` and ``addresses`` have one per table.

    On a CPU they share the memory of the tables. On a GPU a refresh is one copy from page-locked
    memory in the current stream, without a synchronization.

    A copy that a CUDA graph reads is overwritten only by the graph itself: otherwise its replays
    would use addresses from after the capture. A copy that is up to date at the capture is left to
    the graph, and eager steps get a new one when the tables change. If the tables have changed
    since the last eager step (autograd allocates gradients in the graph's own memory), the capture
    takes a spare pair of buffers, on host and device, and the graph copies one to the other in
    each replay. The pairs live as long as this object.

    Args:
        tables: arrays of eight-byte fields.
        device: device of the copies.
        what: what changes the tables, for the error message.
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
        self._captured: list[_Copy] = []  # spares that graphs use
        self._kept: list[_Copy] = []  # former eager copies that graphs read
        self._is_read_by_graphs = False  # whether a graph reads the eager copy
        # These outlive an inference mode that is active here.
        with torch.inference_mode(False):
            self._now = self._eager = self._room()

    @property
    def views(self) -> list[torch.Tensor]:
        """The current copies, int64, 1-D."""
        return self._now.views

    @property
    def addresses(self) -> tuple[int, ...]:
        """Their addresses."""
        return self._now.addresses

    def refresh(self, version: int) -> None:
        """Update the copies if they are older than ``version`` of the tables.

        Raises:
            RuntimeError: the tables have changed during captures of CUDA graphs, and no spare
                copy is left, or none has been made yet.
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
        """Copy the tables to the eager copy, and allocate missing spares."""
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
        """Give the graph being captured a copy that nothing else will overwrite."""
        if self._version == version:
            self._now, self._is_read_by_graphs = self._eager, True
            return
        if self._captured_version != version:
            if not self._spares:
                raise RuntimeError(
                    f"{self._what} has changed since the last step outside of a CUDA graph, "
                    f"and all {SPARES} spare copies of the tables are in graphs, or there are "
                    "none yet; run a step before the capture"
                )
            found = self._spares.pop()
            np.concatenate(self._parts, out=found.staged.numpy())
            self._captured.append(found)
            self._captured_version = version
        # This may be another capture than the one that took the spare, and its graph may be
        # replayed first: each use is preceded by the copy.
        self._now = self._captured[-1]
        self._now.whole.copy_(self._now.staged, non_blocking=True)

"""What a stage is given: where it writes, its device and cases, and how long it may take."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from spectral_kernels.backends import choice

from . import inputs, measure
from .lines import Lines
from .parallel import LAST_PART, NOT_BEGUN

_LEAST = 0.5  # seconds that a group is worth


@dataclass
class Job:
    """One stage as its process sees it; ``until`` is the monotonic time at which it is killed.

    ``without`` are "case/dtype/backend" that have broken the device in an earlier process of this
    stage, and ``after`` is the "case/dtype" that it was at.
    """

    lines: Lines
    device: str
    until: float
    cases: tuple[str, ...] = inputs.CASES
    without: tuple[str, ...] = ()
    after: str | None = None
    begin: float = field(default_factory=time.monotonic)
    backends: tuple[str, ...] = ()

    def __post_init__(self):
        """Take both backends for the device; on a CPU, C++ stands in for CUDA C++."""
        self.backends = self.backends or ("triton", "cpu" if self.dry_run else "cuda")

    @property
    def dry_run(self) -> bool:
        """Tell whether this is a rehearsal on a CPU."""
        return self.lines.dry_run

    @property
    def rounds(self) -> int:
        """Return how many rounds there are at most; the figures of a rehearsal tell nothing."""
        return 1 if self.dry_run else measure.MOST

    def leave_out_unavailable(self) -> None:
        """Keep of the backends those that can run here, and write why the others cannot."""
        reasons = {name: choice.unavailable(name) for name in self.backends}
        self.backends = tuple(name for name in reasons if reasons[name] is None)
        for name, reason in reasons.items():
            if reason is not None and self.after is None:  # else it is written already
                self.lines.left_out("available", reason, backend=name)

    def left(self) -> float:
        """Return the seconds in which something may still begin."""
        return self.begin + LAST_PART * (self.until - self.begin) - time.monotonic()

    def groups(self, wanted) -> Iterator[tuple[str, torch.dtype, float]]:
        """Yield case, dtype and seconds of those (case, dtype) that were asked for.

        Each gets an equal part of what is left. Those for which no time is left are written down.
        What a group raises is the caller's; memory of the device is given back between them.
        """
        own = [(case, dtype) for case, dtype in wanted if case in self.cases]
        names = [f"{case}/{dtype}" for case, dtype in own]
        if self.after in names:
            own = own[names.index(self.after) :]
        for i, (case, dtype) in enumerate(own):
            gc.collect()
            if self.device == "cuda":
                torch.cuda.empty_cache()
            left = self.left()
            if left < _LEAST:
                self.lines.left_out("group", NOT_BEGUN, case=case, dtype=dtype)
                continue
            yield case, getattr(torch, dtype), left / (len(own) - i)

    def takes_part(self, case: str, dtype: torch.dtype, backend: str) -> bool:
        """Tell whether a backend has not broken the device in this group."""
        return f"{case}/{name_of(dtype)}/{backend}" not in self.without

    def go_on_where_the_device_broke(self, case: str, dtype: torch.dtype, *backends: str) -> None:
        """Begin anew at this group without ``backends``, in this very process, if it must be.

        After an illegal access, say, every call of CUDA fails in a process.
        """
        try:
            measure.synchronize(self.device)
            return
        except RuntimeError as error:
            broken = error
        group = f"{case}/{name_of(dtype)}"
        without = {f"{group}/{backend}" for backend in backends}
        if without <= set(self.without):  # it is none of ours that breaks it
            raise broken
        command = [sys.executable, "-u", "-m", "bench.gpu", self.lines.stage,
                   str(self.lines.path.parent), f"--until={self.until}",
                   f"--cases={','.join(self.cases)}", f"--after={group}",
                   f"--without={','.join((*self.without, *without))}"]  # fmt: skip
        sys.stdout.flush()
        os.execv(sys.executable, command)


def name_of(dtype: torch.dtype) -> str:
    """Return "bfloat16" of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")

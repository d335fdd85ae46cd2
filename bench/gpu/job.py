"""The job of a stage: its output, device, cases and deadline."""

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

_LEAST = 0.5  # seconds; with less left, a group is left out


@dataclass
class Job:
    """A stage, seen from its process; ``until`` is the monotonic time at which it is killed.

    ``without`` lists each "case/dtype/backend" that broke the device earlier in this stage, and
    ``after`` is the "case/dtype" at which to resume.
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
        """Default to both backends of the device; on a CPU, C++ replaces CUDA C++."""
        self.backends = self.backends or ("triton", "cpu" if self.dry_run else "cuda")

    @property
    def dry_run(self) -> bool:
        """Whether this is a rehearsal on a CPU."""
        return self.lines.dry_run

    @property
    def rounds(self) -> int:
        """Maximum number of rounds; a rehearsal's figures mean nothing."""
        return 1 if self.dry_run else measure.MOST

    def leave_out_unavailable(self) -> None:
        """Remove the backends that cannot run here, and record why."""
        reasons = {name: choice.unavailable(name) for name in self.backends}
        self.backends = tuple(name for name in reasons if reasons[name] is None)
        for name, reason in reasons.items():
            if reason is not None and self.after is None:  # else it is recorded already
                self.lines.left_out("available", reason, backend=name)

    def left(self) -> float:
        """Return the seconds left in which new work may start."""
        return self.begin + LAST_PART * (self.until - self.begin) - time.monotonic()

    def groups(self, wanted) -> Iterator[tuple[str, torch.dtype, float]]:
        """Yield case, dtype and seconds of every (case, dtype) that was asked for.

        Each gets an equal part of the time left. Those without any time are recorded as left out.
        The caller handles exceptions of a group; device memory is freed between groups.
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
        """Return whether a backend is to run in this group: it has not broken the device there."""
        return f"{case}/{name_of(dtype)}/{backend}" not in self.without

    def go_on_where_the_device_broke(self, case: str, dtype: torch.dtype, *backends: str) -> None:
        """Restart this process at this group without ``backends``, if the device is broken.

        After an illegal access, for example, every CUDA call of the process fails.
        """
        try:
            measure.synchronize(self.device)
            return
        except RuntimeError as error:
            broken = error
        group = f"{case}/{name_of(dtype)}"
        without = {f"{group}/{backend}" for backend in backends}
        if without <= set(self.without):  # none of our backends breaks it
            raise broken
        command = [sys.executable, "-u", "-m", "bench.gpu", self.lines.stage,
                   str(self.lines.path.parent), f"--until={self.until}",
                   f"--cases={','.join(self.cases)}", f"--after={group}",
                   f"--without={','.join((*self.without, *without))}"]  # fmt: skip
        sys.stdout.flush()
        os.execv(sys.executable, command)


def name_of(dtype: torch.dtype) -> str:
    """Return "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")

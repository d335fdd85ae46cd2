"""Peak extra memory of a contender: ``python -m bench.support.memory CASE DEVICE DTYPE CONTENDER``.

Memory beside weights and gradients that a contender holds or allocates while it is built and runs
two steps, in a process of its own. On a CPU it is the operating system's high-water mark of
resident memory, which misses nothing; on a GPU it is that of torch's allocator.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from tests import ROOT
from tests.support import cases

from .baselines import CONTENDERS
from .gate import STRENGTH, leaves

# Larger blocks are mapped one by one, and returned to the system when they are freed.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class Peak(NamedTuple):
    """Extra bytes at the peak, and seconds of one step."""

    bytes: int
    seconds: float


def missing(device: str) -> str | None:
    """Return why memory cannot be measured on ``device`` here, or None."""
    if device == "cpu" and not os.access("/proc/self/clear_refs", os.W_OK):
        return "the system has no /proc/self/clear_refs"
    return None


def measure(case: str, device: str, dtype: str, contender: str) -> Peak:
    """Measure in a new process.

    Raises:
        RuntimeError: the process failed; has the end of its output.
    """
    command = [sys.executable, "-m", "bench.support.memory", case, device, dtype, contender]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **_MALLOC},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-500:])
    return Peak(*json.loads(done.stdout))


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def _mark(device: str) -> int:
    """Reset the peak; return the bytes in use."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _resident("VmHWM")


def main(case: str, device: str, dtype: str, contender: str) -> None:
    """Print extra bytes and seconds of a step as a JSON list."""
    weights = leaves(cases.CASES[case](), getattr(torch, dtype), device)

    def run() -> float:
        step = CONTENDERS[contender].make(weights, STRENGTH)
        step()
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    run()  # compilers, libraries and threads allocate once
    before = _mark(device)
    seconds = run()
    print(json.dumps([_peak(device) - before, seconds]))


if __name__ == "__main__":
    main(*sys.argv[1:])

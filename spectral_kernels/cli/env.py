"""The command ``spectral-kernels env``: versions, backends and instruction sets."""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import numpy
import torch

from .. import __version__
from ..backends import choice
from ..tables.native import native_module
from .console import tell


def add_parser(commands) -> None:
    """Add the command to the subparsers ``commands``."""
    parser = commands.add_parser("env", help="print versions, backends and instruction sets")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the table and return the exit code."""
    rows = [
        ("spectral_kernels", __version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("triton", triton_version()),
        ("numpy", numpy.__version__),
        ("platform", platform.platform()),
        ("processor", processor()),
        ("threads", str(torch.get_num_threads())),
    ]
    for name in choice.NAMES:
        reason = choice.unavailable(name)
        if reason is None and name in ("triton", "cuda") and torch.cuda.is_available():
            device = torch.device("cuda", torch.cuda.current_device())
            reason = choice.failed_check(name, device, torch.float32)
        rows.append((f"backend {name}", "works" if reason is None else f"no: {reason}"))
    if choice.unavailable("cpu") is None:
        cpu = native_module().cpu
        rows.append(("instruction set", f"{cpu.level()} (available: {', '.join(cpu.levels())})"))
        why = cpu.without_openmp
        rows.append(("openmp", f"no, one thread: {why}" if why else "yes"))
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        tell(f"{label:{width}}  {value}")
    return 0


def triton_version() -> str:
    """Return Triton's version, or why there is none."""
    try:
        import triton
    except ImportError as error:
        return f"none ({error})"
    return triton.__version__


def processor() -> str:
    """Return the name of the processor, as the operating system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"

"""What the figures depend on: device, versions, commit. Does not import torch, which takes long."""

from __future__ import annotations

import ctypes
import datetime
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


class Device(NamedTuple):
    """A CUDA device: name, compute capability ("9.0") and bytes of memory."""

    name: str
    capability: str
    memory: int


def cuda_device() -> Device | None:
    """Return the first device that the driver shows this process, or None."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count, device, number = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return None
    cuda.cuDeviceGet(ctypes.byref(device), 0)
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    version = []
    for attribute in (_MAJOR, _MINOR):
        cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        version.append(str(number.value))
    return Device(name.value.decode(), ".".join(version), memory.value)


def environment(device: Device | None) -> dict[str, object]:
    """Return device, versions and commit of a run."""
    return {
        "device": device.name if device else f"CPU: {_processor()}",
        "capability": device.capability if device else None,
        "memory_bytes": device.memory if device else None,
        "driver": _driver() if device else None,
        "torch": _version("torch"),
        "cuda": _cuda_of_torch(),
        "triton": _version("triton"),
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
        "commit": _commit(),
        "sources": sources(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def sources() -> str:
    """Return a hash of the package's sources: identifies a version where there is no git."""
    found = hashlib.sha256()
    paths = [*(ROOT / "spectral_kernels").rglob("*.py"), *(ROOT / "csrc").rglob("*")]
    for path in sorted(paths):
        if path.is_file():
            found.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


def output_of(*command: str) -> str | None:
    """Return the stripped output of a command, or None if it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10,
                              check=True)  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _commit() -> str:
    commit = output_of("git", "rev-parse", "--short=10", "HEAD")
    if commit is None:
        return "unknown"
    return f"{commit}-changed" if output_of("git", "status", "--porcelain") else commit


def _driver() -> str:
    query = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return query.splitlines()[0] if query else "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _cuda_of_torch() -> str | None:
    """Return the CUDA version that torch was built with, or None."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = Path(spec.origin).with_name("version.py").read_text()
    found = re.search(r"^cuda\b[^=\n]*= *['\"](.+)['\"]", text, re.MULTILINE)
    return found[1] if found else None


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*: *(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()

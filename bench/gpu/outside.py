"""Stages that run other programs: the build, pytest, compute-sanitizer."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from . import group
from .environment import ROOT, cuda_device, output_of
from .lines import Lines
from .parallel import LAST_PART

CUDA = Path("/usr/local/cuda/bin")
TEST_SECONDS = 40  # of one test, where pytest-timeout is installed
NOT_AVAILABLE = (
    "this backend cannot run here: "  # tests.support.sanitized prints it before the reason
)
_TOOL = "compute-sanitizer"


def run(command, variables=None) -> int:
    """Run a command with its output in this stage's log, and return its exit code."""
    print("$", *command, flush=True)
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **(variables or {})}, check=False,
                          stdin=subprocess.DEVNULL).returncode  # fmt: skip


# ------------------------------------------------------------------------------------- the build


def build_variables() -> dict[str, str]:
    """Return environment variables for a build for this machine's device only."""
    device, found = cuda_device(), {"SPECTRAL_KERNELS_NATIVE": "1"}
    if device is not None:
        found["CUDAARCHS"] = device.capability.replace(".", "") + "-real"
    if shutil.which("nvcc") is None and (CUDA / "nvcc").exists():
        found["PATH"] = f"{os.environ['PATH']}{os.pathsep}{CUDA}"
    if output_of("git", "rev-parse", "HEAD") is None:  # no tag to take the version from
        found["SETUPTOOLS_SCM_PRETEND_VERSION"] = "0.0"
    return found


def build(lines: Lines) -> None:
    """Build the module with pip or, if that fails, with CMake into the package.

    A dry run only configures CMake, in a temporary folder.
    """
    variables, start = build_variables(), time.perf_counter()
    print(*(f"{name}={value}" for name, value in variables.items()), flush=True)
    by = "cmake"
    if lines.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            code = _cmake(Path(folder), Path(folder), variables, only_configure=True)
        by = "cmake, configured only"
    else:
        code = 1
        if all(map(importlib.util.find_spec, ("pip", "setuptools", "pybind11"))):
            by = "pip"
            command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps",
                       "--no-index", "-v", "-e", "."]  # fmt: skip
            code = run(command, variables)
        if code:
            by = "cmake"
            code = _cmake(ROOT / "build" / "on_gpu", ROOT / "spectral_kernels", variables)
    if code:
        lines.failed("build", f"{by} ended with {code}, see build.txt")
    else:
        lines.put("build", time.perf_counter() - start, "s", by=by,
                  architectures=variables.get("CUDAARCHS"))  # fmt: skip


def _cmake(folder: Path, target: Path, variables, only_configure: bool = False) -> int:
    """Do what setup.py does, without setuptools."""
    if importlib.util.find_spec("pybind11") is None:
        print("pybind11 is not installed", flush=True)
        return 1
    configure, compile_ = cmake_commands(folder, target)
    code = run(configure, variables)
    if code or only_configure:
        return code
    return run(compile_, variables)


def cmake_commands(folder: Path, target: Path, *options: str) -> tuple[list[str], list[str]]:
    """Return the commands that configure and compile the module.

    Args:
        folder: of the objects; it is created.
        target: the folder that the module goes to.
        options: further ones of the first command.
    """
    import pybind11

    folder.mkdir(parents=True, exist_ok=True)
    configure = [
        *("cmake", "-S", str(ROOT / "csrc"), "-B", str(folder), "-G", "Ninja"),
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
        *options,
    ]
    return configure, ["cmake", "--build", str(folder)]


# ------------------------------------------------------------------------------------- the tests


def tests(lines: Lines) -> int:
    """Run the tests for a GPU, spread over processes where pytest-xdist is installed.

    ``pytest_lines`` records failures at once, and the counts. Returns pytest's exit code.
    """
    command = [sys.executable, "-m", "pytest", "-m", "gpu and not slow", "-q", "--tb=short",
               "-p", "no:cacheprovider", "-p", "bench.gpu.pytest_lines"]  # fmt: skip
    if importlib.util.find_spec("xdist") is not None:
        most = 1 if lines.dry_run else 12  # on a CPU they are all skipped
        processes = min(most, len(os.sched_getaffinity(0)))
        command += ["-n", str(processes), "--dist", "worksteal"]
    if importlib.util.find_spec("pytest_timeout") is not None:
        command += [f"--timeout={TEST_SECONDS}"]
    variables = {
        "BENCH_GPU_LINES": str(lines.path.parent), "BENCH_GPU_DRY_RUN": str(int(lines.dry_run)),
    }  # fmt: skip
    code = run(command, variables)
    if code == 1:  # the plugin has recorded which
        return 1
    if code:
        lines.failed("pytest", f"it ended with {code}, see tests.txt")
    return code


# --------------------------------------------------------------------------------- the sanitizer


def memcheck(lines: Lines, backends: tuple[str, ...], until: float) -> None:
    """Run ``tests.support.sanitized`` under memcheck, every tensor in an allocation of its own.

    Each backend gets an equal part of the time left until ``until``, a monotonic time.
    """
    found = shutil.which(_TOOL) or next(map(str, filter(Path.exists, [CUDA / _TOOL])), None)
    begin = time.monotonic()
    end = begin + LAST_PART * (until - begin)
    for i, backend in enumerate(backends):
        if found is None or lines.dry_run:
            reason = "a CPU has no device memory" if lines.dry_run else f"there is no {_TOOL}"
            lines.left_out("memcheck", reason, backend=backend)
        else:
            _memcheck(lines, found, backend, (end - time.monotonic()) / (len(backends) - i))


def _memcheck(lines: Lines, tool: str, backend: str, most: float) -> None:
    """Run memcheck for one backend, and kill it after ``most`` seconds."""
    start = time.monotonic()
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9",
               sys.executable, "-m", "tests.support.sanitized", backend]  # fmt: skip
    print("$", *command, flush=True)
    process = group.start(
        command, cwd=ROOT, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    killed = threading.Event()

    def kill():
        if process.returncode is None:
            killed.set()
            group.end(process)

    timer = threading.Timer(max(most, 0), kill)
    timer.start()
    errors, last, reason = None, "", None
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line.strip(" =\n") or last
        if NOT_AVAILABLE in line:
            reason = line.partition(NOT_AVAILABLE)[2].strip()
        if match := re.search(r"ERROR SUMMARY: (\d+) error", line):
            errors = int(match[1])
    code = process.wait()
    timer.cancel()
    process.stdin.close()
    seconds = time.monotonic() - start
    if reason is not None:
        lines.left_out("available", reason, backend=backend)
    elif killed.is_set():
        said = f", the last it said: {last}" if last else ""
        lines.failed("memcheck", f"killed after {seconds:.0f} s{said}", backend=backend)
    elif code or errors != 0:
        found = f"exit code {code}: {last}" if errors is None else f"{errors} errors"
        lines.failed("memcheck", f"{found}, see stages.log", backend=backend)
    else:
        lines.put("memcheck", errors, "errors", backend=backend, seconds=seconds)

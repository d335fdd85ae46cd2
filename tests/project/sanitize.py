"""The C++ kernels under GCC's sanitizers of addresses and undefined behaviour.

``python -m tests --sanitize`` builds the compiled module with them, without CUDA C++, beside a copy
of the package and its tests in build/sanitized, and runs the tests of SUITE there, with one thread
and with two. A report of a sanitizer stops the tests, is printed, and is a failure; before them, an
access that PLANTED makes beyond a weight has to be reported. Memory that is not freed is not
reported: Python keeps much of it until its end.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from bench.gpu.outside import cmake_commands
from tests import ROOT

# Tests that reach the accesses of the kernels and of the bindings; others that do belong here too.
SUITE = (
    "tables/test_layout.py", "tables/test_plan.py", "tables/test_addresses.py",
    "backends/test_backends.py", "backends/test_subspace.py", "backends/test_partials.py",
    "optim/test_optim.py", "optim/test_changes.py", "optim/test_surgery.py",
    "optim/test_large_steps.py", "regularizer/test_replaced_weights.py", "engine/test_prepared.py",
)  # fmt: skip
# The kernel begins in the second row of a weight, and reads a row that the weight does not have.
PLANTED = """
import torch
from tests.support.buckets import bucket_of
bucket = bucket_of([torch.randn(8, 64)], "cpu")
bucket.plan.table["weight"] += 64 * 4
bucket.backend.gram_matvec(bucket.plan, bucket.state)
"""
THREADS = (1, 2)  # of OpenMP
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"
FOLDER = ROOT / "build" / "sanitized"


def compiler() -> str:
    """Return the name of GCC's C++ compiler."""
    return os.environ.get("CXX") or "g++"


def runtime() -> str:
    """Return the paths of the libraries that Python has to load first.

    libasan takes over the functions that throw exceptions from libstdc++, which is not Python's.

    Raises:
        SystemExit: the compiler does not have them.
    """
    cxx, paths = compiler(), []
    for name in ("libasan.so", "libstdc++.so"):
        path = ""
        if shutil.which(cxx) is not None:
            ask = [cxx, f"-print-file-name={name}"]
            path = subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip()
        if not os.path.isabs(path):
            raise SystemExit(f"CXX: expected g++ with its sanitizers, got {cxx!r} without {name}")
        paths.append(path)
    return " ".join(paths)


def copy_sources() -> Path:
    """Copy what tests need into a new folder without a compiled module, and return it."""
    target = FOLDER / "sources"
    shutil.rmtree(target, ignore_errors=True)
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "results", "_native_left_out.txt")
    for name in ("spectral_kernels", "tests", "bench", "csrc"):
        shutil.copytree(ROOT / name, target / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", target)
    return target


def build(package: Path) -> None:
    """Compile what has changed since the last time, into ``package``."""
    options = (f"-DCMAKE_CXX_COMPILER={compiler()}", f"-DCMAKE_CXX_FLAGS={FLAGS}",
               "-DSPECTRAL_KERNELS_CUDA=0")  # fmt: skip
    for command in cmake_commands(FOLDER / "objects", package, *options):
        subprocess.run(command, check=True)


def run(sources: Path, preload: str, threads: int, arguments: list[str]) -> tuple[int, list[str]]:
    """Run Python with ``arguments`` in ``sources``; return its exit code and the reports."""
    log = FOLDER / "report"
    for old in FOLDER.glob(f"{log.name}.*"):
        old.unlink()
    variables = {
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": f"detect_leaks=0:log_path={log}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={log}",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": str(sources),
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=sources, env={**os.environ, **variables}, check=False,
    )  # fmt: skip
    reports = sorted(FOLDER.glob(f"{log.name}.*"))
    return done.returncode, [report.read_text(errors="replace") for report in reports]


def main(arguments: list[str]) -> int:
    """Build, then run ``arguments`` of pytest, or SUITE; the exit code is not 0 at any report."""
    start = time.monotonic()
    preload, sources = runtime(), copy_sources()
    build(sources / "spectral_kernels")
    print(f"[{time.monotonic() - start:.0f} s] built", flush=True)
    code, reports = run(sources, preload, 1, ["-c", PLANTED])
    if code == 0 or not any("heap-buffer-overflow" in report for report in reports):
        print("the planted access beyond a weight was not reported", *reports, file=sys.stderr)
        return 1
    print("the planted access beyond a weight was reported", flush=True)
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
    spread = ["-n", "auto", "--dist", "loadfile", "-m", "not gpu"]
    arguments = arguments or [*spread, *(f"tests/{name}" for name in SUITE)]
    for threads in THREADS:
        code, reports = run(sources, preload, threads, [*pytest, *arguments])
        if code or reports:
            print(*reports, f"failed with {threads} threads", sep="\n", file=sys.stderr)
            return code or 1
        print(f"[{time.monotonic() - start:.0f} s] no report with {threads} threads", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Every check that needs no GPU: ``python -m tests``, with the extras demo, test and bench.

Style, then the test suite: from a wheel in an empty environment (see tests/project/wheel.py), and
here what needs more than that. Where there is nvcc, the module here gets its CUDA kernels for it,
which an installation builds only where there is a GPU too; not with SPECTRAL_KERNELS_CUDA=0. What
concerns Triton runs once more in processes of its own, where an interpreter runs the kernels on the
CPU.

``python -m tests --quick``: style, and every test that takes less than a second, with one
instruction-set level. For use while working.

``python -m tests --fuzz N``: N new examples of each property in tests/properties, shared by as many
processes as there are cores; each prints its figures and its seed at the end, with which
``python -m tests.properties --seed S --examples M`` repeats them.

``python -m tests --zoo``: what the parameters of some 90 architectures of public libraries are
taken for; with the extra zoo. It takes a minute.

``python -m tests --sanitize``: the C++ kernels under GCC's sanitizers (tests/project/sanitize.py).
"""

import argparse
import importlib.util
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator

from . import ROOT
from .project import wheel

STYLE = [["ruff", "check", "."], ["ruff", "format", "--check", "."]]
SPREAD = ["pytest", "-n", "auto", "--dist", "loadfile"]  # over the cores, a file to one of them
WITH_CUDA = ["pip", "install", "--no-deps", "--no-build-isolation", "-e", "."]
# One by one: no file of these has fixtures of its own that take long to make.
INTERPRETED = [
    "pytest", "-n", "auto", "--dist", "worksteal", "-m", "not gpu",
    "-k", "triton or do_not_know_them",
    *(f"tests/{name}" for name in (
        "backends/test_triton.py", "backends/test_selfcheck.py", "backends/test_backends.py",
        "backends/test_subspace.py", "backends/test_partials.py", "backends/test_operators.py",
        "optim/test_optim.py", "engine/test_sides.py::test_value_and_gradient",
        "optim/test_constraints.py::test_a_step_is_the_optimizers_and_the_bound_by_the_svd",
        "optim/test_capped_values.py::test_a_step_caps_every_singular_value_of_the_vectors",
        "optim/test_changes.py", "engine/test_compile.py", "regularizer/test_gpu_like.py",
        "bench/test_gpu_sizes.py",
    )),
]  # fmt: skip


def main() -> int:
    """Run the checks in order; the exit code is that of the first one that fails."""
    parser = argparse.ArgumentParser(prog="python -m tests", description=__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="style and what takes no second")
    which.add_argument("--fuzz", type=int, metavar="N", help="N new examples of each property")
    which.add_argument("--zoo", action="store_true", help="architectures of public libraries")
    which.add_argument("--sanitize", action="store_true", help="the C++ kernels under sanitizers")
    start, given = time.monotonic(), parser.parse_args()
    commands = quick() if given.quick else everything()
    if given.fuzz is not None:
        seed = str(random.randrange(2**32))
        examples = "--examples", str(given.fuzz), "--seed", seed, "--jobs", str(os.cpu_count())
        commands = [["tests.properties", *examples]]
    elif given.zoo:
        commands = [["pytest", "-n", "auto", "-q", "--zoo", "tests/zoo"]]
    elif given.sanitize:
        commands = [["tests.project.sanitize"]]
    for arguments in commands:
        # Threads that wait by spinning would keep another process of the tests from its core.
        is_spread = "-n" in arguments or "tests.properties" in arguments
        extra = {"OMP_WAIT_POLICY": "PASSIVE"} if is_spread else {}
        if arguments is INTERPRETED:
            extra["TRITON_INTERPRET"] = "1"
        elif arguments is WITH_CUDA:
            extra["SPECTRAL_KERNELS_CUDA"] = "1"
        so_far = f"[{time.monotonic() - start:.0f} s]"
        variables = [f"{k}={v}" for k, v in extra.items()]
        print(so_far, "$", *variables, "python -m", *arguments, flush=True)
        command = [sys.executable, "-m", *arguments]
        env = {**os.environ, **extra}
        if code := subprocess.run(command, cwd=ROOT, env=env, check=False).returncode:
            print("failed: python -m", *arguments, file=sys.stderr)
            return code
    print(f"[{time.monotonic() - start:.0f} s] everything passed")
    return 0


def quick() -> Iterator[list[str]]:
    """Yield the arguments of ``python -m`` for a check while working."""
    yield from STYLE
    yield [*SPREAD, "-q", "--quick", "tests"]


def everything() -> Iterator[list[str]]:
    """Yield the arguments of ``python -m`` for all checks."""
    yield from STYLE
    yield ["spectral_kernels", "env"]
    yield ["tests.project.wheel"]
    if shutil.which("nvcc") and os.environ.get("SPECTRAL_KERNELS_CUDA") != "0":
        yield WITH_CUDA
    yield [*SPREAD, "-m", "not gpu", *(f"tests/{name}" for name in wheel.ELSEWHERE)]
    if importlib.util.find_spec("triton"):
        yield INTERPRETED


if __name__ == "__main__":
    sys.exit(main())

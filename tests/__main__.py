"""Every check that needs no GPU: ``python -m tests``, with the extras demo, test and bench.

Style, the demo and each bench suite on its smallest case, then the test suite: from a wheel in an
empty environment (see tests/wheel.py), and here what needs more than that. What concerns Triton
runs once more in a process of its own, where an interpreter runs the kernels on the CPU.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from . import wheel

ROOT = Path(__file__).parent.parent
SPREAD = ["pytest", "-n", "auto", "--dist", "loadfile"]  # over the cores, a file to one of them
# One by one: no file of these has fixtures of its own that take long to make.
INTERPRETED = ["pytest", "-n", "auto", "--dist", "worksteal",
               "tests/test_triton.py", "tests/test_self_check.py", "tests/test_backends.py",
               "tests/test_subspace.py", "tests/test_optim.py", "tests/test_partials.py",
               "tests/test_compile.py", "tests/test_gpu_like.py", "tests/test_gpu_sizes.py",
               "-k", "triton or do_not_know_them", "-m", "not gpu"]  # fmt: skip


def main() -> int:
    """Run the checks in order; the exit code is that of the first one that fails."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        picture = str(Path(folder) / "demo.png")
        for arguments in (
            ["ruff", "check", "."],
            ["ruff", "format", "--check", "."],
            ["spectral_kernels", "env"],
            ["spectral_kernels", "demo", "--tasks", "2", "--epochs", "1", "--out", picture],
            ["pytest", "bench", "--smoke", "-q", "--benchmark-columns=median,rounds"],
            ["bench.accuracy", "--smoke", "--estimators", "1/4, auto", "--strengths", "1e-3",
             "--out", str(Path(folder) / "accuracy")],
            ["bench.scale_model", "--check"],
            ["torch.distributed.run", "--standalone", "--nproc-per-node", "2",
             "-m", "bench.fsdp_example"],
            ["tests.wheel"],
            [*SPREAD, "-m", "not gpu", *(f"tests/test_{name}.py" for name in wheel.ELSEWHERE)],
            *([INTERPRETED] if importlib.util.find_spec("triton") else []),
        ):  # fmt: skip
            # Threads that wait by spinning would keep another process of the tests from its core.
            extra = {"OMP_WAIT_POLICY": "PASSIVE"} if "-n" in arguments else {}
            if arguments is INTERPRETED:
                extra["TRITON_INTERPRET"] = "1"
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


if __name__ == "__main__":
    sys.exit(main())

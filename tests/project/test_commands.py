"""Each program of bench/ on its smallest case: that it still runs to its end."""

import os
import subprocess
import sys

import pytest

from tests import ROOT, TIMEOUT

COMMANDS = {
    "benchmarks": ["pytest", "bench", "--smoke", "-q"],
    "accuracy": ["bench.accuracy", "--smoke", "--estimators", "1/4, auto", "--strengths", "1e-3"],
    "model of scaling": ["bench.sharded.scale_model", "--check"],
}  # fmt: skip


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", COMMANDS)
def test_a_program_runs_to_its_end(name, tmp_path):
    arguments = COMMANDS[name] + (["--out", str(tmp_path)] if name == "accuracy" else [])
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=3 * TIMEOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout

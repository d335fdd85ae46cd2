"""The C++ kernels as a program of another processor: tests of all backends."""

import subprocess
import sys

import pytest

from .. import ROOT, TIMEOUT
from ..support import emulated_processor

# Together these call every function that is compiled per level, with every dtype.
OF_EVERY_BACKEND = [
    "tests/backends/test_backends.py",
    "tests/backends/test_partials.py",
    "tests/backends/test_subspace.py",
    "tests/backends/test_elementwise.py",
    "tests/backends/test_operators.py",
    "tests/optim/test_optim.py::test_rows_of_every_length",
    "tests/optim/test_constraints.py",
    "tests/optim/test_capped_values.py",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of the program."""
    if (reason := emulated_processor.missing("aarch64")) is not None:
        pytest.skip(reason)
    where = tmp_path_factory.mktemp("aarch64")
    emulated_processor.build("aarch64", where)
    return where


@pytest.mark.takes_seconds
@pytest.mark.slow
@pytest.mark.parametrize("tests", OF_EVERY_BACKEND)
def test_aarch64(folder, tests):
    command = [sys.executable, "-m", "pytest", "-p", "tests.support.emulated_processor",
               "--processor", "aarch64", "--built", folder,
               "-p", "no:cacheprovider", "-q", tests]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout

"""The properties hold for some examples, the same ones at every run; more: ``--fuzz``.

They are drawn in a process of their own, which prints the failing example, and the stack where it
crashed. FUZZ_EXAMPLES=N in the environment draws N of each.
"""

import os
import subprocess
import sys

import pytest

from tests import ROOT

pytest.importorskip("hypothesis")


@pytest.mark.slow
@pytest.mark.takes_seconds
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize(("name", "examples"), [("surgery", "120"), ("shapes", "80")])
def test_property(name, examples):
    found = subprocess.run(
        [sys.executable, "-m", "tests.properties", "--only", name,
         "--examples", os.environ.get("FUZZ_EXAMPLES", examples)],
        cwd=ROOT, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    print(found.stdout)
    assert found.returncode == 0, found.stdout

"""What the parameters of public architectures are taken for, against expected.txt.

``python -m tests --zoo``, with the extra zoo.
"""

import fnmatch
import warnings
from pathlib import Path

import pytest
import torch

from spectral_kernels.selection.rules import select

from .models import MODELS

ROLES = ("matrix", "stack", "groups", "rows", "bias", "biases", "gain", "skip")


def sections():
    """Return model -> lines (role, patterns) of the table."""
    found = {}
    for line in Path(__file__).with_name("expected.txt").read_text().splitlines():
        if line.startswith("["):
            lines = found.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            role, *patterns = line.split()
            assert role in ROLES
            lines.append((role, patterns))
    return found


EXPECTED = sections()


def expected_role(name, lines, used):
    for role, patterns in lines:
        for pattern in patterns:
            if fnmatch.fnmatchcase(name, pattern):
                used.add(pattern)
                return role
    return "none: add it to expected.txt"


def roles_of(model):
    """Return name -> role of every parameter, by :func:`select`."""
    found, roles = select(model), {}
    for matrix in found.matrices:
        whole = matrix.index is None and "groups" not in matrix.view
        roles[matrix.ref.name] = (
            "matrix" if whole else "stack" if matrix.index is not None else "groups"
        )
    for entry in found.elementwise:
        rows = "biases" if entry.target == 0 else "rows"
        roles[entry.name] = {"rows": rows, "shift": "bias", "gain": "gain"}[entry.kind]
    return {**roles, **{name: "skip" for name, _ in found.skipped}}


def test_the_table_has_every_model_and_no_other():
    assert set(EXPECTED) == {"common", *MODELS}
    assert len(MODELS) >= 60


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_what_its_model_uses_it_for(name):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the libraries
        roles = roles_of(MODELS[name]())
    own, used = EXPECTED[name], set()
    wanted = {n: expected_role(n, [*own, *EXPECTED["common"]], used) for n in roles}
    assert roles == wanted
    assert {pattern for _, patterns in own for pattern in patterns} <= used

"""The penalty step with several vectors per matrix, relative to one vector."""

import pytest

from tests.support import cases

from ..support.baselines import SEVERAL
from .compete import compete_on_shapes, parameters


@pytest.mark.parametrize(("case", "device", "dtype", "contender"), parameters(SEVERAL))
def test_subspace(case, device, dtype, contender, compete):
    compete_on_shapes(compete, "subspace", cases.CASES[case](), dtype, SEVERAL)

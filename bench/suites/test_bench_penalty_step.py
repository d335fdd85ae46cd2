"""One step = power iteration of every matrix + the penalty's gradient added to .grad."""

import pytest

from tests.support import cases

from ..support.baselines import CONTENDERS
from .compete import compete_on_shapes, parameters


@pytest.mark.parametrize(("case", "device", "dtype", "contender"), parameters(CONTENDERS))
def test_penalty_step(case, device, dtype, contender, compete):
    compete_on_shapes(compete, "penalty_step", cases.CASES[case](), dtype, CONTENDERS)

"""penalty() forward and backward, for those who add it to the loss."""

import pytest

from tests.support import cases

from ..support.baselines import BY_AUTOGRAD
from .compete import compete_on_shapes, parameters


@pytest.mark.parametrize(("case", "device", "dtype", "contender"), parameters(BY_AUTOGRAD))
def test_autograd(case, device, dtype, contender, compete):
    compete_on_shapes(compete, "autograd", cases.CASES[case](), dtype, BY_AUTOGRAD)

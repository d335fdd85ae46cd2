"""penalty() forward and backward, for those who add it to the loss."""

import pytest

from tests import cases

from .baselines import BY_AUTOGRAD
from .suites import compete_on_shapes, parameters


@pytest.mark.parametrize(("case", "device", "dtype", "contender"), parameters(BY_AUTOGRAD))
def test_autograd(case, device, dtype, contender, compete):
    compete_on_shapes(compete, "autograd", cases.CASES[case](), dtype, BY_AUTOGRAD)

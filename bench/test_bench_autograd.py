"""penalty() forward and backward, for those who add it to the loss."""

import pytest

from tests import cases

from .baselines import BY_AUTOGRAD, FLOORS
from .gate import compete_on_shapes


@pytest.mark.parametrize("contender", [*BY_AUTOGRAD, *FLOORS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", cases.MODELS)
def test_autograd(case, dtype, contender, compete):
    compete_on_shapes(compete, "autograd", case, dtype, BY_AUTOGRAD)

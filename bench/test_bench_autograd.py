"""penalty() forward and backward, for those who add it to the loss."""

import pytest
import torch

from tests import cases

from .baselines import BY_AUTOGRAD, FLOORS


@pytest.mark.parametrize("contender", [*BY_AUTOGRAD, *FLOORS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", cases.MODELS)
def test_autograd(case, dtype, contender, compete):
    shapes = cases.MODELS[case]()

    def fill(group, names):
        chosen = {name: BY_AUTOGRAD[name] for name in names if name in BY_AUTOGRAD}
        group.run(shapes, getattr(torch, dtype), chosen, names)

    compete(fill, suite="autograd", matrices=len(shapes), weights=sum(m * n for m, n in shapes))

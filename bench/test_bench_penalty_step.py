"""One step = power iteration of every matrix + the penalty's gradient added to .grad."""

import pytest

from tests import cases

from .baselines import CONTENDERS, FLOORS
from .gate import compete_on_shapes


def fits(case, contender):
    limit = getattr(CONTENDERS.get(contender), "most", float("inf"))
    return sum(m * n for m, n in cases.MODELS[case]()) <= limit


PARAMETERS = [
    (case, dtype, contender)
    for case in cases.MODELS
    for dtype in ("float32", "bfloat16")
    for contender in (*CONTENDERS, *FLOORS)
    # There is no SVD in 16 bits.
    if fits(case, contender) and (dtype, contender) != ("bfloat16", "exact_svd")
]


@pytest.mark.parametrize(("case", "dtype", "contender"), PARAMETERS)
def test_penalty_step(case, dtype, contender, compete):
    compete_on_shapes(compete, "penalty_step", case, dtype, CONTENDERS)

"""Peak memory beside weights and gradients while a contender is built and runs two steps."""

import pytest

from tests.support import cases

from ..support import memory
from ..support.baselines import CONTENDERS

PARAMETERS = [
    (case, device, dtype, name)
    for case, device, dtype in (
        ("mlp", "cpu", "float32"),
        ("vit_b", "cpu", "float32"),
        ("many_small", "cpu", "float32"),
        ("one_huge", "cpu", "float32"),
        ("vit_b", "cuda", "float32"),
        ("many_small", "cuda", "float32"),
        ("llama_1b", "cuda", "bfloat16"),
    )
    for name, contender in CONTENDERS.items()
    if contender.enters(cases.CASES[case](), dtype, device)
]


@pytest.mark.parametrize(("case", "device", "dtype", "contender"), PARAMETERS)
def test_memory(case, device, dtype, contender, compete):
    if (reason := memory.missing(device)) is not None:
        pytest.skip(reason)

    def fill(group, names):
        for name in names:
            try:
                group.peak_bytes[name], seconds = memory.measure(case, device, dtype, name)
                group.durations[name] = [seconds]
            except RuntimeError as error:
                group.wrong[name] = str(error)

    shapes = cases.CASES[case]()
    sides, weights = sum(m + n for m, n in shapes), sum(m * n for m, n in shapes)
    compete(fill, suite="memory", matrices=len(shapes), weights=weights, sides=sides)

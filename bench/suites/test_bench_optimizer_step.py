"""One step of AdamW on given gradients, with the penalty and without."""

import pytest
import torch

from ..support import optimizers
from ..support.devices import DEVICES

models = pytest.importorskip("bench.support.models", reason="needs the bench extra")

CASES = ("mlp", "resnet18", "vit_tiny", "vit_b", "llama_1b")
PARAMETERS = [
    (case, device, dtype, contender)
    for case in CASES
    for device in DEVICES
    for dtype in ("float32", "bfloat16")
    if case != "llama_1b" or (device, dtype) == ("cuda", "bfloat16")
    for contender in optimizers.CONTENDERS
]


@pytest.mark.parametrize(("case", "device", "dtype", "contender"), PARAMETERS)
def test_optimizer_step(case, device, dtype, contender, compete):
    build = models.MODELS[case].build

    def fill(group, names):
        optimizers.run(group, names, build, getattr(torch, dtype))

    compete(fill, suite="optimizer_step", weights=optimizers.n_parameters(build))

"""A whole training step of a real model, with the penalty in different ways and without."""

import pytest
import torch

from spectral_kernels import SpectralAdamW, SpectralRegularizer

from ..support import baselines

models = pytest.importorskip("bench.support.models", reason="needs the bench extra")

# Training in bfloat16 on a CPU without instructions for it means nothing.
DTYPES = {"cpu": ("float32",), "cuda": ("float32", "bfloat16")}
PARAMETERS = [
    (case, device, dtype, contender)
    for case, model in models.MODELS.items()
    for device in model.devices
    for dtype in DTYPES[device]
    for contender in ("without", "attach", "spectral_adamw", "autograd_loop")
]


def training_step(case, device, dtype, contender):
    """Build a model and return a function that trains it one step on the same batch."""
    model, x = models.MODELS[case].make(device, dtype)
    if contender == "spectral_adamw":
        optimizer = SpectralAdamW(model, 1e-4)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    if contender == "attach":
        SpectralRegularizer(model).attach(optimizer)
    weights = [p for p in model.parameters() if p.dim() >= 2]
    loop = None
    if contender == "autograd_loop":
        flat = [w.flatten(1) for w in weights]
        vectors = baselines.start_vectors(flat)

        def loop():
            return baselines.loop_penalty([w.flatten(1) for w in weights], vectors)

    def step():
        optimizer.zero_grad()
        loss = models.loss_of(model, x)
        if loop is not None:
            loss = loss + 1e-3 * loop()
        loss.backward()
        optimizer.step()

    return step


@pytest.mark.parametrize(("case", "device", "dtype", "contender"), PARAMETERS)
def test_training_step(case, device, dtype, contender, compete):
    def fill(group, names):
        group.time_steps({name: training_step(case, device, getattr(torch, dtype), name)
                          for name in names})  # fmt: skip

    compete(fill, suite="training_step", batch=models.MODELS[case].batch)

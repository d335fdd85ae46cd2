"""A training step with forward and backward pass compiled by torch.compile."""

import pytest
import torch

from spectral_kernels import SpectralRegularizer

from ..support import baselines

models = pytest.importorskip("bench.support.models", reason="needs the bench extra")

DTYPES = {"cpu": ("float32",), "cuda": ("float32", "bfloat16")}
CONTENDERS = ("without", "penalty_in_graph", "penalty_beside", "attach", "loop_in_graph")
PARAMETERS = [
    (case, device, dtype, contender)
    for case in ("mlp", "vit_tiny", "vit_b", "gpt2")
    for device in models.MODELS[case].devices
    for dtype in DTYPES[device]
    for contender in CONTENDERS
]


def compiled_step(case, device, dtype, contender):
    """Build a model and return a function that trains it one step on the same batch.

    Each contender is a function of its own: torch.compile caches results per code object.
    """
    model, x = models.MODELS[case].make(device, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    reg = SpectralRegularizer(model)
    weights = [p for p in model.parameters() if p.dim() >= 2]
    with torch.no_grad():
        vectors = baselines.start_vectors([w.flatten(1) for w in weights])

    def task(x):
        return models.loss_of(model, x)

    def with_penalty(x):
        return task(x) + reg.penalty()

    def with_loop(x):
        return task(x) + 1e-3 * baselines.loop_penalty([w.flatten(1) for w in weights], vectors)

    graph = {"penalty_in_graph": with_penalty, "loop_in_graph": with_loop}.get(contender, task)
    loss_of = torch.compile(graph, fullgraph=True, dynamic=False)
    if contender == "attach":
        reg.attach(optimizer)

    def step():
        optimizer.zero_grad()
        loss = loss_of(x)
        if contender == "penalty_beside":
            loss = loss + reg.penalty()
        loss.backward()
        optimizer.step()

    return step


@pytest.mark.parametrize(("case", "device", "dtype", "contender"), PARAMETERS)
def test_compiled_step(case, device, dtype, contender, compete):
    def fill(group, names):
        torch.compiler.reset()  # earlier compilations count against the recompilation limit
        group.time({name: compiled_step(case, device, getattr(torch, dtype), name)
                    for name in names})  # fmt: skip

    compete(fill, suite="compiled_step", batch=models.MODELS[case].batch)

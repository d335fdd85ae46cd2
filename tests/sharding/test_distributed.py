"""Under DistributedDataParallel every rank gets the same result."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from spectral_kernels import SpectralRegularizer

STEPS, BATCH = 6, 8


def model_and_data():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 4))
    return model, torch.randn(STEPS, BATCH, 20), torch.randn(STEPS, BATCH, 4)


def train(model, inputs, targets, way):
    """Train and return parameters and sigma; ``model`` may be wrapped."""
    reg = SpectralRegularizer(model, 0.1)
    assert all(not name.startswith("module.") for name in reg.names)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    if way == "attach":
        reg.attach(optimizer)
    for x, y in zip(inputs, targets, strict=True):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        if way == "penalty":
            loss = loss + reg.penalty()
        loss.backward()
        if way == "accumulate":
            reg.accumulate_grad_()
        optimizer.step()
    return [*(p.detach().clone() for p in model.parameters()), reg.sigma]


def trained_by_a_rank(way):
    """Train on this rank's half of every batch."""
    rank = dist.get_rank()
    model, inputs, targets = model_and_data()
    half = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    ddp = DistributedDataParallel(model)
    return train(ddp, inputs[:, half], targets[:, half], way)


@pytest.mark.takes_seconds
@pytest.mark.parametrize("way", ["penalty", "accumulate", "attach"])
def test_two_ranks_agree_with_each_other_and_with_one_process(ranks, way):
    first, second = ranks(2).call(trained_by_a_rank, way)
    model, inputs, targets = model_and_data()
    alone = train(model, inputs, targets, way)
    for a, b, c in zip(first, second, alone, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-6)

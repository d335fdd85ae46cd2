"""Under DistributedDataParallel every rank gets the same result."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
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


def rank_main(rank, port, way, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model, inputs, targets = model_and_data()
    half = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    ddp = DistributedDataParallel(model)
    results[rank] = [t.numpy() for t in train(ddp, inputs[:, half], targets[:, half], way)]
    dist.destroy_process_group()


@pytest.mark.parametrize("way", ["penalty", "accumulate", "attach"])
def test_two_ranks_agree_with_each_other_and_with_one_process(way):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(rank_main, (port, way, results), nprocs=2)
        first, second = ([torch.from_numpy(a) for a in results[rank]] for rank in (0, 1))
    model, inputs, targets = model_and_data()
    alone = train(model, inputs, targets, way)
    for a, b, c in zip(first, second, alone, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-6)

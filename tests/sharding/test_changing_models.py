"""A sharded model whose head is replaced by a sharded one."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from spectral_kernels import SpectralAdamW, SpectralRegularizer, SpectralSGD


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    return model


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(4, 8)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", [SpectralAdamW, SpectralSGD, torch.optim.SGD])
def test_a_sharded_head_that_is_replaced_is_followed(one_rank, kind):
    model = net()
    if kind is torch.optim.SGD:
        optimizer = kind(model.parameters(), 0.01)
        readings = SpectralRegularizer(model, 0.1, warmup=100)
        readings.attach(optimizer)
    else:
        optimizer = readings = kind(model, 0.01, strength=0.1, warmup=100)
    step(model, optimizer)
    model[2] = fully_shard(nn.Linear(8, 5))
    with pytest.raises(RuntimeError, match=r"'2\.weight' was replaced.*does not hold"):
        step(model, optimizer)
    optimizer.add_param_group({"params": list(model[2].parameters())})
    truth = float(torch.linalg.svdvals(model[2].weight.full_tensor())[0])
    step(model, optimizer)
    assert readings.report()[-1].shape == (5, 8)
    assert readings.report()[-1].sigma == pytest.approx(truth, rel=0.05)


def test_a_sharded_parameter_without_a_penalty_takes_its_step(one_rank):
    model = net()
    optimizer = SpectralAdamW(model, exclude="2.*")
    before = model[2].weight.full_tensor().clone()
    step(model, optimizer), step(model, optimizer)
    assert not torch.equal(model[2].weight.full_tensor(), before)

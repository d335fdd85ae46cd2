"""Functions that tests/sharding/test_sharded_roles.py runs on every rank: groups, stacks, zeros."""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from spectral_kernels import SpectralRegularizer
from tests.support.sharded_models import built, device, distributed, whole


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(5, 6, 4))
        self.up_bias = nn.Parameter(torch.randn(5, 6))


class Roles(nn.Module):
    def __init__(self):
        super().__init__()
        self.groups = nn.Conv2d(6, 9, 3, groups=3)
        self.depthwise = nn.Conv2d(7, 7, 3, groups=7)
        self.experts = Experts()
        self.norm, self.offset = nn.LayerNorm(5), nn.LayerNorm(5)
        self.pos_embed = nn.Parameter(torch.randn(5, 4))


def built_roles():
    model = built(Roles)
    with torch.no_grad():
        for norm in (model.norm, model.offset):
            for p in norm.parameters():
                p.copy_(torch.linspace(-2, 3, 5))
        model.offset.weight.zero_()
    return model


def compare(placements):
    """Return what is selected of the model and of the sharded one, and how far gradients differ."""
    world = torch.distributed.get_world_size()
    alone, model = built_roles(), built_roles()
    model = distributed(model, init_device_mesh(device(), (world,)), placements)
    found = []
    for one in (alone, model):
        reg = SpectralRegularizer(one, 0.1)
        for _ in range(2):
            reg.accumulate_grad_()
        grads = {n: whole(p.grad) for n, p in one.named_parameters() if p.grad is not None}
        found.append((reg.names, reg._selection.skipped, reg.sigma, grads))
    (names, skipped, sigma, grads), (*own, own_sigma, own_grads) = found
    assert [names, skipped] == own
    assert grads.keys() == own_grads.keys()
    far = {n: float((own_grads[n] - g).abs().max() / g.abs().max()) for n, g in grads.items()}
    return {**far, "sigma": float((own_sigma - sigma).abs().max())}, dict(skipped)


def transposed():
    """Return what is said of a transposed convolution by groups that is sharded."""
    model = built(lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2)))
    mesh = init_device_mesh(device(), (torch.distributed.get_world_size(),))
    model = distributed(model, mesh, (torch.distributed.tensor.Shard(0),))
    try:
        SpectralRegularizer(model).accumulate_grad_()
    except ValueError as error:
        SpectralRegularizer(model, roles={"0.weight": "matrix"}).accumulate_grad_()
        return str(error)
    return ""

"""Functions that tests/sharding/test_sharded_operators.py runs on every rank: convolutions."""

import torch
from torch import nn
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import Shard

from spectral_kernels import SpectralAdamW, SpectralRegularizer, spectral_norms
from tests.support.sharded_models import built, distributed
from tests.support.sharded_rows import differences, mesh_of, moved, numbers, two_steps


class Convolutions(nn.Module):
    """Convolutions of which no number of ranks divides all sizes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(6, 10, 3, bias=False)
        self.last = nn.Conv2d(6, 7, 3, stride=2, bias=False).to(memory_format=torch.channels_last)
        self.up = nn.ConvTranspose2d(6, 10, 3, bias=False)
        self.line = nn.Conv1d(3, 5, 4, bias=False)
        self.groups = nn.Conv2d(6, 8, 3, groups=2, bias=False)


def pair(placements):
    """The model, and the same one sharded."""
    return built(Convolutions), distributed(built(Convolutions), mesh_of(placements), placements)


def compare(placements, way):
    """Return the largest difference between sharded and whole, over the largest number."""
    found = []
    for one in pair(placements):
        options = {"strength": 0.3, "target": 0.4, "convolutions": "operator"}
        if way.startswith("adamw"):
            own = SpectralAdamW(one, 0.01, eps=1e-2, decoupled="," in way, **options)
        else:
            own = SpectralRegularizer(one, **options)
        moved(one)
        two_steps(one, own, way)
        found.append(numbers(one, own))
    return differences(*found)


def resumed(folder, flat):
    """Return next_search of an optimizer after two steps, and of one that has loaded its state."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    models = [pair((Shard(0),))[1] for _ in range(2)]
    own, other = (SpectralAdamW(model, 0.01, convolutions="operator") for model in models)
    moved(models[0])
    two_steps(models[0], own, "adamw")
    save(get_optimizer_state_dict(models[0], own, options=options), checkpoint_id=folder)
    state = get_optimizer_state_dict(models[1], other, options=options)
    load(state, checkpoint_id=folder)
    set_optimizer_state_dict(models[1], other, state, options=options)
    return [one.regularizer.state_dict()["next_search"] for one in (own, other)]


def norms(placements):
    """Return the norms of the operators, whole and sharded."""
    return [spectral_norms(model, convolutions="operator") for model in pair(placements)]

"""Functions that tests/sharding/test_sharded_operators.py runs on every rank: convolutions."""

import torch
from torch import nn

from spectral_kernels import SpectralAdamW, SpectralRegularizer, spectral_norms
from tests.support.sharded_models import built, distributed, whole
from tests.support.sharded_rows import mesh_of, moved


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
        sgd = torch.optim.SGD(one.parameters(), 0.01)
        if way == "attached, decoupled":
            own.attach(sgd, decoupled=True)
        for _ in range(2):
            if way == "accumulate":
                own.accumulate_grad_()
            elif way == "penalty":
                own.penalty().backward()
            else:
                for p in one.parameters():
                    p.grad = torch.full_like(p, 0.1)
                (own if way.startswith("adamw") else sgd).step()
        found.append({
            **{f"sigma {n}": x for n, x in zip(own.names, own.sigma, strict=True)},
            **{n: whole(p.detach()) for n, p in one.named_parameters()},
            **{f"grad {n}": whole(p.grad) for n, p in one.named_parameters()},
        })  # fmt: skip
    expected, mine = found
    return {
        name: float((mine[name] - x).abs().max() / x.abs().max().clamp(min=1e-30))
        for name, x in expected.items()
    }


def norms(placements):
    """Return the norms of the operators, whole and sharded."""
    return [spectral_norms(model, convolutions="operator") for model in pair(placements)]

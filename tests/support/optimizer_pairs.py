"""A network, and pairs of optimizers for it: torch's with a regularizer attached, and ours."""

import os

import pytest
import torch
from torch import nn

from spectral_kernels import SpectralAdamW, SpectralRegularizer, SpectralSGD

KINDS = {
    "adamw": (torch.optim.AdamW, SpectralAdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "sgd": (torch.optim.SGD, SpectralSGD, {"lr": 1e-2}),
    "momentum": (torch.optim.SGD, SpectralSGD,
                 {"lr": 1e-2, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    "nesterov": (torch.optim.SGD, SpectralSGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True}),
}  # fmt: skip
# Triton's interpreter takes a second for a step.
MANY, SOME, FEW = (6, 2, 1) if os.environ.get("TRITON_INTERPRET") == "1" else (200, 60, 5)
every_kind = pytest.mark.parametrize("kind", KINDS)


class Net(nn.Module):
    """Convolutions (one channels_last), a norm, linear layers, a scale that is not regularized."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 6, 3)
        self.conv.to(memory_format=torch.channels_last)
        self.norm = nn.LayerNorm(96)
        self.wide, self.last = nn.Linear(96, 33), nn.Linear(33, 7)
        self.scale = nn.Parameter(torch.ones(33))
        self.unused = nn.Parameter(torch.ones(5))

    def forward(self, x):
        return self.last(self.wide(self.norm(self.conv(x).flatten(1))) * self.scale)


def backward(model, step, factor=1.0):
    """Leave gradients of a batch that belongs to ``step``."""
    generator = torch.Generator().manual_seed(step)
    one = next(model.parameters())
    dtype = one.dtype
    x = torch.randn(16, 3, 6, 6, generator=generator, device="cpu").to(one)
    y = torch.randint(7, (16,), generator=generator, device="cpu").to(one.device)
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(x).to(torch.promote_types(dtype, torch.float32)), y)
    (factor * loss).backward()
    return loss.detach()


def pair(kind, backend, dtype=torch.float32, strength=0.02, **changes):
    """A model with torch's optimizer and a regularizer, and the same with ours."""
    theirs, ours, options = KINDS[kind]
    options = {**options, **changes}
    models = Net().to(dtype), Net().to(dtype)
    first = theirs(models[0].parameters(), **options)
    first.regularizer = SpectralRegularizer(models[0], strength, backend=backend)
    first.regularizer.attach(first)
    second = ours(models[1], **options, strength=strength, backend=backend)
    return (models[0], first), (models[1], second)


def distance(a, b):
    """The largest difference of two models' parameters, over the largest parameter of each."""
    return max(
        float((p - q).detach().abs().max() / p.detach().abs().max())
        for p, q in zip(a.parameters(), b.parameters(), strict=True)
    )


def run(model, optimizer, steps):
    """Train; return the loss of every step."""
    losses = []
    for step in steps:
        losses.append(backward(model, step))
        optimizer.step()
    return torch.stack(losses)

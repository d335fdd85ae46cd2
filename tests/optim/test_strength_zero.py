"""With strength 0, steps are those of torch, also of parameters that have no gradient."""

import pytest
import torch
from torch import nn

from spectral_kernels import SpectralAdamW, SpectralRegularizer, SpectralSGD

OPTIONS = {"lr": 0.1, "weight_decay": 0.1}
THEIRS = {SpectralAdamW: torch.optim.AdamW, SpectralSGD: torch.optim.SGD}
HEAD = {"head_b.*": 0, "*": 1e-2}


def net():
    torch.manual_seed(0)
    parts = {"body": nn.Linear(4, 4), "head_a": nn.Linear(4, 2), "head_b": nn.Linear(4, 2)}
    return nn.ModuleDict(parts)


def train(model, optimizer, steps=3):
    """Train the first head; the second one takes no part, and has no gradients."""
    for _ in range(steps):
        optimizer.zero_grad()
        model["head_a"](model["body"](torch.ones(3, 4))).square().sum().backward()
        optimizer.step()
    return model


def attached(kind):
    def make(model, strength, backend):
        optimizer = THEIRS[kind](model.parameters(), **OPTIONS)
        optimizer.regularizer = SpectralRegularizer(model, strength, backend=backend)
        optimizer.regularizer.attach(optimizer)
        return optimizer

    return make


def own(kind):
    return lambda model, strength, backend: kind(
        model, strength=strength, backend=backend, **OPTIONS
    )


WAYS = {
    "SpectralAdamW": own(SpectralAdamW), "SpectralSGD": own(SpectralSGD),
    "AdamW, attached": attached(SpectralAdamW), "SGD, attached": attached(SpectralSGD),
}  # fmt: skip
every_way = pytest.mark.parametrize("way", WAYS)


def is_touched(model, part="head_b"):
    pairs = zip(model[part].parameters(), net()[part].parameters(), strict=True)
    return [not torch.equal(p, q) for p, q in pairs]


@every_way
@pytest.mark.parametrize("strength", [0, 0.0, {"*": 0}])
def test_without_strength_steps_are_torchs(backend, way, strength):
    other, model = net(), net()
    kind = torch.optim.AdamW if "AdamW" in way else torch.optim.SGD
    train(other, kind(other.parameters(), **OPTIONS))
    optimizer = WAYS[way](model, strength, backend)
    train(model, optimizer)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert is_touched(model) == [False, False]
    assert all(p.grad is None for p in model["head_b"].parameters())
    assert float(optimizer.regularizer.residual.max()) < 1  # its sigma is measured all the same


@every_way
def test_parameters_of_strength_zero_are_as_if_excluded(backend, way):
    model, other = net(), net()
    train(model, WAYS[way](model, HEAD, backend))
    reference = WAYS[way](other, 1e-2, backend)
    excluded = net()
    if "attached" not in way:
        kind = SpectralAdamW if "AdamW" in way else SpectralSGD
        train(
            excluded, kind(excluded, strength=1e-2, exclude="head_b.*", backend=backend, **OPTIONS)
        )
        for p, q in zip(model.parameters(), excluded.parameters(), strict=True):
            torch.testing.assert_close(p, q)
    assert is_touched(model) == [False, False]
    assert is_touched(model, "body") == [True, True]
    assert is_touched(train(other, reference)) == [True, True]  # 1e-2 for all of them


@every_way
def test_a_strength_that_is_assigned_counts_from_then_on(backend, way):
    model = net()
    optimizer = WAYS[way](model, HEAD, backend)
    train(model, optimizer)
    optimizer.regularizer.strength = 1e-2
    before = [p.detach().clone() for p in model["head_b"].parameters()]
    assert is_touched(model) == [False, False]
    train(model, optimizer)
    after = [p.detach().clone() for p in model["head_b"].parameters()]
    assert not any(torch.equal(p, q) for p, q in zip(before, after, strict=True))
    optimizer.regularizer.strength = HEAD
    train(model, optimizer)
    assert all(torch.equal(p, q) for p, q in zip(model["head_b"].parameters(), after, strict=True))
    optimizer.regularizer.strength = torch.tensor(0.0)  # its value may change without notice
    train(model, optimizer)
    assert not any(
        torch.equal(p, q) for p, q in zip(model["head_b"].parameters(), after, strict=True)
    )


def test_a_gradient_that_is_there_is_used(backend):
    """Weight decay and moments go on, as torch's do for a gradient of zeros."""
    model, other = net(), net()
    pairs = (model, SpectralAdamW(model, strength=HEAD, backend=backend, **OPTIONS)), (
        other, torch.optim.AdamW(other.parameters(), **OPTIONS)
    )  # fmt: skip
    for one, optimizer in pairs:
        for _ in range(2):
            for p in one["head_b"].parameters():
                p.grad = torch.full_like(p, 0.3)
            optimizer.step()
    for p, q in zip(model["head_b"].parameters(), other["head_b"].parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert is_touched(model) == [True, True]

"""A compiled ``penalty()`` of a model that changes: it uses the modules of this moment."""

import copy

import pytest
import torch
import torch._dynamo
from torch import nn

from spectral_kernels import SpectralRegularizer

pytestmark = [
    pytest.mark.usefixtures("seeded", "compiled_once"),
    pytest.mark.takes_seconds,
]
recompiles = torch._dynamo.config.patch(error_on_recompile=False)


def net():
    model = nn.Sequential()
    model.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
    model.head = nn.Linear(8, 3)
    return model


def compiled(reg):
    """Return a compiled function of the penalty alone, in which no module is called."""

    def run():
        return reg.penalty()

    return torch.compile(run, fullgraph=True, backend="aot_eager")


def grads(model):
    return {name: p.grad for name, p in model.named_parameters()}


def check(model, reg, penalty):
    """The compiled penalty and its gradients are those of a new regularizer."""
    twin = copy.deepcopy(model)
    fresh = SpectralRegularizer(twin, reg.strength, warmup=300)
    model.zero_grad(), twin.zero_grad()
    found, expected = penalty(), fresh.penalty()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    if found.requires_grad:  # a part of it has a strength
        found.backward()
    expected.backward()
    found, expected = grads(model), grads(twin)
    for name, grad in expected.items():
        assert (found[name] is None) == (grad is None), name
        if grad is not None:
            torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-5)


def same_shape(model):
    model.head = nn.Linear(8, 3)


def another_shape(model):
    model.head = nn.Linear(8, 5)


def a_container(model):
    model.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))


def wider(model):
    model.head.weight = nn.Parameter(torch.randn(5, 8))


def frozen(model):
    model.body.requires_grad_(False)


@recompiles
@pytest.mark.parametrize("change", [same_shape, another_shape, a_container, wider, frozen])
def test_changes_are_followed(change):
    model = net()
    reg = SpectralRegularizer(model, 0.1, warmup=300)
    penalty = compiled(reg)
    check(model, reg, penalty), check(model, reg, penalty)
    change(model)
    check(model, reg, penalty), check(model, reg, penalty)


@recompiles
def test_what_is_unfrozen_is_in_the_graph_from_then_on():
    model = net()
    model.body.requires_grad_(False)
    reg = SpectralRegularizer(model, 0.1, warmup=300)
    penalty = compiled(reg)
    check(model, reg, penalty)
    model.body.requires_grad_(True)
    check(model, reg, penalty)


@recompiles
@pytest.mark.parametrize("strength", [0, {"head.*": 0, "*": 0.1}])
def test_strength_zero_makes_no_gradient(strength):
    model = net()
    reg = SpectralRegularizer(model, strength, warmup=300)
    penalty = compiled(reg)
    check(model, reg, penalty)
    assert model.head.weight.grad is None
    reg.strength = 0.2
    check(model, reg, penalty)
    assert model.head.weight.grad is not None
    reg.strength = strength
    check(model, reg, penalty)


@recompiles
def test_a_penalty_that_is_only_evaluated_follows_too():
    model = net()
    reg = SpectralRegularizer(model, 0.1, warmup=300)
    penalty = compiled(reg)
    with torch.no_grad():
        penalty()
        model.head = nn.Linear(8, 3)
        expected = SpectralRegularizer(model, 0.1, warmup=300).penalty()
        torch.testing.assert_close(penalty(), expected, rtol=1e-4, atol=1e-6)

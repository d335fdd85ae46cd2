"""Warnings point at the line of the user's file that led to them."""

import copy
import warnings

import pytest
import torch
from torch import nn

from spectral_kernels import SpectralAdamW, SpectralRegularizer, SpectralSGD
from spectral_kernels.backends import choice


def step(optimizer):
    """Take a step of weights with a large sigma."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.data.mul_(100)
            p.grad = torch.zeros_like(p)
    optimizer.step()


def reference_instead():
    choice._said.clear()
    SpectralRegularizer(nn.Linear(2, 3)).penalty()


def orthogonalized():
    weight = nn.Parameter(torch.randn(3, 2))
    optimizer = torch.optim.Muon([weight])
    SpectralRegularizer([("0.weight", weight)]).attach(optimizer)


def unstable_attached():
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    SpectralRegularizer(model).attach(optimizer)
    step(optimizer)


def unstable_inside():
    step(SpectralSGD(nn.Linear(4, 3), 1.0))


def lost():
    model = nn.Linear(4, 3)
    regularizer = SpectralRegularizer(model)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    regularizer.attach(optimizer)
    copy.deepcopy(regularizer).penalty()
    optimizer.zero_grad()


def without_vectors():
    model = nn.Linear(4, 3)
    theirs = torch.optim.AdamW(model.parameters())
    step(theirs)
    SpectralAdamW(nn.Linear(4, 3)).load_state_dict(theirs.state_dict())


@pytest.mark.parametrize(
    ("provoke", "says"),
    [
        (reference_instead, "uses its PyTorch reference: as the test wants"),
        (orthogonalized, "orthogonalizes gradients"),
        (unstable_attached, "step of SGD unstable"),
        (unstable_inside, "step of SGD unstable"),
        (lost, "is not attached"),
        (without_vectors, "no vectors"),
    ],
)
def test_a_warning_points_at_the_line_of_its_user(provoke, says, monkeypatch):
    if provoke is orthogonalized and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    if provoke is reference_instead:
        monkeypatch.setattr(choice, "unavailable", lambda *_: "as the test wants")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        provoke()
    (one,) = [w for w in found if says in str(w.message)]
    assert one.filename == __file__

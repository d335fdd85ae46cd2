"""The Lipschitz bounds that the benchmark of continual learning measures."""

import math

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn", reason="scikit-learn is not installed")

from bench.continual import models, train

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("name", ["mlp", "resnet_plain", "vgg_plain"])
def test_no_pair_of_inputs_exceeds_the_lipschitz_bound(name):
    model = models.build(name, (1, 8, 8), 10, torch.Generator().manual_seed(0))
    found = train.operators(model)
    x = torch.randn(64, 1, 8, 8)
    z = x + 1e-3 * torch.randn_like(x)
    with torch.no_grad():
        moved = (model(x) - model(z)).norm(dim=1) / (x - z).flatten(1).norm(dim=1)
    assert 0 < float(moved.max()) <= found["lipschitz"] * (1 + 1e-3)
    assert len(found["operator_sigma"]) == sum(p.dim() > 1 for p in model.parameters())


def test_a_linear_chain_reaches_its_lipschitz_bound():
    conv, linear = nn.Conv2d(1, 1, 1, bias=False), nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        conv.weight.fill_(-3)
        linear.weight.copy_(2 * torch.eye(4))
    model = nn.Sequential(conv, nn.Flatten(), linear)
    assert train.operators(model)["lipschitz"] == pytest.approx(6)


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_models_with_norms_have_no_lipschitz_bound(name):
    model = models.build(name, (1, 8, 8), 10, torch.Generator().manual_seed(0))
    assert math.isnan(train.operators(model)["lipschitz"])

"""The warning about one parameter that is nearly the whole penalty."""

import warnings

import pytest
import torch
from torch import nn

from spectral_kernels import SpectralAdamW, SpectralRegularizer

pytestmark = pytest.mark.usefixtures("seeded")


def layers(n=4, factor=1.0):
    """Layers of which the third is ``factor`` times too large."""
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(n)))
    with torch.no_grad():
        model[2].weight.mul_(factor)
    return model


def warnings_of(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, [str(one.message) for one in caught]


@pytest.mark.parametrize("kind", [SpectralRegularizer, SpectralAdamW])
def test_one_warning_when_it_is_built_names_the_parameter_and_its_share(kind):
    model = layers(factor=30.0)
    held, said = warnings_of(lambda: kind(model, strength=0.01))
    assert len(said) == 1
    assert said[0].startswith("parameter '2.weight' is ")
    share = float(said[0].split(" is ")[1].split(" %")[0])
    sigmas = [torch.linalg.svdvals(m.weight.detach())[0].double() for m in model]
    penalties = [float((s**2 - 1) ** 2) for s in sigmas]
    penalties.append(sum(float(m.bias.detach().norm() ** 4) for m in model))
    assert share == pytest.approx(100 * penalties[2] / sum(penalties), abs=0.05)
    step = held.accumulate_grad_ if kind is SpectralRegularizer else held.step
    assert warnings_of(lambda: [step() for _ in range(3)])[1] == []


def test_weights_that_come_later_are_seen_at_the_first_step():
    model = layers()
    reg, said = warnings_of(lambda: SpectralRegularizer(model, strength=0.01))
    assert said == []
    model.load_state_dict(layers(factor=30.0).state_dict())
    _, said = warnings_of(lambda: [reg.accumulate_grad_() for _ in range(3)])
    assert ["2.weight" in text for text in said] == [True]


def test_a_large_model_is_looked_at_in_its_first_step():
    model = nn.Sequential(*(nn.Linear(1536, 1536, bias=False) for _ in range(3)))
    with torch.no_grad():
        model[1].weight.mul_(30)
    reg, said = warnings_of(lambda: SpectralRegularizer(model, strength=0.01))
    assert said == []
    _, said = warnings_of(reg.penalty)
    assert ["1.weight" in text for text in said] == [True]


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (layers(factor=30.0), {"strength": 1e-9}),  # too small to matter
        (layers(factor=30.0), {"strength": {"2.*": 0, "*": 0.01}}),
        (layers(factor=30.0), {"target": "initial"}),
        (layers(factor=30.0), {"include": ["2.*"]}),  # nothing else
        (nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Linear(64, 3)), {}),
    ],
)
def test_no_warning_where_it_is_meant(model, options):
    def steps():
        reg = SpectralRegularizer(model, **options)
        for _ in range(2):
            reg.accumulate_grad_()

    assert warnings_of(steps)[1] == []

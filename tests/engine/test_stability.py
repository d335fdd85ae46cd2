"""A warning, once, where the penalty makes the step of SGD unstable."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from spectral_kernels import SpectralAdamW, SpectralRegularizer, SpectralSGD
from spectral_kernels.backends import choice
from spectral_kernels.engine.stability import EVERY, FIRST

from ..support.small_nets import zero_gradients


def layer(sigma):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24, bias=False))
    with torch.no_grad():
        model[0].weight.mul_(sigma / torch.linalg.matrix_norm(model[0].weight, 2))
    return model


def warnings_of(step, model, n=1):
    """Take steps without a gradient of the task; return the texts of the warnings."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(n):
            zero_gradients(model)
            step()
    return [str(w.message) for w in found if w.category is RuntimeWarning]


def attached(model, lr=0.1, kind=torch.optim.SGD, **options):
    optimizer = kind(model.parameters(), lr)
    reg = SpectralRegularizer(model, **options)
    reg.attach(optimizer)
    return optimizer, reg


def sgd(model, lr=0.1, **options):
    optimizer = SpectralSGD(model, lr, **options)
    return optimizer, optimizer


@pytest.mark.parametrize("make", [attached, sgd])
def test_a_step_that_goes_past_the_target_and_farther_away_warns_once(make):
    model = layer(100.0)
    optimizer, _ = make(model)
    (found,) = warnings_of(optimizer.step, model)
    assert "'0.weight'" in found
    assert "lr 0.1 and strength 0.001 it moves sigma by" in found
    assert "past its target 1 " in found
    assert "decoupled=True" in found
    assert warnings_of(optimizer.step, model, 3) == []


@pytest.mark.parametrize("make", [attached, sgd])
def test_the_limit_is_twice_the_distance_to_the_target(make):
    """The step is lr * strength * 4 * (sigma^2 - 1) * sigma."""
    sigma, target = 5.0, 1.0
    limit = 2 * (sigma - target) / (4 * (sigma**2 - 1) * sigma)
    for factor, n in ((0.98, 0), (1.02, 1)):
        model = layer(sigma)
        # One singular value, so that the estimate is exact.
        with torch.no_grad():
            model[0].weight.copy_(sigma * torch.ones(24, 24) / 24)
        optimizer, _ = make(model, 1.0, strength=factor * limit)
        assert len(warnings_of(optimizer.step, model)) == n


@pytest.mark.parametrize("options", [{"lr": 0.1, "momentum": 0.9, "nesterov": True}, {"lr": 0.1}])
def test_sgd_of_every_kind_warns(options):
    model = layer(100.0)
    optimizer = torch.optim.SGD(model.parameters(), **options)
    SpectralRegularizer(model).attach(optimizer)
    assert len(warnings_of(optimizer.step, model)) == 1


def test_steps_that_are_normalized_or_capped_do_not_warn():
    model = layer(100.0)
    for kind in (torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad):
        assert warnings_of(attached(model, kind=kind)[0].step, model) == []
    for kind in (SpectralAdamW, SpectralSGD):
        assert warnings_of(kind(model, 0.1, decoupled=True).step, model) == []
    assert warnings_of(SpectralAdamW(model, 0.1).step, model) == []


def test_without_a_learning_rate_there_is_no_warning():
    model = layer(100.0)
    reg = SpectralRegularizer(model)
    assert warnings_of(lambda: reg.penalty().backward(), model) == []
    assert warnings_of(reg.accumulate_grad_, model) == []


@pytest.mark.parametrize("make", [attached, sgd])
def test_a_learning_rate_that_has_grown_is_noticed(make):
    model = layer(3.0)
    optimizer, _ = make(model, 1e-4)
    assert warnings_of(optimizer.step, model, FIRST) == []
    optimizer.param_groups[0]["lr"] = 1e4
    with torch.no_grad():
        saved = model[0].weight.clone()

    def step():
        optimizer.step()
        with torch.no_grad():
            model[0].weight.copy_(saved)

    assert len(warnings_of(step, model, EVERY)) == 1


@pytest.mark.parametrize("make", [attached, sgd])
def test_a_strength_that_has_grown_is_noticed_at_once(make):
    model = layer(30.0)
    optimizer, reg = make(model, 1e-5)
    assert warnings_of(optimizer.step, model, FIRST + 3) == []
    reg.strength = 1e3
    assert len(warnings_of(optimizer.step, model)) == 1


def test_every_matrix_is_judged_by_the_learning_rate_of_its_group():
    model = nn.Sequential(layer(100.0)[0], layer(2.0)[0])
    for lrs, n in (((1e-3, 0.1), 0), ((0.1, 1e-3), 1)):
        groups = [{"params": [p], "lr": lr} for p, lr in zip(model.parameters(), lrs, strict=True)]
        optimizer = torch.optim.SGD(groups)
        handle = SpectralRegularizer(model).attach(optimizer)
        found = warnings_of(optimizer.step, model)
        assert len(found) == n
        assert all("'0.weight'" in text for text in found)
        handle.remove()


def test_a_matrix_that_is_not_finite_does_not_warn():
    model = layer(100.0)
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    optimizer, _ = attached(model)
    assert warnings_of(optimizer.step, model) == []


@pytest.mark.parametrize("make", [attached, sgd])
def test_on_a_gpu_reading_metrics_warns_and_a_step_does_not(gpu_like, make):
    """A step would have to wait for sigma there."""
    model = layer(100.0)
    optimizer, reg = make(model, 0.1, backend="cpu")
    assert warnings_of(optimizer.step, model) == []
    with torch.no_grad():
        model[0].weight.copy_(layer(100.0)[0].weight)
    if make is attached:
        reg.accumulate_grad_()
    else:
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.1
    assert len(warnings_of(reg.metrics, model)) == 1
    assert warnings_of(reg.metrics, model) == []


def test_metrics_of_a_detached_regularizer_do_not_warn():
    model = layer(100.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    reg = SpectralRegularizer(model)
    reg.attach(optimizer).remove()
    assert warnings_of(reg.metrics, model) == []


def test_copies_and_pickles_still_step():
    model = layer(3.0)
    optimizer = SpectralSGD(model, 0.1)
    warnings_of(optimizer.step, model)
    twin, other = copy.deepcopy((model, optimizer))
    assert warnings_of(other.step, twin) == []
    twin, other = pickle.loads(pickle.dumps((model, optimizer)))
    assert warnings_of(other.step, twin) == []


def test_the_reference_warns_too():
    model = layer(100.0)
    assert choice.unavailable("reference") is None
    optimizer, _ = attached(model, backend="reference")
    assert len(warnings_of(optimizer.step, model)) == 1


def test_the_watch_for_unstable_steps_knows_it(recwarn):
    """Far below its target the penalty of two sides is unstable, that of one side is nothing."""
    model = nn.Linear(6, 6, bias=False)
    with torch.no_grad():
        model.weight.mul_(0.1)
    for side in ("both", "above"):
        own = copy.deepcopy(model)
        optimizer = SpectralSGD(own, 1.0, strength=10.0, side=side)
        own.weight.grad = torch.zeros_like(own.weight)
        optimizer.step()
        found = [w for w in recwarn.list if "unstable" in str(w.message)]
        assert len(found) == 1

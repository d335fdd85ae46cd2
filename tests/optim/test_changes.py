"""Optimizers with the penalty in their pass: checkpoints, scalers, and weights that are edited."""

import copy
import io
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from spectral_kernels import SpectralAdamW, SpectralSGD

from ..support.optimizer_pairs import (
    FEW,
    SOME,
    Net,
    backward,
    distance,
    every_kind,
    pair,
    run,
)

# -------------------------------------------------------------------------------- checkpoints


@every_kind
def test_checkpoints_go_both_ways_between_torch_and_here(backend, kind):
    (a, first), (b, second) = pair(kind, backend)
    run(a, first, range(FEW)), run(b, second, range(FEW))
    (c, third), (d, fourth) = pair(kind, backend)
    for model in (c, d):
        model.load_state_dict(a.state_dict())
    saved = io.BytesIO()
    torch.save({"theirs": first.state_dict(), "ours": second.state_dict()}, saved)
    saved.seek(0)
    saved = torch.load(saved)
    third.load_state_dict(saved["ours"])
    said = pytest.warns(
        UserWarning, match="no vectors of the spectral penalty.*; they are warmed up"
    )
    # Plain SGD's checkpoint is the same before the first step and after it.
    with said if saved["theirs"]["state"] else nullcontext():
        fourth.load_state_dict(saved["theirs"])
    for optimizer in (third, fourth):  # torch's checkpoint has no place for the vectors
        optimizer.regularizer.load_state_dict(first.regularizer.state_dict())
    expected = run(a, first, range(FEW, 3 * FEW))
    for model, optimizer in ((c, third), (d, fourth)):
        torch.testing.assert_close(
            run(model, optimizer, range(FEW, 3 * FEW)), expected, rtol=1e-3, atol=1e-4
        )


@every_kind
def test_resuming_gives_the_same_bits(backend, kind):
    _, (model, optimizer) = pair(kind, backend)
    run(model, optimizer, range(FEW))
    _, (other, resumed) = pair(kind, backend)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twin = copy.deepcopy({"model": model, "optimizer": optimizer})
    run(model, optimizer, range(FEW, 2 * FEW))
    for m, o in ((other, resumed), (twin["model"], twin["optimizer"])):
        run(m, o, range(FEW, 2 * FEW))
        # A matrix that is stored by columns restarts from its other singular vector.
        close = [torch.equal(p, q) for p, q in zip(model.parameters(), m.parameters(), strict=True)]
        assert all(close) or distance(model, m) < 1e-6


def test_adam_and_amsgrad_checkpoints_are_refused():
    model = Net()
    optimizer = SpectralAdamW(model)
    for other, message in (
        (torch.optim.AdamW(model.parameters(), amsgrad=True), "amsgrad: expected .*, got True"),
        (torch.optim.Adam(model.parameters()), "decoupled_weight_decay: expected .*, got False"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(other.state_dict())


# ------------------------------------------------------------------------ changes from outside


def edited(how, optimizer, model):
    with torch.no_grad():
        if how == "in place":
            model.wide.weight.mul_(3)
        elif how == "state_dict":
            model.load_state_dict({**model.state_dict(), "wide.weight": 3 * model.wide.weight})
        elif how == "new data":
            model.wide.weight.data = 3 * model.wide.weight
        else:
            model.wide.weight.data.mul_(3)
            getattr(optimizer, "refresh", lambda: None)()


@pytest.mark.parametrize("how", ["in place", "state_dict", "new data", "refresh"])
def test_weights_changed_from_outside_give_no_wrong_gradient(backend, how):
    (a, first), (b, second) = pair("sgd", backend, torch.float64, strength=0.05)
    run(a, first, range(3)), run(b, second, range(3))
    edited(how, first, a), edited(how, second, b)
    run(a, first, range(3)), run(b, second, range(3))
    assert distance(a, b) < 1e-10


def test_a_skipped_step_of_a_scaler_changes_nothing(backend):
    _, (model, optimizer) = pair("adamw", backend)
    run(model, optimizer, range(3))
    before, sigma = copy.deepcopy(model.state_dict()), optimizer.sigma
    backward(model, 3)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert torch.equal(optimizer.sigma, sigma)
    assert float(optimizer.state[model.scale]["step"]) == 3


def test_scaled_gradients_are_unscaled_and_the_penalty_is_not(backend):
    _, (a, first) = pair("adamw", backend)
    _, (b, second) = pair("adamw", backend)
    for step in range(5):
        backward(a, step)
        first.step()
        backward(b, step, factor=256.0)
        second.grad_scale, second.found_inf = torch.tensor(256.0), torch.tensor(0.0)
        second.step()
    assert distance(a, b) < 1e-6


def test_a_grad_scaler_trains_as_without_it_and_skips_what_overflows(backend):
    _, (a, first) = pair("adamw", backend)
    _, (b, second) = pair("adamw", backend)
    scaler = torch.amp.GradScaler(
        torch.get_default_device().type, init_scale=256.0, growth_interval=1000
    )
    for step in range(5):
        backward(a, step)
        first.step()
        scaler.scale(torch.ones(()))  # makes the scale
        backward(b, step, factor=scaler.get_scale())
        if step % 2:
            scaler.unscale_(second)  # as before clipping: the step must not do it again
        scaler.step(second)
        scaler.update()
    # The scale is a power of two: scaled gradients have the same digits.
    assert distance(a, b) < 1e-6
    before, sigma = copy.deepcopy((b.state_dict(), second.state_dict())), second.sigma
    backward(b, 5, factor=scaler.get_scale())
    b.scale.grad[3] = torch.inf
    scaler.step(second)
    scaler.update()
    assert scaler.get_scale() == 128
    after = b.state_dict(), second.state_dict()
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert torch.equal(second.sigma, sigma)
    backward(b, 6, factor=scaler.get_scale())
    scaler.step(second)
    assert float(second.state[b.scale]["step"]) == 6
    assert not torch.equal(b.scale, before[0]["scale"])


def test_sigma_is_that_of_the_weights_after_the_step(backend):
    _, (model, optimizer) = pair("adamw", backend)
    run(model, optimizer, range(SOME))
    for name, _, sigma, residual in optimizer.report():
        weight = model.get_parameter(name).detach().flatten(1).double()
        values = torch.linalg.svdvals(weight)
        assert float((values - sigma).abs().min()) <= residual + 1e-3
        assert sigma <= float(values[0]) * (1 + 1e-5)
    assert optimizer.names == optimizer.regularizer.names
    optimizer.strength = 0.0
    assert optimizer.regularizer.strength == 0


def test_autograd_notices_that_weights_have_changed(backend):
    model = nn.Linear(4, 3)
    optimizer = SpectralSGD(model, backend=backend)
    x = torch.randn(2, 4, requires_grad=True)
    y = model(x).sum()
    model.weight.grad, model.bias.grad = torch.randn(3, 4), torch.randn(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()

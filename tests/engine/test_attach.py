"""attach(): every optimizer.step() contains the penalty, once."""

import pytest
import torch
from torch import nn

from spectral_kernels import SpectralRegularizer

from ..support.models import close


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3))


def data(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 6, 10, generator=generator)


def parameters_after(model, steps, optimizer, use_penalty=None):
    x = data()
    for i in range(steps):
        optimizer.zero_grad()
        loss = model(x[i % 4]).square().mean()
        if use_penalty is not None:
            loss = loss + use_penalty.penalty()
        loss.backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


OPTIMIZERS = [
    lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    lambda p: torch.optim.AdamW(p, 0.01),
    lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    lambda p: torch.optim.Adam(p, 0.01, foreach=True),
]


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_same_training_as_with_the_penalty_in_the_loss(make):
    model = net()
    reg = SpectralRegularizer(model, 0.1)
    expected = parameters_after(model, 8, make(model.parameters()), use_penalty=reg)
    model = net()
    optimizer = make(model.parameters())
    SpectralRegularizer(model, 0.1).attach(optimizer)
    close(parameters_after(model, 8, optimizer), expected, rtol=1e-4, atol=1e-6)


def test_removing_the_handle_ends_it():
    model, plain = net(), net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    reg = SpectralRegularizer(model, 0.1)
    handle = reg.attach(optimizer)
    handle.remove()
    handle.remove()
    close(
        parameters_after(model, 3, optimizer),
        parameters_after(plain, 3, torch.optim.SGD(plain.parameters(), 0.05)),
        rtol=0, atol=0,
    )  # fmt: skip
    reg.attach(optimizer).remove()  # it may be attached again


def test_accumulated_micro_batches_hold_the_penalty_once():
    model = net()
    x = data()
    state = SpectralRegularizer(model, 0.1).state_dict()
    for i in range(4):
        (model(x[i]).square().mean() / 4).backward()
    task = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    reg = SpectralRegularizer(model, 0.1)
    reg.load_state_dict(state)
    reg.penalty().backward()
    expected = [t + p.grad for t, p in zip(task, model.parameters(), strict=True)]

    seen = []
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    reg.load_state_dict(state)
    reg.attach(optimizer)
    optimizer.register_step_pre_hook(
        lambda *_: seen.extend(p.grad.clone() for p in model.parameters())
    )
    optimizer.zero_grad()
    for i in range(4):
        (model(x[i]).square().mean() / 4).backward()
    optimizer.step()
    close(seen, expected)


@pytest.mark.parametrize("as_keyword", [False, True])
def test_a_closure_is_evaluated_before_the_penalty_is_added(as_keyword):
    model = net()
    reg = SpectralRegularizer(model, 0.1)
    expected = parameters_after(model, 5, torch.optim.SGD(model.parameters(), 0.05), reg)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    SpectralRegularizer(model, 0.1).attach(optimizer)
    x, losses = data(), []
    for i in range(5):

        def closure(i=i):
            optimizer.zero_grad()
            loss = model(x[i % 4]).square().mean()
            loss.backward()
            return loss

        losses.append(optimizer.step(closure=closure) if as_keyword else optimizer.step(closure))
    close(list(model.parameters()), expected, rtol=1e-4, atol=1e-6)
    assert all(loss.requires_grad for loss in losses)


# ------------------------------------------------------------------------------- GradScaler


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_grad_scaler_with_any_optimizer(make):
    model = net()
    reg = SpectralRegularizer(model, 0.1)
    expected = parameters_after(model, 6, make(model.parameters()), use_penalty=reg)
    model = net()
    optimizer = make(model.parameters())
    SpectralRegularizer(model, 0.1).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x = data()
    for i in range(6):
        optimizer.zero_grad()
        scaler.scale(model(x[i % 4]).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    close([p.detach() for p in model.parameters()], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", OPTIMIZERS[:3])
def test_a_step_that_grad_scaler_skips_changes_no_weight(make):
    model = net()
    optimizer = make(model.parameters())
    SpectralRegularizer(model, 0.1).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale(model(data()[0]).square().mean()).backward()
    model[0].weight.grad[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    close([p.detach() for p in model.parameters()], before, rtol=0, atol=0)
    assert scaler.get_scale() == 512


def test_scaled_gradients_need_their_scale_in_accumulate_grad():
    model = net()
    reg = SpectralRegularizer(model, 0.1)
    state = reg.state_dict()
    reg.accumulate_grad_()
    expected = [p.grad.clone() for p in model.parameters()]
    for scale in (256.0, torch.tensor(256.0)):
        model.zero_grad()
        reg.load_state_dict(state)
        reg.accumulate_grad_(grad_scale=scale)
        close([p.grad / 256 for p in model.parameters()], expected)
    model.zero_grad()
    reg.load_state_dict(state)
    reg.accumulate_grad_()
    close([p.grad for p in model.parameters()], expected)


# ----------------------------------------------------------------------------------- refusals


def test_what_is_refused():
    model = net()
    reg = SpectralRegularizer(model)
    with pytest.raises(TypeError, match=r"optimizer: expected .*, got Linear"):
        reg.attach(model[0])
    with pytest.raises(TypeError, match=r"LBFGS.*penalty\(\)"):
        reg.attach(torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ValueError, match=r"does not hold parameter '2\.weight'"):
        reg.attach(torch.optim.SGD(model[0].parameters(), 0.1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    reg.attach(optimizer)
    with pytest.raises(RuntimeError, match="attached to it already"):
        reg.attach(optimizer)


def test_a_sparse_gradient_of_what_is_not_regularized_is_none_of_its_business():
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Embedding(9, 4, sparse=s), nn.Linear(4, 3)) for s in (True, False)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        SpectralRegularizer(model, 0.1).attach(optimizer)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.tensor([1, 2])).square().sum().backward()
            assert model[0].weight.grad.is_sparse == model[0].sparse
            optimizer.step()
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q)


def test_bad_gradients_are_named_and_nothing_is_changed():
    model = net()
    reg = SpectralRegularizer(model)
    before = reg.state_dict()["vectors"]
    model[0].weight.grad = torch.randn(8, 10)
    model[2].weight.grad = torch.randn(3, 8).to_sparse()
    kept = model[0].weight.grad.clone()
    with pytest.raises(ValueError, match=r"gradient of parameter '2\.weight'.*dense"):
        reg.accumulate_grad_()
    assert torch.equal(model[0].weight.grad, kept)
    assert model[0].bias.grad is None
    model[2].weight.grad = None
    assert all(torch.equal(before[n], v) for n, v in reg.state_dict()["vectors"].items())

"""attach(decoupled=True): the penalty acts on the weights, beside the steps of any optimizer."""

import copy

import pytest
import torch
from torch import nn

from spectral_kernels import SpectralAdamW, SpectralRegularizer, SpectralSGD
from spectral_kernels.engine.attach.decoupled import matrix_strength

from ..support.models import batch, close, mixed
from ..support.small_nets import zero_gradients


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def net(dtype=torch.float32, spread=0.2):
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 4))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(spread * torch.randn_like(p))
    return model.to(dtype)


def pair(model, **options):
    """A model whose optimizer has the penalty, and a twin with an attached regularizer."""
    lr, strength = options.pop("lr", 1e-2), options.pop("strength", 0.2)
    decay = options.pop("weight_decay", 0.1)
    twin = copy.deepcopy(model)
    inside = SpectralAdamW(model, lr, weight_decay=decay, strength=strength, decoupled=True,
                           **options)  # fmt: skip
    optimizer = torch.optim.AdamW(twin.parameters(), lr, weight_decay=decay)
    reg = SpectralRegularizer(twin, strength, **options)
    reg.attach(optimizer, decoupled=True)
    return (model, inside), (twin, optimizer), reg


def train(model, optimizer, steps=8, loss=None):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(5, 8, generator=generator, dtype=torch.float64, device="cpu")
        x = x.to(next(model.parameters()))
        optimizer.zero_grad()
        (model(x) if loss is None else loss(model)).square().mean().backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exponent", [1, 1.5, 2])
def test_the_weights_are_those_of_a_decoupled_spectral_adamw(backend, dtype, exponent):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("float64 goes to the reference")
    inside, attached, _ = pair(net(dtype), exponent=exponent, backend=backend)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    close(train(*attached), train(*inside), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", [{"n_vectors": 4}, {"n_power_iterations": "auto"}])
def test_so_they_are_with_other_estimates(options):
    inside, attached, _ = pair(net(torch.float64), **options)
    close(train(*attached), train(*inside), rtol=1e-12, atol=1e-12)


def test_so_they_are_in_every_layout_of_layers():
    tokens, images = batch(torch.float64)
    model = mixed(dtype=torch.float64)
    twin = copy.deepcopy(model)
    inside = SpectralSGD(model, 0.01, strength=0.05, decoupled=True)
    optimizer = torch.optim.SGD(twin.parameters(), 0.01)
    SpectralRegularizer(twin, 0.05).attach(optimizer, decoupled=True)

    def loss(model):
        return model(tokens, images)

    found, expected = train(twin, optimizer, loss=loss), train(model, inside, loss=loss)
    close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_sixteen_bits_are_rounded_once(dtype):
    model = net(dtype)
    wide = copy.deepcopy(model).float()
    for own in (model, wide):
        optimizer = torch.optim.SGD(own.parameters(), 0.5)
        SpectralRegularizer(own, 0.2, warmup=50).attach(optimizer, decoupled=True)
        optimizer.step()
    for p, w in zip(model.parameters(), wide.parameters(), strict=True):
        torch.testing.assert_close(p, w.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("number", [float, lambda x: torch.tensor(x, dtype=torch.float64)])
def test_groups_have_their_own_learning_rates_which_may_change(number):
    model = net(torch.float64)
    twin = copy.deepcopy(model)
    named, plain = list(model.named_parameters()), list(twin.parameters())
    inside = SpectralSGD([{"params": named[:3]}, {"params": named[3:]}], model=model,
                         strength=0.2, decoupled=True)  # fmt: skip
    optimizer = torch.optim.SGD([{"params": plain[:3]}, {"params": plain[3:]}])
    SpectralRegularizer(twin, 0.2).attach(optimizer, decoupled=True)
    for rates in ((0.03, 0.01), (0.01, 0.0), (0.02, 0.02)):
        for own, others, rate in zip(
            optimizer.param_groups, inside.param_groups, rates, strict=True
        ):
            own["lr"], others["lr"] = number(rate), rate
        before = [p.detach().clone() for p in plain]
        close(train(twin, optimizer, 3), train(model, inside, 3), rtol=1e-12, atol=1e-13)
        for p, b in zip(plain[3:], before[3:], strict=True):
            assert torch.equal(p, b) == (rates[1] == 0)


def test_a_learning_rate_of_one_tensor_is_read_in_every_step():
    model = net()
    lr = torch.tensor(0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr)
    SpectralRegularizer(model, 0.2).attach(optimizer, decoupled=True)
    zero_gradients(model)
    before = model[0].weight.detach().clone()
    optimizer.step()
    assert torch.equal(model[0].weight, before)
    lr.fill_(0.1)
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


def test_gradients_and_moments_do_not_see_the_penalty():
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    SpectralRegularizer(model, 10.0).attach(optimizer, decoupled=True)
    zero_gradients(model)
    before = model[0].weight.detach().clone()
    optimizer.step()
    assert not any(p.grad.any() for p in model.parameters())
    assert not any(state["exp_avg"].any() for state in optimizer.state.values())
    assert not torch.equal(model[0].weight, before)


def test_autograd_notices_that_weights_have_changed():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    SpectralRegularizer(model, 0.2).attach(optimizer, decoupled=True)
    before = [p._version for p in model.parameters()]
    optimizer.step()  # without gradients SGD changes nothing
    assert all(p._version > v for p, v in zip(model.parameters(), before, strict=True))


def test_a_frozen_parameter_stays():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    SpectralRegularizer(model, 0.5).attach(optimizer, decoupled=True)
    frozen = model[0].weight, model[1].weight, model[3].bias
    for p in frozen:
        p.requires_grad_(False)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    for p, b in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, b) == any(p is f for f in frozen)


def test_an_optimizers_own_rule_sees_the_weights_without_the_penalty():
    """With lr * weight_decay = 1 the rule takes everything away, and the penalty remains."""
    model = net(torch.float64)
    start = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), 0.5, weight_decay=2.0)
    SpectralRegularizer(model, 0.01).attach(optimizer, decoupled=True)
    zero_gradients(model)
    optimizer.step()
    reg = SpectralRegularizer(start, 0.01)
    penalty = torch.autograd.grad(reg.penalty(), list(start.parameters()))
    close([p.detach() for p in model.parameters()], [-0.5 * g for g in penalty], 1e-12, 1e-15)


def test_a_closure_is_evaluated_at_the_weights_without_the_penalty():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    reg = SpectralRegularizer(model, 0.5)
    reg.attach(optimizer, decoupled=True)
    before = model[0].weight.detach().clone()
    seen = []

    def closure():
        seen.append(model[0].weight.detach().clone())
        optimizer.zero_grad()
        loss = model(torch.ones(2, 8)).sum()
        (loss + reg.penalty() if len(seen) > 1 else loss).backward()
        return loss

    optimizer.step(closure)
    assert torch.equal(seen[0], before)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="leave out penalty"):
        optimizer.step(closure)
    close([p.detach() for p in model.parameters()], before, rtol=0, atol=0)


# ----------------------------------------------------------------------------------- the last step


@pytest.mark.parametrize("exponent", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-3, 3.0, 1e12, 1e30])
def test_no_step_carries_a_singular_value_past_its_target(size, dtype, exponent):
    weight = nn.Parameter(size * torch.randn(12, 1, dtype=dtype) @ torch.randn(1, 8, dtype=dtype))
    bias = nn.Parameter(size * torch.randn(5, dtype=dtype))
    optimizer = torch.optim.SGD([weight, bias], 1.0)
    named = [("weight", weight), ("bias", bias)]
    reg = SpectralRegularizer(named, 1e6, exponent, target=0.5)
    reg.attach(optimizer, decoupled=True)
    before = float(weight.detach().double().norm()), bias.detach().clone()
    optimizer.step()
    tolerance = 20 * torch.finfo(dtype).eps * max(before[0], 0.5)
    after = float(weight.detach().double().norm())
    assert min(before[0], 0.5) - tolerance <= after <= max(before[0], 0.5) + tolerance
    ratio = bias.detach() / before[1]
    assert ((ratio > -1e-6) & (ratio <= 1)).all()
    if size > 1:  # there the step is long enough
        assert after == pytest.approx(0.5, abs=tolerance)
        assert ratio.abs().max() < 1e-6


def test_no_step_carries_a_gain_past_one():
    norm = nn.LayerNorm(6)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([-3.0, -1.0, 0.0, 0.5, 1.5, 1e3]))
    optimizer = torch.optim.SGD(norm.parameters(), 1.0)
    SpectralRegularizer(norm, 1e6).attach(optimizer, decoupled=True)
    optimizer.step()
    close([norm.weight.detach()], [torch.tensor([-1.0, -1.0, 0.0, 1.0, 1.0, 1.0])])


def test_the_capped_coefficient():
    sigma = torch.tensor([0.0, 0.2, 1.0, 1.001, 1.5, 4.0, 1e15, 1e25])
    target = torch.ones(8)
    for k in (1, 1.5, 2, 3):
        for strength in (0.0, 1e-3, 0.1, 10.0):
            own = matrix_strength(sigma, target, torch.full((8,), strength), k)
            found = 2 * own.double() * (sigma - target).double()
            s, t = sigma.double(), target.double()
            c = strength * 2 * k * (s**k - t**k) * s ** (k - 1)
            gap = (s - t).abs()
            close([found], [torch.minimum(torch.maximum(c, -gap), gap)], rtol=1e-4, atol=1e-6)


def test_strength_zero_leaves_an_exploded_matrix_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight.mul_(1e30)
        model[0].bias.mul_(1e30)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    reg = SpectralRegularizer(model, {"0.*": 0.0, "*": 0.1})
    reg.attach(optimizer, decoupled=True)
    before = copy.deepcopy(model[0].state_dict())
    optimizer.step()
    for name, value in model[0].state_dict().items():
        assert torch.equal(value, before[name])


# ---------------------------------------------------------------------------------------- scaling


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_neither_scales_nor_hides_it(fused):
    results = []
    for scaled in (False, True):
        torch.manual_seed(0)
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), 0.01, fused=fused)
        SpectralRegularizer(model, 0.2).attach(optimizer, decoupled=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for _ in range(4):
            optimizer.zero_grad()
            scaler.scale(model(torch.ones(3, 8)).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append([p.detach() for p in model.parameters()])
    close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_grad_scaler_skips_changes_nothing(fused):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, fused=fused)
    SpectralRegularizer(model, 0.2).attach(optimizer, decoupled=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale(model(torch.ones(3, 8)).square().mean()).backward()
    model[0].weight.grad[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    close([p.detach() for p in model.parameters()], before, rtol=0, atol=0)


# --------------------------------------------------------------------------------------- refusals


def test_a_group_without_a_learning_rate_is_refused():
    class Adafactor(torch.optim.SGD):
        """Like transformers' with relative steps."""

    model = net()
    optimizer = Adafactor(model.parameters(), 0.1)
    optimizer.param_groups[0]["lr"] = None
    reg = SpectralRegularizer(model, 0.2)
    with pytest.raises(
        ValueError, match=r"lr: expected .* with decoupled=True, got None in group 0 of Ad"
    ):
        reg.attach(optimizer, decoupled=True)
    optimizer.param_groups[0]["lr"] = 0.1
    reg.attach(optimizer, decoupled=True)
    optimizer.param_groups[0]["lr"] = "fast"
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"lr: expected .*, got 'fast'"):
        optimizer.step()
    close([p.detach() for p in model.parameters()], before, rtol=0, atol=0)


def test_what_is_in_the_gradient_already_is_refused_here_too():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    reg = SpectralRegularizer(model, 0.2)
    reg.attach(optimizer, decoupled=True)
    reg.penalty().backward()
    with pytest.raises(RuntimeError, match="leave out penalty"):
        optimizer.step()

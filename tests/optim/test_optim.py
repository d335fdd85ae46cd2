"""Optimizers with the penalty in their pass, against the regularizer attached to torch's own."""

import copy
import dataclasses
import io
import os
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from spectral_kernels import SpectralAdamW, SpectralRegularizer, SpectralSGD
from spectral_kernels.backends import choice

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


@pytest.mark.takes_seconds
@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_200_steps_are_those_of_the_regularizer_and_torch(backend, kind, dtype):
    (a, first), (b, second) = pair(kind, backend, dtype)
    expected, found = run(a, first, range(MANY)), run(b, second, range(MANY))
    wide = dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-10 if wide else 1e-3, atol=1e-4)
    assert distance(a, b) < (1e-9 if wide else 2e-3)
    assert distance(Net().to(dtype), b) > 2e-4 * MANY  # it has learnt something


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decoupled", [False, True])
def test_rows_of_every_length(backend, kind, dtype, decoupled):
    """Short and long rows, aligned for wide loads or not, several tiles.

    One iteration of warm-up: this is about steps.
    """
    _, ours, options = KINDS[kind]
    shapes = [(200, 8), (5, 31), (7, 520), (3, 1040), (3, 2600), (2, 4096), (2, 5003), (2, 9008)]
    torch.manual_seed(0)
    values = [torch.randn(m, n) / n**0.5 for m, n in shapes]
    gradients = [[torch.randn_like(x) / 10 for x in values] for _ in range(min(SOME, 3))]
    found = []
    for name, own in ((backend, dtype), ("reference", torch.float64)):
        weights = [nn.Parameter(x.to(dtype).to(own, copy=True)) for x in values]
        optimizer = ours([(f"{i}.weight", w) for i, w in enumerate(weights)], **options,
                         strength=0.1, decoupled=decoupled, backend=name)  # fmt: skip
        buckets = optimizer._buckets
        buckets.settings = dataclasses.replace(buckets.settings, warmup=1)
        for bucket in buckets.bound():
            bucket.warmup = 0  # on a CPU, that of replaced matrices
        for step in gradients:
            for w, g in zip(weights, step, strict=True):
                w.grad = g.to(dtype).to(own)
            optimizer.step()
        found.append([*weights, optimizer.sigma, optimizer.residual])
    rounded = 1e-5 if dtype == torch.float32 else 0.04
    for x, y in zip(*found, strict=True):
        # The residual is the root of a difference.
        allowed = rounded**0.5 if y is found[1][-1] else rounded
        torch.testing.assert_close(x.double(), y.double(), rtol=rounded, atol=allowed / 2)


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state_dtype", [None, torch.float32])
def test_a_step_of_16_bit_parameters_is_right_to_one_rounding(backend, kind, dtype, state_dtype):
    _, ours, options = KINDS[kind]
    model = Net().to(dtype)
    optimizer = ours(model, **options, strength=0.02, state_dtype=state_dtype, backend=backend)
    run(model, optimizer, range(3))
    wide_model = copy.deepcopy(model).double()
    wide = ours(wide_model, **options, strength=0.02, backend="reference")
    wide.load_state_dict(optimizer.state_dict())
    backward(model, 4)
    before = [p.detach().double() for p in model.parameters()]
    for p, q in zip(model.parameters(), wide_model.parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.double()
    optimizer.step()
    wide.step()
    in_python = backend == "triton" and choice.interpreted() and dtype == torch.bfloat16
    # Triton's interpreter, unlike a GPU, is not exact to bfloat16.
    unit = (2 if in_python else 1) * torch.finfo(dtype).eps
    for p, q, old in zip(model.parameters(), wide_model.parameters(), before, strict=True):
        # One rounding of the parameter; the step before it is right to float32.
        allowed = 0.51 * unit * q.abs() + 1e-4 * (q - old).abs().max() + 1e-7
        assert ((p.double() - q).abs() <= allowed).all()


def test_float32_moments_of_16_bit_parameters_differ_from_torchs(backend):
    model = Net().to(torch.bfloat16)
    optimizer = SpectralAdamW(model, state_dtype=torch.float32, backend=backend)
    run(model, optimizer, range(2))
    kept = optimizer.state[model.wide.weight]["exp_avg_sq"]
    assert kept.dtype == torch.float32
    assert not torch.equal(kept, kept.bfloat16().float())
    again = SpectralAdamW(model, state_dtype=torch.float32, backend=backend)
    again.load_state_dict(optimizer.state_dict())
    assert torch.equal(again.state[model.wide.weight]["exp_avg_sq"], kept)
    run(model, again, range(2, 3))
    assert again.state[model.wide.weight]["exp_avg_sq"].dtype == torch.float32


@pytest.mark.parametrize("kind", ["adamw", "momentum"])
def test_decoupled_penalty_acts_beside_the_rule(backend, kind):
    theirs, ours, options = KINDS[kind]
    a, b = Net().double(), Net().double()
    plain = theirs(a.parameters(), **options)
    reg = SpectralRegularizer(a, 0.3, backend="reference")
    optimizer = ours(b, **options, strength=0.3, decoupled=True, backend=backend)
    for step in range(5):
        backward(a, step)
        penalty = torch.autograd.grad(reg.penalty(), list(a.parameters()), allow_unused=True)
        plain.step()
        with torch.no_grad():
            for p, g in zip(a.parameters(), penalty, strict=True):
                if g is not None:
                    p -= options["lr"] * g
        backward(b, step)
        optimizer.step()
    assert distance(a, b) < 1e-12


def test_a_group_without_momentum_leaves_its_buffers_as_they_are(backend):
    """Others have one; later it goes on from them, as in torch."""
    a, b = Net(), Net()
    options = {"lr": 1e-2, "momentum": 0.9, "dampening": 0.3}

    def groups(model):
        own = list(model.parameters())
        return [{"params": own[:5]}, {"params": own[5:]}]

    first = torch.optim.SGD(groups(a), **options)
    SpectralRegularizer(a, 0.02, backend=backend).attach(first)
    second = SpectralSGD(groups(b), **options, model=b, strength=0.02, backend=backend)
    for step, momentum in enumerate((0.9, 0.9, 0.0, 0.0, 0.9)):
        for optimizer, model in ((first, a), (second, b)):
            optimizer.param_groups[1]["momentum"] = momentum
            backward(model, step)
            optimizer.step()
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            if p.grad is None:
                continue
            own, truth = second.state[q]["momentum_buffer"], first.state[p]["momentum_buffer"]
            torch.testing.assert_close(own, truth, rtol=1e-3, atol=1e-5)
    assert distance(a, b) < 1e-4


def test_groups_schedulers_and_closures(backend):
    a, b = Net(), Net()
    parts = [
        [{"params": [m.conv.weight, m.last.weight], "lr": 3e-3, "weight_decay": 0.0},
         {"params": [m.wide.weight, m.scale, m.last.bias, m.wide.bias, *m.norm.parameters(),
                     m.conv.bias], "betas": (0.8, 0.9)}] for m in (a, b)
    ]  # fmt: skip
    first = torch.optim.AdamW(parts[0], lr=1e-2)
    SpectralRegularizer(a, 0.02, backend=backend).attach(first)
    second = SpectralAdamW(parts[1], lr=1e-2, model=b, strength=0.02, backend=backend)
    for optimizer in (first, second):
        optimizer.add_param_group({"params": [(a if optimizer is first else b).unused]})
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (first, second)]
    for step in range(FEW + 1):
        for model, optimizer, schedule in zip((a, b), (first, second), schedules, strict=True):
            loss = optimizer.step(lambda m=model, s=step: backward(m, s))
            assert torch.isfinite(loss)
            schedule.step()
    assert distance(a, b) < 1e-5


def test_a_parameter_without_a_gradient(backend):
    """A selected one follows its penalty, others stay, and neither breaks the next step."""
    (a, first), (b, second) = pair("adamw", backend)
    for model, optimizer in ((a, first), (b, second)):
        backward(model, 0)
        model.last.weight.grad = model.scale.grad = None
        optimizer.step()
    assert torch.equal(b.unused, torch.ones(5))
    assert torch.equal(b.scale, torch.ones(33))
    assert not torch.equal(b.last.weight, Net().last.weight)
    run(a, first, range(3)), run(b, second, range(3))
    assert distance(a, b) < 1e-5
    assert float(second.state[b.scale]["step"]) == 3
    assert float(second.state[b.last.weight]["step"]) == 4


def test_frozen_parameters_stay(backend):
    model = Net()
    model.wide.requires_grad_(False)
    optimizer = SpectralAdamW(model, backend=backend)
    run(model, optimizer, range(3))
    assert torch.equal(model.wide.weight, Net().wide.weight)
    model.wide.requires_grad_(True)
    run(model, optimizer, range(3))
    assert not torch.equal(model.wide.weight, Net().wide.weight)


def test_several_dtypes(backend):
    a, b = Net(), Net()
    for model in (a, b):
        model.last.double()
        model.forward = lambda x, m=model: m.last(
            (m.wide(m.norm(m.conv(x).flatten(1))) * m.scale).double()
        )
    first = torch.optim.AdamW(a.parameters(), lr=1e-2)
    SpectralRegularizer(a, 0.02, backend=backend).attach(first)
    second = SpectralAdamW(b, lr=1e-2, strength=0.02, backend=backend)
    run(a, first, range(10)), run(b, second, range(10))
    assert distance(a, b) < 1e-5


def test_same_bits_at_any_number_of_threads(threads):
    if (reason := choice.unavailable("cpu")) is not None:
        pytest.skip(reason)
    results = []
    for n in (1, 2, 3):
        threads(n)
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(s)) for s in ((300, 700), (64, 4000), (9, 5))]
        optimizer = SpectralAdamW([(f"{i}.weight", w) for i, w in enumerate(weights)], 1e-2)
        for _ in range(4):
            for w in weights:
                w.grad = w.detach().sin()
            optimizer.step()
        results.append([*(w.detach() for w in weights), optimizer.sigma])
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


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
    said = pytest.warns(UserWarning, match="no vectors of the spectral penalty; they are warmed up")
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
        (torch.optim.AdamW(model.parameters(), amsgrad=True), "amsgrad: got True"),
        (torch.optim.Adam(model.parameters()), "decoupled_weight_decay: got False"),
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


# ------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr: got -1.0"),
        ({"lr": "x"}, TypeError, "lr: got 'x'"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas: got \(0.9, 1.0\)"),
        ({"eps": float("nan")}, ValueError, "eps: got nan"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay: got -0.1"),
        ({"state_dtype": torch.float16}, ValueError, "state_dtype: got torch.float16"),
        ({"strength": -1.0}, ValueError, "strength: got -1.0"),
        ({"exclude": ["*"]}, ValueError, "nothing to regularize"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        SpectralAdamW(Net(), **arguments)


def test_bad_parameters_are_named():
    model = Net()
    with pytest.raises(TypeError, match="params: got parameters without names"):
        SpectralAdamW(model.parameters())
    with pytest.raises(ValueError, match="params: got"):
        SpectralAdamW([])
    with pytest.raises(ValueError, match="nesterov: got True"):
        SpectralSGD(model, nesterov=True)
    with pytest.raises(ValueError, match="amsgrad: got True"):
        SpectralAdamW([{"params": list(model.parameters()), "amsgrad": True}], model=model)


def test_bad_gradients_change_nothing(backend):
    model = Net()
    optimizer = SpectralAdamW(model, backend=backend)
    run(model, optimizer, range(2))
    for p, bad, message in (
        (model.scale, torch.ones(33).to_sparse(), "scale"),
        (model.scale, torch.ones(66)[::2], r"the gradient of parameter 'scale' has strides \(2,\)"),
        (model.wide.weight, torch.ones(96, 33).t(), r"wide\.weight"),
    ):
        backward(model, 2)
        before = copy.deepcopy(model.state_dict())
        p.grad = bad
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    backward(model, 2)
    optimizer.step()


def test_a_parameter_replaced_in_its_module_is_an_error(backend):
    model = Net()
    optimizer = SpectralAdamW(model, backend=backend)
    run(model, optimizer, range(1))
    model.wide.weight = nn.Parameter(torch.randn(33, 96))
    backward(model, 1)
    with pytest.raises(RuntimeError, match=r"'wide\.weight' was replaced"):
        optimizer.step()

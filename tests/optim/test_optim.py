"""Optimizers with the penalty in their pass, against the regularizer attached to torch's own."""

import copy
import dataclasses
import re

import pytest
import torch
from torch import nn

from spectral_kernels import SpectralAdamW, SpectralRegularizer, SpectralSGD
from spectral_kernels.backends import choice

from ..conftest import at_level
from ..support.optimizer_pairs import (
    FEW,
    KINDS,
    MANY,
    SOME,
    Net,
    backward,
    distance,
    every_kind,
    pair,
    run,
)


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


@pytest.mark.parametrize("level", ["baseline", "v3", "v4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [SpectralAdamW, SpectralSGD])
def test_products_in_a_step_have_the_bits_of_an_iteration(kind, dtype, level):
    """Whatever the compiler makes of two ways to the same sums."""
    if (reason := choice.unavailable("cpu")) is not None:
        pytest.skip(reason)
    for _ in at_level(level, "cpu"):
        torch.manual_seed(0)
        shapes = [(40, n) for n in (1, 3, 7, 8, 9, 15, 16, 17, 24, 31, 33, 36, 47, 64, 520)]
        named = [(f"{i}.weight", nn.Parameter(torch.randn(shape).to(dtype)))
                 for i, shape in enumerate(shapes)]  # fmt: skip
        optimizer = kind(named, 0.01, backend="cpu")
        for _, p in named:
            p.grad = torch.randn_like(p)
        optimizer.step()
        (bucket,) = optimizer._buckets.bound()
        state = bucket.state
        found = [x.clone() for x in (state.s, state.v_next, state.sigma, state.residual)]
        bucket.backend.gram_matvec(bucket.plan, state)
        bucket.backend.normalize(bucket.plan, state)
        for x, y in zip(found, (state.s, state.v_next, state.sigma, state.residual), strict=True):
            assert torch.equal(x, y)


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


# ------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr: expected .*, got -1.0"),
        ({"lr": "x"}, TypeError, "lr: expected .*, got 'x'"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas: expected .*, got \(0.9, 1.0\)"),
        ({"eps": float("nan")}, ValueError, "eps: expected .*, got nan"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay: expected .*, got -0.1"),
        ({"state_dtype": torch.float16}, ValueError, "state_dtype: expected .*, got torch.float16"),
        ({"strength": -1.0}, ValueError, "strength: expected .*, got -1.0"),
        ({"exclude": ["*"]}, ValueError, "nothing to regularize"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        SpectralAdamW(Net(), **arguments)


def test_bad_parameters_are_named():
    model = Net()
    where = "functools.partial(SpectralSGD, model=module) as its class)"
    with pytest.raises(TypeError, match=f"^params: expected .*without names.*{re.escape(where)}$"):
        SpectralSGD(list(model.parameters()))
    with pytest.raises(ValueError, match=r"params: expected .*, got"):
        SpectralAdamW([])
    with pytest.raises(ValueError, match=r"nesterov: expected .*, got True"):
        SpectralSGD(model, nesterov=True)
    with pytest.raises(ValueError, match=r"amsgrad: expected .*, got True"):
        SpectralAdamW([{"params": list(model.parameters()), "amsgrad": True}], model=model)


@pytest.mark.parametrize("kind", [SpectralAdamW, SpectralSGD])
def test_parameters_of_a_module_tell_the_module(kind):
    """As a library passes them to a class; a part that was taken out before is left out."""
    model = Net()
    optimizer = kind(model.parameters(), lr=0.1)
    assert optimizer.names == kind(model, lr=0.1).names
    assert optimizer.regularizer._selection.root is model
    assert "param_names" not in optimizer.param_groups[0]
    used = model.parameters()
    while next(used) is not model.conv.weight:
        pass
    assert kind(used, lr=0.1).names == [n for n in optimizer.names if n != "conv.weight"]
    list(used)
    with pytest.raises(ValueError, match=r"params: expected .*, got no parameters"):
        kind(used)
    with pytest.raises(TypeError, match="without names"):
        kind(p for p in model.parameters())
    model.parameters = lambda: (p for p in model.wide.parameters())
    with pytest.raises(TypeError, match="without names"):
        kind(model.parameters())


def test_bad_gradients_change_nothing(backend):
    model = Net()
    optimizer = SpectralAdamW(model, backend=backend)
    run(model, optimizer, range(2))
    for p, bad, message in (
        (model.scale, torch.ones(33).to_sparse(), "scale"),
        (
            model.scale,
            torch.ones(66)[::2],
            r"gradient of parameter 'scale': expected .*, got \(2,\)",
        ),
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

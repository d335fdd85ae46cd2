"""A compiled ``penalty()`` of small matrices, traced as plain PyTorch; and what is not."""

import copy
import math
import shutil

import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.utils import counters

from spectral_kernels import SpectralRegularizer
from spectral_kernels.engine import traceable, traced
from spectral_kernels.engine.attach import once

pytestmark = [
    pytest.mark.usefixtures("seeded", "compiled_once"),
    pytest.mark.takes_seconds,
]

INDUCTOR = pytest.param("inductor", marks=[
    pytest.mark.slow,
    pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))),
                       reason="inductor needs a C++ compiler"),
])  # fmt: skip
COMPILERS = pytest.mark.parametrize("compiler", ["aot_eager", INDUCTOR])


def net():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 3))


def is_plain(reg):
    """Whether graphs hold the penalty of every bucket as plain PyTorch."""
    return all(bucket.traceable is not None for bucket in reg._buckets.buckets)


def compiled(reg, compiler="aot_eager", **options):
    """Return a compiled function of the penalty alone, with a code object of its own."""

    def run():
        return reg.penalty()

    return torch.compile(run, fullgraph=True, backend=compiler, **options)


def pair(make, compiler="aot_eager", **options):
    """Return two equal models with regularizers, and their penalties: eager and compiled."""
    models = [make()]
    models.append(copy.deepcopy(models[0]))
    regs = [SpectralRegularizer(model, 0.1, **options) for model in models]
    return models, regs, [regs[0].penalty, compiled(regs[1], compiler)]


def check(models, regs, penalties, steps=3, **tolerances):
    """Steps of both give the same penalty, gradients, readings and vectors."""
    for _ in range(steps):
        found = []
        for model, reg, penalty in zip(models, regs, penalties, strict=True):
            model.zero_grad()
            value = penalty()
            value.backward()
            # Near convergence a residual is the square root of rounding errors of sigma.
            ratios = torch.where(reg.sigma == 0, 0.0, reg.residuals[:, 0] / reg.sigma)
            found.append([value.detach(), *(p.grad for p in model.parameters()),
                          reg.sigma, ratios.square(),
                          *reg.state_dict()["vectors"].values()])  # fmt: skip
        for eager, own in zip(*found, strict=True):
            torch.testing.assert_close(own, eager, equal_nan=True, **tolerances)
    assert is_plain(regs[1])


# -------------------------------------------------------------------------------- the same numbers


def shapes(*sizes):
    return lambda: nn.ParameterDict({
        f"w{i}": nn.Parameter(torch.randn(size)) for i, size in enumerate(sizes)
    })  # fmt: skip


@COMPILERS
def test_ragged_shapes(compiler):
    check(*pair(shapes((1, 7), (9, 1), (1, 1), (33, 5), (3, 65), (17, 17)), compiler))


@COMPILERS
@pytest.mark.parametrize("exponent", [1, 1.5, 2])
def test_zeros_have_gradient_zero(compiler, exponent):
    def make():
        model = net()
        for p in (model[0].weight, model[0].bias, model[2].bias):
            nn.init.zeros_(p)
        model[2].weight.data[0] = 0
        return model

    models, regs, penalties = pair(make, compiler, exponent=exponent)
    check(models, regs, penalties)
    assert not models[1][0].weight.grad.any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_vectors_stay_those_before_a_weight_that_is_not_finite(value):
    models, regs, penalties = pair(net)
    check(models, regs, penalties)
    held = regs[1].state_dict()["vectors"]["0.weight"]
    for model in models:
        model[0].weight.data[1, 2] = value
    check(models, regs, penalties)
    now = regs[1].state_dict()["vectors"]["0.weight"]
    assert not regs[1].sigma[0].isfinite()
    assert now.isfinite().all()
    torch.testing.assert_close(now, held, rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1e-18, 1e-12, 1e12, 1e18])
def test_very_large_and_small_weights(scale):
    def make():
        model = net()
        model[0].weight.data.mul_(scale)
        return model

    check(*pair(make, exponent=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    check(*pair(lambda: net().to(dtype)))


def test_parts_stacks_groups_and_channels_last():
    def make():
        model = nn.ModuleDict({
            "attention": nn.MultiheadAttention(8, 2),
            "groups": nn.Conv2d(4, 8, 3, groups=2), "depthwise": nn.Conv2d(4, 4, 3, groups=4),
            "last": nn.Conv2d(3, 4, 3), "transposed": nn.ConvTranspose2d(4, 6, 3),
        })  # fmt: skip
        return model.to(memory_format=torch.channels_last)

    check(*pair(make))


# ------------------------------------------------------------------- what depends on earlier steps


@COMPILERS
def test_a_first_step_is_warmed_up(compiler):
    models, regs, penalties = pair(net, compiler, warmup=20)
    check(models, regs, penalties, steps=1)
    assert all(bucket.warm for bucket in regs[1]._buckets.buckets)


@COMPILERS
def test_matrices_that_are_initialized_again_are_warmed_up_again(compiler):
    def make():
        return nn.Sequential(nn.Linear(60, 20), nn.Linear(20, 4))

    models, regs, penalties = pair(make, compiler)
    check(models, regs, penalties, steps=10)
    again = torch.randn(20, 60)
    for model in models:
        model[0].weight.data.copy_(again)
    model, reg, penalty = models[1], regs[1], penalties[1]
    penalty()
    sigma = torch.linalg.matrix_norm(model[0].weight, 2)
    assert reg.sigma[0] > 0.9 * sigma
    regs[0].penalty()
    check(models, regs, penalties, rtol=1e-4, atol=1e-4)


def test_eager_and_compiled_steps_share_their_state():
    models, regs, penalties = pair(net)
    check(models, regs, penalties)
    check(models, regs, [regs[0].penalty, regs[1].penalty])
    check(models, regs, penalties)


@COMPILERS
def test_a_backward_pass_uses_the_strength_and_vectors_of_its_own_forward_pass(compiler):
    """The next forward pass overwrites the state that this one has read."""
    grads = []
    for model, reg, penalty in zip(*pair(net, compiler), strict=True):
        first = penalty()
        reg.strength, reg.exponent, reg.target = 7.0, 3, 0.5
        penalty()
        model[0].weight.grad = None
        first.backward()
        grads.append([p.grad for p in model.parameters()])
    for eager, own in zip(*grads, strict=True):
        torch.testing.assert_close(own, eager)


def test_second_derivatives_where_no_compiler_traces_the_backward_pass():
    """As the eager penalty has them; compilers refuse them."""
    found = []
    models, regs, penalties = pair(net, "eager")
    for model, penalty in zip(models, penalties, strict=True):
        weights = list(model.parameters())
        grads = torch.autograd.grad(penalty(), weights, create_graph=True)
        total = sum(grad.square().sum() for grad in grads)
        found.append(torch.autograd.grad(total, weights))
    assert is_plain(regs[1])
    for eager, own in zip(*found, strict=True):
        torch.testing.assert_close(own, eager, rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()
    loss = compiled(regs[1])()
    weight = models[1][0].weight
    grad = torch.autograd.grad(loss, weight, create_graph=True)[0]
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.square().sum(), weight)


def test_an_optimizer_that_is_attached_later_sees_the_gradient(monkeypatch):
    monkeypatch.setattr(once, "adds_in_steps", False)
    model = net()
    reg = SpectralRegularizer(model)
    penalty = compiled(reg)
    penalty().backward()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.zero_grad()
    reg.attach(optimizer)
    with torch._dynamo.config.patch(error_on_recompile=False):
        penalty().backward()
    assert is_plain(reg)
    with pytest.raises(RuntimeError, match="adds it again"):
        optimizer.step()


# --------------------------------------------------------------------------- one graph, every mode


@COMPILERS
@pytest.mark.parametrize("options", [{}, {"dynamic": True}, {"mode": "reduce-overhead"}], ids=str)
@pytest.mark.parametrize("n_vectors", [1, 2])
def test_fifty_steps_of_changing_strength_are_one_graph(compiler, options, n_vectors):
    """The whole training step, with the step of the optimizer compiled too."""
    if compiler == "aot_eager" and "mode" in options:
        pytest.skip("a mode of inductor")
    results = []
    for is_compiled in (False, True):
        torch.manual_seed(1)
        model = net()
        reg = SpectralRegularizer(model, 0.1, n_vectors=n_vectors)
        optimizer = torch.optim.AdamW(model.parameters(), torch.tensor(1e-2))

        def loss_of(x, model=model, reg=reg):
            return model(x).square().mean() + reg.penalty()

        step = optimizer.step
        if is_compiled:
            loss_of = torch.compile(loss_of, backend=compiler, fullgraph=True, **options)
            step = torch.compile(step, backend=compiler)
        losses = []
        for i in range(50):
            reg.strength = 0.1 + 0.01 * i
            optimizer.zero_grad()
            loss = loss_of(torch.randn(5, 6))
            loss.backward()
            with torch._dynamo.config.patch(error_on_recompile=i > 1):  # its state is new at first
                step()
            losses.append(loss.detach())
            if i == 1:
                counters.clear()
        results.append([torch.stack(losses), reg.sigma, *(p.detach() for p in model.parameters())])
    assert not counters["stats"]["unique_graphs"]
    assert is_plain(reg) == (n_vectors == 1)
    for eager, own in zip(*results, strict=True):
        torch.testing.assert_close(own, eager, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------- what keeps the operators


@pytest.mark.parametrize("options", [
    {"n_vectors": 2}, {"backend": "reference"}, {"n_power_iterations": "auto"},
], ids=str)  # fmt: skip
def test_operators_remain_for(options, monkeypatch):
    def fail(*args):
        raise AssertionError("traced as plain PyTorch")

    monkeypatch.setattr(traced, "_iterations", fail)
    compiled(SpectralRegularizer(net(), **options))()
    torch._dynamo.reset()
    with pytest.raises(Exception, match="traced as plain PyTorch"):
        compiled(SpectralRegularizer(net()))()


@pytest.mark.parametrize("name", ["MOST_ELEMENTS", "MOST_ENTRIES"])
def test_operators_remain_for_what_is_larger(name, monkeypatch):
    found = {"MOST_ELEMENTS": 6 * 8 + 8 * 3, "MOST_ENTRIES": 2 + 4}[name]
    monkeypatch.setattr(traceable, name, found - 1)
    reg = SpectralRegularizer(net())
    compiled(reg)()
    assert not is_plain(reg)
    monkeypatch.setattr(traceable, name, found)
    torch._dynamo.reset()
    reg = SpectralRegularizer(net())
    compiled(reg)()
    assert is_plain(reg)

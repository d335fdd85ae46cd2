"""Optimizers' steps for rows, shifts and gains with targets, against torch's and the gradient."""

import copy

import pytest
import torch

from spectral_kernels import SpectralRegularizer, regularizer

from ..support.elementwise import Mixed, MixedSelection
from ..support.optimizer_pairs import KINDS, every_kind

pytestmark = pytest.mark.usefixtures("seeded")
# Strength 0 leaves the matrix out: what is looked at is elementwise.
STEPS = 3


@pytest.fixture(autouse=True)
def _rows_are_selected(monkeypatch):
    monkeypatch.setattr(regularizer, "select", MixedSelection(regularizer.select))


def vectors_of(model, target):
    """Each elementwise parameter as vectors [n, length], and the target of each of them [n]."""
    views = {
        "linear.bias": (model.linear.bias.detach()[None], 0.0),
        "norm.weight": (model.norm.weight.detach()[:, None], 1.0),
        "norm.bias": (model.norm.bias.detach()[None], 0.0),
        "kernel": (model.kernel.detach().flatten(1), target),
        "biases": (model.biases.detach(), 0.0),
    }
    return {
        name: (x, x.norm(dim=1) if target == "initial" else torch.full_like(x[:, 0], number))
        for name, (x, number) in views.items()
    }


def task_gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    p = next(model.parameters())
    x = torch.randn(8, 5, generator=generator, device="cpu").to(p)
    model.zero_grad()
    model(x).square().mean().backward()


def explicit_step(model, optimizer, targets, strength, k, decoupled):
    """A step of torch's optimizer with the penalty in the gradients, or beside the step."""
    lr, present = optimizer.param_groups[0]["lr"], vectors_of(model, 0.0)
    parameters, changes = dict(model.named_parameters()), {}
    for name, (x, _) in present.items():
        norm, target = x.norm(dim=1), targets[name][1]
        slope = strength * 2 * k * (norm**k - target**k) * norm ** (k - 1)
        unit = x / torch.where(norm == 0, 1.0, norm)[:, None]
        if decoupled:
            most = (norm - target).abs()
            slope = torch.minimum(torch.maximum(lr * slope, -most), most)
        changes[name] = (slope[:, None] * unit).view_as(parameters[name])
        if not decoupled:
            parameters[name].grad += changes[name]
    optimizer.step()
    with torch.no_grad():
        for name, change in changes.items() if decoupled else ():
            parameters[name] -= change


@pytest.mark.parametrize("kind", ["adamw", "momentum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("target", [0.8, "initial"])
@pytest.mark.parametrize(("decoupled", "k", "strength"), [
    (False, 2, 0.3), (False, 2.5, 0.3), (True, 1, 0.3), (True, 2.5, 0.3), (True, 2, 300.0),
])  # fmt: skip
def test_steps(backend, kind, dtype, target, decoupled, k, strength):
    theirs, ours, options = KINDS[kind]
    eps = {"eps": 1e-3} if kind == "adamw" else {}
    model = Mixed(dtype).to(torch.get_default_device())
    other = copy.deepcopy(model).double()
    for one in (model, other):  # both begin with the same numbers
        with torch.no_grad():
            one.kernel[2] = 0
    strengths = {"linear.weight": 0.0, "*": strength}
    mine = ours(model, **options, **eps, strength=strengths, target=target, exponent=k,
                decoupled=decoupled, backend=backend)  # fmt: skip
    yours = theirs(other.parameters(), **options, **eps)
    targets = vectors_of(other, target)
    for step in range(STEPS):
        for one in (model, other):
            task_gradients(one, step)
        mine.step()
        explicit_step(other, yours, targets, strength, k, decoupled)
    limit = 1e-9 if dtype == torch.float64 else 2e-4
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=limit, atol=limit, msg=name)
    own = [x.norm(dim=1).max() for x, _ in vectors_of(other, 0.0).values()]
    (bucket,) = mine._buckets.buckets
    torch.testing.assert_close(
        bucket.state.norm[[0, 3, 4]].double(), torch.stack(own)[[0, 3, 4]], rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("exponent", [1, 2, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("target", [0.7, "initial"])
def test_the_decoupled_attachment_makes_the_steps_of_the_optimizer(
    backend, dtype, exponent, target
):
    _, ours, _ = KINDS["sgd"]
    model = Mixed(dtype)
    other = copy.deepcopy(model)
    options = {"strength": 20.0, "target": target, "exponent": exponent, "backend": backend}
    mine = ours(model, lr=0.01, decoupled=True, **options)
    reg = SpectralRegularizer(other, **options)
    yours = torch.optim.SGD(other.parameters(), lr=0.01)
    handle = reg.attach(yours, decoupled=True)
    for step in range(STEPS):
        for one, optimizer in ((model, mine), (other, yours)):
            task_gradients(one, step)
            optimizer.step()
    limit = 1e-9 if dtype == torch.float64 else 1e-4
    for (name, p), q in zip(model.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(p, q[1], rtol=limit, atol=limit, msg=name)
    handle.remove()


@every_kind
def test_no_step_carries_a_norm_past_its_target(backend, kind):
    _, ours, options = KINDS[kind]
    options = {**options, "weight_decay": 0.0}
    model = Mixed()
    optimizer = ours(model, **options, strength=1e5, target="initial", decoupled=True,
                     backend=backend)  # fmt: skip
    wanted = vectors_of(model, "initial")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.7)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, (x, _) in vectors_of(model, 0.0).items():
        torch.testing.assert_close(x.norm(dim=1), wanted[name][1], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state_dtype", [None, torch.float32])
def test_16_bit_parameters(backend, dtype, state_dtype):
    """Elements lie in split order in some kernels: targets must go with theirs."""
    _, ours, _ = KINDS["adamw"]
    found = []
    for name, own in ((backend, dtype), ("reference", torch.float64)):
        torch.manual_seed(0)
        model = Mixed()
        model.norm = torch.nn.LayerNorm(300)
        with torch.no_grad():
            model.norm.weight.copy_(torch.randn(300))
        model.to(dtype).to(own)
        wide = {"state_dtype": state_dtype} if own == dtype else {}
        optimizer = ours(model, lr=0.05, eps=0.1, strength=1.0, target="initial", backend=name,
                         **wide)  # fmt: skip
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.5)
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.125)
        optimizer.step()
        found.append(model)
    for (name, p), q in zip(found[0].named_parameters(), found[1].parameters(), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=0.02, atol=0.01, msg=name)

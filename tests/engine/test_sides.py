"""side="above": what is at or below its target has neither penalty nor gradient."""

import copy

import pytest
import torch
import torch._dynamo

from spectral_kernels import SpectralAdamW, SpectralRegularizer, SpectralSGD, regularizer
from spectral_kernels.engine import traceable

from ..support.elementwise import Mixed, MixedSelection

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture(autouse=True)
def _rows_are_selected(monkeypatch):
    monkeypatch.setattr(regularizer, "select", MixedSelection(regularizer.select))


def model_of(dtype=torch.float32, matrix=1.0):
    """Gains and rows on both sides of 1 and 0.8; a matrix, times a number; a bias above its 0."""
    model = Mixed(dtype)
    with torch.no_grad():
        for i in range(6):
            model.kernel[i] *= (0.3 + 0.2 * i) / model.kernel[i].norm()
        model.norm.weight.copy_(torch.tensor([2.0, -1.5, 0.5, -0.2, 1.0, -1.0, 0.0]))
        u, s, v = torch.linalg.svd(model.linear.weight.double(), full_matrices=False)
        s = matrix * torch.tensor([1, 0.1, 0.05, 0.02, 0.01], dtype=torch.float64)
        model.linear.weight.copy_((u * s) @ v)
    return model.to(torch.get_default_device())


def truth(model, k, side, strength=0.3, target=0.8):
    """The penalty by the SVD in float64, and its gradients by autograd."""
    p = {n: x.detach().double().requires_grad_() for n, x in model.named_parameters()}
    values = {
        "linear.weight": (torch.linalg.svdvals(p["linear.weight"])[:1], target),
        "norm.weight": (p["norm.weight"].abs(), 1.0),
        "kernel": (p["kernel"].flatten(1).norm(dim=1), target),
    }
    total = sum((p[n].square().sum() ** k) for n in ("linear.bias", "norm.bias"))
    total = total + (p["biases"].norm(dim=1) ** (2 * k)).sum()
    for x, tau in values.values():
        excess = x**k - tau**k
        total = total + (excess.clamp(min=0) if side == "above" else excess).square().sum()
    (strength * total).backward()
    return strength * total.detach(), {n: x.grad for n, x in p.items()}


def is_close(model, expected, dtype, factor=1.0):
    limit = 1e-9 if dtype == torch.float64 else 2e-5
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            p.grad.double(), factor * expected[name], rtol=limit, atol=limit, msg=name
        )


@pytest.mark.parametrize("way", ["penalty", "accumulate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 2, 2.5])
@pytest.mark.parametrize("matrix", [0.5, 2.0])
def test_value_and_gradient(backend, way, dtype, k, matrix):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("float64 goes to the reference")
    model = model_of(dtype, matrix)
    for side in ("both", "above"):
        value, expected = truth(model, k, side)
        reg = SpectralRegularizer(model, 0.3, k, 0.8, side=side, warmup=20, backend=backend)
        model.zero_grad()
        if way == "penalty":
            loss = reg.penalty()
            assert float(loss.detach()) == pytest.approx(float(value), rel=2e-5)
            loss.backward()
        else:
            reg.accumulate_grad_()
        is_close(model, expected, dtype)
    assert (float(expected["linear.weight"].abs().max()) == 0) == (matrix < 0.8)
    assert float(model.kernel.grad[0].abs().max()) == 0  # a row below its target
    assert float(model.norm.weight.grad[2].abs()) == 0


def test_several_vectors(backend):
    model = model_of(matrix=0.5)
    reg = SpectralRegularizer(model, 0.3, 2, 0.8, side="above", n_vectors=4, backend=backend)
    reg.accumulate_grad_()
    assert float(model.linear.weight.grad.abs().max()) == 0
    assert float(reg._buckets.buckets[0].state.raw_penalty[0]) == 0


@pytest.mark.parametrize("n_vectors", [1, 2])
def test_a_sigma_that_is_not_finite_shows(backend, n_vectors):
    model = model_of()
    with torch.no_grad():
        model.linear.weight[1, 2] = torch.nan
    reg = SpectralRegularizer(model, side="above", n_vectors=n_vectors, backend=backend)
    with torch.no_grad():
        assert not torch.isfinite(reg.penalty())


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("strength", [0.3, 1e3])
def test_steps_of_optimizers_and_attachments(backend, decoupled, strength):
    if strength > 1 and not decoupled:
        pytest.skip("such a step is unstable")
    model = model_of(matrix=0.5)
    before = copy.deepcopy(model)
    options = {"strength": strength, "target": 0.8, "side": "above", "backend": backend}
    mine = SpectralSGD(model, 0.01, decoupled=decoupled, **options)
    reg = SpectralRegularizer(other := copy.deepcopy(model), **options)
    yours = torch.optim.SGD(other.parameters(), 0.01)
    reg.attach(yours, decoupled=decoupled)
    for one, optimizer in ((model, mine), (other, yours)):
        for p in one.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)
    assert torch.equal(model.linear.weight, before.linear.weight)
    assert torch.equal(model.kernel[:2], before.kernel[:2])
    assert torch.equal(model.norm.weight[2:], before.norm.weight[2:])
    norms = model.kernel.flatten(1).norm(dim=1), before.kernel.flatten(1).norm(dim=1)
    assert bool((norms[0] < norms[1])[3:].all())
    if strength > 1:
        assert float(norms[0].detach().max()) == pytest.approx(0.8, rel=1e-5)


def test_it_can_be_assigned_and_a_backward_pass_uses_its_own(backend):
    model = model_of(matrix=0.5)
    reg = SpectralRegularizer(model, 0.3, 2, 0.8, warmup=20, backend=backend)
    loss = reg.penalty()
    reg.side = "above"
    _, both = truth(model, 2, "both")
    loss.backward()
    is_close(model, both, torch.float32)
    model.zero_grad()
    reg.accumulate_grad_()
    is_close(model, truth(model, 2, "above")[1], torch.float32)
    assert "side=above" in repr(reg)
    reg.side = "both"
    model.zero_grad()
    reg.accumulate_grad_()
    is_close(model, both, torch.float32)
    with pytest.raises(ValueError, match=r"^side: expected 'both' or 'above', got 'left'"):
        reg.side = "left"
    assert reg.side == "both"


def test_prepared_steps_take_it_over():
    model = model_of(matrix=0.5)
    optimizer = SpectralSGD(model, 0.0, strength=0.3, target=0.8)
    for _ in range(4):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    optimizer.side = "above"
    optimizer.step()
    assert float(optimizer._buckets.buckets[0].state.raw_penalty[0]) == 0
    assert "side: above" in repr(optimizer)


def test_copies_have_it():
    model = model_of(matrix=0.5)
    _, reg = copy.deepcopy((model, SpectralRegularizer(model, side="above")))
    assert reg.side == "above"
    optimizer = SpectralAdamW(model, side="above")
    assert copy.deepcopy((model, optimizer))[1].side == "above"


def test_derivatives_of_the_gradient():
    """Double backward and torch.func go by operations of PyTorch."""
    model = model_of(torch.float64, matrix=0.5)
    for side in ("both", "above"):
        reg = SpectralRegularizer(model, 0.3, 2, 0.8, side=side, warmup=30)
        weights = list(model.parameters())
        grads = torch.autograd.grad(reg.penalty(), weights, create_graph=True)
        expected = truth(model, 2, side)[1]
        for (name, _), grad in zip(model.named_parameters(), grads, strict=True):
            torch.testing.assert_close(grad.detach(), expected[name], rtol=1e-6, atol=1e-8)
        own = grads[[*expected].index("linear.weight")]
        (found,) = torch.autograd.grad(own.square().sum(), model.linear.weight)
        assert bool(torch.isfinite(found).all())
        assert (float(found.abs().max()) == 0) == (side == "above")


@pytest.mark.takes_seconds
@pytest.mark.usefixtures("compiled_once")
@pytest.mark.parametrize("small", [True, False])
def test_compiled_steps(small, monkeypatch):
    """By plain operations of PyTorch for small matrices, and by operators."""
    if not small:
        monkeypatch.setattr(traceable, "MOST_ELEMENTS", 0)
    model = model_of(matrix=0.5)
    reg = SpectralRegularizer(model, 0.3, 2, 0.8, side="above", warmup=20)
    penalty = torch.compile(lambda: reg.penalty(), fullgraph=True, backend="aot_eager")
    for side in ("above", "both", "above"):
        reg.side = side
        value, expected = truth(model, 2, side)
        for _ in range(2):
            model.zero_grad()
            loss = penalty()
            assert float(loss.detach()) == pytest.approx(float(value), rel=2e-5)
            loss.backward()
            is_close(model, expected, torch.float32)
    assert (reg._buckets.buckets[0].traceable is not None) == small

"""Weights that are held at a bound: constraint="cap" and constraint="sphere"."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from spectral_kernels import SpectralAdamW, SpectralRegularizer, SpectralSGD, regularizer
from spectral_kernels.engine.prepared import Preparation

from ..support.constrained import (
    TARGET,
    Layers,
    assert_step_takes,
    converged,
    dominated,
    flat,
    put_gradients,
)
from ..support.elementwise import Mixed, MixedSelection
from ..support.optimizer_pairs import KINDS, every_kind

pytestmark = pytest.mark.usefixtures("seeded")
every_constraint = pytest.mark.parametrize("constraint", ["cap", "sphere"])
NAN = float("nan")


def held(before, constraint, target=TARGET, above=False):
    """What the constraint takes from a weight, by the SVD."""
    x = flat(before)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    if constraint == "cap":
        return (max(float(s[0]) - target, 0.0) * torch.outer(u[:, 0], vh[0])).view(before.shape)
    excess = float(s[0]) - target
    return (0 if above and excess < 0 else (excess / float(s[0])) * x).view(before.shape)


@every_kind
@every_constraint
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_step_is_the_optimizers_and_the_bound_by_the_svd(backend, kind, constraint, dtype):
    model = Layers(dtype=dtype)
    limit = {torch.float32: 2e-6, torch.float64: 1e-9, torch.bfloat16: 0.01}[dtype]
    assert_step_takes(
        kind, model, {"constraint": constraint, "backend": backend},
        converged(model, warmup=6), lambda weight: held(weight, constraint), limit,
    )  # fmt: skip


@every_constraint
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sigma_goes_to_the_target_and_stays(backend, constraint, dtype):
    model = Layers((30.0, 1.7), dtype)
    names = {f"layers.{i}.weight" for i in range(12)}
    optimizer = SpectralSGD(model, 0.0, target=TARGET, decoupled=True, constraint=constraint,
                            backend=backend, exclude="free")  # fmt: skip
    for _ in range(3 if backend == "triton" else 50):
        put_gradients(model)
        optimizer.step()
    for name, sigma, residual in zip(
        optimizer.names, optimizer.sigma.tolist(), optimizer.residual.tolist(), strict=True
    ):
        assert abs(sigma - TARGET) <= residual + 1e-5, name
        p = dict(model.named_parameters())[name]
        assert float(torch.linalg.svdvals(flat(p))[0]) == pytest.approx(TARGET, rel=1e-5), name
    assert names < set(optimizer.names)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_what_is_below_its_cap_keeps_its_bits(backend, kind, dtype):
    _, ours, options = KINDS[kind]
    model = Layers((0.4, 1.4), dtype)
    before = copy.deepcopy(model)
    optimizer = ours(model, **{**options, "lr": 0.0}, target=TARGET, decoupled=True,
                     constraint="cap", backend=backend)  # fmt: skip
    for _ in range(2):
        put_gradients(model)
        optimizer.step()
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(("side", "expected"), [("both", TARGET), ("above", 0.4)])
def test_a_sphere_of_one_side_scales_nothing_up(backend, side, expected):
    w = nn.Parameter(dominated(20, 12, 0.4).float().to(torch.get_default_device()))
    optimizer = SpectralSGD([("w", w)], 0.0, target=TARGET, decoupled=True, side=side,
                            constraint="sphere", backend=backend)  # fmt: skip
    w.grad = torch.zeros_like(w)
    optimizer.step()
    assert float(torch.linalg.svdvals(flat(w))[0]) == pytest.approx(expected, rel=1e-5)


@every_constraint
@pytest.mark.parametrize(("kind", "value"), [
    ("adamw", 0.0), ("adamw", NAN), ("adamw", math.inf), ("momentum", 0.0), ("momentum", NAN),
])  # fmt: skip
def test_zero_and_not_finite_matrices_stay(backend, kind, constraint, value):
    _, ours, options = KINDS[kind]
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(6, 5, bias=False))
    model.append(nn.Conv2d(4, 4, 3, groups=4, bias=False))
    model.append(nn.LayerNorm(4, bias=False)).to(torch.get_default_device())
    with torch.no_grad():
        for p in (model[0].weight, model[2].weight[1], model[3].weight):
            p.fill_(0.25)
            p.view(-1)[:: 1 if value == 0 else 3].fill_(value)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = ours(model, **{**options, "weight_decay": 0.0}, target=3.0, decoupled=True,
                     constraint=constraint, backend=backend)  # fmt: skip
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), before[0], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(
        model[2].weight[1].detach(), before[2][1], rtol=0, atol=0, equal_nan=True
    )
    odd = ~torch.isfinite(before[3]) | (before[3] == 0)
    torch.testing.assert_close(
        model[3].weight[odd].detach(), before[3][odd], rtol=0, atol=0, equal_nan=True
    )
    if constraint == "sphere":
        found = float(torch.linalg.svdvals(flat(model[1].weight))[0])
        assert found == pytest.approx(3.0, rel=0.05)  # sigma is not exact yet
        norms = model[2].weight.flatten(1).norm(dim=1)[[0, 2, 3]].detach().cpu()
        torch.testing.assert_close(norms, torch.full((3,), 3.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("sigma", [1e-19, 1e19])
@every_constraint
def test_extreme_matrices_come_to_the_target(backend, sigma, constraint):
    w = nn.Parameter(dominated(9, 12, sigma).float().to(torch.get_default_device()))
    optimizer = SpectralSGD([("w", w)], 0.0, decoupled=True, constraint=constraint,
                            backend=backend, warmup=20)  # fmt: skip
    if constraint == "cap" and sigma > 1:  # what rounding leaves has many directions
        w = nn.Parameter(torch.diag(torch.tensor([sigma, 0.5, 0.1])).to(w))
        optimizer = SpectralSGD([("w", w)], 0.0, decoupled=True, constraint=constraint,
                                backend=backend, warmup=20)  # fmt: skip
    for _ in range(8):
        w.grad = torch.zeros_like(w)
        optimizer.step()
    found = float(torch.linalg.svdvals(flat(w))[0])
    if constraint == "cap" and sigma < 1:
        assert found == pytest.approx(sigma, rel=1e-5)
    else:
        assert found == pytest.approx(1.0, rel=1e-3)


# ------------------------------------------------------------------------- what is elementwise


@pytest.fixture
def mixed(monkeypatch):
    monkeypatch.setattr(regularizer, "select", MixedSelection(regularizer.select))


def bounded(x, target, constraint):
    """Vectors [n, length] after a step that adds nothing."""
    norm = x.norm(dim=1, keepdim=True)
    goal = norm.clamp(max=target) if constraint == "cap" else torch.full_like(norm, target)
    return torch.where(norm > 0, x * goal / torch.where(norm > 0, norm, 1.0), x)


@every_kind
@every_constraint
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gains_and_rows_are_held_and_biases_are_not(backend, kind, constraint, dtype, mixed):
    _, ours, options = KINDS[kind]
    model = Mixed(dtype).to(torch.get_default_device())
    with torch.no_grad():
        model.kernel[2] = 0
        model.kernel[3] *= 0.1
        model.norm.weight[1] = 0
    before = copy.deepcopy(model).double()
    optimizer = ours(model, **{**options, "lr": 0.0}, target=0.8, decoupled=True,
                     constraint=constraint, backend=backend)  # fmt: skip
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    rtol = 1e-2 if dtype == torch.bfloat16 else 1e-6
    expected = {
        "norm.weight": bounded(before.norm.weight.detach()[:, None], 1.0, constraint)[:, 0],
        "kernel": bounded(before.kernel.detach().flatten(1), 0.8, constraint).view(6, 1, 3, 3),
    }
    for name, p in model.named_parameters():
        if name == "linear.weight":
            continue
        if name in expected:
            torch.testing.assert_close(
                p.detach().double(), expected[name], rtol=rtol, atol=1e-12, msg=name
            )
        else:
            old = dict(before.named_parameters())[name].detach()
            assert torch.equal(p.detach().double(), old), name
    if constraint == "cap":
        assert float(model.norm.weight.detach().abs().max()) <= 1


@every_constraint
def test_a_bias_with_a_target_is_capped(backend, constraint):
    model = nn.Linear(4, 5).to(torch.get_default_device())
    optimizer = SpectralSGD(model, 0.0, target={"bias": "initial", "*": 1.0}, decoupled=True,
                            constraint=constraint, backend=backend)  # fmt: skip
    norm = float(model.bias.detach().norm())
    for factor, expected in ((3.0, norm), (0.5, 0.5 * norm)):
        with torch.no_grad():
            model.bias.mul_(factor)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        assert float(model.bias.detach().norm()) == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------- with everything else of a step


def steps(optimizer, model, n=6, prepared=True):
    """Take steps; without ``prepared`` none is made ready for the next."""
    for step in range(n):
        put_gradients(model, seed=step)
        if not prepared:
            optimizer._preparation = Preparation()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@every_constraint
@pytest.mark.parametrize("ours", [SpectralAdamW, SpectralSGD])
def test_prepared_steps_have_the_bits_of_others(ours, constraint):
    found = []
    for prepared in (True, False):
        torch.manual_seed(0)
        model = Layers()
        optimizer = ours(model, 0.01, target=TARGET, decoupled=True, constraint=constraint)
        found.append(steps(optimizer, model, prepared=prepared))
        assert (optimizer._preparation.step is not None) or not prepared
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y)


@every_constraint
def test_strength_says_whether_and_not_how_much(constraint):
    found = []
    for strength in (1e-3, 7.0, {"layers.0.weight": 0.0, "*": 2.0}):
        torch.manual_seed(0)
        model = Layers()
        optimizer = SpectralSGD(model, 0.0, strength=strength, target=TARGET, decoupled=True,
                                constraint=constraint)  # fmt: skip
        before = model.layers[0].weight.detach().clone()
        found.append(steps(optimizer, model, 2))
    for x, y in zip(*found[:2], strict=True):
        assert torch.equal(x, y)
    assert torch.equal(model.layers[0].weight, before)
    assert not torch.equal(found[0][1], before)


@every_constraint
def test_a_tensor_of_strength_zero_leaves_all_as_it_is(backend, constraint):
    model = Layers()
    strength = torch.zeros((), device=torch.get_default_device())
    optimizer = SpectralSGD(model, 0.0, strength=strength, target=TARGET, decoupled=True,
                            constraint=constraint, backend=backend)  # fmt: skip
    before = [p.detach().clone() for p in model.parameters()]
    for x, y in zip(before, steps(optimizer, model, 1), strict=True):
        assert torch.equal(x, y)


@every_constraint
@pytest.mark.parametrize("skipped", [False, True])
def test_found_inf_skips_a_step(backend, constraint, skipped):
    model = Layers()
    optimizer = SpectralSGD(model, 0.0, target=TARGET, decoupled=True, constraint=constraint,
                            backend=backend)  # fmt: skip
    optimizer.found_inf = torch.tensor(float(skipped))
    before = [p.detach().clone() for p in model.parameters()]
    after = steps(optimizer, model, 1)
    assert all(map(torch.equal, before, after)) == skipped


@every_constraint
def test_frozen_parameters_stay(constraint):
    model = Layers()
    optimizer = SpectralSGD(model, 0.0, target=TARGET, decoupled=True, constraint=constraint)
    model.layers[0].weight.requires_grad_(False)
    before = model.layers[0].weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    assert torch.equal(model.layers[0].weight, before)
    sigma = float(torch.linalg.svdvals(flat(model.layers[2].weight))[0])
    assert sigma == pytest.approx(TARGET, rel=1e-4)


@every_constraint
@pytest.mark.parametrize("carry", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_and_pickles_go_on_alike(constraint, carry):
    model = Layers()
    optimizer = SpectralAdamW(model, 0.01, target=TARGET, decoupled=True, constraint=constraint)
    steps(optimizer, model, 3)
    other, twin = carry((model, optimizer))
    first = steps(optimizer, model, 3)
    for x, y in zip(first, steps(twin, other, 3), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    assert f"constraint: {constraint}" in repr(twin)


@every_constraint
def test_a_checkpoint_goes_on_alike(constraint):
    options = {"target": TARGET, "decoupled": True, "constraint": constraint}
    model = Layers()
    optimizer = SpectralAdamW(model, 0.01, **options)
    steps(optimizer, model, 3)
    other = copy.deepcopy(model)
    twin = SpectralAdamW(other, 0.5, **options)
    twin.load_state_dict(optimizer.state_dict())
    first = steps(optimizer, model, 3)
    for x, y in zip(first, steps(twin, other, 3), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@every_constraint
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_bounds_do_not_depend_on_lr(backend, constraint, tensor_lr):
    found = []
    for lr in (0.0, 0.5):
        torch.manual_seed(0)
        model = Layers()
        lr = torch.tensor(lr, device=torch.get_default_device()) if tensor_lr else lr
        optimizer = SpectralSGD(model, lr, target=TARGET, decoupled=True, constraint=constraint,
                                backend=backend)  # fmt: skip
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        found.append([p.detach().clone() for p in model.parameters()])
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y)


# -------------------------------------------------------------------------------------- attach


@every_constraint
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side", ["both", "above"])
def test_attach_makes_the_steps_of_the_optimizer(backend, constraint, dtype, side, mixed):
    options = {"target": {"kernel": "initial", "*": 0.8}, "backend": backend, "side": side}
    model = Mixed(dtype).to(torch.get_default_device())
    other = copy.deepcopy(model)
    mine = SpectralSGD(model, 0.01, decoupled=True, constraint=constraint, **options)
    reg = SpectralRegularizer(other, **options)
    yours = torch.optim.SGD(other.parameters(), 0.01)
    handle = reg.attach(yours, decoupled=True, constraint=constraint)
    for seed in range(3):
        for one, optimizer in ((model, mine), (other, yours)):
            with torch.no_grad():
                one.kernel.mul_(1.5)
                one.norm.bias.mul_(1.5)
            put_gradients(one, seed=seed)
            optimizer.step()
    limit = 1e-9 if dtype == torch.float64 else 2e-5
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=limit, atol=limit, msg=name)
    assert handle.constraint == constraint


@every_constraint
def test_attach_serves_every_layout_and_16_bits(constraint):
    model = Layers(dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    reg = SpectralRegularizer(model, target=TARGET)
    reg.attach(optimizer, decoupled=True, constraint=constraint)
    versions = [p._version for p in model.parameters()]
    for _ in range(3):
        put_gradients(model)
        optimizer.step()
    for name, p in model.named_parameters():
        if p.dim() > 1:
            expected = TARGET if "0" in name or constraint == "sphere" else None
            found = float(torch.linalg.svdvals(flat(p))[0])
            assert expected is None or found == pytest.approx(expected, rel=0.02), name
    assert model.conv.weight._version > versions[0]


@every_constraint
def test_an_attached_regularizer_goes_with_its_copies(constraint):
    model = Layers()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    reg = SpectralRegularizer(model, target=TARGET)
    reg.attach(optimizer, decoupled=True, constraint=constraint)
    other, twin, copied = copy.deepcopy((model, optimizer, reg))
    put_gradients(other)
    twin.step()
    assert float(torch.linalg.svdvals(flat(other.layers[0].weight))[0]) == pytest.approx(
        TARGET, rel=1e-3
    )
    copied.n_vectors = 4
    for _ in range(2):
        put_gradients(other)
        twin.step()
    assert float(torch.linalg.svdvals(flat(other.layers[0].weight))[0]) == pytest.approx(
        TARGET, rel=1e-3
    )


# -------------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize("ours", [SpectralAdamW, SpectralSGD])
@pytest.mark.parametrize(("options", "error", "said"), [
    ({"constraint": "cap"}, ValueError, "^constraint: expected None with decoupled=False, "
                                        "got 'cap' .decoupled=True takes it"),
    ({"constraint": "ball", "decoupled": True}, ValueError, "^constraint: expected None, 'cap' "
                                                            "or 'sphere', got 'ball'"),
    ({"constraint": True, "decoupled": True}, TypeError, "^constraint: expected .*, got True"),
    ({"side": "below"}, ValueError, "^side: expected 'both' or 'above', got 'below'"),
    ({"side": None}, TypeError, "^side: expected 'both' or 'above', got None"),
])  # fmt: skip
def test_bad_arguments_are_named(ours, options, error, said):
    with pytest.raises(error, match=said):
        ours(nn.Linear(3, 3), **options)


def test_attach_names_bad_arguments():
    model = nn.Linear(3, 3)
    optimizer, reg = torch.optim.SGD(model.parameters(), 0.1), SpectralRegularizer(model)
    with pytest.raises(
        ValueError, match=r"^constraint: expected None with decoupled=False, got 'cap'"
    ):
        reg.attach(optimizer, constraint="cap")
    with pytest.raises(ValueError, match=r"^constraint: expected None, 'cap' or .*, got 'box'"):
        reg.attach(optimizer, decoupled=True, constraint="box")
    reg.attach(optimizer)  # nothing was attached

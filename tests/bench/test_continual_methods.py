"""The methods of the benchmark of continual learning: each does what its source says."""

import math

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn", reason="scikit-learn is not installed")

from bench.continual import methods, models, train
from bench.continual.methods import base, norms, penalties

pytestmark = pytest.mark.usefixtures("seeded")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def after_update(name, strength, steps=1, seed=0, lr=1e-3):
    """A method after steps on random batches, and the initial parameters."""
    model = models.build("mlp", (1, 8, 8), 10, generator(seed))
    before = [p.detach().clone() for p in model.parameters()]
    method = methods.METHODS[name](model, strength, lr)
    numbers = generator(seed)
    for _ in range(steps):
        x = torch.randn(32, 1, 8, 8, generator=numbers)
        y = torch.randint(10, (32,), generator=numbers)
        loss = nn.functional.cross_entropy(method.model(x), y)
        method.optimizer.zero_grad()
        loss.backward()
        method.before_step()
        method.optimizer.step()
        method.after_step(x)
    return method, before


def distance(method, others):
    parameters = method.model.parameters()
    return sum(
        float((p.detach() - o).square().sum()) for p, o in zip(parameters, others, strict=True)
    )


@pytest.mark.parametrize("name", ["l2", "l2_init"])
def test_penalties_add_their_gradient(name):
    model = models.build("mlp", (1, 8, 8), 10, generator())
    method = methods.METHODS[name](model, 0.3, 1e-3)
    initial = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
            p.grad = torch.zeros_like(p)
    method.before_step()
    for p, start, group in zip(model.parameters(), initial, [0] * 8, strict=True):
        decay = method.optimizer.param_groups[group]["weight_decay"]
        centre = start if name == "l2_init" else torch.zeros_like(p)
        expected = 2 * 0.3 * (p.detach() - centre)
        torch.testing.assert_close(p.grad + decay * p.detach(), expected)


@pytest.mark.takes_seconds
def test_l2_shrinks_and_l2_init_holds():
    plain, initial = after_update("none", 0, 200)
    for name, others in (("l2", [torch.zeros(())] * 8), ("l2_init", initial)):
        method, _ = after_update(name, 0.1, 200)
        assert distance(method, others) < 0.7 * distance(plain, others), name


def test_shrink_and_perturb_goes_to_what_weights_were_like():
    method, initial = after_update("shrink_perturb", 0.05, 1, lr=0.0)
    for p, start in zip(method.model.parameters(), initial, strict=True):
        if p.numel() < 100:  # too few numbers to tell
            continue
        rest = (p.detach() - 0.95 * start) / 0.05
        assert float(rest.std()) == pytest.approx(float(start.std()), rel=0.3)


def test_redo_brings_dormant_units_back():
    method, _ = after_update("redo", 0.01, 5)
    linear, following = method.hidden[0][0], method.hidden[1][0]
    with torch.no_grad():
        linear.bias[:9] = -100
    kept = linear.weight[9:].detach().clone()
    method.steps = method.period - 1
    method.after_step(torch.randn(64, 1, 8, 8))
    assert (linear.bias[:9].abs() < 1).all()
    assert (following.weight[:, :9] == 0).all()
    assert torch.equal(linear.weight[9:], kept)
    moments = method.optimizer.state[linear.weight]
    assert (moments["exp_avg"][:9] == 0).all()
    assert (moments["exp_avg"][9:] != 0).any()


@pytest.mark.parametrize("name", ["layer_norm", "redo"])
def test_what_is_made_for_mlps_says_so(name):
    with pytest.raises(ValueError, match=f"expected 'mlp' for the method '{name}'"):
        methods.METHODS[name](models.build("resnet", (1, 8, 8), 10, generator()), 0.1, 1e-3)


@pytest.mark.takes_seconds
def test_spectral_norm_holds_every_matrix_at_one():
    for name in ("mlp", "resnet", "vit"):
        model = models.build(name, (1, 8, 8), 10, generator())
        method = methods.METHODS["spectral_norm"](model, 0, 1e-3)
        for _ in range(30):
            method.model(torch.randn(4, 1, 8, 8))
        for _, weight in train._weights(method.model):
            assert float(torch.linalg.svdvals(weight.flatten(1))[0]) == pytest.approx(1, abs=0.1)


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", [n for n in methods.METHODS if n.startswith("spectral_")])
def test_spectral_methods_hold_sigma_down(name):
    if name == "spectral_norm":
        pytest.skip("has no strength")
    plain, _ = after_update("none", 0, 150, lr=3e-3)
    strength = {"spectral_decoupled": 10, "spectral_cap": 1}.get(name, 0.1)
    held, _ = after_update(name, strength, 150, lr=3e-3)
    largest = [max(float(torch.linalg.svdvals(w)[0]) for _, w in train._weights(m.model))
               for m in (plain, held)]  # fmt: skip
    assert largest[1] < 0.7 * largest[0]
    assert largest[1] < 2


# ---------------------------------------------------------------------------- methods of others


def built(name, strength=0.1, model="mlp", lr=1e-3):
    model = models.build(model, (1, 8, 8), 10, generator())
    return methods.METHODS[name](model, strength, lr)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (4, 3, 2, 2), (3, 4, 3, 3), (6, 6)])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_isometry_has_the_gradient_of_autograd(shape, scale):
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    flat = weight.flatten(1)
    rows, cols = flat.shape
    gram = flat @ flat.mT if rows <= cols else flat.mT @ flat
    penalty = (gram - scale * torch.eye(len(gram), dtype=torch.float64)).square().sum()
    (expected,) = torch.autograd.grad(penalty, weight)
    with torch.no_grad():
        torch.testing.assert_close(penalties.isometry_gradient(weight, scale), expected)


@pytest.mark.takes_seconds
@pytest.mark.parametrize(
    ("name", "strength", "squared"), [("parseval", 1.0, 2), ("isometry", 10, 1)]
)
def test_isometries_hold_every_singular_value(name, strength, squared):
    method, _ = after_update(name, strength, 300)
    weights = penalties.matrices(method.model)[: -1 if name == "parseval" else None]
    for weight in weights:
        sigmas = torch.linalg.svdvals(weight.detach())
        torch.testing.assert_close(sigmas, torch.full_like(sigmas, squared**0.5), rtol=0.1, atol=0)


def test_parseval_begins_where_its_penalty_is_zero():
    method = built("parseval")
    for weight in method.matrices:
        assert float(penalties.isometry_gradient(weight.detach(), 2.0).abs().max()) < 1e-4
    assert method.matrices[-1] is not method.model[-1].weight


@pytest.mark.parametrize("model", ["resnet", "vit"])
def test_parseval_begins_so_in_every_model(model):
    method = built("parseval", model=model)
    largest = [float(torch.linalg.svdvals(w.detach().flatten(1))[0]) for w in method.matrices]
    assert largest == pytest.approx([2**0.5] * len(largest), rel=1e-4)


def test_effective_rank_is_the_exponential_of_the_entropy():
    units = torch.randn(20, 8, dtype=torch.float64)
    share = torch.linalg.svdvals(units)
    share /= share.sum()
    expected = -(share * share.log()).sum()
    torch.testing.assert_close(penalties.log_effective_rank(units), expected, rtol=1e-4, atol=0)
    same = torch.ones(20, 8, dtype=torch.float64)  # one direction
    assert float(penalties.log_effective_rank(same)) < 0.01


def test_the_reward_for_rank_raises_it():
    method = built("l2_er", 1e-5)
    x = torch.randn(64, 1, 8, 8)

    def ranks():
        method.model(x)
        found = [penalties.log_effective_rank(h.units.detach()) for h in method.hidden]
        return float(sum(found))

    before = ranks()
    for step in range(1, 101):
        method.optimizer.zero_grad()
        method.model(x)
        reward = method.penalty()
        assert (reward is None) == bool(step % method.period)
        if reward is not None:
            reward.backward()
            method.optimizer.step()
    assert ranks() > before + 0.1


def trained(method, steps, x=None):
    """Train ``method`` for ``steps`` on random batches."""
    for _ in range(steps):
        batch = torch.randn(32, 1, 8, 8) if x is None else x
        y = torch.randint(10, (len(batch),))
        method.optimizer.zero_grad()
        nn.functional.cross_entropy(method.model(batch), y).backward()
        method.before_step()
        method.optimizer.step()
        method.after_step(batch)


def test_continual_backprop_replaces_the_unit_of_least_use():
    method = built("continual_backprop", 1.01 / 128)  # a unit per step, of 128 mature ones
    layer = method.hidden[0]
    trained(method, method.maturity)  # nothing is mature yet
    method.utilities[0][7] = 0
    method.due[1:] = [-1.0, -1.0]  # no other layer's turn
    kept = layer.linear.weight.detach().clone()
    outputs = method.means[0].clone() / (1 - method.decay**method.maturity)
    assert (method.ages[0] == method.maturity).all()
    method.lr = 0.0
    for group in method.optimizer.param_groups:
        group["lr"] = 0.0
    biases = layer.following.bias.detach().clone()
    outgoing = layer.following.weight.detach()[:, 7].clone()
    trained(method, 1)
    changed = (layer.linear.weight.detach() != kept).any(1)
    assert changed.nonzero().flatten().tolist() == [7]
    assert (layer.following.weight[:, 7] == 0).all()
    assert float(layer.linear.weight[7].abs().max()) <= layer.bound
    assert float(layer.linear.bias[7]) == 0
    moved = layer.following.bias.detach() - biases
    torch.testing.assert_close(moved, outgoing * outputs[7], rtol=0.2, atol=1e-7)
    moments = method.optimizer.state[layer.linear.weight]
    assert (moments["exp_avg"][7] == 0).all()
    assert (moments["exp_avg"][8] != 0).any()
    assert method.ages[0][7] == 0
    assert (method.ages[0][8:] == method.maturity + 1).all()


def test_continual_backprop_replaces_its_share():
    method = built("continual_backprop", 0.003)
    trained(method, 200)
    # About 100 steps with 128 mature units: 38 replacements in each layer, whose ages began anew.
    renewed = [int((ages < 100).sum()) for ages in method.ages]
    assert all(30 <= n <= 39 for n in renewed), renewed


def test_silent_units_are_replaced_and_those_that_always_were_rare_are_not():
    method = built("snr", 0.01)
    layer, x = method.hidden[0], torch.rand(32, 1, 8, 8)
    with torch.no_grad():
        layer.linear.weight[:2] = 1.0
        layer.linear.bias[:2] = 1.0  # both fire
    method.lr = 0.0
    for group in method.optimizer.param_groups:
        group["lr"] = 0.0
    for step in range(300):  # unit 1 fires every 20th step, unit 0 two times of three
        with torch.no_grad():
            layer.linear.bias[0] = 1.0 if step % 3 else -1e4
            layer.linear.bias[1] = 1.0 if step % 20 == 0 else -1e4
        trained(method, 1, x)
    assert float(layer.linear.weight[1].min()) == 1.0
    with torch.no_grad():
        layer.linear.bias[0] = -1e4
    for step in range(15):
        with torch.no_grad():
            layer.linear.bias[1] = 1.0 if step % 20 == 0 else -1e4
        trained(method, 1, x)
    assert float(layer.linear.weight[0].abs().max()) <= layer.bound  # replaced
    assert float(layer.linear.weight[1].min()) == 1.0


@pytest.mark.parametrize("name", ["weight_projection", "nap"])
def test_projections_hold_the_norms(name):
    method = built(name)
    before = [float(w.norm()) for w in penalties.matrices(method.model)]
    trained(method, 20)
    after = [float(w.norm()) for w in penalties.matrices(method.model)]
    assert after == pytest.approx(before, rel=1e-5)
    norms_inside = [m for m in method.model if isinstance(m, nn.LayerNorm)]
    assert len(norms_inside) == (3 if name == "nap" else 0)


def test_muon_is_that_of_torch():
    """As one of the same options, whose iteration is in bfloat16."""
    method = built("muon", lr=1e-2)
    others = [nn.Parameter(w.detach().clone()) for w in method.matrices]
    muon = torch.optim.Muon(others, lr=1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    begun = [w.detach().clone() for w in others]
    for _ in range(4):
        for p in method.model.parameters():
            p.grad = torch.randn_like(p)
        for w, other in zip(method.matrices, others, strict=True):
            other.grad = w.grad.clone()
        method.optimizer.step()
        method.after_step(torch.zeros(0))
        muon.step()
    for w, other, start in zip(method.matrices, others, begun, strict=True):
        moved = (other.detach() - start).norm()
        assert float((w.detach() - other.detach()).norm() / moved) < 0.05
    assert len(others) == 2  # the hidden ones
    matrix = torch.randn(12, 30)
    assert 0.6 < float(torch.linalg.svdvals(norms.orthogonalized(matrix))[-1]) < 1.2


def test_a_cap_holds_every_matrix_at_its_bound():
    method, _ = after_update("spectral_cap", 1.5, 150, lr=3e-3)
    for group in method.optimizer.param_groups:
        group["lr"] = 0.0
    trained(method, 50)
    for weight in penalties.matrices(method.model):
        assert float(torch.linalg.svdvals(weight.detach())[0]) < 1.5 * 1.05


def test_hidden_layers_of_a_policy_are_those_of_both_networks():
    pytest.importorskip("gymnasium", reason="gymnasium is not installed")
    pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")
    from bench.continual import control

    policy = control.build([control.ChangingPole()], 0).policy
    layers = base.hidden_layers(policy, "any")
    assert [layer.linear.out_features for layer in layers] == [64] * 4
    assert layers[1].following is policy.action_net
    assert layers[3].following is policy.value_net
    policy(torch.randn(5, 4))
    assert [list(layer.units.shape) for layer in layers] == [[5, 64]] * 4
    with torch.no_grad():
        policy(torch.randn(7, 4))
    assert len(layers[0].units) == 5  # steps in the environment are not counted


def test_units_are_of_the_last_pass_and_survive_measurements():
    method = built("continual_backprop", 1e-4)
    trained(method, 2)
    units = method.hidden[0].units
    train.operators(method.model)  # copies the model, and its hooks
    assert method.hidden[0].units is units
    assert math.isclose(method.hidden[0].bound, (1 / 64) ** 0.5, rel_tol=0.05)

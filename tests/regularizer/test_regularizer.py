"""What a user holds: the three ways to the same gradient, arguments, reports."""

import copy

import pytest
import torch
from torch import nn

from spectral_kernels import SpectralRegularizer
from spectral_kernels.backends import reference
from spectral_kernels.diagnostics.readings import LayerReading

from ..support import models
from ..support.models import close


def gradient_of_way(way, dtype=torch.float32, backend="auto", steps=1, **arguments):
    """Gradients of the task and the penalty together, as an optimizer step gets them."""
    model = models.mixed(dtype=dtype)
    reg = SpectralRegularizer(model, 0.3, backend=backend, **arguments)
    seen = []

    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    if way == "attach":
        reg.attach(optimizer)
    optimizer.register_step_pre_hook(lambda *_: seen.append(models.grads(model)))
    torch.manual_seed(5)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(*models.batch(dtype))
        if way == "penalty":
            (loss + reg.penalty()).backward()
        else:
            loss.backward()
        if way == "accumulate":
            reg.accumulate_grad_()
        optimizer.step()
    return seen, reg


@pytest.mark.takes_seconds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_three_ways_give_the_same_gradient(backend, dtype):
    arguments = {"dtype": dtype, "backend": backend, "steps": 3, "exponent": 3}
    first, _ = gradient_of_way("penalty", **arguments)
    for way in ("accumulate", "attach"):
        other, _ = gradient_of_way(way, **arguments)
        for a, b in zip(first, other, strict=True):
            close(a, b, rtol=1e-4 if dtype == torch.float32 else 1e-10, atol=1e-6)


def test_gradient_is_autograd_of_the_formula(backend):
    model = models.mixed(dtype=torch.float64)
    reg = SpectralRegularizer(model, 0.3, exponent=2.5, target=0.8, backend=backend)
    value = reg.penalty()
    value.backward()
    found = models.grads(model)
    model.zero_grad()
    total = 0.0
    (bucket,) = reg._buckets.buckets
    for i, matrix in enumerate(bucket.plan.matrices):
        weight = reference.stored(bucket.plan, i, matrix.ref.get())
        weight = weight.reshape(bucket.plan.layouts[i].rows, -1)
        v = bucket.state.columns(i, bucket.state.v)[0]
        total = total + ((weight @ v).norm() ** 2.5 - 0.8**2.5) ** 2
    for vector in bucket.plan.elementwise:
        x = vector.ref.get()
        gain = ((x.abs() ** 2.5 - 1) ** 2).sum()
        total = total + (gain if vector.kind == "gain" else x.square().sum() ** 2.5)
    (0.3 * total).backward()
    torch.testing.assert_close(value.detach(), 0.3 * total.detach())
    close(found, models.grads(model), rtol=1e-9, atol=1e-12)


def test_sigma_converges_to_the_svd():
    model = models.mixed()
    reg = SpectralRegularizer(model, warmup=500)
    by_name = dict(zip(reg.names, reg.sigma.tolist(), strict=True))
    top = {
        "conv.weight": model.conv.weight.flatten(1),
        "up.weight": model.up.weight.transpose(0, 1).flatten(1),
        "attention.in_proj_weight[k]": model.attention.in_proj_weight.chunk(3)[1],
        "rnn.weight_hh_l0[n]": model.rnn.weight_hh_l0.chunk(3)[2],
        "head.weight": model.head.weight,
    }
    for name, weight in top.items():
        truth = float(torch.linalg.svdvals(weight.detach())[0])
        assert by_name[name] == pytest.approx(truth, rel=1e-3), name


def test_training_pulls_sigma_to_the_target():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 5))
    with torch.no_grad():
        model[0].weight.mul_(6)
    reg = SpectralRegularizer(model, 0.1, target=1.5, n_power_iterations=4)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    reg.attach(optimizer)
    for _ in range(1000):
        optimizer.zero_grad()
        optimizer.step()
    for layer in (model[0], model[2]):
        assert float(torch.linalg.svdvals(layer.weight.detach())[0]) == pytest.approx(1.5, rel=0.05)


# ------------------------------------------------------------------------------------ penalty()


def test_penalty_backward_scales_and_double_backward_works(backend):
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)).double()
    with torch.no_grad():
        model[1].weight.mul_(0.7)
    reg = SpectralRegularizer(model, 0.5, backend=backend)
    parameters = list(model.parameters())
    for _ in range(100):  # v no longer moves, so that a derivative by differences makes sense
        reg.penalty()
    first = torch.autograd.grad(reg.penalty(), parameters)
    scaled = torch.autograd.grad(3 * reg.penalty(), parameters)
    close([3 * g for g in first], scaled, rtol=1e-9)
    again = torch.autograd.grad(reg.penalty(), parameters, create_graph=True)
    close(first, [g.detach() for g in again], rtol=1e-9)
    norm = sum(g.square().sum() for g in again)
    hessian_vector = torch.autograd.grad(norm, parameters)
    # d/dW ||g||^2 = 2 H g, by central differences along g with the vectors held by their state.
    state = reg.state_dict()
    step = 1e-5
    moved = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, g in zip(parameters, first, strict=True):
                p.add_(sign * step * g)
        reg.load_state_dict(state)
        moved.append(torch.autograd.grad(reg.penalty(), parameters))
        with torch.no_grad():
            for p, g in zip(parameters, first, strict=True):
                p.sub_(sign * step * g)
    numeric = [(a - b) / step for a, b in zip(*moved, strict=True)]
    close(hessian_vector, numeric, rtol=1e-5, atol=1e-7)


def test_several_forwards_before_one_backward(backend):
    model = models.mixed()
    reg = SpectralRegularizer(model, 0.3, backend=backend, warmup=1)
    parameters = [p for p in model.parameters()]
    one, two = copy.deepcopy((model, reg)), copy.deepcopy((model, reg))
    separate = []
    for _ in range(2):
        separate.append(
            torch.autograd.grad(one[1].penalty(), list(one[0].parameters()), allow_unused=True)
        )
    total = two[1].penalty() + two[1].penalty()
    together = torch.autograd.grad(total, list(two[0].parameters()), allow_unused=True)
    expected = [None if a is None else a + b for a, b in zip(*separate, strict=True)]
    close(together, expected)
    assert len(parameters) == len(together)


def test_weights_changed_between_forward_and_backward_are_refused():
    model = nn.Linear(4, 3)
    reg = SpectralRegularizer(model)
    value = reg.penalty()
    with torch.no_grad():
        model.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_no_grad_evaluates_without_advancing(backend):
    model = models.mixed()
    reg = SpectralRegularizer(model, backend=backend, warmup=1)
    with torch.no_grad():
        first, second = reg.penalty(), reg.penalty()
    assert torch.equal(first, second)
    assert not first.requires_grad
    advanced = reg.penalty()
    assert advanced.requires_grad
    torch.testing.assert_close(advanced.detach(), first)
    with torch.no_grad():
        assert not torch.equal(reg.penalty(), first)


def test_first_use_may_be_in_inference_mode(backend):
    model = models.mixed()
    reg = SpectralRegularizer(model, backend=backend)
    with torch.inference_mode():
        first = reg.penalty()
        assert torch.equal(first, reg.penalty())
    reg.penalty().backward()
    reg.accumulate_grad_()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_penalty_is_differentiable_only_where_the_weights_are():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    reg = SpectralRegularizer(model)
    model[0].requires_grad_(False)
    reg.penalty().backward()
    assert model[0].weight.grad is None
    assert model[1].weight.grad is not None
    reg.accumulate_grad_()
    assert model[0].weight.grad is None


def test_value_of_the_penalty():
    weight = nn.Parameter(torch.diag(torch.tensor([3.0, 1.0])))
    bias = nn.Parameter(torch.tensor([0.6, 0.8]))
    reg = SpectralRegularizer([("0.weight", weight), ("0.bias", bias)], 0.1, exponent=2, warmup=50)
    assert float(reg.penalty().detach()) == pytest.approx(0.1 * ((9 - 1) ** 2 + 1), rel=1e-5)
    reg = SpectralRegularizer([("0.weight", weight)], 0.1, exponent=1, target=2, warmup=50)
    assert float(reg.penalty().detach()) == pytest.approx(0.1, rel=1e-5)


# ---------------------------------------------------------------------------- strength, target


def test_strength_may_change_and_may_be_a_tensor():
    model = nn.Linear(5, 4)
    reg = SpectralRegularizer(model, 0.2)
    with torch.no_grad():
        base = float(reg.penalty())
        reg.strength = 0.4
        assert float(reg.penalty()) == pytest.approx(2 * base)
        reg.strength = torch.tensor(0.6)
        assert float(reg.penalty()) == pytest.approx(3 * base)
        reg.strength.mul_(2)
        assert float(reg.penalty()) == pytest.approx(6 * base)
    reg.strength = {"weight": 0.0, "*": 0.2}
    model.zero_grad()
    reg.accumulate_grad_()
    assert model.weight.grad is None
    assert (model.bias.grad != 0).any()


def test_strength_by_pattern_first_match_counts():
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    reg = SpectralRegularizer(model, {"1.*": 0, "*": 0.5}, biases=False)
    reg.accumulate_grad_()
    assert model[1].weight.grad is None
    assert (model[0].weight.grad != 0).any()


def test_initial_target_is_the_sigma_at_construction():
    model = nn.Linear(12, 9, bias=False)
    reg = SpectralRegularizer(model, 1.0, target="initial", warmup=500)
    with torch.no_grad():
        assert float(reg.penalty()) < 1e-5
        model.weight.mul_(2)
        start = float(torch.linalg.svdvals(model.weight)[0]) / 2
        assert float(reg.penalty()) == pytest.approx((4 * start**2 - start**2) ** 2, rel=1e-3)
    # A target survives a checkpoint: it is not measured again on the changed weights.
    other = SpectralRegularizer(model, 1.0, target="initial", warmup=500)
    other.load_state_dict(reg.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(other.penalty(), reg.penalty())


def test_more_power_iterations_per_step_converge_sooner():
    errors = []
    for n in (1, 8):
        torch.manual_seed(3)
        model = nn.Linear(60, 50)
        reg = SpectralRegularizer(model, n_power_iterations=n, warmup=0)
        for _ in range(3):
            reg.accumulate_grad_()
        errors.append(float(torch.linalg.svdvals(model.weight.detach())[0] - reg.sigma[0]))
    assert errors[1] < 0.5 * errors[0]


# ------------------------------------------------------------------------------------- reporting


def test_report_names_shapes_and_estimates():
    model = models.mixed()
    reg = SpectralRegularizer(model)
    rows = reg.report()
    assert [row.name for row in rows] == reg.names
    assert isinstance(rows[0], LayerReading)
    assert dict((r.name, r.shape) for r in rows)["up.weight"] == (4, 24)
    assert [r.sigma for r in rows] == reg.sigma.tolist()
    assert all(0 <= r.residual < r.sigma for r in rows)
    before = reg.sigma
    model.conv.weight.data.mul_(3)
    reg.accumulate_grad_()
    assert not torch.equal(before, reg.sigma)  # a copy, not a view of the state


def test_printing_shows_what_is_regularized_and_what_is_not():
    text = str(SpectralRegularizer(models.mixed(), exclude=["up.*"]))
    for part in ("conv.weight", "6 x 27", "[q]", "norm.weight", "every element pulled to 1",
                 "exclude 'up.*'"):  # fmt: skip
        assert part in text, part


# -------------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"strength": -1.0}, ValueError, "strength: expected .*, got -1.0"),
        ({"strength": float("nan")}, ValueError, "strength: expected .*, got nan"),
        ({"strength": "big"}, TypeError, "strength: expected .*, got 'big'"),
        (
            {"strength": torch.ones(3)},
            ValueError,
            r"strength: expected .*, got Tensor of shape \(3,\)",
        ),
        ({"strength": "1e-3"}, TypeError, "strength: expected a number, got '1e-3'"),
        ({"strength": True}, TypeError, "strength: expected .*, got True"),
        ({"strength": torch.tensor(True)}, ValueError, "strength: expected .*, got .*bool"),
        ({"strength": torch.tensor(-1.0)}, ValueError, "strength: expected a finite .*, got -1.0"),
        ({"strength": torch.tensor(float("nan"))}, ValueError, "strength: expected .*, got nan"),
        ({"strength": {"*": "1e-3"}}, TypeError, r"strength\['\*'\]: expected .*, got '1e-3'"),
        ({"strength": {1: 1.0}}, TypeError, "strength: expected .* name patterns.*, got {1: 1.0}"),
        (
            {"target": torch.ones(2, 2)},
            TypeError,
            r"target: expected .*, got Tensor of shape \(2, 2\)",
        ),
        ({"biases": "false"}, TypeError, "biases: expected .*, got 'false'"),
        (
            {"strength": {"weight": 1.0}},
            ValueError,
            "strength: expected a pattern .*, got none for 'bias'",
        ),
        ({"strength": {"wieght": 1.0, "*": 1.0}}, ValueError, "strength: .*, got 'wieght'"),
        ({"exponent": 0.5}, ValueError, "exponent: expected .*, got 0.5"),
        ({"exponent": True}, TypeError, "exponent: expected .*, got True"),
        ({"target": "first"}, TypeError, "target: expected .*'initial'.*, got 'first'"),
        ({"target": -2.0}, ValueError, "target: expected .*, got -2.0"),
        ({"n_power_iterations": 0}, ValueError, "n_power_iterations: expected .*, got 0"),
        ({"n_power_iterations": 1.5}, TypeError, "n_power_iterations: expected .*, got 1.5"),
        ({"warmup": -1}, ValueError, "warmup: expected .*, got -1"),
        (
            {"backend": "cuda9"},
            ValueError,
            "backend: expected 'auto', 'triton', 'cuda', 'cpu', 'reference' or .*, got 'cuda9'",
        ),
        ({"seed": -1}, ValueError, "seed: expected .*, got -1"),
        ({"exclude": ["*"]}, ValueError, "nothing to regularize"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        SpectralRegularizer(nn.Linear(3, 4), **arguments)


def test_a_bad_strength_changes_nothing():
    reg = SpectralRegularizer(nn.Linear(3, 4), 0.5)
    for bad in (-1.0, "x", torch.ones(2)):
        with pytest.raises((TypeError, ValueError)):
            reg.strength = bad
    assert reg.strength == 0.5

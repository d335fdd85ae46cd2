"""Arguments that are assigned after construction: they take effect, or nothing changes."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn

from spectral_kernels import SpectralAdamW, SpectralRegularizer, SpectralSGD
from spectral_kernels.engine.bucket import MAX_EXTRA_ITERATIONS

pytestmark = pytest.mark.usefixtures("seeded")
ASSIGNED = {
    "strength": 0.7, "exponent": 3, "target": 0.4, "n_power_iterations": 3, "n_vectors": 2
}  # fmt: skip
OTHERS = [
    {"exponent": 1.5}, {"target": {"0.*": 2.0, "*": "initial"}}, {"target": "initial"},
    {"n_power_iterations": "auto"}, {"n_vectors": 4}, {"strength": {"0.*": 1, "*": 0}},
]  # fmt: skip
EACH = [{name: value} for name, value in ASSIGNED.items()] + OTHERS


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 12), nn.LayerNorm(12), nn.Linear(12, 6)).to(dtype)


def assign(target, options):
    for name, value in options.items():
        setattr(target, name, value)


def with_gradients(model):
    for i, p in enumerate(model.parameters()):
        p.grad = torch.linspace(-1, 1 + i, p.numel()).to(p).view_as(p) / 10
    return model


def results(model, reg, steps=3):
    """Gradients and readings of some steps in which only the penalty moves the weights."""
    found = []
    for _ in range(steps):
        model.zero_grad()
        reg.accumulate_grad_()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found += [grad.clone() for grad in grads] + [reg.singular_values]
    with torch.no_grad():
        found.append(reg.penalty())
    return found


def assert_close(first, second):
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


# ------------------------------------------------------------------------------ they take effect


@pytest.mark.parametrize("options", EACH, ids=str)
@pytest.mark.parametrize("is_used", [False, True])
def test_an_assigned_argument_is_one_that_was_given(backend, options, is_used):
    models = net(), net()
    common = {"warmup": 60, "backend": backend}
    given = SpectralRegularizer(models[0], **options, **common)
    assigned = SpectralRegularizer(models[1], **common)
    if is_used:
        results(models[1], assigned)
    assign(assigned, options)
    given.load_state_dict({**assigned.state_dict(), "initial": {}})
    assert repr(assigned) == repr(given)
    assert_close(results(models[0], given), results(models[1], assigned))
    (name,) = options
    if name != "n_power_iterations":  # vectors have converged
        found, model = results(models[1], assigned), net()
        plain = results(model, SpectralRegularizer(model, **common))
        assert not all(
            a.shape == b.shape and torch.allclose(a, b) for a, b in zip(found, plain, strict=True)
        )


@pytest.mark.parametrize("kind", [SpectralAdamW, SpectralSGD])
@pytest.mark.parametrize("through", ["optimizer", "regularizer"])
def test_an_optimizer_takes_them_between_steps(kind, through):
    """As torch's optimizer does with a regularizer attached, whose arguments are assigned."""
    theirs = {SpectralAdamW: torch.optim.AdamW, SpectralSGD: torch.optim.SGD}[kind]
    a, b = net(), net()
    first, second = theirs(a.parameters(), lr=0.01), kind(b, lr=0.01, strength=0.1, warmup=60)
    reg = SpectralRegularizer(a, 0.1, warmup=60)
    reg.attach(first)
    door = second if through == "optimizer" else second.regularizer
    for options in ({}, {"strength": 0.5, "exponent": 3}, {"target": 0.4}, {"target": "initial"}):
        assign(reg, options), assign(door, options)
        assert {name: getattr(second, name) for name in options} == options
        for _ in range(2):
            with_gradients(a), with_gradients(b)
            first.step(), second.step()
        assert_close(a.parameters(), b.parameters())
    assign(door, {"n_vectors": 4, "n_power_iterations": "auto"})
    steps = [state["step"].clone() for state in second.state.values()]
    with_gradients(b)
    second.step()
    truth = torch.linalg.svdvals(b[0].weight.detach())[:4]
    torch.testing.assert_close(second.singular_values[0], truth, rtol=0.02, atol=0)
    assert [state["step"] for state in second.state.values()] == [step + 1 for step in steps]


def test_an_optimizers_step_has_one_iteration():
    optimizer = SpectralAdamW(net())
    for door in (optimizer, optimizer.regularizer, pickle.loads(pickle.dumps(optimizer))):
        with pytest.raises(ValueError, match="expected 1 or 'auto' in an optimizer, got 3"):
            door.n_power_iterations = 3
        assert door.n_power_iterations == 1


def test_more_vectors_are_warmed_up_and_fewer_go_on():
    model = net()
    reg = SpectralRegularizer(model, n_vectors=2, warmup=300)
    two = reg.singular_values
    reg.n_vectors = 1
    assert {v.shape[0] for v in reg.state_dict()["vectors"].values()} == {2}
    torch.testing.assert_close(reg.sigma, two[:, 0])
    reg.n_vectors = 4
    truth = torch.linalg.svdvals(model[2].weight.detach())[:4]
    torch.testing.assert_close(reg.singular_values[1], truth, rtol=1e-3, atol=0)


def test_extra_iterations_may_be_switched_on_and_off():
    reg = SpectralRegularizer(net())
    reg.penalty()
    for value, extra in (("auto", MAX_EXTRA_ITERATIONS), (2, 0), ("auto", MAX_EXTRA_ITERATIONS)):
        reg.n_power_iterations = value
        assert reg.n_power_iterations == value
        assert [b.extra_iterations for b in reg._buckets.buckets] == [extra]


def test_an_initial_target_is_that_of_its_first_assignment():
    model = net()
    reg = SpectralRegularizer(model, target=2)
    start = torch.linalg.svdvals(model[0].weight.detach())[0]
    with torch.no_grad():
        model[0].weight.mul_(3)
    for target in ("initial", 1.0, "initial"):
        reg.target = target
        assert reg.target == target
        with torch.no_grad():
            model[0].weight.mul_(2)
    assert reg.state_dict()["initial"]["0.weight"] == pytest.approx(3 * float(start), rel=1e-4)


def test_a_gradient_is_that_of_its_own_forward_pass():
    models = net(), net()
    regs = [SpectralRegularizer(model, 0.3) for model in models]
    values = [reg.penalty() for reg in regs]
    assign(regs[1], {"strength": 5.0, "exponent": 4, "target": 3.0})
    for value in values:
        value.backward()
    assert_close(*([p.grad for p in m.parameters()] for m in models))


def test_copies_and_pickles_keep_what_was_assigned():
    reg = SpectralRegularizer(net())
    reg.penalty()
    assign(reg, ASSIGNED)
    for other in (copy.deepcopy(reg), pickle.loads(pickle.dumps(reg))):
        assert {name: getattr(other, name) for name in ASSIGNED} == ASSIGNED
        with torch.no_grad():
            torch.testing.assert_close(other.penalty(), reg.penalty())


@pytest.mark.takes_seconds
def test_sharded_parameters_see_them_too():
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        whole, sharded = net(), net()
        fully_shard(sharded)
        found = []
        for model in (whole, sharded):
            reg = SpectralRegularizer(model, warmup=60)
            reg.accumulate_grad_()
            assign(reg, {"strength": 0.7, "exponent": 3, "target": {"0.*": 0.4, "*": "initial"}})
            model.zero_grad()
            for _ in range(30):  # vectors of a shard start from others
                reg.penalty()
            reg.accumulate_grad_()
            grads = [p.grad for p in model.parameters()]
            found.append([g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads])
        assert_close(*found)
    finally:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------ nothing changes


@pytest.mark.parametrize(
    ("name", "value", "error", "says"),
    [
        ("strength", -1, ValueError, "strength: expected .*, got -1"),
        ("strength", torch.tensor(-1.0), ValueError, "strength: expected a finite .*, got -1.0"),
        ("strength", {"wieght": 1, "*": 1}, ValueError, "strength: .*, got 'wieght'"),
        ("exponent", 0.5, ValueError, "exponent: expected a finite number >= 1, got 0.5"),
        ("exponent", "2", TypeError, "exponent: expected .*, got '2'"),
        ("target", -1, ValueError, "target: expected .*, got -1"),
        ("target", "first", TypeError, "target: expected .*'initial'.*, got 'first'"),
        ("target", {"0.*": "initial"}, ValueError, "target: expected a pattern .*, got none for"),
        ("n_power_iterations", 0, ValueError, "n_power_iterations: expected .*, got 0"),
        ("n_power_iterations", "often", TypeError, "n_power_iterations: .*'auto', got 'often'"),
        ("n_vectors", 3, ValueError, "n_vectors: expected 1, 2, 4, 8 or 16, got 3"),
        ("n_vectors", None, TypeError, "n_vectors: expected .*, got None"),
    ],
)  # fmt: skip
def test_a_bad_value_is_named_and_changes_nothing(name, value, error, says):
    models = net(), net()
    reg, twin = (SpectralRegularizer(model, 0.3) for model in models)
    for one in (reg, twin):
        one.penalty()
    with pytest.raises(error, match=says):
        setattr(reg, name, value)
    assert repr(reg) == repr(twin)
    assert reg.state_dict()["initial"] == {}
    for a, b in zip(results(models[0], reg), results(models[1], twin), strict=True):
        assert torch.equal(a, b)


def test_a_target_that_cannot_be_measured_changes_nothing(monkeypatch):
    reg = SpectralRegularizer(net(), target=2)

    def fail(*arguments, **options):
        raise RuntimeError("no convergence")

    monkeypatch.setattr("spectral_kernels.engine.lanczos.top", fail)
    with pytest.raises(RuntimeError, match="no convergence"):
        reg.target = "initial"
    assert reg.target == 2
    reg.penalty()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("strenght", "no attribute 'strenght'; did you mean 'strength'?"),
        ("n_iterations", "did you mean 'n_power_iterations'?"),
        ("targets", "did you mean 'target'?"),
        ("qqq", "no attribute 'qqq'; attributes of your own need a subclass"),
    ],
)
def test_a_misspelt_attribute_is_told(name, says):
    reg = SpectralRegularizer(net())
    with pytest.raises(AttributeError) as caught:
        setattr(reg, name, 0)
    assert says in str(caught.value)
    assert not hasattr(reg, name)


def test_a_subclass_has_attributes_of_its_own():
    class Mine(SpectralRegularizer):
        def __init__(self, *arguments, **options):
            self.title = "mine"
            super().__init__(*arguments, **options)

    assert Mine(net()).title == "mine"
    assert repr(Mine(net())).startswith("Mine(strength=0.001")


def test_printing_an_optimizer_shows_the_penalty_and_what_is_selected():
    optimizer = SpectralSGD(net(), lr=0.25, strength=0.125, exclude="2.*", decoupled=True)
    optimizer.target = 0.75
    text = repr(optimizer)
    assert text.startswith("SpectralSGD (\nParameter Group 0\n")
    for part in ("\n    lr: 0.25\n", "\nPenalty\n", "strength: 0.125\n", "exponent: 2\n",
                 "target: 0.75\n", "decoupled: True\n", "backend: auto\n", "1 matrix\n",
                 "    12 x 9  0.weight", "exclude '2.*'"):  # fmt: skip
        assert part in text, part

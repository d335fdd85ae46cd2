"""attach() to wrappers, to optimizers whose steps cannot contain a penalty, and to several."""

import copy
import warnings
from collections import OrderedDict, defaultdict

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer

from spectral_kernels import SpectralRegularizer, SpectralSGD

from ..support.models import close
from ..support.small_nets import zero_gradients


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def net():
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 4))


def train(model, *optimizers, steps=4):
    """Parameters after some steps of all ``optimizers`` on the same data."""
    x = torch.randn(steps, 5, 8, generator=torch.Generator().manual_seed(1))
    for batch in x:
        model.zero_grad()
        model(batch).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def expected_of(model, make):
    """Parameters of a copy of ``model`` after steps with the penalty in the loss."""
    twin = copy.deepcopy(model)
    optimizer, reg = make(twin.parameters()), SpectralRegularizer(twin, 0.5)
    x = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(1))
    for batch in x:
        twin.zero_grad()
        (twin(batch).square().mean() + reg.penalty()).backward()
        optimizer.step()
    return [p.detach() for p in twin.parameters()]


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1, momentum=0.9)


# --------------------------------------------------------------------------------------- wrappers


class SlowFast(torch.optim.Optimizer):
    """Every second step, weights go half the way back: it never calls Optimizer.__init__."""

    def __init__(self, base):
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()
        self.base, self.param_groups, self.state = base, base.param_groups, defaultdict(dict)

    def step(self, closure=None):
        return self.base.step(closure)


class Plain:
    """No torch.optim.Optimizer at all."""

    def __init__(self, inner):
        self.inner, self.param_groups = inner, inner.param_groups

    def step(self):
        self.inner.step()


class OneForEach:
    """Drives two."""

    def __init__(self, first, second):
        self.members = [first, second]

    def step(self):
        for member in self.members:
            member.step()


class NoAverager:
    step = 0

    def average_parameters(self, params):
        pass


def local_sgd(optimizer):
    return PostLocalSGDOptimizer(optimizer, NoAverager())


@pytest.mark.parametrize("wrap", [SlowFast, Plain, local_sgd, lambda o: Plain(local_sgd(o))])
def test_a_wrapper_takes_the_steps_of_the_optimizer_inside(wrap):
    model = net()
    expected = expected_of(model, sgd)
    inner = sgd(model.parameters())
    wrapper = wrap(inner)
    handle = SpectralRegularizer(model, 0.5).attach(wrapper)
    assert handle.optimizers == [inner]
    close(train(model, wrapper), expected, rtol=1e-4, atol=1e-6)


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("decoupled", [False, True])
def test_a_sharded_optimizer_adds_the_penalty_once(decoupled):
    model = net()
    twin = copy.deepcopy(model)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    plain = sgd(twin.parameters())
    for own, one in ((model, optimizer), (twin, plain)):
        SpectralRegularizer(own, 0.5).attach(one, decoupled=decoupled)
    close(train(model, optimizer), train(twin, plain), rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("process_group")
def test_an_optimizer_that_acts_in_the_backward_pass_is_refused():
    model = net()
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), torch.optim.SGD, lr=0.1, overlap_with_ddp=True
    )
    with pytest.raises(TypeError, match=r"in the backward pass.*overlap_with_ddp=False"):
        SpectralRegularizer(model, 0.5).attach(optimizer)


def test_a_wrapper_around_other_parameters_is_refused_by_the_name_of_what_is_inside():
    model, masters = net(), net()
    reg = SpectralRegularizer(model)
    for inner in (SlowFast(sgd(masters.parameters())), Plain(sgd(masters.parameters()))):
        with pytest.raises(ValueError, match=r"SGD does not hold parameter '0\.weight'"):
            reg.attach(inner)


def test_a_wrapper_around_several_is_refused_by_their_names():
    model = net()
    first, second = sgd(model[0].parameters()), torch.optim.AdamW(model[1:].parameters())
    with pytest.raises(TypeError, match=r"OneForEach, .*SGD and AdamW: attach\(\[\.\.\.\]\)"):
        SpectralRegularizer(model).attach(OneForEach(first, second))
    empty = SlowFast(first)
    del empty.base
    with pytest.raises(
        TypeError, match=r"expected one that runs step hooks, got SlowFast, whose __init__"
    ):
        SpectralRegularizer(model).attach(empty)
    inside = Plain(SpectralSGD(model))
    with pytest.raises(
        TypeError, match=r"without the penalty .*, got Plain with SpectralSGD inside"
    ):
        SpectralRegularizer(model).attach(inside)


# --------------------------------------------------------------- what cannot contain the penalty


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization in its usual form; step hooks run around neither step."""

    def __init__(self, params, base, rho=0.05):
        super().__init__(params, {"rho": rho})
        self.base_optimizer, self.rho = base(self.param_groups), rho
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        for p in self.param_groups[0]["params"]:
            self.state[p]["back"] = p.detach().clone()
            p.add_(self.rho * p.grad / (p.grad.norm() + 1e-12))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for p in self.param_groups[0]["params"]:
            p.copy_(self.state[p]["back"])
        self.base_optimizer.step()
        self.zero_grad()


def test_optimizers_with_two_steps_are_refused_with_what_to_do():
    model = net()
    optimizer = SAM(model.parameters(), lambda groups: torch.optim.SGD(groups, 0.1))
    reg = SpectralRegularizer(model, 0.5)
    with pytest.raises(TypeError, match=r"SAM.*call accumulate_grad_\(\) before second_step\(\)"):
        reg.attach(optimizer)
    with pytest.raises(TypeError, match="Plain with SAM inside"):
        reg.attach(Plain(optimizer))
    weight = model[0].weight.detach().clone()  # the advice is good
    zero_gradients(model)
    optimizer.first_step()
    reg.accumulate_grad_()
    optimizer.second_step()
    assert (model[0].weight - weight).norm() > 1e-3


def test_a_gradient_that_is_ascended_along_is_no_place_for_the_penalty():
    model = net()
    groups = [
        {"params": model[0].parameters()},
        {"params": model[1:].parameters(), "maximize": True},
    ]
    reg, optimizer = SpectralRegularizer(model, 0.5), torch.optim.SGD(groups, 0.1)
    with pytest.raises(
        ValueError, match=r"maximize: expected False, got True in the group of .*'3\.weig"
    ):
        reg.attach(optimizer)
    SpectralRegularizer(model[0], 0.5).attach(optimizer)
    assert SpectralRegularizer(model[1:], 0.5).attach(optimizer, decoupled=True).active


def test_nothing_is_no_optimizer():
    model = net()
    reg = SpectralRegularizer(model)
    for wrong in (None, "sgd", model, reg, {"a": sgd(model.parameters())}):
        with pytest.raises(TypeError, match=f"optimizer: expected .*, got {type(wrong).__name__}"):
            reg.attach(wrong)
    with pytest.raises(TypeError, match="expected one or several, got none"):
        reg.attach([])


# ---------------------------------------------------------------------------------------- several


def halves(model):
    """An optimizer of the matrices, and one of the rest."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    return sgd(matrices), torch.optim.AdamW(others, 1e-2)


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("wrap", [lambda x: x, Plain])
def test_several_optimizers_take_the_penalty_of_what_they_hold(wrap, decoupled):
    model = net()
    twin = copy.deepcopy(model)
    first, second = halves(model)
    reg = SpectralRegularizer(model, 0.5)
    handle = reg.attach([wrap(first), second], decoupled=decoupled)
    assert handle.optimizers == [first, second]
    found = train(model, first, second)
    one, two = halves(twin)
    own = SpectralRegularizer(twin, 0.5, biases=False, norms=False)
    rest = SpectralRegularizer(twin, 0.5, exclude=["0.weight", "3.weight"])
    own.attach(one, decoupled=decoupled)
    rest.attach(two, decoupled=decoupled)
    close(found, train(twin, one, two), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(reg.sigma, own.sigma)
    assert len(reg.report()) == 2
    reg.penalty()
    handle.remove()
    assert not handle.active
    moved = train(model, first, second, steps=1)
    expected = train(twin, one, two, steps=1)
    assert not any(torch.equal(a, b) for a, b in zip(moved, expected, strict=True))


def test_each_adds_its_part_once_per_step_of_its_own():
    model = net()
    with torch.no_grad():
        for p in model.parameters():  # no gain is one, no shift zero
            p.add_(0.1)
    first, second = halves(model)
    for optimizer in (first, second):
        optimizer.param_groups[0]["lr"] = 0.0
    SpectralRegularizer(model, 0.5).attach([first, second])
    zero_gradients(model)
    first.step()
    assert all(bool(p.grad.any()) == (p.dim() > 1) for p in model.parameters())
    seen = [p.grad.clone() for p in model.parameters()]
    second.step()
    unchanged = [torch.equal(p.grad, g) for p, g in zip(model.parameters(), seen, strict=True)]
    assert unchanged == [p.dim() > 1 for p in model.parameters()]


def test_vectors_are_kept_when_optimizers_divide_the_parameters():
    model = net()
    reg = SpectralRegularizer(model, 0.5)
    for _ in range(30):
        reg.penalty()
    kept = reg.state_dict()["vectors"]
    first, second = halves(model)
    handle = reg.attach([first, second])
    for name, v in reg.state_dict()["vectors"].items():
        assert torch.equal(v, kept[name])
    handle.remove()
    reg.attach(sgd(model.parameters()))
    for name, v in reg.state_dict()["vectors"].items():
        assert torch.equal(v, kept[name])


def test_several_must_hold_every_parameter_once():
    model = net()
    first, second = halves(model)
    reg = SpectralRegularizer(model, 0.5)
    with pytest.raises(ValueError, match=r"SGD does not hold parameter '0\.bias'"):
        reg.attach([first])
    third = torch.optim.AdamW([model[3].bias])
    with pytest.raises(ValueError, match=r"SGD and AdamW do not hold parameter '0\.bias'"):
        reg.attach([first, third])
    with pytest.raises(ValueError, match=r"AdamW and AdamW both hold parameter '3\.bias'"):
        reg.attach([first, second, third])
    with pytest.raises(TypeError, match=r"optimizer: expected .*, got Linear"):
        reg.attach([first, model[0]])
    beside = sgd([nn.Parameter(torch.ones(3))])  # none of the parameters
    assert reg.attach((first, second, beside)).optimizers == [first, second, beside]
    with pytest.raises(RuntimeError, match="attached to it already"):
        reg.attach([second, first])
    with pytest.raises(RuntimeError, match=r"'weight' gets a penalty in the steps of SGD"):
        SpectralRegularizer(model[0], 0.5, biases=False).attach(sgd(model[0].parameters()))


def test_one_regularizer_is_not_divided_in_two_ways():
    model = net()
    reg = SpectralRegularizer(model, 0.5)
    first, second = halves(model)
    reg.attach([first, second])
    others = sgd(model[0].parameters()), sgd(model[1:].parameters())
    with pytest.raises(RuntimeError, match="SGD and AdamW too, which divide its parameters"):
        reg.attach(others, shared=True)
    assert reg.attach(sgd(model.parameters()), shared=True).active


# ------------------------------------------------------------------------------------------- Muon


def test_muon_loses_the_size_of_the_penalty_unless_it_is_decoupled():
    moved = {}
    for decoupled in (False, True):
        for strength in (0.01, 0.02):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 4, bias=False))
            muon = torch.optim.Muon(model.parameters(), lr=0.02, weight_decay=0.0)
            reg = SpectralRegularizer(model, strength, warmup=100)
            if decoupled:
                reg.attach(muon, decoupled=True)
            else:
                with pytest.warns(UserWarning, match=r"Muon orthogonalizes.*decoupled=True") as w:
                    reg.attach(muon)
                assert len(w) == 1
                assert w[0].filename == __file__
            zero_gradients(model)
            before = model[0].weight.detach().clone()
            muon.step()
            moved[decoupled, strength] = float((model[0].weight.detach() - before).norm())
    assert moved[False, 0.02] == pytest.approx(moved[False, 0.01], rel=1e-2)
    assert moved[True, 0.02] == pytest.approx(2 * moved[True, 0.01], rel=1e-3)


@pytest.mark.parametrize(("constraint", "n_vectors"), [("cap", 1), ("cap", 16), ("sphere", 1)])
def test_muon_wants_more_than_one_vector_under_a_cap(constraint, n_vectors):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24, bias=False), nn.Linear(24, 20, bias=False))
    muon = torch.optim.Muon(model.parameters(), lr=0.1, weight_decay=0.0)
    reg = SpectralRegularizer(model, n_vectors=n_vectors)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        reg.attach(muon, decoupled=True, constraint=constraint)
    said = [w for w in found if "n_vectors=16" in str(w.message)]
    assert len(said) == (constraint == "cap" and n_vectors == 1)
    assert all(w.filename == __file__ for w in said)
    x, y = torch.randn(64, 16), 9 * torch.randn(64, 20)
    for _ in range(50):
        muon.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        muon.step()
    largest = max(float(torch.linalg.matrix_norm(p.detach(), 2)) for p in model.parameters())
    assert (largest > 1.6) == bool(said), largest


def test_muon_beside_another_optimizer():
    model = net()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    muon, adamw = torch.optim.Muon(matrices, 0.02), torch.optim.AdamW(rest)
    reg = SpectralRegularizer(model, 0.5)
    with pytest.warns(UserWarning, match="Muon orthogonalizes"):
        reg.attach([muon, adamw]).remove()
    reg.attach([muon, adamw], decoupled=True)
    train(model, muon, adamw, steps=20)
    assert reg.sigma.max() < 1.3

"""Steps that stay prepared: what changes between two of them counts as if none had been."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from spectral_kernels import SpectralAdamW, SpectralRegularizer, SpectralSGD
from spectral_kernels.engine.model_buckets import ModelBuckets
from spectral_kernels.engine.prepared import Preparation
from spectral_kernels.optim.base import SpectralOptimizer
from spectral_kernels.tables import addresses, guard

if addresses.tensor_reader() is None:
    pytest.skip("tensors are read one by one here: nothing is prepared", allow_module_level=True)

WAYS = "accumulated", "attached", "SpectralAdamW", "SpectralSGD"


def net(dtype=torch.float32):
    torch.manual_seed(0)
    layers = nn.Linear(70, 90), nn.ReLU(), nn.LayerNorm(90), nn.Linear(90, 5, bias=False)
    model = nn.Sequential(*layers, nn.Embedding(3, 4)).to(dtype)  # without a penalty
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


class Run:
    """A model in training; ``step`` is one step with new gradients, the same in every run."""

    def __init__(self, way, **options):
        self.model, self.way, self.n = net(), way, 0
        self.in_place = self.to_frozen = False  # how gradients arrive
        options = {"strength": 0.05, **options}
        if way.startswith("Spectral"):
            kind = SpectralAdamW if way == "SpectralAdamW" else SpectralSGD
            more = {"lr": 0.01} if way == "SpectralAdamW" else {"lr": 1e-3, "momentum": 0.9}
            self.optimizer = kind(self.model, **more, **options)
            self.reg = self.optimizer.regularizer
        else:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), 0.01)
            self.reg = SpectralRegularizer(self.model, **options)
            if way == "attached":
                self.handle = self.reg.attach(self.optimizer)

    def step(self, without=()):
        generator = torch.Generator().manual_seed(self.n)
        self.n += 1
        self.optimizer.zero_grad(set_to_none=not self.in_place)
        for name, p in self.model.named_parameters():
            if (p.requires_grad or self.to_frozen) and name not in without:
                grad = torch.randn(p.shape, generator=generator).to(p.dtype)
                p.grad = grad if p.grad is None else p.grad.copy_(grad)
        if self.way == "accumulated":
            self.reg.accumulate_grad_()
        self.optimizer.step()

    def numbers(self):
        values = [p.detach().clone() for p in self.model.parameters()]
        return [*values, self.reg.sigma, *self.reg.state_dict()["vectors"].values()]


def never(patch):
    """Let no step be prepared."""
    patch.setattr(Preparation, "renew", lambda self, prepare: None)


def assert_same(found, wanted):
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


@pytest.fixture
def slow_steps(monkeypatch):
    """The steps that were looked at object by object, by name of the function that does it."""
    seen = []
    for owner, name in ((ModelBuckets, "_bound"), (SpectralOptimizer, "_step")):
        original = getattr(owner, name)

        def counted(self, *args, original=original, name=name, **options):
            seen.append(name)
            return original(self, *args, **options)

        monkeypatch.setattr(owner, name, counted)
    return seen


@pytest.mark.parametrize("way", WAYS)
def test_steps_with_new_gradients_stay_prepared(way, slow_steps):
    run = Run(way)
    for _ in range(25):  # SGD's first ten are looked at
        run.step()
    slow_steps.clear()
    for _ in range(20):
        run.step()
    assert slow_steps == []


@pytest.mark.parametrize("way", WAYS)
def test_prepared_steps_have_the_bits_of_others(way, monkeypatch):
    run = Run(way)
    for _ in range(30):
        run.step()
    never(monkeypatch)
    other = Run(way)
    for _ in range(30):
        other.step()
    assert_same(run.numbers(), other.numbers())


def replace_layer(run):
    run.model[3] = nn.Linear(90, 4, bias=False)
    with torch.no_grad():
        run.model[3].weight.copy_(0.3 * torch.randn(4, 90, generator=torch.Generator()))
    run.optimizer.add_param_group({"params": [run.model[3].weight]})


def freeze(run):
    run.model[0].weight.requires_grad_(False)


def move(run):
    run.model[0].weight.data = run.model[0].weight.data.clone()


def edit(run):
    with torch.no_grad():
        run.model[0].weight.mul_(1.5)


def edit_much(run):
    """Vectors jump, and are warmed up again."""
    with torch.no_grad():
        nn.init.orthogonal_(run.model[0].weight, 3.0)


def move_moment(run):
    for state in run.optimizer.state.values():
        for key in ("exp_avg", "momentum_buffer"):
            if key in state:
                state[key] = 0.5 * state[key]


def count_anew(run):
    for state in run.optimizer.state.values():
        if "step" in state:
            state["step"] = torch.tensor(100.0)


def clear_state(run):
    run.optimizer.state.clear()


def other_lr(run):
    run.optimizer.param_groups[0]["lr"] = 0.003


def tensor_lr(run):
    run.optimizer.param_groups[0]["lr"] = torch.tensor(0.003)


def other_betas(run):
    group = run.optimizer.param_groups[0]
    if "betas" in group:
        group["betas"] = (0.5, 0.9)
    else:
        group["momentum"] = 0.5


def no_momentum(run):
    if "momentum" in run.optimizer.param_groups[0]:
        run.optimizer.param_groups[0]["momentum"] = 0


def other_strength(run):
    run.reg.strength = 0.2


def no_strength(run):
    run.reg.strength = {"0.*": 0.0, "*": 0.1}


def other_exponent(run):
    run.reg.exponent = 3


def other_target(run):
    run.reg.target = 2.0


def more_vectors(run):
    run.reg.n_vectors = 4


def auto(run):
    run.reg.n_power_iterations = "auto"


def load(run):
    run.reg.load_state_dict(run.reg.state_dict())
    run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))


def other_dtype(run):
    run.model[0].to(torch.float64)
    run.optimizer.state.clear()


def evaluate(run):
    run.reg.penalty().backward()
    run.optimizer.zero_grad()


def differentiate(run):
    """The tables get addresses of other gradients; those of the step stay where they are."""
    run.in_place = True
    torch.autograd.grad(run.reg.penalty(), run.model[0].weight)


def other_list(run):
    groups = run.optimizer.param_groups
    groups[0]["params"] = [p for p in groups[0]["params"] if p.dim() > 1 or p.numel() == 90]


def shorter_list(run):
    run.optimizer.param_groups[0]["params"].pop()


def gradient_of_frozen(run):
    run.to_frozen = not run.model[4].weight.requires_grad
    run.model[4].weight.requires_grad_(False)


CHANGES = [
    replace_layer, freeze, move, edit, edit_much, move_moment, count_anew, clear_state, other_lr,
    tensor_lr, other_betas, no_momentum, other_strength, no_strength, other_exponent, other_target,
    more_vectors, auto, load, other_dtype, evaluate, differentiate, other_list,
    shorter_list, gradient_of_frozen,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("way", WAYS)
def test_a_change_between_prepared_steps_counts(way, change, monkeypatch):
    def trained():
        run = Run(way)
        for i in range(30):
            if i in (14, 22):
                change(run)
            run.step()
        return run.numbers()

    found = trained()
    never(monkeypatch)
    assert_same(found, trained())


@pytest.mark.parametrize("way", WAYS)
def test_gradients_that_are_missing_in_some_steps(way, monkeypatch):
    def trained():
        run = Run(way)
        for i in range(30):
            run.step(without={"0.weight"} if i % 3 else ())
        return run.numbers()

    found = trained()
    never(monkeypatch)
    assert_same(found, trained())


def test_a_gradient_that_is_always_missing_is_created_in_prepared_steps(slow_steps):
    run = Run("attached")
    for _ in range(5):
        run.step(without={"3.weight"})
    slow_steps.clear()
    for _ in range(5):
        run.step(without={"3.weight"})
        assert run.model[3].weight.grad is not None
    assert slow_steps == []


BAD = {
    "freed": (lambda p: p.grad.untyped_storage().resize_(0), "no memory of its own"),
    "negative": (lambda p: setattr(p, "grad", torch._neg_view(p.grad)), "negative bit"),
    "weight freed": (lambda p: p.untyped_storage().resize_(0), "no memory of its own"),
    "weight negative": (lambda p: setattr(p, "data", torch._neg_view(p.data)), "negative bit"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("way", WAYS)
def test_memory_that_a_prepared_step_must_not_touch(way, bad):
    run = Run(way)
    for _ in range(20):
        run.step()
    spoil, message = BAD[bad]

    def spoiled():
        run.optimizer.zero_grad()
        for p in run.model.parameters():
            p.grad = torch.randn_like(p)
        spoil(run.model[0].weight)
        before = [p.detach().clone() for p in run.model.parameters() if p is not weight]
        with pytest.raises(ValueError, match=message):
            run.reg.accumulate_grad_() if way == "accumulated" else run.optimizer.step()
        after = [p.detach() for p in run.model.parameters() if p is not weight]
        assert_same(after, before)

    weight = run.model[0].weight
    spoiled()


@pytest.mark.parametrize("way", WAYS)
def test_gradients_that_share_memory_are_refused(way):
    run = Run(way)
    for _ in range(20):
        run.step()
    for p in run.model.parameters():
        p.grad = torch.randn_like(p)
    shared = torch.randn(2 * 90)
    run.model[0].bias.grad, run.model[2].bias.grad = shared[:90], shared[40:130]
    with pytest.raises(ValueError, match="share memory"):
        run.reg.accumulate_grad_() if way == "accumulated" else run.optimizer.step()


@pytest.mark.parametrize("way", WAYS)
def test_prepared_steps_keep_no_gradients(way):
    run = Run(way)
    for _ in range(20):
        run.step()
    refs = [weakref.ref(p.grad) for p in run.model.parameters()]
    run.optimizer.zero_grad()
    assert all(ref() is None for ref in refs)


def test_what_is_prepared_is_collected_with_its_model():
    """Also a model that holds its regularizer: a cycle, which garbage collection must see."""
    model = net()
    model.reg = SpectralRegularizer(model, 0.1)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        model.reg.accumulate_grad_()
    ref = weakref.ref(model[0])
    del model, p
    gc.collect()
    assert ref() is None


@pytest.mark.parametrize("way", WAYS)
def test_a_step_that_changes_every_time_is_seldom_prepared(way, monkeypatch):
    made = []
    original = guard.Guard.__init__

    def counted(self, *args, **options):
        made.append(1)
        original(self, *args, **options)

    monkeypatch.setattr(guard.Guard, "__init__", counted)
    run = Run(way)
    for _ in range(100):
        move(run)
        run.step()
    assert len(made) <= 8


def test_versions_count_prepared_steps():
    run = Run("attached")
    for _ in range(5):
        run.step()
    for p in run.model.parameters():
        p.grad = torch.randn_like(p)
    grad = run.model[0].weight.grad
    before = grad._version
    run.reg.accumulate_grad_()
    run.reg.accumulate_grad_()
    assert grad._version >= before + 2
    other = Run("SpectralAdamW")
    for _ in range(5):
        other.step()
    before = [p._version for p in other.model.parameters()]
    other.step()
    assert all(p._version > n for p, n in zip(other.model.parameters(), before, strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_other_backends_look_once_and_run_their_own_stages(way, slow_steps, monkeypatch):
    run = Run(way, backend="reference")
    for _ in range(14):
        run.step()
    slow_steps.clear()
    for _ in range(5):
        run.step()
    assert "_bound" not in slow_steps
    never(monkeypatch)
    other = Run(way, backend="reference")
    for _ in range(19):
        other.step()
    assert_same(run.numbers(), other.numbers())


def test_parameters_of_two_dtypes_are_taken_in_one_step(slow_steps, monkeypatch):
    def trained():
        run = Run("attached")
        run.model[3].to(torch.bfloat16)
        for _ in range(20):
            run.step()
        return run.numbers()

    found = trained()
    assert slow_steps.count("_bound") <= 6
    never(monkeypatch)
    assert_same(found, trained())

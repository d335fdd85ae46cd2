"""Models whose modules are replaced, resized, deleted, added, frozen and unfrozen."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from spectral_kernels import SpectralAdamW, SpectralRegularizer, SpectralSGD

from ..support.small_nets import zero_gradients

OPTIONS = {"strength": 0.1, "warmup": 300}


def net():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
    model.head = nn.Linear(8, 3)
    return model


class Way:
    """A way to apply the penalty: ``reg`` and ``step()``, with gradients of zero."""

    def __init__(self, name, model, **options):
        self.name, self.model = name, model
        options = {**OPTIONS, **options}
        if name in ("SpectralAdamW", "SpectralSGD"):
            kind = {"SpectralAdamW": SpectralAdamW, "SpectralSGD": SpectralSGD}[name]
            self.optimizer = kind(model, lr=0.01, weight_decay=0, **options)
            self.reg = self.optimizer.regularizer
            return
        self.optimizer = torch.optim.SGD(model.parameters(), 0.01)
        self.reg = SpectralRegularizer(model, **options)
        if name in ("attached", "decoupled"):
            self.reg.attach(self.optimizer, decoupled=name == "decoupled")

    @property
    def readings(self):
        return self.optimizer if self.name.startswith("Spectral") else self.reg

    def add(self, module):
        self.optimizer.add_param_group({"params": list(module.parameters())})

    def step(self):
        self.optimizer.zero_grad()
        zero_gradients(self.model)
        if self.name == "penalty":
            self.reg.penalty().backward()
        elif self.name == "accumulated":
            self.reg.accumulate_grad_()
        self.optimizer.step()


IN_STEPS = ["attached", "decoupled", "SpectralAdamW", "SpectralSGD"]
every_way = pytest.mark.parametrize("name", ["penalty", "accumulated", *IN_STEPS])
in_steps = pytest.mark.parametrize("name", IN_STEPS)


def largest(weight):
    return float(torch.linalg.matrix_norm(weight.detach().flatten(1).double(), 2))


def scaled(module, factor=4):
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(factor)
    return module


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same_as_fresh(way, part, n=1):
    """Take ``n`` steps; those of ``part`` are as with what is built anew on a copy of the model."""
    twin = copy.deepcopy(way.model)
    fresh, before = Way(way.name, twin), largest(part(way.model).weight)
    for _ in range(n):
        way.step(), fresh.step()
    for p, q in zip(part(way.model).parameters(), part(twin).parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    ours, theirs = (
        {row.name: (row.shape, row.sigma) for row in x.readings.report()} for x in (way, fresh)
    )
    assert ours.keys() == theirs.keys()
    for key, (shape, sigma) in ours.items():
        assert shape == theirs[key][0]
        if way.name != "SpectralAdamW":  # it has moments of the other parameters
            assert sigma == pytest.approx(theirs[key][1], rel=1e-3)
    assert largest(part(way.model).weight) < before  # it is regularized
    return ours


# ---------------------------------------------------------------------- replaced and resized


@every_way
@pytest.mark.parametrize("classes", [3, 5])
def test_a_module_that_is_replaced_is_followed(name, classes):
    way = Way(name, net())
    way.step(), way.step()
    old, way.model.head = way.model.head, scaled(nn.Linear(8, classes))
    way.add(way.model.head)
    kept, truth = weights(old), largest(way.model.head.weight)
    found = same_as_fresh(way, lambda model: model.head)
    assert found["head.weight"][0] == (classes, 8)
    assert all(torch.equal(p, kept[key]) for key, p in old.named_parameters())
    assert float(way.readings.sigma[-1]) == pytest.approx(
        largest(way.model.head.weight) if name.startswith("Spectral") else truth, rel=1e-3
    )


@every_way
def test_a_container_that_is_replaced_is_followed_with_all_that_is_in_it(name):
    way = Way(name, net())
    way.step()
    way.model.body = scaled(nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 7), nn.Linear(7, 8)))
    way.add(way.model.body)
    same_as_fresh(way, lambda model: model.body[1])
    assert way.reg.names == ["body.0.weight", "body.1.weight", "body.2.weight", "head.weight"]


@every_way
def test_a_parameter_of_another_shape_is_followed(name):
    way = Way(name, net())
    way.step()
    head = way.model.head
    with torch.no_grad():
        head.weight = nn.Parameter(4 * torch.cat((head.weight, torch.randn(2, 8))))
        head.bias = nn.Parameter(torch.ones(5))
    way.add(head)
    same_as_fresh(way, lambda model: model.head)


@every_way
def test_parts_of_a_resized_parameter_are_of_the_new_size(name):
    def sizes():
        return [(row.name, row.shape) for row in way.reg.report()]

    model = nn.ModuleDict({"rnn": nn.GRUCell(4, 6)})
    way = Way(name, model)
    way.step()
    assert sizes()[0] == ("rnn.weight_ih[r]", (6, 4))
    model["rnn"] = nn.GRUCell(4, 5)
    way.add(model["rnn"])
    way.step()
    assert sizes()[0] == ("rnn.weight_ih[r]", (5, 4))
    assert float(way.reg.sigma[0]) == pytest.approx(largest(model["rnn"].weight_ih[:5]), rel=0.02)


def test_start_vectors_are_the_old_ones_where_the_shape_fits():
    model = net()
    reg = SpectralRegularizer(model, **{**OPTIONS, "warmup": 0})
    for _ in range(30):
        reg.accumulate_grad_()
    kept = reg.state_dict()["vectors"]
    model.head = nn.Linear(8, 5)
    found = reg.state_dict()["vectors"]
    assert all(torch.equal(found[name], v) for name, v in kept.items())
    model.body[2], model.head = nn.Linear(8, 9), nn.Linear(9, 5)
    found = reg.state_dict()["vectors"]
    assert found["head.weight"].shape == (1, 9)
    assert torch.equal(found["body.0.weight"], kept["body.0.weight"])


def test_an_initial_target_is_measured_anew_for_other_weights():
    model = net()
    reg = SpectralRegularizer(model, target="initial")
    reg.accumulate_grad_()
    before = reg.state_dict()["initial"]
    model.head = scaled(nn.Linear(8, 3))
    found = reg.state_dict()["initial"]
    assert found["head.weight"] == pytest.approx(largest(model.head.weight), rel=1e-3)
    assert found["body.0.weight"] == before["body.0.weight"]


def test_a_tied_weight_is_kept_when_one_of_its_modules_is_replaced():
    model = net()
    model.twin = nn.Linear(8, 3, bias=False)
    model.twin.weight = model.head.weight
    reg = SpectralRegularizer(model)
    assert reg.names[-1] == "head.weight"
    model.head = nn.Linear(8, 3)
    assert reg.names[-2:] == ["head.weight", "twin.weight"]
    del model.twin
    with pytest.warns(UserWarning, match=r"'twin\.weight' was removed"):
        assert reg.names[-1] == "head.weight"


def test_a_wrapper_around_a_module_changes_nothing():
    model = net()
    reg = SpectralRegularizer(model, backend="reference")
    reg.accumulate_grad_()
    expected, names = reg.sigma, reg.names
    model.head = torch.compile(model.head, backend="eager")
    assert reg.names == names
    assert torch.equal(reg.sigma, expected)


def test_nothing_is_selected_again_while_the_model_stays(monkeypatch):
    way, calls = Way("attached", net()), []
    follower = way.reg._selection.follower
    monkeypatch.setattr(follower, "followed", lambda *args, **kw: calls.append(args))
    for p in way.model.parameters():
        p.data = p.data.clone()
    way.step(), way.step(), way.reg.report()
    assert not calls


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("first", [True, False])
def test_copies_follow_their_own_model(how, first):
    model = net()
    reg = SpectralRegularizer(model, **OPTIONS, include=(x for x in ("*",)))
    reg.accumulate_grad_()
    if first:
        model.head = nn.Linear(8, 5)
    model, reg = how((model, reg))
    if not first:
        model.head = nn.Linear(8, 5)
    reg.accumulate_grad_()
    assert float(reg.sigma[-1]) == pytest.approx(largest(model.head.weight), rel=1e-3)
    assert model.head.weight.grad is not None


def test_pairs_of_names_and_parameters_are_not_followed():
    model = net()
    reg = SpectralRegularizer(model.named_parameters())
    model.head = nn.Linear(8, 5)
    assert reg.report()[-1].shape == (3, 8)
    with pytest.raises(RuntimeError, match=r"expected a module.*, got .*pairs"):
        reg.reselect()


# ---------------------------------------------------------------- what no optimizer holds


@in_steps
def test_a_new_parameter_that_the_optimizer_does_not_hold_is_named(name):
    way = Way(name, net())
    way.step()
    way.model.head = scaled(nn.Linear(8, 5))
    before, kind = weights(way.model), type(way.optimizer).__name__
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"'head\.weight' was replaced.*{kind} does not"):
            way.step()
    assert all(torch.equal(p, before[key]) for key, p in way.model.named_parameters())
    way.add(way.model.head)
    same_as_fresh(way, lambda model: model.head)


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_fresh_optimizer_takes_over_after_a_replacement(decoupled):
    model = net()
    reg, old = SpectralRegularizer(model, **OPTIONS), torch.optim.SGD(model.parameters(), 0.01)
    handle = reg.attach(old, decoupled=decoupled)
    zero_gradients(model)
    old.step()
    with pytest.raises(RuntimeError, match="attached to it already"):
        reg.attach(old)
    model.head = scaled(nn.Linear(8, 3))
    new, before = torch.optim.SGD(model.parameters(), 0.01), largest(model.head.weight)
    zero_gradients(model)
    with pytest.raises(RuntimeError, match=r"'head\.weight'.*SGD does not hold"):
        old.step()
    reg.attach(new, decoupled=decoupled)
    assert not handle.active
    new.step()
    assert largest(model.head.weight) < before
    with pytest.raises(RuntimeError, match="already"):
        reg.attach(torch.optim.SGD(model.parameters(), 0.01))


def test_a_new_head_may_go_to_the_other_of_two_optimizers():
    model = net()
    body = torch.optim.SGD([*model.parameters()], 0.01)
    other = torch.optim.Adam([nn.Parameter(torch.ones(2))], 0.01)
    reg = SpectralRegularizer(model, **OPTIONS)
    reg.attach([body, other])
    zero_gradients(model)
    body.step(), other.step()
    model.head = scaled(nn.Linear(8, 3))
    other.add_param_group({"params": model.head.parameters()})
    zero_gradients(model)
    body.step()
    assert model.head.weight.grad.abs().max() == 0
    assert model.body[0].weight.grad.abs().max() > 0
    zero_gradients(model)
    other.step()
    assert model.head.weight.grad.abs().max() > 0
    assert model.body[0].weight.grad.abs().max() == 0


# ------------------------------------------------------------------------ deleted and added


def by_del(model):
    del model.head


def by_none(model):
    model.head = None


def by_identity(model):
    model.head = nn.Identity()


@every_way
@pytest.mark.parametrize("delete", [by_del, by_none, by_identity])
def test_a_module_that_is_deleted_leaves_with_one_warning(name, delete):
    way = Way(name, net())
    way.step()
    delete(way.model)
    with pytest.warns(UserWarning, match=r"'head\.weight', 'head\.bias' were removed") as said:
        way.step()
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        way.step()
    assert way.reg.names == ["body.0.weight", "body.2.weight"]


def test_a_model_of_which_nothing_is_left_is_refused():
    model = nn.ModuleDict({"head": nn.Linear(4, 3)})
    reg = SpectralRegularizer(model)
    del model["head"]
    with pytest.raises(ValueError, match="nothing to regularize was found"):
        reg.penalty()


@pytest.mark.parametrize("look", [repr, "report", "metrics", "state_dict"])
def test_added_parameters_are_named_once(look):
    model = net()
    reg = SpectralRegularizer(model, exclude="*.bias")
    reg.accumulate_grad_()
    model.second = nn.Sequential(nn.Linear(8, 2), nn.Embedding(3, 3))
    call = (lambda: repr(reg)) if look is repr else getattr(reg, look)
    with pytest.warns(UserWarning, match=r"'second\.0\.weight' was added.*reselect\(\)") as said:
        call(), call()
    assert len(said) == 1
    assert "second.0.weight" not in reg.names
    model.third = nn.Linear(8, 2)
    with pytest.warns(UserWarning, match=r"^parameter 'third\.weight' was added"):
        call()


@every_way
def test_reselect_takes_added_parameters_in(name):
    way = Way(name, net())
    way.step()
    kept = way.reg.state_dict()["vectors"]
    way.model.second = scaled(nn.Linear(8, 4))
    if name in IN_STEPS:
        kind = type(way.optimizer).__name__
        with pytest.raises(RuntimeError, match=rf"'second\.weight' was.*{kind} does not hold"):
            way.readings.reselect()
        assert "second.weight" not in way.reg.names
    way.add(way.model.second)
    way.step()
    assert way.reg.names[-1] == "head.weight"
    way.readings.reselect()
    assert way.reg.names[-1] == "second.weight"
    way.optimizer.state.clear()
    assert kept.keys() < way.reg.state_dict()["vectors"].keys()
    same_as_fresh(way, lambda model: model.second)


def test_patterns_may_match_nothing_any_more():
    model = net()
    reg = SpectralRegularizer(
        model, strength={"head.*": 0.1, "*": 0.2}, target={"head.*": 2, "*": 1}, exclude="head.bias"
    )
    del model.head
    with pytest.warns(UserWarning, match="was removed"):
        reg.accumulate_grad_()
    reg.reselect()
    assert reg.names == ["body.0.weight", "body.2.weight"]


def test_a_log_goes_on_with_what_is_left(tmp_path):
    model = net()
    reg = SpectralRegularizer(model)
    log = reg.log_to(tmp_path / "log.csv")
    log(0)
    del model.head
    with pytest.warns(UserWarning, match="were removed"):
        log(1)
    header, first, second = (tmp_path / "log.csv").read_text().splitlines()
    place = header.split(",").index("sigma/head.weight")
    assert float(first.split(",")[place]) > 0
    assert second.split(",")[place] == "nan"
    before, after = (float(line.split(",")[place - 1]) for line in (first, second))
    assert after == pytest.approx(before, rel=0.02)


# ------------------------------------------------------------------------- frozen, unfrozen


@every_way
def test_a_layer_that_was_frozen_at_first_is_regularized_once_it_is_not(name):
    model = net()
    model.body.requires_grad_(False)
    way = Way(name, model)
    way.step()
    assert way.reg.names == ["head.weight"]
    model.body[2].requires_grad_(True)
    scaled(model.body[2], 1.5)
    way.optimizer.state.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = same_as_fresh(way, lambda model: model.body[2])
    assert list(found) == ["body.2.weight", "head.weight"]


@every_way
def test_a_frozen_layer_with_a_gradient_of_zeros_does_not_move(name):
    way = Way(name, scaled(net()))
    way.model.body.requires_grad_(False)
    for p in way.model.parameters():
        p.grad = torch.zeros_like(p)
    before = weights(way.model)
    for _ in range(2):
        way.step()
        for p in way.model.body.parameters():
            p.grad = torch.zeros_like(p)
    moved = {key for key, p in way.model.named_parameters() if not torch.equal(p, before[key])}
    assert moved == {"head.weight", "head.bias"}
    way.model.body.requires_grad_(True)
    way.step()
    assert not torch.equal(way.model.body[0].weight, before["body.0.weight"])


def test_the_penalty_leaves_frozen_layers_out():
    model = net()
    reg = SpectralRegularizer(model, **OPTIONS)
    reg.penalty()
    model.body.requires_grad_(False)
    expected = SpectralRegularizer(copy.deepcopy(model), **OPTIONS).penalty()
    torch.testing.assert_close(reg.penalty(), expected, rtol=1e-4, atol=0)
    reg.strength = torch.tensor(OPTIONS["strength"])
    torch.testing.assert_close(reg.penalty(), expected, rtol=1e-4, atol=0)


# ----------------------------------------------------------------------------- strength zero


@every_way
@pytest.mark.parametrize("strength", [0, {"head.*": 0, "*": 0.1}])
def test_a_head_of_strength_zero_gets_no_gradient(name, strength):
    model = net()
    way = Way(name, model, strength=strength)
    before = weights(model.head)
    for _ in range(2):
        model.zero_grad()
        if name == "penalty":
            way.reg.penalty().backward()
        elif name == "accumulated":
            way.reg.accumulate_grad_()
        way.optimizer.step()
    assert all(p.grad is None for p in model.head.parameters())
    assert all(torch.equal(p, before[key]) for key, p in model.head.named_parameters())
    assert all(p not in way.optimizer.state or not way.optimizer.state[p].get("step")
               for p in model.head.parameters())  # fmt: skip
    way.reg.strength = 0.1
    way.step()
    assert not torch.equal(model.head.weight, before["weight"])


def test_a_gradient_of_strength_zero_keeps_its_bits():
    model = net()
    model.head.weight.data[0, 0] = torch.inf
    reg = SpectralRegularizer(model, strength={"head.*": 0, "*": 0.1})
    model.head.weight.grad = torch.full((3, 8), 0.3)
    reg.accumulate_grad_()
    assert torch.equal(model.head.weight.grad, torch.full((3, 8), 0.3))


def test_second_derivatives_leave_strength_zero_out():
    model = net()
    for strength in (0, {"head.*": 0, "*": 0.1}):
        reg = SpectralRegularizer(model, strength=strength)
        found = torch.autograd.grad(
            reg.penalty(), list(model.parameters()), create_graph=True, allow_unused=True
        )
        assert found[-1] is found[-2] is None
        assert (found[0] is None) == (strength == 0)

"""Copies and pickles of what holds a model, its optimizer and the regularizer attached to it."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

from spectral_kernels import SpectralRegularizer, SpectralSGD
from spectral_kernels.engine.model_buckets import ModelBuckets

from ..support.models import close
from ..support.small_nets import zero_gradients


def by_torch(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


copies = pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), by_torch]
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def agent(several=False, **options):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    reg = SpectralRegularizer(model, 0.5)
    if several:
        optimizers = [torch.optim.SGD(model[0].parameters(), 0.1, momentum=0.9),
                      torch.optim.Adam(model[2].parameters(), 0.1)]  # fmt: skip
    else:
        optimizers = [torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)]
    handle = reg.attach(optimizers, **options)
    return {"model": model, "optimizers": optimizers, "reg": reg, "handle": handle}


def train(agent, steps=3):
    x = torch.randn(steps, 4, 6, generator=torch.Generator().manual_seed(1))
    for batch in x:
        agent["model"].zero_grad()
        agent["model"](batch).square().mean().backward()
        for optimizer in agent["optimizers"]:
            optimizer.step()
    return [p.detach().clone() for p in agent["model"].parameters()]


ORDERS = [
    ("model", "optimizers", "reg", "handle"), ("handle", "reg", "optimizers", "model"),
    ("reg", "handle", "model", "optimizers"), ("optimizers", "handle", "model", "reg"),
    ("model", "optimizers", "reg"), ("reg", "model", "optimizers"),
    ("model", "handle", "optimizers"),
]  # fmt: skip


@copies
@pytest.mark.parametrize("order", ORDERS, ids=" ".join)
@pytest.mark.parametrize("several", [False, True])
def test_a_copy_trains_as_the_original_does(copied, order, several):
    original = agent(several)
    train(original)
    twin = copied({name: original[name] for name in order})
    expected = train(original)
    close(train(twin), expected, rtol=0, atol=0)
    if "handle" in twin:
        assert twin["handle"].active
        assert twin["handle"].optimizers == twin["optimizers"]
        twin["handle"].remove()
        before = train(twin)
        assert not all(torch.equal(a, b) for a, b in zip(before, train(original), strict=True))
    assert original["handle"].active
    again = copied(copied(original))
    close(train(again), train(original), rtol=0, atol=0)


@copies
def test_options_of_attach_are_copied(copied):
    original = agent(decoupled=True, shared=True)
    train(original)
    twin = copied(original)
    close(train(twin), train(original), rtol=0, atol=0)
    twin["reg"].penalty().backward()
    twin["optimizers"][0].step()  # shared: not refused


@copies
def test_a_copy_is_refused_what_the_original_is(copied):
    twin = copied(agent())
    with pytest.raises(RuntimeError, match="attached to it already"):
        twin["reg"].attach(twin["optimizers"])
    twin["reg"].penalty().backward()
    with pytest.raises(RuntimeError, match="leave out penalty"):
        twin["optimizers"][0].step()


@copies
def test_what_has_ended_stays_ended(copied):
    original = agent()
    original["handle"].remove()
    twin = copied(original)
    assert not twin["handle"].active
    close(train(twin), train(original), rtol=0, atol=0)


@copies
def test_an_optimizer_with_the_penalty_inside_is_copied_as_ever(copied):
    model = nn.Linear(4, 3)
    optimizer = SpectralSGD(model, 0.1, strength=0.5)
    original = {"model": model, "optimizers": [optimizer]}
    zero_gradients(model)
    optimizer.step()
    twin = copied(original)
    zero_gradients(twin["model"])
    for each in (optimizer, twin["optimizers"][0]):
        each.step()
    close([p.detach() for p in twin["model"].parameters()],
          [p.detach() for p in model.parameters()], rtol=1e-6, atol=1e-7)  # fmt: skip
    reg = SpectralRegularizer(twin["model"], 0.5)
    reg.penalty().backward()
    with pytest.raises(RuntimeError, match="leave out penalty"):
        twin["optimizers"][0].step()


@copies
def test_a_copy_without_the_optimizer_says_that_it_is_not_attached(copied):
    original = agent()
    twin = copied({"model": original["model"], "reg": original["reg"]})
    with pytest.warns(UserWarning, match=r"not attached: .*SGD, was not copied together"):
        twin["reg"].penalty()
    twin["reg"].penalty()
    with pytest.warns(UserWarning, match="not attached"):
        copied(original["reg"]).penalty()
    handle = copied(original["handle"])
    assert not handle.active
    handle.remove()


@copies
def test_a_copy_that_is_attached_anew_says_nothing(copied):
    original = agent()
    twin = copied({"model": original["model"], "reg": original["reg"]})
    optimizer = torch.optim.SGD(twin["model"].parameters(), 0.1)
    twin["reg"].attach(optimizer)
    zero_gradients(twin["model"])
    optimizer.step()


@pytest.mark.parametrize("built_at_once", [False, True])
@copies
def test_a_copy_made_before_the_first_step_warms_its_vectors_up_too(
    copied, built_at_once, monkeypatch
):
    monkeypatch.setattr(ModelBuckets, "_some_traced", built_at_once)
    original = agent()
    twin = copied(original)
    close(train(twin), train(original), rtol=0, atol=0)


def test_shallow_copies_add_no_penalty():
    original, other = agent(), agent()
    other["model"].load_state_dict(original["model"].state_dict())
    twin, handle = copy.copy(original["reg"]), copy.copy(original["handle"])
    assert not handle.active
    close(train(original), train(other), rtol=0, atol=0)
    twin.penalty()
    original["handle"].remove()
    original["reg"].load_state_dict(original["reg"].state_dict())
    twin.penalty()


@copies
def test_a_model_that_holds_all_of_it(copied):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    model.reg = SpectralRegularizer(model, 0.5)
    model.optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.handle = model.reg.attach(model.optimizer)
    found = []
    for each in (model, copied(model)):
        found.append(train({"model": each, "optimizers": [each.optimizer]}))
        assert each.handle.active
    close(*found, rtol=0, atol=0)

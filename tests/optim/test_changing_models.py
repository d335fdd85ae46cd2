"""Optimizers with the penalty in their step, of models whose modules are replaced or added."""

import copy
import io

import pytest
import torch
from torch import nn

from spectral_kernels import SpectralAdamW, SpectralSGD

from ..support.small_nets import net, zero_gradients

# Estimates of sigma are compared with the SVD: how near they come depends on the matrix, and where
# the penalty has drawn two singular values to their target, it is less than 1 %.
pytestmark = pytest.mark.usefixtures("seeded")
KINDS = {"adamw": SpectralAdamW, "sgd": SpectralSGD}
OPTIONS = {"lr": 0.01, "strength": 0.1, "weight_decay": 0.1, "warmup": 300}
every_kind = pytest.mark.parametrize("kind", KINDS)


def stepped(kind, model, optimizer=None, n=2, **options):
    """Take steps with gradients of zero, except that those of a discarded head stay None."""
    if optimizer is None:
        more = {"momentum": 0.9} if kind == "sgd" else {}
        optimizer = KINDS[kind](model, **{**OPTIONS, **more, **options})
    for _ in range(n):
        optimizer.zero_grad()
        zero_gradients(model)
        optimizer.step()
    return optimizer


def new_head(model, classes=5):
    old, model[2] = model[2], nn.Linear(8, classes)
    with torch.no_grad():
        for p in model[2].parameters():
            p.mul_(4)
    return old


def check_head(kind, model, optimizer):
    """The next step of the head is that of an optimizer that is built anew; nothing else moves."""
    held = {id(p): p.detach().clone() for g in optimizer.param_groups for p in g["params"]}
    own = set(map(id, model.parameters()))
    twin = copy.deepcopy(model)
    stepped(kind, twin, n=1), stepped(kind, model, optimizer, n=1)
    for p, q in zip(model[2].parameters(), twin[2].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    for group in optimizer.param_groups:
        for p in group["params"]:
            if id(p) not in own:
                assert torch.equal(p, held[id(p)])
    sigma = optimizer.sigma[optimizer.names.index("2.weight")]
    assert float(sigma) == pytest.approx(float(torch.linalg.svdvals(model[2].weight)[0]), rel=1e-2)
    assert optimizer.report()[-1].shape == tuple(model[2].weight.shape)


@every_kind
@pytest.mark.parametrize("classes", [3, 5])
@pytest.mark.parametrize("named", [True, False])
def test_a_new_head_in_a_new_group_is_regularized_at_the_next_step(kind, classes, named):
    model = net()
    optimizer = stepped(kind, model)
    new_head(model, classes)
    params = list(model[2].named_parameters(prefix="2") if named else model[2].parameters())
    optimizer.add_param_group({"params": params, "lr": 0.01})
    check_head(kind, model, optimizer)
    stepped(kind, model, optimizer)
    assert optimizer.names == ["0.weight", "2.weight"]


@every_kind
def test_a_new_group_of_an_optimizer_with_names_gets_them_from_the_model(kind):
    model = net()
    optimizer = KINDS[kind](model.named_parameters(), model=model, **OPTIONS)
    stepped(kind, model, optimizer)
    new_head(model)
    optimizer.add_param_group({"params": list(model[2].parameters())})
    assert optimizer.param_groups[1]["param_names"] == ["2.weight", "2.bias"]
    stepped(kind, model, optimizer, n=1)
    assert optimizer.report()[-1].shape == (5, 8)


@every_kind
@pytest.mark.parametrize("classes", [3, 5])
def test_a_replaced_entry_of_a_group_is_regularized_at_the_next_step(kind, classes):
    model = net()
    optimizer = stepped(kind, model)
    old = new_head(model, classes)
    params = optimizer.param_groups[0]["params"]
    for attribute in ("weight", "bias"):
        i = next(i for i, p in enumerate(params) if p is getattr(old, attribute))
        params[i] = getattr(model[2], attribute)
    check_head(kind, model, optimizer)
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    saved.seek(0)
    other = KINDS[kind](copy.deepcopy(model), **OPTIONS)
    other.load_state_dict(torch.load(saved))
    assert len(other.state_dict()["state"]) == 4


@every_kind
def test_checkpoints_go_on_after_a_new_head(kind):
    model = net()
    optimizer = stepped(kind, model)
    new_head(model)
    optimizer.add_param_group({"params": model[2].parameters()})
    stepped(kind, model, optimizer)
    saved, twin = copy.deepcopy(optimizer.state_dict()), copy.deepcopy((model, optimizer))
    stepped(kind, model, optimizer)
    stepped(kind, *twin)
    for p, q in zip(model.parameters(), twin[0].parameters(), strict=True):
        assert torch.equal(p, q)
    optimizer.load_state_dict(saved)
    stepped(kind, model, optimizer)


@every_kind
def test_a_backbone_that_is_added_to_a_group_is_regularized_after_reselect(kind):
    model = net()
    optimizer = KINDS[kind](model[2].parameters(), model=model, **OPTIONS)
    stepped(kind, model, optimizer)
    assert optimizer.names == ["2.weight"]
    optimizer.add_param_group({"params": model[0].parameters()})
    stepped(kind, model, optimizer)
    assert optimizer.names == ["2.weight"]
    optimizer.reselect()
    assert optimizer.names == ["0.weight", "2.weight"]
    stepped(kind, model, optimizer)
    assert float(optimizer.sigma[0]) == pytest.approx(
        float(torch.linalg.svdvals(model[0].weight)[0]), rel=1e-2
    )


@every_kind
def test_what_is_added_to_the_model_alone_stays_out(kind):
    model = net()
    optimizer = stepped(kind, model)
    model.append(nn.Linear(3, 2))
    stepped(kind, model, optimizer)
    with pytest.raises(RuntimeError, match=rf"'3\.weight' was.*{KINDS[kind].__name__} does not"):
        optimizer.reselect()
    with pytest.warns(UserWarning, match=r"'3\.weight', '3\.bias' were added.*reselect"):
        repr(optimizer)
    stepped(kind, model, optimizer)
    assert optimizer.names == ["0.weight", "2.weight"]


@every_kind
def test_a_frozen_layer_takes_the_step_of_torch(kind):
    """Weight decay and momentum act on a gradient of zeros, the penalty does not."""
    model, other = net(), net()
    other.load_state_dict(model.state_dict())
    theirs = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[kind]
    optimizer = KINDS[kind](model, **OPTIONS)
    second = theirs(other.parameters(), lr=0.01, weight_decay=0.1)
    for one in (model, other):
        one[0].requires_grad_(False)
    for one, opt in ((model, optimizer), (other, second)):
        for _ in range(3):
            zero_gradients(one)
            opt.step()
    for p, q in zip(model[0].parameters(), other[0].parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert not torch.allclose(model[2].weight, other[2].weight)

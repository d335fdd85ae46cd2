"""A parameter gets one penalty per step, and a step that would add another one says so."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from spectral_kernels import SpectralAdamW, SpectralRegularizer, SpectralSGD

from ..support.models import close
from ..support.small_nets import net, sgd, zero_gradients


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def without_gc():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def moved_by(step, model):
    """How far a step on zero gradients moves each parameter."""
    before = [p.detach().clone() for p in model.parameters()]
    step()
    return [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]


def penalties_per_step(model, optimizer):
    """What the first step adds to a gradient, in units of the penalty's; ``optimizer`` has lr 0."""
    zero_gradients(model)
    (one,) = torch.autograd.grad(SpectralRegularizer(model, 0.1).penalty(), [model[0].weight])
    optimizer.step()
    return float(model[0].weight.grad.norm() / one.norm())


# -------------------------------------------------------------------------------- two attachments


def test_a_second_regularizer_of_the_same_parameters_is_refused():
    model = net()
    optimizer = sgd(model)
    first = SpectralRegularizer(model, 0.1).attach(optimizer)
    says = r"'0\.weight' gets a penalty in the steps of SGD already.*handle\.remove\(\).*replace"
    with pytest.raises(RuntimeError, match=says):
        SpectralRegularizer(model, 0.1).attach(optimizer)
    with pytest.raises(RuntimeError, match=says.replace(r"0\.", "")):
        SpectralRegularizer(model[0], 0.1).attach(sgd(model[0]))
    first.remove()
    assert SpectralRegularizer(model, 0.1).attach(optimizer).active


def test_a_trunk_of_two_optimizers_gets_the_penalty_of_one():
    trunk, heads = nn.Linear(6, 8), [nn.Linear(8, 3), nn.Linear(8, 2)]
    models = [nn.Sequential(trunk, head) for head in heads]
    optimizers = [torch.optim.Adam(models[0].parameters()), sgd(models[1])]
    SpectralRegularizer(models[0], 0.1).attach(optimizers[0])
    second = SpectralRegularizer(models[1], 0.1)
    with pytest.raises(RuntimeError, match=r"'0\.weight' gets a penalty in the steps of Adam "):
        second.attach(optimizers[1])
    alone = SpectralRegularizer(models[1], 0.1, exclude=["0.*"])
    assert alone.attach(optimizers[1]).active
    zero_gradients(models[1])
    moved = moved_by(optimizers[1].step, models[1])
    assert not moved[0].any()
    assert moved[2].any()


def test_replace_ends_the_attachments_of_a_lost_handle():
    model = net()
    optimizer = sgd(model, lr=0)
    lost = SpectralRegularizer(model, 0.1).attach(optimizer)
    reg = SpectralRegularizer(model, 0.1)
    handle = reg.attach(optimizer, replace=True)
    assert handle.active
    assert not lost.active
    again = reg.attach(optimizer, replace=True)
    assert again.active
    assert not handle.active
    assert penalties_per_step(model, optimizer) == pytest.approx(1)


def test_nothing_is_changed_by_an_attachment_that_is_refused():
    model, other = net(), net()
    optimizer = sgd(model)
    handle = SpectralRegularizer(model, 0.1).attach(optimizer)
    with pytest.raises(ValueError, match=r"does not hold parameter '0\.weight'"):
        SpectralRegularizer(other, 0.1).attach(optimizer, replace=True)
    with pytest.raises(ValueError, match="does not hold"):
        SpectralRegularizer(model, 0.1).attach(sgd(other), replace=True)
    assert handle.active


def test_shared_parameters_may_have_two_penalties():
    model = net()
    optimizer = sgd(model, lr=0)
    SpectralRegularizer(model, 0.1).attach(optimizer)
    reg = SpectralRegularizer(model, 0.1)
    reg.attach(optimizer, shared=True)
    assert penalties_per_step(model, optimizer) == pytest.approx(2)
    with pytest.raises(RuntimeError, match="attached to it already"):
        reg.attach(optimizer, shared=True)
    model, optimizers = net(), []
    for shared in (True, False):
        optimizers.append(sgd(model))
        SpectralRegularizer(model, 0.1).attach(optimizers[-1], shared=shared)


def test_optimizers_with_the_penalty_in_their_step_are_no_optimizers_to_attach_to():
    for kind in (SpectralSGD, SpectralAdamW):
        model = net()
        optimizer = kind(model, strength=0.1)
        with pytest.raises(
            TypeError, match=f"without the penalty in its step, got {kind.__name__}"
        ):
            optimizer.regularizer.attach(optimizer)
        with pytest.raises(TypeError, match="without the penalty in its step, got"):
            SpectralRegularizer(model, 0.1).attach(optimizer)


def test_their_parameters_get_no_other_penalty():
    model = net()
    optimizer, reg = SpectralSGD(model, 1.0, strength=0.1), SpectralRegularizer(model, 0.1)
    with pytest.raises(RuntimeError, match=r"'0\.weight' has its penalty in the steps of Spectral"):
        reg.attach(sgd(model))
    del optimizer
    handle = reg.attach(other := sgd(model))
    optimizer = SpectralSGD(model, 1.0, strength=0.1)
    zero_gradients(model)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"'0\.weight': .*SpectralSGD, and of the SGD to which"):
        optimizer.step()
    close(before, [p.detach() for p in model.parameters()], rtol=0, atol=0)
    handle.remove()
    optimizer.step()
    assert other is not None
    assert not torch.equal(before[0], model[0].weight)


# ------------------------------------------------------------------------- what nobody holds ends


@pytest.mark.usefixtures("without_gc")
def test_a_cell_that_runs_again_needs_no_handle_of_its_last_run():
    model = net()
    for _ in range(3):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        reg = SpectralRegularizer(model, 0.1)
        handle = reg.attach(optimizer)
    assert handle.active


@pytest.mark.usefixtures("without_gc")
@pytest.mark.parametrize("kept", ["optimizer", "reg", "handle", "model"])
def test_attachments_keep_nothing_alive(kept):
    model = net()
    zero_gradients(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    reg = SpectralRegularizer(model, 0.1)
    handle = reg.attach(optimizer)
    optimizer.step()
    things = {"optimizer": optimizer, "reg": reg, "handle": handle, "model": model}
    refs = {name: weakref.ref(thing) for name, thing in things.items()}
    own = things.pop(kept)
    things.clear()
    del model, optimizer, reg, handle
    # What a thing is made of stays: an optimizer has the hook, a regularizer the model.
    parts = {"optimizer": {"reg", "handle", "model"}, "reg": {"model"}}.get(kept, set())
    assert {name for name, ref in refs.items() if ref() is not None} == {kept, *parts}
    del own
    assert all(ref() is None for ref in refs.values())


@pytest.mark.usefixtures("without_gc")
def test_the_handle_of_an_optimizer_that_is_gone_is_not_active():
    model = net()
    optimizer = sgd(model)
    reg = SpectralRegularizer(model, 0.1)
    handle = reg.attach(optimizer)
    del optimizer
    assert not handle.active
    handle.remove()
    assert reg.attach(sgd_kept := sgd(model)).active
    assert sgd_kept is not None


def test_an_optimizer_in_a_cycle_of_references_counts_until_nobody_has_it():
    model = net()

    class Agent:
        def __init__(self):
            self.itself, self.optimizer = self, sgd(model)
            SpectralRegularizer(model, 0.1).attach(self.optimizer)

    Agent()
    optimizer = sgd(model)
    assert SpectralRegularizer(model, 0.1).attach(optimizer).active


# ------------------------------------------------------------------------------- steps in steps


class Twice(torch.optim.SGD):
    """Its step() calls that of its base class, twice: torch runs step hooks for all three."""

    fails = False

    def step(self, closure=None):
        if self.fails:
            raise ArithmeticError("before the steps of the base class")
        super().step(closure)
        return super().step()


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_step_that_calls_those_of_its_base_class_has_one_penalty(decoupled):
    model = net()
    plain = sgd(net())  # torch now runs hooks around SGD.step
    twin = copy.deepcopy(model)
    calls = []
    optimizer = Twice(model.parameters(), 1.0)
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    for own, one in ((model, optimizer), (twin, sgd(twin))):
        SpectralRegularizer(own, 0.1).attach(one, decoupled=decoupled)
        zero_gradients(own)
    expected = moved_by(optimizer.step, model)
    assert len(calls) == 3
    once = moved_by(one.step, twin)
    factor = 1 if decoupled else 2  # the base class goes along the same gradient twice
    close(expected, [factor * x for x in once], rtol=1e-4, atol=1e-6)
    assert plain is not None


def test_a_step_after_one_that_failed_has_its_penalty():
    model = net()
    zero_gradients(model)
    optimizer = Twice(model.parameters(), 1.0)
    SpectralRegularizer(model, 0.1).attach(optimizer)
    optimizer.fails = True
    with pytest.raises(ArithmeticError):
        optimizer.step()
    optimizer.fails = False
    zero_gradients(model)
    assert moved_by(optimizer.step, model)[0].any()

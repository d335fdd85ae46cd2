"""A gradient that holds the penalty already is marked, and a step refuses to add it again."""

import pytest
import torch

from spectral_kernels import SpectralRegularizer, SpectralSGD

from ..support import processes
from ..support.models import close, grads
from ..support.small_nets import net, sgd, zero_gradients


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def by_penalty(reg):
    reg.penalty().backward()


def by_penalty_in_the_loss(reg):
    (reg.penalty() + sum(ref.get().sum() for ref in reg._buckets.refs)).backward()


def by_accumulation(reg):
    reg.accumulate_grad_()


WAYS = {
    by_penalty: "penalty", by_penalty_in_the_loss: "penalty", by_accumulation: "accumulate_grad_",
}  # fmt: skip
ways = pytest.mark.parametrize("way", WAYS)


def attached(model):
    optimizer = sgd(model)
    reg = SpectralRegularizer(model, 0.1)
    reg.attach(optimizer)
    return reg, optimizer


def with_penalty_inside(model):
    return SpectralRegularizer(model, 0.1), SpectralSGD(model, 1.0, strength=0.1)


optimizers = pytest.mark.parametrize("make", [attached, with_penalty_inside])


@ways
@optimizers
def test_a_step_refuses_to_add_what_is_in_the_gradient_already(make, way):
    model = net()
    reg, optimizer = make(model)
    for _ in range(2):  # also after steps that were right
        zero_gradients(model)
        way(reg)
        before = [p.detach().clone() for p in model.parameters()], grads(model)
        vectors = reg.state_dict()["vectors"]
        for _ in range(2):  # again as long as nothing has changed
            says = rf"'0\.weight': {WAYS[way]}\(\) has put .* adds it again; leave out {WAYS[way]}"
            with pytest.raises(RuntimeError, match=says):
                optimizer.step()
        close([p.detach() for p in model.parameters()], before[0], rtol=0, atol=0)
        close(grads(model), before[1], rtol=0, atol=0)
        for name, v in reg.state_dict()["vectors"].items():
            assert torch.equal(v, vectors[name])
        optimizer.zero_grad()
        zero_gradients(model)
        optimizer.step()


@ways
def test_after_the_refusal_zero_grad_in_place_is_enough(way):
    model = net()
    reg, optimizer = attached(model)
    zero_gradients(model)
    way(reg)
    with pytest.raises(RuntimeError, match="adds it again"):
        optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()


@ways
def test_other_regularizers_matter_where_they_share_a_parameter(way):
    model, other = net(), net()
    _, optimizer = attached(model)
    part, apart = SpectralRegularizer(model[0], 0.2), SpectralRegularizer(other, 0.2)
    zero_gradients(model)
    way(apart)
    optimizer.step()
    way(part)
    with pytest.raises(RuntimeError, match=r"parameter '0\.(weight|bias)'"):
        optimizer.step()


@ways
def test_gradients_that_were_put_away_are_free_of_it(way):
    model = net()
    reg, optimizer = attached(model)
    zero_gradients(model)
    way(reg)
    kept = [p.grad for p in model.parameters()]
    optimizer.zero_grad()
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    assert kept[0].any()


@ways
def test_micro_batches_after_it_do_not_hide_it(way):
    model = net()
    reg, optimizer = attached(model)
    way(reg)
    for _ in range(3):
        model(torch.randn(4, 6)).sum().backward()
    with pytest.raises(RuntimeError, match="adds it again"):
        optimizer.step()


def test_a_closure_that_adds_it_is_seen():
    model = net()
    reg, optimizer = attached(model)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(1, 6)).sum() + reg.penalty()
        loss.backward()
        return loss

    for kind in (optimizer, SpectralSGD(twin := net(), 1.0, strength=0.1)):
        if kind is not optimizer:
            reg = SpectralRegularizer(twin, 0.1)
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(RuntimeError, match="leave out penalty"):
            kind.step(closure)
        close([p.detach() for p in model.parameters()], before, rtol=0, atol=0)


@optimizers
def test_looking_at_the_penalty_is_free(make):
    model = net()
    reg, optimizer = make(model)
    x = torch.randn(4, 6)
    for first in (True, False):
        optimizer.zero_grad()
        for looks in (first, not first):
            if looks:
                torch.autograd.grad(reg.penalty(), list(model.parameters()))
                torch.autograd.grad(reg.penalty(), [model[2].weight], create_graph=True)
                with torch.no_grad():
                    reg.penalty()
                reg.penalty()
            else:
                model(x).sum().backward()
        optimizer.step()


@pytest.mark.takes_seconds
def test_a_compiled_penalty_is_seen_and_looking_at_it_is_free():
    model = net()
    reg, optimizer = attached(model)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def loss_of(x):
        return model(x).square().mean() + reg.penalty()

    x = torch.randn(4, 6)
    optimizer.zero_grad()
    torch.autograd.grad(loss_of(x), list(model.parameters()))
    model(x).sum().backward()
    optimizer.step()
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(x).backward()
        with pytest.raises(RuntimeError, match=r"'0\.weight': penalty\(\) has put"):
            optimizer.step()


def test_a_backward_pass_into_a_part_of_the_parameters_is_seen():
    model = net()
    reg, optimizer = attached(model)
    zero_gradients(model)
    for frozen in (model[0].weight, model[2].bias):
        frozen.requires_grad_(False)
    for part in (model[2].weight, model[0].bias):
        optimizer.zero_grad()
        zero_gradients(model)
        reg.penalty().backward(inputs=[part])
        with pytest.raises(RuntimeError, match="adds it again"):
            optimizer.step()


def test_shared_attachments_do_not_look():
    model = net()
    optimizer = sgd(model)
    reg = SpectralRegularizer(model, 0.1)
    reg.attach(optimizer, shared=True)
    zero_gradients(model)
    reg.penalty().backward()
    optimizer.step()


@pytest.mark.takes_seconds
def test_where_no_step_adds_a_penalty_no_gradient_leaves_a_mark():
    done = processes.run(
        "import torch; from spectral_kernels import SpectralRegularizer\n"
        "reg = SpectralRegularizer(torch.nn.Linear(3, 2))\n"
        "reg.penalty().backward(); reg.accumulate_grad_()\n"
        "print(reg._buckets.mark)"
    )
    assert done.stdout == "None\n", done.stderr


def test_a_step_without_marks_looks_at_no_parameter(monkeypatch):
    model = net()
    zero_gradients(model)
    _, optimizer = attached(model)
    inside = SpectralSGD(other := net(), 1.0)
    zero_gradients(other)
    for each in (optimizer, inside):
        each.step()
    from spectral_kernels.engine.attach.once import StepPenalty

    def refuse(*_):
        raise AssertionError("a step without a mark compares two numbers")

    monkeypatch.setattr(StepPenalty, "_look", refuse)
    for each in (optimizer, inside):
        each.step()
    SpectralRegularizer(net(), 0.1).accumulate_grad_()
    with pytest.raises(AssertionError):
        optimizer.step()


@pytest.mark.parametrize("way", ["penalty", "accumulate_grad_"])
def test_tensors_can_be_swapped_after_a_gradient_of_the_penalty(way):
    """As ``module.to()`` does with ``torch.__future__.set_swap_module_params_on_conversion``."""
    model, other = net(), net()
    reg = SpectralRegularizer(model, 0.1)
    reg.attach(sgd(model))
    if way == "penalty":
        reg.penalty().backward()
    else:
        reg.accumulate_grad_()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        p.grad = None
        torch.utils.swap_tensors(p, q)


def test_a_gradient_with_the_penalty_in_it_can_be_saved(tmp_path):
    model = net()
    reg = SpectralRegularizer(model, 0.1)
    reg.attach(sgd(model))
    reg.accumulate_grad_()
    found = [p.grad for p in model.parameters()]
    torch.save(found, tmp_path / "grads.pt")
    loaded = torch.load(tmp_path / "grads.pt", weights_only=True)
    assert all(map(torch.equal, loaded, found))

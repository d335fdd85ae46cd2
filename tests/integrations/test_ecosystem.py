"""Beside other tools that change parameters, gradients and forward passes."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from spectral_kernels import SpectralAdamW, SpectralRegularizer, SpectralSGD
from spectral_kernels.backends import formulas

pytestmark = pytest.mark.usefixtures("seeded")


def built():
    return nn.Sequential(nn.Linear(12, 20), nn.LayerNorm(20), nn.ReLU(), nn.Linear(20, 5))


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_autocast_leaves_the_penalty_as_it_is():
    model, x = built(), torch.randn(6, 12)
    twin = copy.deepcopy(model)
    plain = SpectralRegularizer(twin, 0.1).penalty()
    plain.backward()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
        penalty = SpectralRegularizer(model, 0.1).penalty()
    penalty.backward()
    assert torch.equal(penalty, plain)
    for name, grad in gradients(model).items():
        assert torch.equal(grad, gradients(twin)[name])


@pytest.mark.parametrize("way", ["penalty", "attach"])
def test_activation_checkpointing_changes_nothing(way):
    x, results = torch.randn(6, 12), []
    for recompute in (False, True):
        torch.manual_seed(1)
        model = built()
        reg = SpectralRegularizer(model, 0.1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        if way == "attach":
            reg.attach(optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            y = checkpoint(model[:2], x, use_reentrant=False) if recompute else model[:2](x)
            loss = model[2:](y).square().mean()
            (loss + reg.penalty() if way == "penalty" else loss).backward()
            optimizer.step()
        results.append([*(p.detach() for p in model.parameters()), reg.sigma])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_averaged_weights_know_nothing_of_the_regularizer():
    model = built()
    keys = set(model.state_dict())
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = SpectralAdamW(model, 1e-2, strength=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(6, 12)).square().mean().backward()
        optimizer.step()
        averaged.update_parameters(model)
    assert set(model.state_dict()) == keys
    assert {name.removeprefix("module.") for name in averaged.state_dict()} - keys == {"n_averaged"}
    # The average is a model like others.
    reg = SpectralRegularizer(averaged, 0.1)
    assert len(reg.names) == 2
    assert not any(torch.equal(a, b) for a, b in zip(
        averaged.module.parameters(), model.parameters(), strict=True))  # fmt: skip


def test_functional_calls_take_the_tensors_that_they_are_given():
    """``functional_call`` brings its own parameters: the regularizer is built on those."""
    model, x = built(), torch.randn(6, 12)
    own = {n: p.detach().clone().mul_(2).requires_grad_() for n, p in model.named_parameters()}
    reg = SpectralRegularizer(own.items(), 0.1, norms=False)
    loss = torch.func.functional_call(model, own, (x,)).square().mean() + reg.penalty()
    loss.backward()
    assert all(p.grad is None for p in model.parameters())
    twin = built()
    for name, p in twin.named_parameters():
        p.data.copy_(own[name].detach())
    other = SpectralRegularizer(list(twin.named_parameters()), 0.1, norms=False)
    (twin(x).square().mean() + other.penalty()).backward()
    for name, grad in gradients(twin).items():
        torch.testing.assert_close(own[name].grad, grad)


# ------------------------------------------------------------------------------- parametrizations


def test_the_penalty_is_about_the_weight_that_a_parametrization_makes():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(12, 20)), nn.Linear(20, 5))
    reg = SpectralRegularizer(model, 0.1, biases=False)
    assert set(reg.names) == {"0.weight", "1.weight"}
    assert "part of a parametrization" in repr(reg)
    originals = list(model[0].parametrizations.weight.parameters())
    for _ in range(4):
        for p in model.parameters():
            p.grad = None
        value = reg.penalty()
        value.backward()
        (bucket,) = reg._buckets.buckets
        i = [m.name for m in bucket.plan.matrices].index("0.weight")
        v = bucket.state.columns(i, bucket.state.v)[0]
        expected = 0.1 * formulas.raw_penalty(model[0].weight, v, 2, 1.0)
        for p, grad in zip(originals, torch.autograd.grad(expected, originals), strict=True):
            torch.testing.assert_close(p.grad, grad)
        with torch.no_grad():
            for p in originals:
                p.add_(0.1 * torch.randn_like(p))
    exact = torch.linalg.svdvals(model[0].weight.detach())[0]
    for _ in range(50):
        reg.penalty()
    assert reg.sigma[reg.names.index("0.weight")] == pytest.approx(float(exact), rel=1e-3)


@pytest.mark.parametrize("way", ["accumulated", "attached", "SpectralAdamW", "SpectralSGD"])
def test_ways_that_work_in_place_leave_out_a_parametrized_weight(way):
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(12, 20)), nn.Linear(20, 5))
    twin = copy.deepcopy(model)

    def begun(model, **options):
        """Return what takes a step, with the penalty alone, and what holds its matrices."""
        options |= {"strength": 0.1}
        if way in ("SpectralAdamW", "SpectralSGD"):
            kind = {"SpectralAdamW": SpectralAdamW, "SpectralSGD": SpectralSGD}[way]
            optimizer = kind(model, lr=0.1, **options)
            return optimizer.step, optimizer
        reg = SpectralRegularizer(model, **options)
        sgd = torch.optim.SGD(model.parameters(), 0.1)
        if way == "attached":
            reg.attach(sgd)
            return sgd.step, reg
        return lambda: (reg.accumulate_grad_(), sgd.step()), reg

    def stepped(model, **options):
        step, held = begun(model, **options)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            step()
        return held

    with pytest.warns(UserWarning, match=r"'0\.weight' was left out.*penalty\(\) alone") as caught:
        held = stepped(model)
    assert len(caught) == 1
    assert held.names == ["1.weight"]
    assert "only penalty() regularizes it" in repr(held)
    stepped(twin, exclude=["0.weight"])
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_nothing_but_a_parametrized_weight_is_refused():
    layer = parametrizations.weight_norm(nn.Linear(12, 20, bias=False))
    with pytest.raises(ValueError, match=r"nothing to regularize.*weight.*only penalty\(\)"):
        SpectralRegularizer(layer).accumulate_grad_()


def test_pruned_weights_are_refused_until_the_mask_is_final():
    model = built()
    prune.l1_unstructured(model[0], "weight", 0.5)
    with pytest.raises(ValueError, match=r"'0\.weight_orig' is pruned.*prune\.remove"):
        SpectralRegularizer(model)
    assert SpectralRegularizer(model, exclude=["0.weight_orig"]).names == ["3.weight"]
    prune.remove(model[0], "weight")
    assert set(SpectralRegularizer(model).names) == {"0.weight", "3.weight"}


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_norms_of_old_are_refused(name):
    layer = getattr(nn.utils, name)(nn.Linear(12, 20))
    with pytest.raises(ValueError, match=rf"parametrizations\.{name} instead"):
        SpectralRegularizer(layer)


def test_adapters_are_matrices_of_their_own():
    """LoRA trains A and B: those are regularized, the frozen weight is not."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=4, target_modules=["0", "3"])
    model = peft.get_peft_model(built(), config)
    reg = SpectralRegularizer(model, 0.1)
    assert len(reg.names) == 4
    assert all("lora_A" in name or "lora_B" in name for name in reg.names)
    assert "requires_grad is False" in repr(reg)
    model(torch.randn(6, 12)).square().mean().backward()
    reg.accumulate_grad_()
    merged = model.merge_and_unload().requires_grad_(True)
    assert len(SpectralRegularizer(merged).names) == 2

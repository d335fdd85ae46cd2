"""The vectors kept between steps, and changes of the model during training."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from spectral_kernels import SpectralRegularizer, spectral_norms

from ..support import models
from ..support.models import close

# ------------------------------------------------------------------------------------------ state


def test_state_dict_resumes_bit_for_bit():
    def run(model, reg, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    x = torch.randn(6, 10)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    reg = SpectralRegularizer(model, 0.1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    reg.attach(optimizer)
    run(model, reg, optimizer, 5)
    saved = io.BytesIO()
    torch.save({"model": model.state_dict(), "reg": reg.state_dict()}, saved)
    run(model, reg, optimizer, 5)

    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    other = nn.Sequential(nn.Linear(10, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    other.load_state_dict(state["model"])
    other_reg = SpectralRegularizer(other, 0.1, seed=9)
    assert other_reg.load_state_dict(state["reg"]) == ([], [])
    other_optimizer = torch.optim.SGD(other.parameters(), 0.1)
    other_reg.attach(other_optimizer)
    run(other, other_reg, other_optimizer, 5)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(reg.sigma, other_reg.sigma)


def test_loading_normalizes_tolerates_and_refuses():
    model = nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 3))
    reg = SpectralRegularizer(model)
    state = reg.state_dict()
    v = state["vectors"]["0.weight"]
    assert v.shape == (1, 10)
    result = reg.load_state_dict({"vectors": {"0.weight": 5 * v, "gone": v}})
    assert result.missing_keys == ["1.weight"]
    assert result.unexpected_keys == ["gone"]
    torch.testing.assert_close(reg.state_dict()["vectors"]["0.weight"], v)
    with pytest.raises(ValueError, match=r"0\.weight.*expected shape \(1, 10\).*, got \(1, 9\)"):
        reg.load_state_dict({"vectors": {"0.weight": torch.randn(1, 9)}})
    with pytest.raises(ValueError, match=r"0\.weight.*norm"):
        reg.load_state_dict({"vectors": {"0.weight": torch.zeros(1, 10)}})
    with pytest.raises(TypeError, match="state_dict"):
        reg.load_state_dict({"weights": {}})
    torch.testing.assert_close(reg.state_dict()["vectors"]["0.weight"], v)


@pytest.mark.parametrize("is_used", [False, True])
def test_states_are_copies_in_both_directions(is_used):
    """Of a regularizer that was used since it was loaded, and of one that was not."""
    first, second = (SpectralRegularizer(nn.Linear(10, 8), target="initial") for _ in range(2))
    given = first.state_dict()
    second.load_state_dict(given)
    if is_used:
        second.penalty()
    kept, vectors = second.state_dict(), second.state_dict()["vectors"]["weight"].clone()
    given["vectors"]["weight"].zero_()
    given["initial"]["weight"] = 0.0
    second.state_dict()["vectors"]["weight"].zero_()
    second.state_dict()["initial"]["weight"] = 0.0
    first.penalty()
    assert torch.equal(second.state_dict()["vectors"]["weight"], vectors)
    assert second.state_dict()["initial"]["weight"] > 0
    for _ in range(3):
        second.penalty()
    assert torch.equal(kept["vectors"]["weight"], vectors)


def test_sigma_is_known_right_after_loading():
    model = models.mixed()
    reg = SpectralRegularizer(model, warmup=300)
    state, sigma = reg.state_dict(), reg.sigma
    other = SpectralRegularizer(model)
    other.load_state_dict(state)
    torch.testing.assert_close(other.sigma, sigma, rtol=1e-4, atol=0)
    assert (other.residual >= 0).all()
    again = other.state_dict()["vectors"]
    assert all(torch.equal(again[name], v) for name, v in state["vectors"].items())


@pytest.mark.parametrize("shape", [(30, 30), (30, 20)])
def test_vectors_are_carried_between_memory_layouts(shape):
    """A clear leading direction: a wrong start would need many iterations to find it."""
    weight = 3 * torch.outer(*(nn.functional.normalize(torch.randn(n), dim=0) for n in shape))
    weight += 0.01 * torch.randn(shape)
    for first, second in (("rows", "columns"), ("columns", "rows")):
        stored = {"rows": weight.clone(), "columns": weight.t().contiguous().t()}
        parameter = nn.Parameter(stored[first])
        reg = SpectralRegularizer([("w.weight", parameter)], warmup=20)
        truth = reg.sigma
        state = reg.state_dict()
        parameter.data = stored[second]
        torch.testing.assert_close(reg.sigma, truth, rtol=1e-5, atol=0)
        other = SpectralRegularizer([("w.weight", nn.Parameter(stored[second]))], warmup=0)
        other.load_state_dict(state)
        torch.testing.assert_close(other.sigma, truth, rtol=1e-5, atol=0)


def test_no_kernel_runs_on_weights_that_have_moved_since(monkeypatch):
    """After loading, nothing has been computed yet: saving must use the current address of W."""
    parameter = nn.Parameter(torch.randn(6, 9).t())
    reg = SpectralRegularizer([("w.weight", parameter)])
    reg.load_state_dict(reg.state_dict())
    reg._buckets.bound()
    (bucket,) = reg._buckets.buckets
    real, calls = bucket.backend.gram_matvec, []

    def checked(plan, state):
        calls.append(list(plan.table["weight"]) == [t.data_ptr() for t in plan.tensors])
        real(plan, state)

    monkeypatch.setattr(bucket.backend, "gram_matvec", checked)
    parameter.data = torch.randn(6, 9).t()
    reg.state_dict()
    parameter.data = torch.randn(9, 6)
    reg.state_dict()
    assert calls == [True]


def test_a_parameter_of_another_size_is_measured_and_saved_anew():
    model = nn.Linear(7, 5)
    reg = SpectralRegularizer(model)
    reg.penalty()
    model.weight.data = torch.randn(9, 4)
    assert reg.report()[0].shape == (9, 4)
    assert reg.load_state_dict(reg.state_dict()) == ([], [])
    assert reg.state_dict()["vectors"]["weight"].shape == (1, 4)


def test_a_square_weight_transposed_in_place_gets_the_right_gradient():
    model = nn.Linear(6, 6, bias=False)
    with torch.no_grad():  # a leading direction, on which power iteration converges fast
        model.weight.add_(torch.outer(torch.randn(6), torch.randn(6)), alpha=2)
    reg = SpectralRegularizer(model, warmup=300)
    reg.accumulate_grad_()
    model.weight.data = model.weight.data.t()
    model.weight.grad = None
    for _ in range(1000):
        reg.penalty()
    reg.accumulate_grad_()
    u, s, vh = torch.linalg.svd(model.weight.detach())
    expected = 1e-3 * 4 * (s[0] ** 2 - 1) * s[0] * torch.outer(u[:, 0], vh[0])
    torch.testing.assert_close(model.weight.grad, expected, rtol=1e-2, atol=1e-5)


def test_state_is_outside_of_the_model():
    model = models.mixed()
    before = list(model.state_dict())
    reg = SpectralRegularizer(model)
    reg.penalty().backward()
    assert list(model.state_dict()) == before


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_independently_with_the_same_bits(copier):
    model = models.mixed()
    reg = SpectralRegularizer(model, 0.2, warmup=2)
    reg.penalty()
    twin, twin_reg = copier((model, reg))
    model.zero_grad()
    reg.accumulate_grad_()
    assert all(p.grad is None for p in twin.parameters())
    twin_reg.accumulate_grad_()
    for a, b in zip(models.grads(model), models.grads(twin), strict=True):
        assert torch.equal(a, b)


def test_torchs_random_numbers_are_not_touched():
    model = models.mixed()
    before = torch.get_rng_state()
    SpectralRegularizer(model).penalty()
    assert torch.equal(before, torch.get_rng_state())


def test_seed_and_name_decide_the_start():
    def start(seed, **kw):
        return SpectralRegularizer(models.mixed(), seed=seed, warmup=0, **kw).state_dict()[
            "vectors"
        ]

    first = start(1)
    assert torch.equal(first["conv.weight"], start(1, include=["conv.*"])["conv.weight"])
    assert not torch.equal(first["conv.weight"], start(2)["conv.weight"])
    assert not torch.equal(first["rnn.weight_hh_l0[r]"], first["rnn.weight_hh_l0[z]"])


# --------------------------------------------------------------------- changes of the model


def fresh_gradient(model, vectors):
    """The gradient of a new regularizer with given vectors."""
    reg = SpectralRegularizer(model, 0.2)
    reg.load_state_dict({"vectors": vectors})
    model.zero_grad()
    reg.accumulate_grad_()
    return models.grads(model)


def replaced_data(model):
    for p in model.parameters():
        p.data = torch.randn_like(p)


def assigned(model):
    state = {k: torch.randn_like(v) for k, v in model.state_dict().items() if v.is_floating_point()}
    model.load_state_dict({**model.state_dict(), **state}, assign=True)


def doubled(model):
    model.double()


def to_channels_last(model):
    model.to(memory_format=torch.channels_last)


def replaced_parameter(model):
    model.conv.weight = nn.Parameter(torch.randn_like(model.conv.weight))


def same_memory_replaced(model):
    model.conv.weight = nn.Parameter(model.conv.weight.data)


def unchanged(model):
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize(
    "change",
    [
        replaced_data,
        assigned,
        doubled,
        to_channels_last,
        replaced_parameter,
        same_memory_replaced,
        unchanged,
    ],
)
def test_changes_between_steps_are_noticed_and_vectors_carried(change):
    model = models.mixed()
    reg = SpectralRegularizer(model, 0.2, warmup=0)  # vectors go on, whatever they are worth
    reg.accumulate_grad_()
    vectors = reg.state_dict()["vectors"]
    change(model)
    model.zero_grad()
    reg.accumulate_grad_()
    found = models.grads(model)
    close(found, fresh_gradient(model, vectors))


def test_a_transposed_convolution_may_be_channels_last():
    """Stored column by column, with several dimensions of columns: v is a left vector."""
    layer = nn.ConvTranspose2d(8, 4, 3, bias=False).to(memory_format=torch.channels_last)
    reg = SpectralRegularizer(layer, warmup=60)
    exact = torch.linalg.svdvals(layer.weight.detach().transpose(0, 1).flatten(1))[0]
    torch.testing.assert_close(reg.sigma[0], exact)


def test_meta_model_is_fine_once_it_is_materialized():
    with torch.device("meta"):
        model = nn.Linear(6, 5)
    reg = SpectralRegularizer(model, target="initial")
    with pytest.raises(RuntimeError, match=r"'weight' is on the meta device"):
        reg.penalty()
    model.to_empty(device="cpu")
    nn.init.normal_(model.weight)
    nn.init.normal_(model.bias)
    assert torch.isfinite(reg.penalty())


def test_the_default_device_does_not_matter():
    model = nn.Linear(6, 5)
    expected = SpectralRegularizer(model, 0.1).penalty()
    with torch.device("meta"):
        reg = SpectralRegularizer(model, 0.1, target={"*": 1.0})
        assert torch.equal(reg.penalty(), expected)
        reg.strength = {"*": 0.2}
        reg.accumulate_grad_(grad_scale=2.0)
        assert spectral_norms(model)["weight"] > 0
    assert torch.isfinite(model.weight.grad).all()


def test_a_parameter_that_is_gone_is_named():
    model = nn.Sequential(nn.Linear(6, 5))
    reg = SpectralRegularizer(model)
    reg.penalty()
    torch.nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(RuntimeError, match=r"'0\.weight' is no longer a parameter"):
        reg.penalty()


@pytest.mark.takes_seconds
def test_several_dtypes_in_one_model(backend):
    def build():
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(9, 8), nn.LayerNorm(8), nn.Linear(8, 7), nn.Linear(7, 6))
        model[0].bfloat16()
        model[2].double()
        return model

    model = build()
    reg = SpectralRegularizer(model, 0.3, backend=backend, warmup=200)
    assert reg.sigma.dtype == torch.float64
    for layer, sigma in zip((model[0], model[2], model[3]), reg.sigma, strict=True):
        truth = torch.linalg.svdvals(layer.weight.detach().double())[0]
        assert float(sigma) == pytest.approx(float(truth), rel=2e-3)
    reg.penalty().backward()
    first = models.grads(model)
    other = build()
    SpectralRegularizer(other, 0.3, backend=backend, warmup=200).accumulate_grad_()
    for a, b in zip(first, models.grads(other), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(
            a, b, rtol=1e-2 if a.dtype == torch.bfloat16 else 1e-4, atol=1e-6
        )


def test_low_precision_and_missing_gradients():
    model = nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 7))
    reg = SpectralRegularizer(model, 0.3)
    state = reg.state_dict()
    model[1](torch.randn(2, 8)).sum().backward()
    task = models.grads(model)
    assert task[0] is None
    reg.accumulate_grad_()
    found = models.grads(model)
    model.zero_grad()
    reg.load_state_dict(state)
    reg.penalty().backward()
    expected = [p if t is None else p + t for p, t in zip(models.grads(model), task, strict=True)]
    close(found, expected)

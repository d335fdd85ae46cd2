"""target="initial" for everything that is selected: the penalty begins at zero and holds it."""

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from torch import nn

from spectral_kernels import SpectralAdamW, SpectralRegularizer, SpectralSGD, regularizer
from spectral_kernels.diagnostics import singular_values, spectra, spectral_norms

from ..support.elementwise import Mixed, MixedSelection

pytestmark = pytest.mark.usefixtures("seeded")
ELEMENTWISE = ["linear.bias", "norm.weight", "norm.bias", "kernel", "biases"]


@pytest.fixture(autouse=True)
def _rows_are_selected(monkeypatch):
    chosen = MixedSelection(regularizer.select)
    monkeypatch.setattr(regularizer, "select", chosen)
    monkeypatch.setattr(singular_values, "select", chosen)


def numbers_of(model):
    """What is held, by name."""
    wide = {name: p.detach().double() for name, p in model.named_parameters()}
    return {
        "linear.bias": wide["linear.bias"].norm(), "norm.weight": wide["norm.weight"].abs(),
        "norm.bias": wide["norm.bias"].norm(), "kernel": wide["kernel"].flatten(1).norm(dim=1),
        "biases": wide["biases"].norm(dim=1),
    }  # fmt: skip


def assert_holds(found, model):
    assert sorted(found) == sorted([*ELEMENTWISE, "linear.weight"])
    for name, expected in numbers_of(model).items():
        torch.testing.assert_close(
            torch.as_tensor(found[name], dtype=torch.float64), expected,
            rtol=1e-6, atol=0,
        )  # fmt: skip
        assert isinstance(found[name], float) == (expected.dim() == 0)


def moved(model):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    return model


# --------------------------------------------------------------------------------- the penalty


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("exponent", [1, 2, 2.5])
def test_the_penalty_begins_at_zero(backend, dtype, exponent):
    model = Mixed(dtype)
    reg = SpectralRegularizer(model, 1.0, exponent, "initial", backend=backend)
    assert float(reg.penalty()) < 1e-6
    assert float(SpectralRegularizer(model, 1.0, exponent, backend=backend).penalty()) > 0.1
    assert_holds(reg.state_dict()["initial"], model)


@pytest.mark.parametrize("way", ["accumulate", "penalty", "compiled"])
def test_it_pulls_back_to_where_things_were(way):
    model = Mixed()
    reg = SpectralRegularizer(model, 1.0, 1, target="initial")
    held = numbers_of(model)
    moved(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    penalty = torch.compile(reg.penalty, backend="eager") if way == "compiled" else reg.penalty
    for _ in range(150):
        optimizer.zero_grad()
        if way == "accumulate":
            reg.accumulate_grad_()
        else:
            penalty().backward()
        optimizer.step()
    for name, now in numbers_of(model).items():
        torch.testing.assert_close(now, held[name], rtol=1e-2, atol=1e-3, msg=name)


def test_names_choose_what_is_held():
    model = Mixed()
    target = {"norm.*": "initial", "biases": "initial", "*": 0.6}
    reg = SpectralRegularizer(model, 1.0, target=target)
    assert sorted(reg.state_dict()["initial"]) == ["biases", "norm.bias", "norm.weight"]
    reg.penalty()
    (bucket,) = reg._buckets.buckets
    raw = dict(zip([x.name for x in bucket.plan.elementwise], bucket.state.raw_penalty[1:],
                   strict=True))  # fmt: skip
    assert [float(raw[name]) < 1e-9 for name in ELEMENTWISE] == [False, True, True, False, True]
    norms = model.kernel.detach().flatten(1).norm(dim=1)
    torch.testing.assert_close(raw["kernel"], ((norms**2 - 0.36) ** 2).sum())
    bias = model.linear.bias.detach()
    torch.testing.assert_close(raw["linear.bias"], bias.square().sum() ** 2)


def test_an_assignment_measures_what_is_there():
    model = Mixed()
    reg = SpectralRegularizer(model, 1.0)
    reg.penalty()
    moved(model)
    reg.target = "initial"
    assert float(reg.penalty()) < 1e-6
    assert_holds(reg.state_dict()["initial"], model)
    reg.target = 1.0
    assert float(reg.penalty()) > 0.1
    moved(model)
    reg.target = "initial"  # what it was when it was first asked for
    assert float(reg.penalty()) > 0.1


def test_a_backward_pass_uses_the_targets_of_its_forward_pass():
    model = Mixed()
    reg = SpectralRegularizer(model, 1.0, target=0.3)
    reg.penalty().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    reg = SpectralRegularizer(model, 1.0, target=0.3)
    penalty = reg.penalty()
    reg.target = "initial"
    penalty.backward()
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=0, atol=0)


def test_meta_parameters_are_measured_when_they_are_there():
    model = Mixed()
    values = copy.deepcopy(model.state_dict())
    model.to("meta")
    reg = SpectralRegularizer(model, 1.0, target="initial")
    assert reg._coefficients.initial == {}
    model.to_empty(device="cpu")
    model.load_state_dict(values)
    assert float(reg.penalty()) < 1e-6
    assert_holds(reg.state_dict()["initial"], model)


def test_second_derivatives_and_transforms_see_the_targets():
    model = Mixed(torch.float64)
    reg = SpectralRegularizer(model, 1.0, target="initial")
    moved(model)
    weights = list(model.parameters())
    plain = torch.autograd.grad(reg.penalty(), weights)
    twice = torch.autograd.grad(reg.penalty(), weights, create_graph=True)
    for a, b in zip(plain, twice, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


# -------------------------------------------------------------------------------------- states


def test_a_state_dict_carries_them_to_another_model():
    reg = SpectralRegularizer(Mixed(), 1.0, target="initial")
    saved = reg.state_dict()
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    other = SpectralRegularizer(Mixed(), 1.0, target="initial")
    result = other.load_state_dict(torch.load(buffer, weights_only=True))
    assert result == ([], [])
    found = other.state_dict()["initial"]
    assert found.keys() == saved["initial"].keys()
    assert all(torch.equal(torch.as_tensor(found[n]), torch.as_tensor(x))
               for n, x in saved["initial"].items())  # fmt: skip
    found["kernel"].zero_()  # a copy
    assert other.state_dict()["initial"]["kernel"].all()
    (bucket,) = other._buckets.bound()
    assert torch.equal(bucket.plan.targets[3], saved["initial"]["kernel"])


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_and_pickles_carry_them(copier):
    reg = SpectralRegularizer(Mixed(), 1.0, target="initial")
    first = reg.state_dict()["initial"]
    moved(reg._selection.root)
    other = copier(reg)
    assert float(other.penalty()) > 0.1
    assert torch.equal(other.state_dict()["initial"]["norm.weight"], first["norm.weight"])


@pytest.mark.parametrize("missing", [*ELEMENTWISE, "linear.weight"])
def test_a_missing_one_is_said(missing):
    reg = SpectralRegularizer(Mixed(), 1.0, target="initial")
    state = reg.state_dict()
    del state["initial"][missing]
    state["initial"]["gone"] = 1.0
    assert reg.load_state_dict(state) == ([missing], ["gone"])
    reg.target = {missing: 1.0, "*": "initial"}
    assert reg.load_state_dict(state) == ([], ["gone"])


@pytest.mark.parametrize(("name", "value", "error", "says"), [
    ("kernel", 1.0, TypeError, "'kernel': expected a tensor, got 1.0"),
    ("kernel", torch.ones(5), ValueError, r"'kernel': expected shape \(6,\), got \(5,\)"),
    ("norm.weight", torch.ones(7, 1), ValueError, r"expected shape \(7,\)"),
    ("norm.weight", torch.full((7,), math.nan), ValueError, "weight': expected finite numbers"),
    ("biases", -torch.ones(4), ValueError, "'biases': expected finite numbers >= 0"),
    ("norm.bias", torch.ones(7), TypeError, "'norm.bias': expected a number, got Tensor"),
    ("norm.bias", math.inf, ValueError, "'norm.bias'"),
    ("linear.weight", "1", TypeError, "'linear.weight': expected .*, got '1'"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_and_changes_nothing(name, value, error, says):
    reg = SpectralRegularizer(Mixed(), 1.0, target="initial")
    before, penalty = reg.state_dict()["initial"], float(reg.penalty())
    with pytest.raises(error, match=says):
        reg.load_state_dict({"vectors": {}, "initial": {**before, name: value}})
    for other, x in reg.state_dict()["initial"].items():
        assert torch.equal(torch.as_tensor(x), torch.as_tensor(before[other]))
    assert float(reg.penalty()) == pytest.approx(penalty, abs=1e-9)
    with pytest.raises(TypeError, match="expected a mapping"):
        reg.load_state_dict({"vectors": {}, "initial": [1.0]})


def test_a_parameter_of_another_size_is_measured_again():
    model = Mixed()
    reg = SpectralRegularizer(model, 1.0, target="initial")
    reg.penalty()
    model.norm.weight = nn.Parameter(torch.randn(9))
    model.biases = nn.Parameter(torch.randn(3, 5))
    assert float(reg.penalty()) < 1e-6
    assert_holds(reg.state_dict()["initial"], model)


# ---------------------------------------------------------------------------------- optimizers


def steps(model, optimizer, n=2):
    for _ in range(n):
        for i, p in enumerate(model.parameters()):
            p.grad = 0.1 * torch.ones_like(p) * (i + 1)
        optimizer.step()


@pytest.mark.parametrize("kind", [SpectralAdamW, SpectralSGD])
@pytest.mark.parametrize("decoupled", [False, True])
def test_checkpoints_of_optimizers_carry_them(kind, decoupled):
    options = {"lr": 0.01, "strength": 0.5, "target": "initial", "decoupled": decoupled}
    model = Mixed()
    optimizer = kind(model, **options)
    held = optimizer.regularizer.state_dict()["initial"]
    steps(model, optimizer)
    other = copy.deepcopy(model)
    resumed = kind(other, **options)  # it measures the weights of now
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load_state_dict(optimizer.state_dict())
    found = resumed.regularizer.state_dict()["initial"]
    for name, x in held.items():
        assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(x)), name
    for one, own in ((model, optimizer), (other, resumed)):
        steps(one, own)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_an_optimizer_warns_once_of_those_that_are_missing():
    model = Mixed()
    optimizer = SpectralAdamW(model, target="initial")
    steps(model, optimizer)
    saved = optimizer.state_dict()
    names = [name for name, _ in model.named_parameters()]
    for name in ("norm.weight", "kernel"):
        del saved["state"][names.index(name)]["spectral_initial"]
    with pytest.warns(UserWarning, match="no initial targets of norm.weight, kernel") as found:
        optimizer.load_state_dict(saved)
    assert len(found) == 1
    other = SpectralAdamW(model, target=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(saved)


# ------------------------------------------------------------------------------------- readings


def test_a_depthwise_convolution_is_read_as_a_matrix(backend):
    model = Mixed()
    reg = SpectralRegularizer(model, 1.0, target=0.5, n_vectors=2, backend=backend)
    reg.penalty()
    norms = model.kernel.detach().flatten(1).norm(dim=1)
    assert reg.names == ["linear.weight", "kernel"]
    torch.testing.assert_close(reg.sigma[1], norms.max())
    assert reg.singular_values[1, 1] == 0
    assert reg.residuals[1].tolist() == [0, 0]
    assert reg.singular_values.shape == (2, 2)
    row = reg.report()[1]
    assert row == ("kernel", (6, 9), float(reg.sigma[1]), 0.0)
    found = reg.metrics(per_layer=True)
    assert found["spectral/sigma/kernel"] == row.sigma
    assert found["spectral/above_target"] == 2
    reg.target = 100.0
    assert reg.metrics()["spectral/above_target"] == 0
    reg.target = "initial"
    assert reg.metrics()["spectral/above_target"] == 0
    assert reg.metrics()["spectral/sigma_max"] == max(float(x) for x in reg.sigma)


def test_readings_of_two_buckets_and_of_a_log(tmp_path):
    model = Mixed()
    model.kernel.data = model.kernel.data.double()
    reg = SpectralRegularizer(model, 1.0, target="initial")
    torch.testing.assert_close(
        reg.sigma[1], model.kernel.detach().flatten(1).norm(dim=1).max(), check_dtype=False
    )
    log = reg.log_to(tmp_path / "log.csv")
    log(0)
    assert "sigma/kernel" in (tmp_path / "log.csv").read_text()
    optimizer = SpectralAdamW(model, target="initial")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(
        optimizer.sigma[1], model.kernel.detach().flatten(1).norm(dim=1).max(), check_dtype=False
    )


def test_norms_and_spectra_are_those_of_the_block_diagonal_matrix():
    model = Mixed()
    values = torch.linalg.svdvals(
        torch.block_diag(*model.kernel.detach().double().flatten(1)[:, None])
    )
    assert spectral_norms(model)["kernel"] == pytest.approx(float(values[0]))
    assert spectral_norms(model, n_vectors=4)["kernel"] == pytest.approx(values[:4].tolist())
    assert spectral_norms(model, n_vectors=8)["kernel"][6:] == (0, 0)
    summary = spectra(model)["kernel"]
    assert summary.sigma_min == pytest.approx(float(values[5]))
    assert summary.norm == pytest.approx(float(model.kernel.norm()))
    with torch.no_grad():
        model.kernel[2, 0, 1, 1] = math.nan
    assert math.isnan(spectral_norms(model)["kernel"])
    assert math.isnan(spectra(model)["kernel"].norm)

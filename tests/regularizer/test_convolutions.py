"""convolutions="operator" of the regularizer, the optimizers and spectral_norms."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from spectral_kernels import SpectralAdamW, SpectralRegularizer, SpectralSGD, spectral_norms
from spectral_kernels.backends.reference import differentiable_penalty
from spectral_kernels.diagnostics import spectra
from spectral_kernels.engine import operators as engine_operators
from spectral_kernels.engine.prepared import Preparation
from spectral_kernels.selection.rules import select

from ..support import convolutions
from ..support.small_nets import zero_gradients

pytestmark = pytest.mark.usefixtures("seeded")


def net(dtype=torch.float32):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 6, 3, groups=2), nn.Conv2d(6, 4, 1)
    return nn.Sequential(*layers, nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(4, 2)).to(
        dtype
    )


def regularizer(model, **options):
    return SpectralRegularizer(model, convolutions="operator", **options)


def operators_of(reg):
    """The bucket of operators."""
    return next(b for b in reg._buckets.bound() if b.plan.operators is not None)


# ------------------------------------------------------------------------------- what is selected


def test_the_default_is_the_flattened_kernel():
    model = net()
    chosen = {m.name: m for m in select(model).matrices}
    assert not any(m.periods for m in chosen.values())
    assert (
        SpectralRegularizer(model).names
        == SpectralRegularizer(model, convolutions="flattened").names
    )


def test_operators_have_a_name_per_group_and_say_what_they_are():
    reg = regularizer(net())
    groups = [f"3.weight[{i}]" for i in range(4)]
    assert reg.names == ["0.weight", "1.weight[0]", "1.weight[1]", "2.weight", *groups, "5.weight"]
    text = str(reg)
    assert "operator of a convolution, 2 x 2 phases by its stride\n    8 x 27  0.weight" in text
    assert "a matrix for each of 4 groups, operator of a convolution" in text
    assert "flattened (dim 0, rest)\n    4 x 6  2.weight" in text


@pytest.mark.parametrize("name", convolutions.AS_MATRICES)
def test_kernels_whose_taps_never_meet_are_matrices(name):
    conv = convolutions.made(name)
    (matrix,) = select(conv, convolutions="operator").matrices
    assert matrix.periods is None
    (found,) = spectral_norms(conv, 1e-8, convolutions="operator").values()
    exact = convolutions.norm_on(conv, convolutions.image_of(name))
    assert math.isclose(found, exact, rel_tol=1e-6)


def test_wrong_arguments_say_what_was_expected():
    model = net()
    with pytest.raises(
        ValueError, match="convolutions: expected 'flattened' or 'operator', got 'op'"
    ):
        SpectralRegularizer(model, convolutions="op")
    with pytest.raises(
        TypeError, match="convolutions: expected 'flattened' or 'operator', got True"
    ):
        SpectralRegularizer(model, convolutions=True)
    said = "n_vectors: expected 1 with convolutions='operator', got 2"
    with pytest.raises(ValueError, match=said):
        regularizer(model, n_vectors=2)
    with pytest.raises(ValueError, match=said):
        spectral_norms(model, n_vectors=2, convolutions="operator")
    reg = regularizer(model)
    with pytest.raises(ValueError, match=said):
        reg.n_vectors = 2
    assert reg.n_vectors == 1
    with pytest.raises(ValueError, match="convolutions: expected 'flattened', got 'operator'"):
        spectra(model, convolutions="operator")
    weight = torch.randn(4, 3, 3, 5).permute(3, 1, 2, 0)  # (out, in, h, w), out contiguous
    with pytest.raises(
        ValueError, match=r"'w': .* cannot be used in place \(the rows of the kernel"
    ):
        regularizer([("w", weight.requires_grad_())]).penalty()


# --------------------------------------------------------------------------------- spectral_norms


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", convolutions.KINDS)
def test_norms_are_the_maxima_over_all_frequencies(name):
    conv = convolutions.made(name, torch.float32, seed=3)
    found = list(spectral_norms(conv, convolutions="operator").values())
    exact = [convolutions.norm_over_frequencies(k, conv) for k in convolutions.kernels_of(conv)]
    flattened = list(spectral_norms(conv).values())
    between = 0.01 if len(conv.kernel_size) == 3 else 4e-3
    for own, truth in zip(found, exact, strict=True):
        assert truth * (1 - 1e-4) <= own <= truth * (1 + between)
    assert max(found) >= max(flattened) * (1 - 1e-4)
    # Zero padding cuts rows and columns out of the operator.
    on_image = convolutions.norm_on(copy.deepcopy(conv).double(), convolutions.image_of(name))
    assert on_image <= max(found) * (1 + 1e-4)


@pytest.mark.takes_seconds
def test_larger_images_come_closer_and_never_above():
    conv = nn.Conv2d(3, 4, 3, padding=1, dtype=torch.float64)
    (norm,) = spectral_norms(conv, 1e-8, convolutions="operator").values()
    found = [convolutions.norm_on(conv, (n, n)) for n in (2, 4, 8, 16)]
    assert found == sorted(found)
    assert 0.97 * norm < found[-1] <= norm
    circular = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular", dtype=torch.float64)
    circular.load_state_dict(conv.state_dict())
    on_circle = [convolutions.norm_on(circular, (n, n)) for n in (4, 8, 16)]
    assert max(on_circle) <= norm
    assert max(on_circle) > 0.97 * norm


def test_norms_of_extreme_kernels():
    weights = {"zero": torch.zeros(3, 2, 3, 3), "empty": torch.zeros(0, 2, 3, 3),
               "nan": torch.full((3, 2, 3, 3), math.nan)}  # fmt: skip
    found = spectral_norms(weights.items(), convolutions="operator")
    assert found["zero"] == found["empty"] == 0
    assert math.isnan(found["nan"])
    large = {n: torch.randn(3, 2, 3, 3) * x for n, x in (("a", 1e30), ("b", 1e-30))}
    found = spectral_norms(large.items(), convolutions="operator")
    for name, weight in large.items():
        conv = nn.Conv2d(2, 3, 3)
        exact = convolutions.norm_over_frequencies(weight, conv)
        assert math.isclose(found[name], exact, rel_tol=2e-3)


# ------------------------------------------------------------------------------------ the penalty


def test_unstable_steps_of_sgd_are_told():
    """A step changes sigma of an operator by more than one of a matrix does."""
    model = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False))
    with torch.no_grad():
        model[0].weight.mul_(2 / spectral_norms(model, convolutions="operator")["0.weight"])
    # d penalty / d sigma = 4 (4 - 1) 2: times lr and strength 0.6, less than twice the way to 1.
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    reg = regularizer(model, strength=0.025)
    reg.attach(optimizer)
    zero_gradients(model)
    with pytest.warns(RuntimeWarning, match=r"unstable for '0.weight'"):
        optimizer.step()


@pytest.mark.parametrize("way", ["penalty", "accumulate", "attach"])
def test_three_ways_have_one_gradient(way):
    model = net()
    reg = regularizer(model, strength=0.3, target=0.5)
    zero_gradients(model)
    truth = copy.deepcopy(reg)
    copied = truth._buckets.selection.root
    truth.penalty().backward()
    if way == "penalty":
        reg.penalty().backward()
    elif way == "accumulate":
        reg.accumulate_grad_()
    else:
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        before = [p.detach().clone() for p in model.parameters()]
        reg.attach(optimizer)
        optimizer.step()
        for p, old in zip(model.parameters(), before, strict=True):
            p.grad = old - p.detach()
    for p, expected in zip(model.parameters(), copied.parameters(), strict=True):
        torch.testing.assert_close(p.grad, expected.grad, rtol=1e-4, atol=1e-6)


def test_the_gradient_is_exact_given_the_vectors():
    model = net(torch.float64)
    reg = regularizer(model, strength=0.3, target=0.5, exponent=3)
    reg.penalty().backward()
    bucket = operators_of(reg)
    weights = [p.detach().clone().requires_grad_() for p in bucket.parameters]

    def penalty(*own):
        return differentiable_penalty(bucket.plan, bucket.state, own)

    torch.autograd.gradcheck(penalty, weights)
    torch.autograd.gradgradcheck(penalty, weights)
    for p, grad in zip(bucket.parameters, torch.autograd.grad(penalty(*weights), weights),
                       strict=True):  # fmt: skip
        torch.testing.assert_close(p.grad, grad)


def test_second_derivatives_and_transforms():
    model = net(torch.float64)
    reg = regularizer(model, strength=0.3, target=0.5)
    weight = model[0].weight
    (first,) = torch.autograd.grad(reg.penalty(), weight, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), weight)
    assert second.abs().max() > 0
    with torch.no_grad():
        value = reg.penalty()
    assert math.isclose(float(value), reg.penalty().item(), rel_tol=1e-3)


def test_sigma_goes_to_the_target():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    reg = regularizer(model, strength=1.0, biases=False)
    reg.attach(optimizer)
    for _ in range(1000):
        zero_gradients(model)
        optimizer.step()
    norms = spectral_norms(model, convolutions="operator")
    for name, norm in norms.items():
        assert abs(norm - 1) < 0.05, name


def test_a_step_of_the_decoupled_form_goes_to_the_target_at_most():
    model = net(torch.float64)
    before = spectral_norms(model, 1e-6, convolutions="operator")
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    regularizer(model, strength=1e3, target=0.1).attach(optimizer, decoupled=True)
    zero_gradients(model)
    optimizer.step()
    after = spectral_norms(model, 1e-6, convolutions="operator")
    for name, norm in after.items():
        # What the tracked frequency loses another one may gain.
        assert 0.1 * (1 - 1e-6) <= norm < 2 * before[name], name


def test_initial_targets_make_no_penalty_at_first():
    model = net()
    reg = regularizer(model, target="initial")
    assert reg.penalty().item() < 1e-6
    norms = spectral_norms(model, convolutions="operator")
    for name, sigma in zip(reg.names, reg.sigma.tolist(), strict=True):
        assert math.isclose(sigma, norms[name], rel_tol=1e-3), name


def test_channels_last_weights_have_the_same_operators():
    model = net()
    expected = regularizer(model, warmup=30).sigma
    found = regularizer(model.to(memory_format=torch.channels_last), warmup=30).sigma
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


# ----------------------------------------------------------------------- states, copies, changes


def steps(model, reg, n):
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    handle = reg.attach(optimizer)
    for i in range(n):
        generator = torch.Generator().manual_seed(i)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    handle.remove()


def searches_of(monkeypatch):
    """Return a list that grows by one with every later search of a clock."""
    found, search_again = [], engine_operators.search_again

    def noted(bucket, least):
        found.append(search_again(bucket, least))
        return found[-1]

    monkeypatch.setattr(engine_operators, "search_again", noted)
    return found


@pytest.mark.parametrize("n", [4, 20])  # without and with a search in what follows
@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_training_goes_on_with_the_same_bits(how, n, monkeypatch):
    found = searches_of(monkeypatch)
    model = net()
    reg = regularizer(model, strength=0.1)
    steps(model, reg, n)
    if how == "state_dict":
        other = copy.deepcopy(model)
        resumed = regularizer(other, strength=0.1)
        assert resumed.load_state_dict(pickle.loads(pickle.dumps(reg.state_dict()))) == ([], [])
    elif how == "deepcopy":
        other, resumed = copy.deepcopy((model, reg))
    else:
        other, resumed = pickle.loads(pickle.dumps((model, reg)))
    assert not found
    for one, own in ((model, reg), (other, resumed)):
        steps(one, own, n)
    assert len(found) == (2 if n > 12 else 0)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(reg.sigma, resumed.sigma)


@pytest.mark.parametrize(("value", "error"), [
    (0, ValueError), (201, ValueError), (True, TypeError), (1.5, ValueError), ("3", TypeError),
    (math.nan, ValueError), (torch.tensor([3, 4]), TypeError), (torch.tensor(3.5), ValueError),
])  # fmt: skip
@pytest.mark.parametrize("what", ["regularizer", "optimizer"])
def test_a_bad_count_to_the_next_search_is_refused(what, value, error):
    model = net()
    if what == "regularizer":
        own = regularizer(model)
        state = {**own.state_dict(), "next_search": value}
    else:
        own = SpectralAdamW(model, 0.1, convolutions="operator")
        zero_gradients(model)
        own.step()
        state = own.state_dict()
        state["state"][0]["spectral_next_search"] = value
        state["param_groups"][0]["lr"] = 7.0
    with pytest.raises(error, match="next_search"):
        own.load_state_dict(state)
    reg = own if what == "regularizer" else own.regularizer
    assert reg.state_dict()["next_search"] == (25 if what == "regularizer" else 24)
    assert what == "regularizer" or own.param_groups[0]["lr"] == 0.1


def test_the_next_search_survives_a_state_of_torchs():
    model = net()
    own = SpectralAdamW(model, 0.1, convolutions="operator")
    zero_gradients(model)
    own.step()
    torchs = torch.optim.AdamW(model.parameters(), 0.1)
    torchs.load_state_dict(own.state_dict())  # which makes floats of all numbers in it
    again = SpectralAdamW(model, 0.1, convolutions="operator")
    again.load_state_dict(torchs.state_dict())
    assert again.regularizer.state_dict()["next_search"] == 24


def test_a_state_has_real_and_imaginary_parts():
    model = net()
    assert "next_search" not in SpectralRegularizer(model).state_dict()
    found = regularizer(model).state_dict()["vectors"]
    assert found["0.weight"].shape == (2, 27)
    assert found["2.weight"].shape == (1, 6)
    # Those of flattened kernels do not fit, and the other way round the first part is used.
    flattened = SpectralRegularizer(model)
    reg = regularizer(model)
    missing, _ = reg.load_state_dict(flattened.state_dict())
    assert "0.weight" in missing
    bad = {"vectors": {"0.weight": torch.zeros(2, 27)}}
    with pytest.raises(ValueError, match=r"vectors of '0.weight': expected .*, got norms"):
        reg.load_state_dict(bad)


def test_vectors_that_are_no_waves_are_brought_to_the_nearest():
    model = net()
    reg = regularizer(model)
    state = reg.state_dict()
    state["vectors"]["0.weight"] += 0.3 * torch.randn(2, 27)
    reg.load_state_dict(state)
    v = reg.state_dict()["vectors"]["0.weight"]
    assert not torch.equal(v, state["vectors"]["0.weight"])
    reg.accumulate_grad_()
    assert (
        reg.sigma
        <= 1.01 * torch.tensor(list(spectral_norms(model, convolutions="operator").values()))
    ).all()


def test_a_replaced_convolution_is_searched_again():
    model = net()
    reg = regularizer(model)
    reg.accumulate_grad_()
    with torch.no_grad():  # the same parameter, other weights
        model[0].weight.copy_(torch.randn(8, 3, 3, 3))
    for _ in range(3):
        reg.accumulate_grad_()
    norm = spectral_norms(model[0], convolutions="operator")["weight"]
    sigma = dict(zip(reg.names, reg.sigma.tolist(), strict=True))["0.weight"]
    assert math.isclose(sigma, norm, rel_tol=0.02)
    model[0] = nn.Conv2d(3, 5, 5)
    model[1] = nn.Conv2d(5, 6, 3)
    reg.accumulate_grad_()
    assert reg.names[:2] == ["0.weight", "1.weight"]
    norm = spectral_norms(model[0], convolutions="operator")["weight"]
    sigma = dict(zip(reg.names, reg.sigma.tolist(), strict=True))["0.weight"]
    assert math.isclose(sigma, norm, rel_tol=0.02)


@pytest.mark.parametrize("kind", [None, SpectralAdamW, SpectralSGD])
def test_prepared_steps_have_the_same_bits(kind, monkeypatch):
    results = []
    for is_prepared in (True, False):
        if not is_prepared:
            monkeypatch.setattr(Preparation, "renew", lambda self, prepare: None)
        model = net()
        options = {"strength": 0.1, "convolutions": "operator"}
        optimizer = (
            kind(model, 0.01, **options) if kind else torch.optim.SGD(model.parameters(), 0.01)
        )
        own = optimizer if kind else SpectralRegularizer(model, **options)
        if not kind:
            own.attach(optimizer)
        for i in range(8):
            generator = torch.Generator().manual_seed(i)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        results.append([*model.parameters(), own.sigma])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("constraint", ["cap", "sphere"])
@pytest.mark.parametrize("way", [SpectralAdamW, SpectralSGD, None])
def test_constraints_hold_operators(way, constraint):
    model = net(torch.float64)
    options = {"target": 0.5, "convolutions": "operator", "biases": False}
    if way is None:
        optimizer = torch.optim.SGD(model.parameters(), 1e-9)
        reg = SpectralRegularizer(model, **options)
        reg.attach(optimizer, decoupled=True, constraint=constraint)
    else:
        optimizer = reg = way(model, 1e-9, decoupled=True, constraint=constraint, **options)
    zero_gradients(model)
    before = spectral_norms(model, 1e-6, convolutions="operator")
    for _ in range(200):
        optimizer.step()
    after = spectral_norms(model, 1e-6, convolutions="operator")
    for name, norm in after.items():
        if constraint == "sphere" or before[name] > 0.5:
            assert 0.5 * (1 - 1e-3) <= norm <= 0.5 * 1.02, name


def test_above_leaves_small_operators_alone():
    model = net()
    reg = regularizer(model, strength=1.0, target=10.0, side="above", biases=False)
    assert reg.penalty().item() == 0
    zero_gradients(model)
    reg.accumulate_grad_()
    assert not any(p.grad.any() for p in model.parameters())


def test_singular_vectors_of_an_operator_are_complex():
    model = net()
    reg = regularizer(model, warmup=200)
    u, sigma, v = reg.singular_vectors()["0.weight"]
    kernel = model[0].weight.detach().flatten(1)
    torch.testing.assert_close(kernel.to(v.dtype) @ v, sigma * u, rtol=1e-4, atol=1e-5)
    assert math.isclose(torch.linalg.vector_norm(u).item(), 1, rel_tol=1e-5)


@pytest.mark.parametrize("n", [3, 20])  # without and with a search in what follows
@pytest.mark.parametrize("kind", [SpectralAdamW, SpectralSGD])
def test_optimizers_resume(kind, n, monkeypatch):
    found = searches_of(monkeypatch)
    model = net()
    optimizer = kind(model, 0.01, strength=0.1, convolutions="operator")

    def run(model, optimizer, seeds):
        for i in seeds:
            generator = torch.Generator().manual_seed(i)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()

    run(model, optimizer, range(n))
    other = copy.deepcopy(model)
    resumed = kind(other, 0.01, strength=0.1, convolutions="operator")
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for own in ((model, optimizer), (other, resumed)):
        run(*own, range(n, 2 * n))
    assert len(found) == (2 if n > 12 else 0)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_compiled_penalties_are_eager_ones():
    model = net()
    reg = regularizer(model, strength=0.3, target=0.5)
    eager = copy.deepcopy(reg)
    torch._dynamo.reset()
    compiled = torch.compile(lambda: reg.penalty(), fullgraph=True, backend="aot_eager")
    for _ in range(3):
        for own, penalty in ((reg, compiled), (eager, eager.penalty)):
            zero_gradients(own._buckets.selection.root)
            penalty().backward()
        for p, q in zip(model.parameters(), eager._buckets.selection.root.parameters(),
                        strict=True):  # fmt: skip
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)

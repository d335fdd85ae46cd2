"""Power laws of spectra, the edge of noise, and all singular values of a matrix."""

import math

import pytest
import torch

from spectral_kernels.diagnostics import marchenko_pastur_edge, tail_exponent
from spectral_kernels.diagnostics.all_values import all_singular_values
from tests.support import tails

pytestmark = pytest.mark.usefixtures("seeded")
NAMES = list(tails.WEIGHTWATCHER)


@pytest.fixture(scope="module")
def matrices():
    return tails.ten_matrices()


@pytest.mark.parametrize("name", NAMES)
def test_alpha_and_distance_are_those_of_weightwatcher(matrices, name):
    fit = tail_exponent(all_singular_values(torch.tensor(matrices[name])))
    assert (fit.alpha, fit.distance) == pytest.approx(tails.WEIGHTWATCHER[name], abs=1e-3)


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", NAMES)
def test_alpha_and_distance_are_those_of_the_package_that_is_installed(matrices, name):
    pytest.importorskip("weightwatcher")
    fit = tail_exponent(torch.linalg.svdvals(torch.tensor(matrices[name])))
    expected = tails.of_weightwatcher(matrices[name])
    assert (fit.alpha, fit.distance) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("alpha", [1.6, 2.5, 4.0])
def test_the_exponent_of_a_power_law_is_found(alpha):
    # Eigenvalues 3 u^(-1 / (alpha - 1)) with u uniform have the density x^-alpha from 3 on.
    eigenvalues = 3 * torch.rand(2000, dtype=torch.float64) ** (-1 / (alpha - 1))
    fit = tail_exponent(eigenvalues.sqrt())
    assert fit.alpha == pytest.approx(alpha, rel=0.15)
    assert fit.distance < 0.05
    assert fit.n_tail == int((eigenvalues >= fit.xmin * (1 - 1e-9)).sum())
    reordered = tail_exponent(eigenvalues.sqrt()[torch.randperm(2000)])
    assert reordered == pytest.approx(fit)


def test_pieces_of_candidates_give_what_all_at_once_give(monkeypatch):
    values = torch.randn(150, dtype=torch.float64).abs() + 0.1
    whole = tail_exponent(values)
    monkeypatch.setattr("spectral_kernels.diagnostics.tails._PIECE", 1000)
    assert tail_exponent(values) == pytest.approx(whole, rel=1e-12)


def test_a_spectrum_without_a_tail_has_no_exponent():
    few = torch.rand(7) + 1
    equal = torch.full((40,), float(torch.rand(()) + 1))
    not_finite = torch.cat((torch.rand(30) + 1, torch.tensor([math.nan])))
    for values in (few, equal, not_finite, torch.zeros(30), torch.empty(0)):
        fit = tail_exponent(values)
        assert math.isnan(fit.alpha)
        assert math.isnan(fit.distance)
        assert fit.n_tail == 0
    # With zeros beside them, it is that of the others.
    tail = torch.rand(60) + 0.1
    assert tail_exponent(torch.cat((tail, torch.zeros(20)))) == tail_exponent(tail)


def test_small_eigenvalues_are_left_out():
    values = torch.rand(60) + 1
    assert tail_exponent(torch.cat((values, 0.5 * values))) != tail_exponent(values)
    assert tail_exponent(torch.cat((values, 0.5 * values)), least=1.0) == tail_exponent(values)


@pytest.mark.parametrize("shape", [(300, 300), (150, 600), (400, 100)])
@pytest.mark.parametrize("scale", [1e-3, 5.0])
def test_noise_ends_at_the_edge(shape, scale):
    noise = scale * torch.randn(shape, dtype=torch.float64)
    signal = scale * 100 * torch.nn.functional.normalize(torch.randn(3, shape[0]), dim=1).double()
    signal = signal.mT @ torch.nn.functional.normalize(torch.randn(3, shape[1]), dim=1).double()
    expected = scale * (math.sqrt(shape[0]) + math.sqrt(shape[1]))
    values = torch.linalg.svdvals(noise)
    edge = marchenko_pastur_edge(values, shape)
    assert edge == pytest.approx(expected, rel=0.05)
    assert int((values > 1.03 * edge).sum()) == 0
    values = torch.linalg.svdvals(noise + signal)
    edge = marchenko_pastur_edge(values[torch.randperm(len(values))], shape)
    assert edge == pytest.approx(expected, rel=0.05)
    assert int((values > 1.03 * edge).sum()) == 3


def test_the_median_of_the_marchenko_pastur_law_is_that_of_its_density():
    from spectral_kernels.diagnostics.tails import _median_of_law

    for ratio in (1e-4, 0.1, 0.5, 0.9, 1.0):
        low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2
        median = _median_of_law(ratio) ** 2
        # The integral up to the median, with x = low + (median - low) t^2.
        t = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
        x = low + (median - low) * t**2
        density = ((high - x) * (x - low)).clamp(min=0).sqrt() / (2 * math.pi * ratio * x)
        integral = (density * 2 * (median - low) * t).mean()
        assert float(integral) == pytest.approx(0.5, abs=1e-6)
    # 0.6528 for square matrices: omega(1) = 2.858 is (4 / sqrt 3) / sqrt of it.
    assert 4 / math.sqrt(3) / _median_of_law(1.0) == pytest.approx(2.858, abs=1e-3)


def test_an_edge_that_cannot_be_told_is_no_number():
    assert math.isnan(marchenko_pastur_edge(torch.tensor([1.0, math.inf]), (2, 5)))
    assert math.isnan(marchenko_pastur_edge(torch.empty(0), (0, 5)))
    assert marchenko_pastur_edge(torch.tensor([3.0, 0.0, 0.0]), (7, 3)) == 0


@pytest.mark.parametrize("call", [tail_exponent, lambda v: marchenko_pastur_edge(v, (3, 3))])
def test_values_of_another_shape_are_refused(call):
    with pytest.raises(ValueError, match=r"values: expected one dimension, got 2"):
        call(torch.rand(3, 3))
    with pytest.raises(TypeError, match=r"values: expected a tensor, got \["):
        call([1.0, 2.0, 3.0])


def test_all_values_are_asked_for():
    with pytest.raises(
        ValueError, match=r"values: expected all 3 of a matrix of shape \(3, 5\), got 2"
    ):
        marchenko_pastur_edge(torch.rand(2), (3, 5))
    with pytest.raises(ValueError, match=r"least: expected .*, got -1"):
        tail_exponent(torch.rand(9), least=-1)


# ------------------------------------------------------------------------------------ all values


def conditioned(shape, condition):
    """A matrix with singular values spread evenly over the decades of its condition number."""
    n = min(shape)
    left, right = (torch.linalg.qr(torch.randn(side, n, dtype=torch.float64)).Q for side in shape)
    values = torch.logspace(0, -math.log10(condition), n, dtype=torch.float64)
    return (left * values) @ right.mT


@pytest.mark.parametrize("shape", [(90, 90), (60, 200), (700, 40)])
@pytest.mark.parametrize("condition", [10, 1e4, 1e7, 1e10, 1e12])
@pytest.mark.parametrize("scale", [1e-170, 1.0, 1e170])
def test_the_smallest_value_is_right_for_any_condition(shape, condition, scale):
    weight = conditioned(shape, condition) * scale
    found, exact = all_singular_values(weight), torch.linalg.svdvals(weight)
    assert float(found[-1] / exact[-1]) == pytest.approx(1, abs=max(1e-5, 3e-16 * condition))
    assert torch.allclose(found / scale, exact / scale, rtol=1e-12, atol=2e-7)
    above = exact > 3e-5 * exact[0]
    assert torch.allclose(found[above] / scale, exact[above] / scale, rtol=1e-5, atol=0)
    assert bool((found.diff() <= 0).all())


@pytest.mark.parametrize("shape", [(600, 530), (40, 1200), (1100, 30)])
def test_matrices_of_several_blocks_are_measured(shape):
    weight = torch.randn(shape).bfloat16()
    exact = torch.linalg.svdvals(weight.double())
    assert torch.allclose(all_singular_values(weight), exact, rtol=1e-6)


def test_a_matrix_without_full_rank_has_a_smallest_value_of_zero():
    weight = torch.randn(50, 20).double() @ torch.randn(20, 70).double()
    doubled = torch.cat((weight, weight))
    doubled[:, 3] = 0
    for w in (weight[:, :40], doubled, torch.zeros(4, 6), torch.ones(5, 5)):
        found = all_singular_values(w)
        assert found[-1] == 0
        exact = torch.linalg.svdvals(w.double())
        assert torch.allclose(found, exact, atol=2e-7 * float(exact[0]))
    assert all_singular_values(torch.empty(0, 3)).shape == (0,)

"""The reference against the SVD, autograd and finite differences."""

import pytest
import torch

from spectral_kernels.backends import formulas

from ..support.buckets import bucket_of

F64 = torch.float64


def unit(n):
    v = torch.randn(n, dtype=F64)
    return v / v.norm()


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (3, 7), (40, 41)])
def test_power_iteration_converges_to_the_svd(shape):
    weight = torch.randn(shape, dtype=F64)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    s = s[0] * 0.6 ** torch.arange(len(s), dtype=F64)  # a gap, so that it converges
    weight = u @ torch.diag(s) @ vh
    v = unit(shape[1])[None]
    for _ in range(60):
        found = formulas.power_iteration(weight, v)
        v = found.v_next
    assert float(found.sigmas) == pytest.approx(float(s[0]), rel=1e-12)
    assert float(abs(v @ vh[0])) == pytest.approx(1, rel=1e-12)
    assert float(found.residuals) < 1e-6 * float(s[0])


def test_power_iteration_never_overestimates():
    for _ in range(20):
        weight, v = torch.randn(9, 14, dtype=F64), unit(14)[None]
        exact, last = float(torch.linalg.svdvals(weight)[0]), 0.0
        for _ in range(10):
            found = formulas.power_iteration(weight, v)
            assert last - 1e-12 <= float(found.sigmas) <= exact + 1e-12
            v, last = found.v_next, float(found.sigmas)


@pytest.mark.parametrize("exponent", [1, 2, 3, 2.5])
def test_gradient_is_that_of_autograd(exponent):
    weight, v = torch.randn(8, 5, dtype=F64, requires_grad=True), unit(5)
    value = ((weight @ v).norm() ** exponent - 0.7**exponent) ** 2
    (expected,) = torch.autograd.grad(value, weight)
    s = weight.detach() @ v
    factor = formulas.gradient_factor(s.norm(), 1.0, exponent, 0.7)
    gradient = formulas.penalty_gradient(s, v, factor)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(formulas.raw_penalty(weight, v, exponent, 0.7), value)


@pytest.mark.parametrize("exponent", [1, 2, 3])
def test_gradcheck_and_gradgradcheck(exponent):
    v = unit(4)

    def of_matrix(weight):
        return formulas.raw_penalty(weight, v, exponent, 1.3)

    weight = torch.randn(3, 4, dtype=F64, requires_grad=True)
    vector = (torch.rand(5, dtype=F64) + 0.3).requires_grad_()
    assert torch.autograd.gradcheck(of_matrix, weight)
    assert torch.autograd.gradgradcheck(of_matrix, weight)
    for function in (formulas.shift_penalty, formulas.gain_penalty):
        assert torch.autograd.gradcheck(lambda x, f=function: f(x, exponent), vector)
        assert torch.autograd.gradgradcheck(lambda x, f=function: f(x, exponent), vector)


@pytest.mark.parametrize("exponent", [1, 2, 2.5])
def test_gradients_of_shifts_and_gains_are_those_of_autograd(exponent):
    x = torch.randn(7, dtype=F64, requires_grad=True)
    (expected,) = torch.autograd.grad(formulas.shift_penalty(x, exponent), x)
    own = x.detach()
    torch.testing.assert_close(formulas.shift_gradient(own, own.norm(), exponent), expected)
    (expected,) = torch.autograd.grad(formulas.gain_penalty(x, exponent), x)
    torch.testing.assert_close(formulas.gain_gradient(own, exponent), expected)


@pytest.mark.parametrize("r", [2, 5])
def test_an_iteration_with_several_vectors_finds_the_largest_values(r):
    weight = torch.randn(30, 20, dtype=F64)
    v = formulas.orthonormal_rows(torch.randn(r, 20))
    exact = torch.linalg.svdvals(weight)[:r]
    for _ in range(300):
        found = formulas.power_iteration(weight, v)
        assert (found.sigmas <= exact + 1e-10).all()
        v = found.v_next
    torch.testing.assert_close(found.sigmas[:1], exact[:1])
    torch.testing.assert_close(v @ v.mT, torch.eye(r, dtype=F64))


def test_an_evaluation_does_not_multiply_by_the_transpose(monkeypatch):
    bucket = bucket_of([torch.randn(9, 5), torch.randn(4, 7)])
    expected = bucket.evaluated().sigma
    monkeypatch.setattr(formulas, "transposed_product", None)
    assert torch.equal(bucket.evaluated().sigma, expected)


def test_gradient_at_zero_is_zero():
    factor = formulas.gradient_factor(torch.tensor(0.0), 1.0, 1, 1.0)
    assert (formulas.penalty_gradient(torch.zeros(3), torch.ones(4) / 2, factor) == 0).all()


def test_shift_and_gain_penalties_are_those_of_the_paper():
    b = torch.tensor([3.0, 4.0])
    assert float(formulas.shift_penalty(b, 2)) == pytest.approx(5.0**4)
    # A gain is a diagonal matrix: its singular values are the magnitudes of its elements.
    g = torch.tensor([-2.0, 0.5])
    singular = torch.linalg.svdvals(torch.diag(g))
    assert float(formulas.gain_penalty(g, 3)) == pytest.approx(
        float(((singular**3 - 1) ** 2).sum())
    )

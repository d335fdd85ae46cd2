"""Lanczos iteration: when it stops, how near it is then, and which vector it has."""

import pytest
import torch

from spectral_kernels import spectral_norms
from spectral_kernels.engine import lanczos
from spectral_kernels.engine.bucket import Bucket
from spectral_kernels.selection.rules import select

pytestmark = pytest.mark.usefixtures("seeded")

N = 300


def with_spectrum(squares):
    """A matrix [n + 50, n] whose singular values are the roots of ``squares`` [n]."""
    n = len(squares)
    u = torch.linalg.qr(torch.randn(n + 50, n, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
    return (u * squares.sqrt()) @ v.mT


def spectra():
    """Squares of singular values: with and without gaps, clustered, and of random matrices."""
    line = torch.linspace(1, 0.001, N, dtype=torch.float64)
    alone = 0.99 * line
    alone[0] = 1
    several = line.clone()
    several[:5] = 1 - 1e-3 * torch.arange(5)
    levels = torch.full((N,), 0.9, dtype=torch.float64)
    levels[0], levels[1:30] = 1, 0.999
    noise = torch.linalg.svdvals(torch.randn(N + 50, N, dtype=torch.float64)).square()
    power = torch.arange(1, N + 1, dtype=torch.float64) ** -0.3
    return {"line": line, "alone": alone, "several": several, "levels": levels, "noise": noise,
            "power": power}  # fmt: skip


@pytest.mark.parametrize("kind", list(spectra()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_stops_well_within_the_tolerance(kind, dtype):
    for _ in range(5):
        weight = with_spectrum(spectra()[kind]).to(dtype)
        exact = float(torch.linalg.svdvals(weight.double())[0])
        found = spectral_norms([("w", weight)])["w"]
        assert found <= exact * (1 + 1e-6)
        assert found == pytest.approx(exact, rel=2e-5)


@pytest.mark.parametrize("gap", [2e-4, 3e-4, 1e-3])
def test_the_first_of_many_that_are_nearly_equal_is_found(gap):
    for _ in range(60):
        weight = with_spectrum((1 - gap * torch.arange(64, dtype=torch.float64)).square())
        exact = float(torch.linalg.svdvals(weight)[0])
        assert spectral_norms([("w", weight)])["w"] == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("rtol", [1e-2, 1e-3, 1e-6, 1e-9])
def test_a_finer_tolerance_is_kept_too(rtol):
    for squares in spectra().values():
        weight = with_spectrum(squares)
        exact = float(torch.linalg.svdvals(weight)[0])
        assert spectral_norms([("w", weight)], rtol)["w"] == pytest.approx(exact, rel=rtol)


def test_the_value_takes_fewer_products_than_the_vector(monkeypatch):
    weight = with_spectrum(spectra()["alone"])
    (matrix,) = select([("w", weight)], biases=False, norms=False, trainable_only=False).matrices
    counts, iterate = [], Bucket.iterate
    monkeypatch.setattr(Bucket, "iterate", lambda self, n: counts.append(n) or iterate(self, n))
    lanczos.singular_values(matrix, weight, 1e-4)
    of_value = sum(counts)
    counts.clear()
    top = lanczos.top(matrix, weight, 1e-4, "auto")
    assert of_value < sum(counts)
    # The gap to the next singular value is about a hundredth.
    exact = torch.linalg.svd(weight, full_matrices=False).Vh[0]
    assert abs(float(top.right.double() @ exact)) > 1 - 1e-4


def test_a_basis_may_grow_beyond_its_first_rows(monkeypatch):
    monkeypatch.setattr(lanczos, "_ROWS", 3)
    weight = with_spectrum(spectra()["line"])
    exact = float(torch.linalg.svdvals(weight)[0])
    assert spectral_norms([("w", weight)], 1e-6)["w"] == pytest.approx(exact, rel=1e-6)

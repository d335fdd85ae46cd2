import math

import numpy as np
import pytest
import torch
from torch import nn

from spectral_kernels import SpectralRegularizer, spectral_norms
from spectral_kernels.engine.bucket import Bucket

from ..support import models


def with_singular_values(values, m, n, dtype=torch.float32):
    r = len(values)
    u = torch.linalg.qr(torch.randn(m, r, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(n, r, dtype=torch.float64))[0]
    return ((u * torch.as_tensor(values, dtype=torch.float64)) @ v.T).to(dtype)


def top(weight):
    return float(torch.linalg.svdvals(weight.detach().double())[0])


CLUSTERS = {
    "gap of 1e-2": lambda r: 1 - 1e-2 * torch.arange(r),
    "gap of 3e-4": lambda r: 1 - 3e-4 * torch.arange(r),
    "a pair and a bulk": lambda r: torch.cat(
        (torch.tensor([1, 0.9997]), torch.full((r - 2,), 0.95))
    ),
    "half of them equal": lambda r: torch.where(torch.arange(r) < r // 2, 1.0, 0.5),
    "dense up to the top": lambda r: torch.linspace(0, 1, r).sqrt().flip(0),
}


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("shape", [(60, 90), (300, 200), (64, 700)])
def test_within_rtol_of_the_svd_on_clustered_singular_values(cluster, shape):
    for _ in range(4):
        weight = with_singular_values(CLUSTERS[cluster](min(shape)), *shape)
        assert spectral_norms([("w", weight)])["w"] == pytest.approx(top(weight), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_random_matrices_of_any_dtype(backend, dtype):
    named = [
        (f"{m}x{n}", torch.randn(m, n).to(dtype))
        for m, n in [(1, 1), (1, 50), (50, 1), (7, 9), (200, 300), (513, 65)]
    ]
    found = spectral_norms(named, backend=backend)
    for name, weight in named:
        assert found[name] == pytest.approx(top(weight), rel=1e-4), name


@pytest.mark.parametrize("n_vectors", [2, 4, 16])
@pytest.mark.parametrize("cluster", CLUSTERS)
def test_several_singular_values_of_clusters(cluster, n_vectors):
    for shape in [(60, 90), (300, 200), (64, 700)]:
        weight = with_singular_values(CLUSTERS[cluster](min(shape)), *shape)
        found = spectral_norms([("w", weight)], n_vectors=n_vectors)["w"]
        truth = torch.linalg.svdvals(weight.double())[:n_vectors].tolist()
        assert found == pytest.approx(truth, abs=1e-4 * truth[0]), shape


@pytest.mark.parametrize("n_vectors", [2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_several_singular_values_of_any_dtype(backend, dtype, n_vectors):
    named = [
        (f"{m}x{n}", torch.randn(m, n).to(dtype)) for m, n in [(1, 1), (1, 50), (7, 9), (65, 30)]
    ]
    named += [
        ("low", torch.outer(torch.randn(9), torch.randn(7)).to(dtype)),
        ("zero", torch.zeros(5, 6)),
    ]
    found = spectral_norms(named, backend=backend, n_vectors=n_vectors)
    for name, weight in named:
        truth = torch.zeros(n_vectors, dtype=torch.float64)
        values = torch.linalg.svdvals(weight.double())[:n_vectors]
        truth[: len(values)] = values
        expected = pytest.approx(truth.tolist(), abs=1e-4 * float(truth[0]))
        assert list(found[name]) == expected, name


def test_blocks_reach_the_largest_values_before_they_are_everything(monkeypatch):
    blocks = []
    iterate = Bucket.iterate
    monkeypatch.setattr(Bucket, "iterate", lambda *a: (blocks.append(1), iterate(*a)))
    weight = with_singular_values(0.9 ** torch.arange(200), 300, 900)
    found = spectral_norms([("w", weight)], n_vectors=4)["w"]
    assert found == pytest.approx([0.9**i for i in range(4)], abs=1e-4)
    assert len(blocks) <= 21


@pytest.mark.parametrize("n_vectors", [2, 4])
def test_singular_values_far_below_the_largest(backend, n_vectors):
    values = [1.0, 9e-4, 5e-4, 3e-4, 2e-4, 1e-4, 5e-5]
    for _ in range(5):
        weight = with_singular_values(values, 9, 7)
        found = spectral_norms([("w", weight)], backend=backend, n_vectors=n_vectors)["w"]
        assert found == pytest.approx(values[:n_vectors], abs=2e-5)


def test_several_singular_values_to_a_finer_tolerance_in_float64():
    weight = torch.randn(80, 120, dtype=torch.float64)
    found = spectral_norms([("w", weight)], rtol=1e-10, n_vectors=4)["w"]
    assert found == pytest.approx(torch.linalg.svdvals(weight)[:4].tolist(), rel=1e-10)


def test_finer_tolerance_in_float64():
    weight = torch.randn(80, 120, dtype=torch.float64)
    assert spectral_norms([("w", weight)], rtol=1e-10)["w"] == pytest.approx(top(weight), rel=1e-10)


@pytest.mark.parametrize("scale", [1e19, 1e-19])
def test_extreme_magnitudes(backend, scale):
    weight = torch.randn(40, 60)
    weight *= scale / top(weight)
    assert spectral_norms([("w", weight)], backend=backend)["w"] == pytest.approx(scale, rel=1e-4)


def test_degenerate_matrices():
    found = spectral_norms(
        [
            ("zero", torch.zeros(4, 5)),
            ("empty", torch.zeros(0, 5)),
            ("nan", torch.full((3, 3), math.nan)),
            ("identity", 2 * torch.eye(6)),
        ]
    )
    assert found["zero"] == found["empty"] == 0
    assert math.isnan(found["nan"])
    assert found["identity"] == pytest.approx(2, rel=1e-6)


def test_a_model_is_measured_by_the_same_rules_frozen_or_not():
    model = models.mixed()
    model.conv.requires_grad_(False)
    found = spectral_norms(model)
    assert found["conv.weight"] == pytest.approx(top(model.conv.weight.flatten(1)), rel=1e-4)
    v = model.attention.in_proj_weight.chunk(3)[2]
    assert found["attention.in_proj_weight[v]"] == pytest.approx(top(v), rel=1e-4)
    assert "norm.weight" not in found


@pytest.mark.parametrize("rtol", [0, 1.0, 1e-7])
def test_bad_tolerance_is_named(rtol):
    with pytest.raises(ValueError, match=r"rtol: expected .*1e-05.*, got "):
        spectral_norms(nn.Linear(3, 4), rtol=rtol)


def test_numbers_of_numpy_are_taken_and_words_are_not():
    model = nn.Linear(3, 4)
    found = spectral_norms(model, rtol=np.float32(1e-4), n_vectors=np.int64(2))
    assert found == spectral_norms(model, rtol=float(np.float32(1e-4)), n_vectors=2)
    with pytest.raises(TypeError, match=r"^rtol: expected a number, got .small."):
        spectral_norms(model, rtol="small")


@pytest.mark.parametrize("source", [
    lambda m: m.parameters(), lambda m: list(m.parameters()), lambda m: m.state_dict().values(),
])  # fmt: skip
def test_tensors_without_names_are_refused_without_their_contents(source):
    for function in (spectral_norms, SpectralRegularizer):
        with pytest.raises(
            TypeError, match=r"pass the module or model\.named_parameters"
        ) as caught:
            function(source(nn.Linear(3, 4)))
        assert "tensor(" not in str(caught.value)


def test_unexpected_argument_is_named():
    with pytest.raises(TypeError, match="'biases'"):
        spectral_norms(nn.Linear(3, 4), biases=False)

"""Every backend against float64 and the SVD."""

from functools import lru_cache

import pytest
import torch

from spectral_kernels.backends import choice

from ..support import cases
from ..support.buckets import bucket_of, gradients, poison
from ..support.tolerances import assert_as_good, relative_error

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def rounding(backend, dtype):
    """Error of one rounding in units of eps; Triton's interpreter is less exact to bfloat16."""
    in_python = backend == "triton" and choice.interpreted()
    return 1.01 if in_python and dtype == torch.bfloat16 else 0.51


def decaying_zoo(dtype):
    """The zoo with singular values 1, 1/2, 1/4, ... times a scale; sigma_1 and u v^T of each."""
    device = torch.get_default_device()
    weights, triples = _decaying_zoo(dtype)
    return [w.to(device) for w in weights], [(s, p.to(device)) for s, p in triples]


@lru_cache
def _decaying_zoo(dtype):
    generator, wide = torch.Generator().manual_seed(1), {"dtype": torch.float64, "device": "cpu"}
    weights, triples = [], []
    for m, n in cases.ZOO:
        r = min(m, n, 12)
        u = torch.linalg.qr(torch.randn(m, r, generator=generator, **wide))[0]
        v = torch.linalg.qr(torch.randn(n, r, generator=generator, **wide))[0]
        scale = 3 * torch.rand((), generator=generator, **wide) + 0.5
        weight = (u * (scale * 0.5 ** torch.arange(r, device="cpu"))) @ v.T
        weight = weight.to(dtype)
        u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
        weights.append(weight)
        triples.append((s[0], torch.outer(u[:, 0], vh[0])))
    return weights, triples


@pytest.mark.takes_seconds
@pytest.mark.parametrize("dtype", DTYPES)
def test_sigma_and_direction_against_svd_over_the_zoo(backend, dtype):
    weights, triples = decaying_zoo(dtype)
    bucket = bucket_of(weights, backend)
    in_python = bucket.backend.name == "triton" and choice.interpreted()
    bucket.iterate(14 if in_python else 40)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for i, (sigma, product) in enumerate(triples):
        name = cases.ZOO[i]
        v, s = bucket.state.columns(i, bucket.state.v)[0], bucket.state.rows(i)[0]
        assert float(bucket.state.sigma[i]) == pytest.approx(float(sigma), rel=tolerance), name
        found = torch.outer(s.double() / bucket.state.sigma[i].double(), v.double())
        if bucket.plan.layouts[i].side == "left":
            found = found.T
        assert relative_error(found, product) < 10 * tolerance, name
        # The residual is the square root of a difference: rounding shows at the square root of eps.
        limit = 1e-6 if dtype == torch.float64 else 2e-3
        assert 0 <= float(bucket.state.residual[i]) <= limit * float(sigma), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_iteration_is_as_exact_as_pytorch(backend, dtype):
    weights = cases.random_weights(cases.ZOO, dtype, seed=3)
    bucket = bucket_of(weights, backend, exponent=3, target=0.7, strength=0.3)
    bucket.iterate(1)
    grads = gradients(bucket)
    for i in range(len(weights)):
        layout, state = bucket.plan.layouts[i], bucket.state
        weight = weights[i].T if layout.side == "left" else weights[i]
        v = state.columns(i, state.v)[0]
        truth = weight.double() @ v.double()
        same = weight.to(v.dtype) @ v
        name = f"{cases.ZOO[i]} {dtype}"
        terms = weight.double().abs() @ v.double().abs()
        assert_as_good(state.rows(i)[0], same, truth, f"s of {name}", of=terms)
        sigma = truth.norm()
        assert_as_good(state.sigma[i], same.norm(), sigma, f"sigma of {name}", of=terms)
        t, t_same = weight.double().T @ truth, weight.to(v.dtype).T @ same
        v_next = state.columns(i, state.v_next)[0]
        assert_as_good(v_next, t_same / t_same.norm(), t / t.norm(), f"v_next of {name}")
        residual = (t / sigma - sigma * v.double()).norm()
        assert float(state.residual[i]) == pytest.approx(float(residual), rel=5e-3, abs=2e-3), name
        penalty = (sigma**3 - 0.7**3) ** 2
        assert float(state.raw_penalty[i]) == pytest.approx(float(penalty), rel=1e-4, abs=1e-6), (
            name
        )
        factor = 0.3 * 2 * 3 * (sigma**3 - 0.7**3) * sigma**2
        product = torch.outer(truth / sigma, v.double())
        gradient = factor * product
        if layout.side == "left":
            gradient = gradient.T
        assert grads[i].dtype == dtype
        # Written in the weight's dtype: one rounding to it, on top of float32 arithmetic, in which
        # sigma^3 - 0.7^3 may cancel.
        unit = torch.finfo(dtype).eps
        whole = 0.3 * 2 * 3 * (sigma**3 + 0.7**3) * sigma**2 * product.abs().max()
        allowed = rounding(backend, dtype) * unit * gradient.abs() + 4e-6 * whole
        if dtype == torch.float16:
            allowed += torch.finfo(dtype).smallest_normal * unit
        if dtype == torch.float64:
            allowed = 1e-13 * whole
        assert ((grads[i].double() - gradient).abs() <= allowed + 1e-300).all(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_is_added_to_what_is_there(backend, dtype):
    weights = cases.random_weights([(5, 3), (33, 100), (129, 257)], dtype, seed=4)
    bucket = bucket_of(weights, backend)
    bucket.iterate(2)
    fresh = gradients(bucket)
    start = [torch.randn_like(w) for w in weights]
    added = gradients(bucket, accumulate=True, grads=[g.clone() for g in start])
    for before, fresh_part, after in zip(start, fresh, added, strict=True):
        expected = before.double() + fresh_part.double()
        # Either of the two, or both, may be rounded twice.
        unit = torch.finfo(dtype).eps
        allowed = unit * (expected.abs() + fresh_part.double().abs())
        assert ((after.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_of_another_dtype(backend, dtype, grad_dtype):
    weights = [*cases.random_weights([(9, 40)], dtype), torch.randn(23).to(dtype)]
    bucket = bucket_of(weights, backend)
    bucket.iterate(1)
    expected = [
        g.float()
        for g in gradients(
            bucket, grads=[torch.zeros_like(w, dtype=torch.float32) for w in weights]
        )
    ]
    grads = gradients(bucket, grads=[torch.zeros_like(w, dtype=grad_dtype) for w in weights])
    for grad, truth in zip(grads, expected, strict=True):
        assert grad.dtype == grad_dtype
        torch.testing.assert_close(
            grad, truth.to(grad_dtype), rtol=torch.finfo(grad_dtype).eps, atol=1e-7
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exponent", [1, 2, 2.5, 4])
def test_vectors(backend, dtype, exponent):
    module = torch.nn.Module()
    module.lin = torch.nn.Linear(3, 37)
    module.norm = torch.nn.BatchNorm1d(37)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
        module.norm.weight[5] = 0
    module.to(dtype)
    bucket = bucket_of(module, backend, exponent=exponent, strength=0.5)
    bucket.iterate(1)
    grads = gradients(bucket)
    n = len(bucket.plan.matrices)
    for i, vector in enumerate(bucket.plan.elementwise):
        x = vector.ref.get().detach().double().requires_grad_()
        if vector.kind == "gain":
            truth = ((x.abs() ** exponent - 1) ** 2).sum()
        else:
            truth = (x * x).sum() ** exponent
        expected = torch.autograd.grad(0.5 * truth, x)[0].nan_to_num(0)
        got = grads[bucket.plan.elementwise_ref[i]]
        eps = torch.finfo(dtype).eps
        assert float(bucket.state.raw_penalty[n + i]) == pytest.approx(
            float(truth.detach()), rel=1e-5
        ), vector
        torch.testing.assert_close(got.double(), expected, rtol=eps + 1e-5, atol=1e-6)


def test_same_bits_at_any_number_of_threads(threaded, threads):
    results = []
    for n in (1, 2, 3, 2):
        threads(n)
        bucket = bucket_of(cases.random_weights([(1000, 300), (64, 2000), (257, 129)]), threaded)
        bucket.iterate(5)
        grads = gradients(bucket)
        results.append((bucket.state.v_next, bucket.state.scalars, *grads))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_outside_of_a_matrix_is_read_or_written(backend, dtype):
    """Rows in a larger buffer of NaN: a read beyond a row shows, and so does a write."""
    for rows, cols in [(1, 1), (3, 5), (7, 31), (5, 64), (130, 33), (9, 100)]:
        buffer = torch.full((rows + 2, cols + 9), float("nan"), dtype=dtype)
        weight = buffer[1:-1, 3 : 3 + cols]
        weight.copy_(torch.randn(rows, cols))
        grad_buffer = torch.full((rows + 2, cols + 9), 7.0, dtype=dtype)
        grad = grad_buffer[1:-1, 3 : 3 + cols]
        bucket = bucket_of([weight], backend)
        bucket.iterate(2)
        assert torch.isfinite(bucket.state.sigma).all()
        assert torch.isfinite(bucket.state.v_next).all()
        gradients(bucket, grads=[grad])
        assert torch.isfinite(grad).all()
        outside = grad_buffer.clone()
        outside[1:-1, 3 : 3 + cols] = 7
        assert (outside == 7).all()


# ------------------------------------------------------------------------- degenerate matrices


def with_a_leading_direction(m, n):
    """A random matrix on which power iteration converges fast."""
    return torch.outer(torch.randn(m), torch.randn(n)) + 0.1 * torch.randn(m, n)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_matrix_has_no_gradient_and_keeps_its_vector(backend, dtype):
    bucket = bucket_of([torch.zeros(6, 9, dtype=dtype)], backend)
    before = bucket.state.v_next.clone()
    bucket.iterate(2)
    assert float(bucket.state.sigma) == 0
    assert float(bucket.state.residual) == 0
    assert float(bucket.state.raw_penalty) == 1
    assert torch.equal(bucket.state.v_next, before)
    assert (gradients(bucket)[0] == 0).all()


def test_matrix_that_was_zero_recovers(backend):
    weight = torch.zeros(6, 9)
    bucket = bucket_of([weight], backend)
    bucket.iterate(1)
    weight.copy_(with_a_leading_direction(6, 9))
    bucket.iterate(60)
    assert float(bucket.state.sigma) == pytest.approx(
        float(torch.linalg.svdvals(weight)[0]), rel=1e-4
    )


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_matrix(backend, shape):
    bucket = bucket_of([torch.empty(shape), torch.randn(4, 4)], backend)
    bucket.iterate(3)
    assert float(bucket.state.sigma[0]) == 0
    assert float(bucket.state.sigma[1]) > 0
    assert gradients(bucket)[0].shape == shape


@pytest.mark.parametrize("shape", [(1, 50), (50, 1), (1, 1)])
def test_single_row_or_column_is_exact_at_once(backend, shape):
    weight = torch.randn(shape)
    bucket = bucket_of([weight], backend)
    bucket.iterate(2)
    assert float(bucket.state.sigma) == pytest.approx(float(weight.norm()), rel=1e-6)
    direction = gradients(bucket)[0]
    expected = 4 * (weight.norm() ** 2 - 1) * weight
    torch.testing.assert_close(direction, expected, rtol=1e-4, atol=1e-5)


def test_rank_one_is_exact_after_one_iteration(backend):
    weight = torch.outer(torch.randn(30), torch.randn(70))
    bucket = bucket_of([weight], backend)
    bucket.iterate(2)
    assert float(bucket.state.sigma) == pytest.approx(float(weight.norm()), rel=1e-5)
    assert float(bucket.state.residual) < 2e-3 * float(weight.norm())


def test_repeated_singular_values(backend):
    weight = 3 * torch.linalg.qr(torch.randn(40, 40))[0]
    bucket = bucket_of([weight], backend)
    bucket.iterate(3)
    assert float(bucket.state.sigma) == pytest.approx(3, rel=1e-5)
    assert float(bucket.state.residual) < 0.01
    assert torch.isfinite(gradients(bucket)[0]).all()


@pytest.mark.parametrize("scale", [1e19, 1e-19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_extreme_magnitudes(backend, dtype, scale):
    base = torch.outer(torch.randn(20), torch.randn(30)) + 0.01 * torch.randn(20, 30)
    weight = (base / torch.linalg.svdvals(base)[0] * scale).to(dtype)
    bucket = bucket_of([weight], backend, exponent=1)
    bucket.iterate(4)
    truth = float(torch.linalg.svdvals(weight.double())[0])
    assert float(bucket.state.sigma) == pytest.approx(truth, rel=1e-4)
    assert float(bucket.state.residual) < 0.01 * truth
    assert torch.isfinite(bucket.state.raw_penalty).all()
    gradient = gradients(bucket)[0].double()
    assert float(gradient.norm()) == pytest.approx(2 * abs(truth - 1), rel=1e-2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_weight_shows_and_the_vector_survives(backend, dtype, value):
    weight = with_a_leading_direction(140, 9).to(dtype)
    bucket = bucket_of([weight], backend)
    bucket.iterate(3)
    good = bucket.state.v_next.clone()
    saved = weight[131, 4].clone()
    weight[131, 4] = value
    bucket.iterate(1)
    assert not torch.isfinite(bucket.state.sigma).any()
    assert not torch.isfinite(bucket.state.raw_penalty).any()
    assert torch.equal(bucket.state.v_next, good)
    weight[131, 4] = saved
    bucket.iterate(60)
    truth = float(torch.linalg.svdvals(weight.double())[0])
    assert float(bucket.state.sigma) == pytest.approx(truth, rel=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_16_bit_gradient_value_survives_a_zero_update(backend, dtype):
    """Adding zero must keep every finite number, subnormals and infinities, bit for bit."""
    if dtype.itemsize != 2:
        pytest.skip("only 16-bit types can be enumerated")
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    grad = bits.view(dtype).reshape(256, 256).clone()
    bucket = bucket_of([torch.zeros(256, 256, dtype=dtype)], backend)
    bucket.iterate(1)
    after = gradients(bucket, accumulate=True, grads=[grad.clone()])[0]
    same = (after == grad) | (after.isnan() & grad.isnan())
    if backend == "triton" and dtype == torch.bfloat16 and choice.interpreted():
        # The interpreter, unlike a GPU, does not convert subnormal bfloat16 numbers correctly.
        same |= grad.abs() < torch.finfo(dtype).smallest_normal
    assert same.all()


def test_no_t_is_read_when_only_sigma_is_wanted(backend):
    bucket = bucket_of(cases.random_weights([(30, 40), (5, 200)]), backend)
    bucket.iterate(3)
    before = [x.clone() for x in (bucket.state.v, bucket.state.v_next, bucket.state.s)]
    poison(bucket.plan)
    evaluated = bucket.evaluated()
    for i, weight in enumerate(bucket.plan.tensors):
        truth = (weight @ bucket.state.columns(i, bucket.state.v_next)[0]).norm()
        assert float(evaluated.sigma[i]) == pytest.approx(float(truth), rel=1e-5)
    after = (bucket.state.v, bucket.state.v_next, bucket.state.s)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

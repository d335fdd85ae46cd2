"""Several vectors per matrix, on every backend, against the SVD and the reference."""

import pytest
import torch

from spectral_kernels.backends import choice
from spectral_kernels.tables.schema import N_VECTORS

from ..support import cases
from ..support.buckets import bucket_of, gradients, poison

pytestmark = pytest.mark.usefixtures("seeded")
SEVERAL = N_VECTORS[1:]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Short, long and odd rows, several tiles, fewer rows or columns than vectors.
SHAPES = [(1, 1), (1, 9), (9, 1), (3, 5), (5, 3), (8, 8), (70, 64), (33, 17), (300, 40), (40, 300),
          (17, 1134), (130, 31), (3, 4104), (2, 9001)]  # fmt: skip


@pytest.fixture(autouse=True)
def few_in_the_interpreter(request):
    """In Triton's interpreter, which is slow, only the first test has most r and dtypes."""
    given = request.node.callspec.params
    r, dtype = given.get("r", 2), given.get("dtype", torch.float32)
    dtypes, rs = (torch.float32, torch.bfloat16), (1, 2, 8)
    if "one_iteration" in request.node.name:
        rs = N_VECTORS
    elif "against_the_svd" in request.node.name:
        dtypes, rs = (torch.float32,), (2,)
    if given["backend"] == "triton" and (dtype not in dtypes or r not in rs):
        pytest.skip("slow in the interpreter")


def eps(bucket):
    return torch.finfo(bucket.plan.state_dtype).eps


def matrix_of(bucket, i):
    """Matrix ``i`` as the bucket iterates with it, float64."""
    weight = bucket.plan.tensors[i].double()
    return weight.mT if bucket.plan.layouts[i].side == "left" else weight


def values(bucket, name="sigmas"):
    """Sigmas or residuals, [n_matrices, r], float64."""
    return getattr(bucket.state, name).view(bucket.plan.r, -1).mT.double()


def assert_orthonormal(v, tolerance, what):
    """The rows of v [r, N] are orthonormal; where r > N, all but N of them are zero."""
    gram = v @ v.mT
    lengths = gram.diagonal().round()
    assert lengths.sum() == min(v.shape), what
    assert (gram - torch.diag(lengths)).abs().max() <= tolerance, what


def with_singular_values(m, n, found, dtype=torch.float32):
    u, v = (torch.linalg.qr(torch.randn(k, len(found), dtype=torch.float64))[0] for k in (m, n))
    return ((u * torch.tensor(found, dtype=torch.float64)) @ v.mT).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", SEVERAL)
def test_one_iteration_is_rayleigh_ritz_of_the_vectors(backend, r, dtype):
    weights = cases.random_weights(SHAPES, dtype, seed=r)
    bucket = bucket_of(weights, backend, exponent=3, target=0.7, strength=0.3, r=r)
    before = [bucket.state.columns(i, bucket.state.v_next).double() for i in range(len(SHAPES))]
    before = [v.clone() for v in before]
    bucket.iterate(1)
    state, unit = bucket.state, eps(bucket)
    for i, shape in enumerate(SHAPES):
        weight, v = matrix_of(bucket, i), before[i]
        truth = torch.linalg.svdvals(v @ weight.mT)
        size = torch.linalg.matrix_norm(weight, 2)
        sigmas = torch.zeros(r, dtype=torch.float64)
        sigmas[: len(truth)] = truth
        found = values(bucket)[i]
        # A millionth of the largest counts as zero.
        assert (found - sigmas).abs().max() <= (20 * unit + 1.1e-6) * size, shape
        assert (found[:-1] >= found[1:]).all(), shape
        # v and s are rotated to the Ritz vectors: the same space, orthogonal s, s = W v.
        turned, s = state.columns(i, state.v).double(), state.rows(i).double()
        assert_orthonormal(turned, 20 * unit + 1e-14, shape)
        assert (turned - turned @ v.mT @ v).abs().max() <= 40 * unit, shape
        assert (s - turned @ weight.mT).abs().max() <= 40 * unit * size, shape
        products = s @ s.mT
        off = products - torch.diag(products.diagonal())
        assert off.abs().max() <= 100 * unit * size**2, shape
        assert (products.diagonal().sqrt() - found).abs().max() <= (20 * unit + 1.1e-6) * size
        # The next vectors: orthonormal, and W^T W v lies in their space.
        following = state.columns(i, state.v_next).double()
        assert_orthonormal(following, 20 * unit + 1e-14, shape)
        t = turned @ weight.mT @ weight
        rest = t - t @ following.mT @ following
        assert rest.abs().max() <= 400 * unit * size**2, shape
        # ||W^T u - sigma v|| of every value that is not rounding.
        known = found > 1e-3 * size
        u = s[known] / found[known, None]
        residual = (u @ weight - found[known, None] * turned[known]).norm(dim=1)
        allowed = (60 * unit) ** 0.5 * size * (size / found[known])
        assert ((values(bucket, "residuals")[i][known] - residual).abs() <= allowed).all(), shape
        penalty = (sigmas[0] ** 3 - 0.7**3) ** 2
        assert float(state.raw_penalty[i]) == pytest.approx(float(penalty), rel=1e-3, abs=1e-4), (
            shape
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", SEVERAL)
def test_singular_values_against_the_svd(backend, r, dtype):
    shapes = [(40, 30), (30, 300), (300, 30), (20, 1134), (5, 7)]
    decay = [3 * 0.5**j for j in range(20)]
    weights = [with_singular_values(m, n, decay[: min(m, n)], dtype) for m, n in shapes]
    bucket = bucket_of(weights, backend, r=r)
    bucket.iterate(14)
    for i, shape in enumerate(shapes):
        truth = torch.linalg.svd(matrix_of(bucket, i), full_matrices=False)
        n = min(r, len(truth.S), 12)
        unit = eps(bucket)
        # s is exact to its rounding, relative to sigma_1, and so are small values.
        allowed = 20 * unit * truth.S[0] + 1e-10
        assert ((values(bucket)[i, :n] - truth.S[:n]).abs() <= allowed).all(), shape
        assert (values(bucket)[i] <= torch.cat([truth.S, truth.S.new_zeros(r)])[:r] + allowed).all()
        limit = 1e-6 if dtype == torch.float64 else 4e-3
        assert (values(bucket, "residuals")[i, : min(n, 4)] <= limit * truth.S[0]).all(), shape
        state = bucket.state
        v, s = state.columns(i, state.v)[0].double(), state.rows(i)[0].double()
        found = torch.outer(s / state.sigma[i].double(), v)
        expected = torch.outer(truth.U[:, 0], truth.Vh[0])
        assert (found - expected).abs().max() <= 40 * unit + 1e-9, shape


@pytest.mark.parametrize("r", [2, 4])
def test_close_singular_values_need_several_vectors(backend, r):
    weight = with_singular_values(60, 50, [1.0, *[0.98] * (r - 1), *[0.6] * 20])
    sharp = bucket_of([weight], backend, r=r)
    sharp.iterate(12)
    assert float(sharp.state.sigma) == pytest.approx(1, rel=1e-4)
    single = bucket_of([weight], backend)
    single.iterate(12)
    assert float(single.state.sigma) < 0.9999


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", SEVERAL)
def test_gradient_is_that_of_the_largest_ritz_value(backend, r, dtype):
    weights = [*cases.random_weights([(33, 100), (129, 257), (6, 40)], dtype, seed=4),
               torch.randn(17).to(dtype)]  # fmt: skip
    bucket = bucket_of(weights, backend, exponent=2.5, target=0.7, strength=0.3, r=r)
    grads = [torch.randn_like(w) for w in weights]
    before = [g.double().clone() for g in grads]
    bucket.plan.bind_grads(grads)
    bucket.begin(2)
    bucket.finish(2, grads)
    state = bucket.state
    for i in range(3):
        weight = matrix_of(bucket, i)
        v = state.columns(i, state.v)[0].double()
        sigma = (weight @ v).norm()
        assert float(sigma) == pytest.approx(float(state.sigma[i]), rel=1e-5)
        factor = 0.3 * 2 * 2.5 * (sigma**2.5 - 0.7**2.5) * sigma**1.5
        expected = before[i] + factor * torch.outer(weight @ v / sigma, v)
        allowed = torch.finfo(dtype).eps * expected.abs().max() * 1.01 + 1e-5 * factor.abs()
        assert ((grads[i].double() - expected).abs() <= allowed).all()
    again = gradients(bucket, accumulate=True, grads=[b.to(dtype) for b in before])
    for a, b in zip(grads, again, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("r", SEVERAL)
def test_zero_empty_low_rank_and_repeated(backend, r):
    generator = torch.Generator(torch.get_default_device()).manual_seed(r)
    x, y = torch.randn(30, generator=generator), torch.randn(70, generator=generator)
    orthogonal = 3 * torch.linalg.qr(torch.randn(40, 40, generator=generator))[0]
    low = torch.outer(x, y)
    bucket = bucket_of(
        [torch.zeros(20, 10), torch.empty(0, 5), torch.empty(5, 0), low, orthogonal], backend, r=r
    )
    start = bucket.state.columns(0, bucket.state.v_next).clone()
    bucket.iterate(3)
    found = values(bucket)
    assert (found[:3] == 0).all()
    assert torch.isfinite(bucket.state.raw_penalty).all()
    size = float(low.norm())
    assert float(found[3, 0]) == pytest.approx(size, rel=1e-5)
    assert (found[3, 1:] == 0).all()
    assert float(values(bucket, "residuals")[3, 0]) < 4e-3 * size
    assert found[4].tolist() == pytest.approx([3] * r, rel=1e-4)
    kept = bucket.state.columns(0, bucket.state.v_next)
    torch.testing.assert_close(kept.mT @ kept, start.mT @ start)  # the basis may be rotated
    for i in (0, 3, 4):
        assert_orthonormal(bucket.state.columns(i, bucket.state.v_next).double(), 1e-5, i)
    fresh = gradients(bucket)
    assert (fresh[0] == 0).all()
    assert all(torch.isfinite(g).all() for g in fresh)
    # A matrix that was zero or of low rank is estimated again once it is not.
    bucket.plan.tensors[0].copy_(with_singular_values(20, 10, [2, 1, 0.5, 0.25]))
    bucket.plan.tensors[3].copy_(with_singular_values(30, 70, [8, 4, 2, 1, 0.5]))
    bucket.iterate(9)
    n = min(r, 4)
    assert values(bucket)[0, :n].tolist() == pytest.approx([2, 1, 0.5, 0.25][:n], rel=1e-4)
    assert values(bucket)[3, :n].tolist() == pytest.approx([8, 4, 2, 1][:n], rel=1e-4)


@pytest.mark.parametrize("scale", [1e19, 1e-19])
@pytest.mark.parametrize("r", [2, 8])
def test_extreme_magnitudes(backend, r, scale):
    weight = with_singular_values(40, 30, [scale * 0.5**j for j in range(12)])
    bucket = bucket_of([weight], backend, exponent=1, r=r)
    bucket.iterate(9)
    truth = torch.linalg.svdvals(weight.double())
    n = min(r, 6)
    assert values(bucket)[0, :n].tolist() == pytest.approx(truth[:n].tolist(), rel=1e-4)
    assert float(bucket.state.residual) < 0.01 * truth[0]
    assert torch.isfinite(gradients(bucket)[0]).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("r", SEVERAL)
def test_non_finite_weight_shows_and_the_vectors_survive(backend, r, value):
    weight = with_singular_values(140, 20, [3 * 0.5**j for j in range(8)])
    bucket = bucket_of([weight], backend, r=r)
    bucket.iterate(3)
    good = bucket.state.columns(0, bucket.state.v_next).clone()
    saved = weight[131, 4].clone()
    weight[131, 4] = value
    bucket.iterate(1)
    assert not torch.isfinite(bucket.state.sigma).any()
    assert not torch.isfinite(bucket.state.raw_penalty).any()
    kept = bucket.state.columns(0, bucket.state.v_next)
    torch.testing.assert_close(kept.mT @ kept, good.mT @ good)
    weight[131, 4] = saved
    bucket.iterate(6)
    truth = float(torch.linalg.svdvals(weight.double())[0])
    assert float(bucket.state.sigma) == pytest.approx(truth, rel=1e-4)


@pytest.mark.parametrize("r", SEVERAL)
def test_only_sigma_is_wanted(backend, r):
    bucket = bucket_of(cases.random_weights([(30, 40), (5, 200)]), backend, r=r)
    bucket.iterate(3)
    before = [x.clone() for x in (bucket.state.v, bucket.state.v_next, bucket.state.s)]
    poison(bucket.plan)
    evaluated = bucket.evaluated()
    for i, weight in enumerate(bucket.plan.tensors):
        v = bucket.state.columns(i, bucket.state.v_next)
        truth = torch.linalg.svdvals(v @ weight.mT)[0]
        assert float(evaluated.sigma[i]) == pytest.approx(float(truth), rel=1e-5)
    after = (bucket.state.v, bucket.state.v_next, bucket.state.s)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("r", N_VECTORS)
def test_extra_iterations_are_for_stale_matrices_alone(backend, r):
    settled = with_singular_values(40, 30, [2 * 0.3**j for j in range(12)])
    weights = [settled, torch.randn(64, 40), with_singular_values(70, 50, [1, 0.2, 0.1])]
    bucket = bucket_of(weights, backend, r=r, extra_iterations=8)
    plain = bucket_of([w.clone() for w in weights], backend, r=r)
    for each in (bucket, plain):
        each.iterate(8)
    before = [x.clone() for x in (bucket.state.v_next, bucket.state.sigmas)]
    fresh = torch.randn(64, 40)
    for each in (bucket, plain):
        each.plan.tensors[1].copy_(fresh)
        poison(each.plan)
        each.iterate(1)
    truth = torch.linalg.svdvals(fresh.double())[0]
    error, plain_error = (float(1 - each.state.sigma[1] / truth) for each in (bucket, plain))
    assert -1e-5 < error < plain_error
    single = bucket_of([w.clone() for w in weights], backend, r=r)
    single.state.v_next.copy_(before[0])
    single.state.sigmas.copy_(before[1])
    single.plan.tensors[1].copy_(fresh)
    single.iterate(1)
    for i in (0, 2):
        for name in ("v", "v_next"):
            a, b = (each.state.columns(i, getattr(each.state, name)) for each in (bucket, single))
            assert torch.equal(a, b), (i, name)
        assert torch.equal(bucket.state.rows(i), single.state.rows(i))
        assert torch.equal(values(bucket)[i], values(single)[i])
        assert torch.equal(values(bucket, "residuals")[i], values(single, "residuals")[i])
    # The stale one has as many iterations as it would have alone.
    for _ in range(8):
        if float(single.state.residual[1]) <= 0.01 * float(single.state.sigma[1]):
            break
        single.iterate(1)
    a, b = (each.state.columns(1, each.state.v_next) for each in (bucket, single))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert torch.equal(a, b) or choice.interpreted()


@pytest.mark.parametrize("r", SEVERAL)
def test_same_bits_at_any_number_of_threads(threaded, threads, r):
    shapes = [(300, 200), (64, 513), (1000, 40), (20, 3)]
    found = []
    for n in (1, 2, 3):
        threads(n)
        bucket = bucket_of(cases.random_weights(shapes, seed=2), threaded, r=r)
        bucket.iterate(3)
        found.append([bucket.state.v_next.clone(), bucket.state.s.clone(),
                      bucket.state.scalars.clone(), *gradients(bucket)])  # fmt: skip
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))

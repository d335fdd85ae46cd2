"""Partial results of tiles on every backend: from a given s, summed, and used apart."""

import copy

import numpy as np
import pytest
import torch

from spectral_kernels.backends import reference
from spectral_kernels.tables import schema as plan_module
from spectral_kernels.tables.schema import N_VECTORS, SLOT
from spectral_kernels.tables.state import State

from ..support import cases
from ..support.buckets import bucket_of, poison
from ..support.layouts import bucket_in, every_layout

pytestmark = pytest.mark.usefixtures("seeded")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EMPTY = [(0, 5), (5, 0), (1, 9000)]
SMALL = [(m, n) for m, n in cases.ZOO if m * n <= 30_000]
FEW = [(1, 1), (1, 40), (40, 1), (70, 64), (33, 17), (300, 40), (5, 1134), (0, 3), (3, 0)]
NAN = float("nan")


@pytest.fixture(autouse=True)
def few_in_the_interpreter(request):
    """Skip most r and dtypes in Triton's interpreter, which takes seconds for each."""
    given = request.node.callspec.params
    r, dtype = given.get("r", 2), given.get("dtype", torch.float32)
    if given["backend"] == "triton" and (
        dtype not in (torch.float32, torch.bfloat16) or (r > 2 and (r, dtype) != (8, torch.float32))
    ):
        pytest.skip("slow in the interpreter")


def filled(bucket):
    """Fill s at random, sigma with many sizes, the vectors with NaN; return a copy of s."""
    state = bucket.state
    state.s.copy_(torch.randn(state.s.shape))
    sizes = torch.tensor([NAN, 0.0, 0.3, 1.0, 70.0, 3e4, 1e-6])
    state.sigma.copy_(sizes[torch.arange(len(state.sigma)) % len(sizes)])
    state.v.fill_(NAN)
    state.v_next.fill_(NAN)
    return state.s.clone()


def scale_of(sigma):
    """2^-e of sigma = m 2^e with 1 <= m < 2."""
    known = sigma > 0 and np.isfinite(sigma)
    return 2.0 ** -np.floor(np.log2(sigma)) if known else 1.0


def parts(plan, i):
    """The partial t [n_tiles, r, N], products [n_tiles, r, r] and rows of the tiles of a matrix."""
    first, n_tiles = (int(plan.table[name][i]) for name in ("first_tile", "n_tiles"))
    n, r = plan.layouts[i].cols, plan.r
    tiles = plan.tiles[first : first + n_tiles]
    t = [plan.t_partial[x : x + r * n].view(r, n) for x in tiles["t_offset"].tolist()]
    return t, list(plan.gram_partial.view(-1, r, r)[first : first + n_tiles]), tiles


def assert_partials(bucket, s, with_t=True):
    """Assert the partial results of ``s``: of each tile or, for the reference, in all."""
    plan, state = bucket.plan, bucket.state
    eps = torch.finfo(plan.state_dtype).eps
    for i, layout in enumerate(plan.layouts):
        start = int(plan.table["s_offset"][i])
        own = s[start : start + plan.r * layout.rows].view(plan.r, layout.rows).double()
        weight = reference.matrix(plan, i).double()
        t, gram, tiles = parts(plan, i)
        assert len(tiles) > 0 or 0 in weight.shape
        if not len(tiles):
            continue
        if bucket.backend.name == "reference":
            spans, t, gram = [(0, layout.rows)], [sum(t)], [sum(gram)]
        else:
            spans = [(x["row_begin"], x["row_end"]) for x in tiles]
        scale = scale_of(float(state.sigma[i]))
        for (begin, end), t_part, gram_part in zip(spans, t, gram, strict=True):
            rows, w = own[:, begin:end], weight[begin:end]
            allowed = 1e-13 * rows.abs() @ rows.abs().mT
            assert ((gram_part - rows @ rows.mT).abs() <= allowed).all(), layout
            if with_t:
                # The reference multiplies all rows at once.
                allowed = eps * (16 + 0.5 * (end - begin)) * scale * rows.abs() @ w.abs()
                assert ((t_part - scale * rows @ w).abs() <= allowed).all(), layout


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", N_VECTORS)
def test_transposed_is_that_of_the_s_in_the_state(backend, r, dtype):
    shapes = [*(cases.ZOO if r == 1 else SMALL), *EMPTY]
    bucket = bucket_of(cases.random_weights(shapes, dtype, seed=r), backend, r=r)
    s, sigma = filled(bucket), bucket.state.scalars.clone()
    bucket.backend.transposed(bucket.plan, bucket.state)
    assert_partials(bucket, s)
    assert torch.equal(bucket.state.s, s)
    assert bucket.state.v.isnan().all()
    assert bucket.state.v_next.isnan().all()
    torch.testing.assert_close(bucket.state.scalars, sigma, rtol=0, atol=0, equal_nan=True)


@every_layout
@pytest.mark.parametrize("r", [1, 2, 8])
def test_transposed_in_every_layout(backend, r, layout):
    bucket, _, _ = bucket_in(layout, backend, r=r)
    s = filled(bucket)
    bucket.backend.transposed(bucket.plan, bucket.state)
    assert_partials(bucket, s)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", N_VECTORS)
def test_transposed_of_the_s_of_gram_matvec_is_what_that_makes(backend, r, dtype):
    bucket = bucket_of(cases.random_weights(FEW, dtype, seed=r), backend, r=r)
    plan, state = bucket.plan, bucket.state
    bucket.iterate(1)
    state.swap()
    bucket.backend.gram_matvec(plan, state)
    t, gram, s = plan.t_partial.clone(), plan.gram_partial.clone(), state.s.clone()
    poison(plan)
    bucket.backend.transposed(plan, state)
    size = t.abs().max()
    torch.testing.assert_close(plan.t_partial, t, rtol=0, atol=1e-5 * float(size))
    torch.testing.assert_close(plan.gram_partial, gram, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state.s, s, rtol=0, atol=0, equal_nan=True)
    bucket.backend.normalize(plan, state)
    assert torch.isfinite(state.sigma).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", N_VECTORS)
def test_collect_sums_tiles_in_their_order(backend, r, dtype):
    shapes = [*FEW, (9, 2), (1000, 3), (2, 9001)]
    bucket = bucket_of(cases.random_weights(shapes, dtype), backend, r=r)
    plan, state = bucket.plan, bucket.state
    plan.t_partial.copy_(torch.randn(plan.t_partial.shape))
    plan.gram_partial.copy_(torch.randn(plan.gram_partial.shape))
    t, gram = torch.full_like(state.v, NAN), torch.full((len(shapes) * r * r,), NAN).double()
    state.set_tolerance(0.1)  # has no effect
    bucket.backend.collect(plan, state, t, gram)
    exact = {"rtol": 0, "atol": 0} if bucket.backend.name != "reference" else {}
    for i, layout in enumerate(plan.layouts):
        t_parts, gram_parts, _ = parts(plan, i)
        expected = sum(t_parts, torch.zeros(r, layout.cols, dtype=state.v.dtype))
        torch.testing.assert_close(state.columns(i, t), expected, **exact)
        expected = sum(gram_parts, torch.zeros(r, r).double())
        torch.testing.assert_close(gram.view(-1, r, r)[i], expected, **exact)


@pytest.mark.parametrize("r", [1, 4])
def test_without_a_next_vector_there_are_products_alone(backend, r):
    bucket = bucket_of(cases.random_weights(FEW, seed=r), backend, r=r)
    bucket.iterate(1)
    plan, evaluation = bucket.plan, bucket.state.evaluation()
    poison(plan)
    evaluation.s.copy_(torch.randn(evaluation.s.shape))
    bucket.backend.transposed(plan, evaluation)
    assert plan.t_partial.isnan().all()
    assert_partials(bucket, evaluation.s, with_t=False)
    gram = torch.full((len(FEW) * r * r,), NAN).double()
    bucket.backend.collect(plan, evaluation, None, gram)
    for i in range(len(FEW)):
        expected = sum(parts(plan, i)[1], torch.zeros(r, r).double())
        torch.testing.assert_close(gram.view(-1, r, r)[i], expected)


@pytest.mark.parametrize("r", [1, 2, 8])
def test_with_a_tolerance_stale_matrices_alone(backend, r):
    bucket = bucket_of(cases.random_weights([(70, 64), (150, 9), (3, 5)]), backend, r=r)
    plan, state = bucket.plan, bucket.state
    s = filled(bucket)
    state.sigma.fill_(2.0)
    state.residual.copy_(torch.tensor([0.1, 0.5, NAN]))
    state.set_tolerance(0.1)
    bucket.backend.transposed(plan, state)
    for i in (0, 2):
        t_parts, gram_parts, _ = parts(plan, i)
        assert all(x.isnan().all() for x in (*t_parts, *gram_parts))
    plan.t_partial.nan_to_num_()
    t_parts, gram_parts, _ = parts(plan, 1)
    own = s[r * 70 : r * 220].view(r, 150).double()
    torch.testing.assert_close(sum(gram_parts), own @ own.mT)
    expected = own @ reference.matrix(plan, 1).double() / 2
    torch.testing.assert_close(sum(t_parts).double(), expected, rtol=1e-4, atol=1e-4)


def collected(bucket):
    """A plan of one tile per matrix, without weights, that has the bucket's sums; its state."""
    plan, state = bucket.plan, bucket.state
    own = copy.copy(plan)
    own.table, n = plan.table.copy(), len(plan.matrices)
    own.table["weight"] = own.table["grad"] = 0
    own.table["first_tile"], own.table["n_tiles"] = np.arange(n), 1
    own.tiles = np.zeros(n, plan_module.TILE)
    own.tiles["matrix"], own.tiles["t_offset"] = np.arange(n), plan.table["v_offset"]
    own.t_partial = torch.full_like(state.v, NAN)
    own.gram_partial = torch.full((n * plan.r**2,), NAN).double()
    own.header, own._device_tables = plan.header.copy(), None
    for name, value in (("matrices", own.table), ("tiles", own.tiles)):
        own.header[SLOT[name]] = plan_module.address(value)
    own.header[SLOT["n_tiles"]] = n
    own.header[SLOT["t_partial"]] = own.t_partial.data_ptr()
    own.header[SLOT["gram_partial"]] = own.gram_partial.data_ptr()
    bucket.backend.collect(plan, state, own.t_partial, own.gram_partial)
    copies = [x.clone() for x in (state.v, state.v_next, state.s, state.scalars)]
    return own, State(own, *copies, state.exponent)


@pytest.mark.parametrize("tolerance", [0.0, 1e-9])
@pytest.mark.parametrize("r", [1, 2, 8])
def test_normalize_needs_the_sums_alone(backend, r, tolerance):
    bucket = bucket_of(cases.random_weights(FEW), backend, target=0.7, r=r)
    bucket.iterate(1)
    plan, state = bucket.plan, bucket.state
    state.swap()
    if tolerance:
        state.swap()
    state.set_tolerance(tolerance)
    bucket.backend.gram_matvec(plan, state)
    other, apart = collected(bucket)
    apart.set_tolerance(tolerance)
    other.table["rows"][3] = 0  # as on another process: its s is not rotated here
    untouched = apart.rows(3).clone()
    bucket.backend.normalize(plan, state)
    bucket.backend.normalize(other, apart)
    for name in ("sigmas", "residuals", "raw_penalty", "v", "v_next"):
        torch.testing.assert_close(
            getattr(apart, name), getattr(state, name), rtol=1e-5, atol=1e-6, equal_nan=True
        )
    for i in range(len(FEW)):
        if i != 3 or bucket.backend.name == "reference":
            torch.testing.assert_close(
                apart.rows(i), state.rows(i), rtol=1e-5, atol=1e-6, equal_nan=True
            )
        else:
            assert torch.equal(apart.rows(i), untouched)


@pytest.mark.parametrize("r", [1, 4])
def test_same_bits_at_any_number_of_threads(threaded, threads, r):
    shapes = [(300, 200), (64, 513), (1000, 40), (20, 3)]
    found = []
    for n in (1, 2, 3):
        threads(n)
        bucket = bucket_of(cases.random_weights(shapes, seed=2), threaded, r=r)
        torch.manual_seed(1)
        filled(bucket)
        bucket.backend.transposed(bucket.plan, bucket.state)
        t, gram = torch.empty_like(bucket.state.v), torch.empty(len(shapes) * r * r).double()
        bucket.backend.collect(bucket.plan, bucket.state, t, gram)
        found.append((t, gram))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))

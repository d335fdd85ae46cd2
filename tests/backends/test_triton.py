"""Tests of the Triton backend only; those of all backends run it too."""

import math

import pytest
import torch
from torch import nn

from spectral_kernels import SpectralRegularizer
from spectral_kernels.backends import choice
from spectral_kernels.backends.base import Reference
from spectral_kernels.tables import plan, schema

from ..support.buckets import bucket_of, cut_as_on_a_gpu, gradients
from ..support.cases import random_weights

tables = pytest.importorskip(
    "spectral_kernels.backends.triton.tables", reason="triton is not installed"
)


@pytest.fixture
def triton_backend():
    if not choice.interpreted():
        pytest.skip("these tests run on a CPU: set TRITON_INTERPRET=1")
    return "triton"


@pytest.mark.parametrize(
    ("struct", "names", "fields"),
    [
        (schema.MATRIX, "WEIGHT GRAD GRAD_DTYPE ROWS OUTER INNER ROW_STRIDE OUTER_STRIDE "
         "GRAD_ROW_STRIDE GRAD_OUTER_STRIDE V_OFFSET S_OFFSET FIRST_TILE N_TILES REACH",
         "MATRIX_FIELDS"),
        (schema.TILE, "TILE_MATRIX ROW_BEGIN ROW_END T_OFFSET", "TILE_FIELDS"),
        (schema.CHUNK, "CHUNK_MATRIX CHUNK_BEGIN", "CHUNK_FIELDS"),
        (schema.ELEMENTWISE, "WEIGHT GRAD GRAD_DTYPE SIZE KIND LENGTH TARGETS",
         "ELEMENTWISE_FIELDS"),
        (schema.MOMENT, "FIRST SECOND PARAMETER GROUP", "MOMENT_FIELDS"),
        (schema.GROUP, "LR WEIGHT_DECAY OPTION_1 OPTION_2 EPS NESTEROV", "GROUP_FIELDS"),
    ],
)  # fmt: skip
def test_the_kernels_know_the_tables(struct, names, fields):
    known = {name.removeprefix("TILE_").removeprefix("CHUNK_").lower(): getattr(tables, name).value
             for name in names.split()}  # fmt: skip
    assert known == {name: i for i, name in enumerate(struct.names)}
    assert getattr(tables, fields).value == len(struct.names)
    assert tables.GAIN.value == schema.KINDS["gain"]
    assert tables.ROWS_KIND.value == schema.KINDS["rows"]
    assert tables.CHUNK_COLUMNS.value == schema.CHUNK_COLUMNS


def test_the_kernels_find_the_parts_of_the_scalars():
    n_matrices, n_elementwise, r = 5, 7, 4
    sizes = schema.scalar_sizes(n_matrices, n_elementwise, r)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    n_sigmas, rest = r * n_matrices, (n_matrices, n_elementwise)
    found = {
        "sigmas": 0,
        "residuals": tables.residuals_of.fn(0, n_sigmas),
        "norm": tables.norms_of.fn(0, n_sigmas),
        "raw_penalty": tables.penalties_of.fn(0, n_sigmas, n_elementwise),
        "strength": tables.strengths_of.fn(0, n_sigmas, *rest),
        "target": tables.targets_of.fn(0, n_sigmas, *rest),
    }
    assert list(found) == list(schema.SCALARS)
    assert list(found.values()) == starts


def test_one_launch_gives_the_same_bits_as_two(triton_backend):
    weights = [*random_weights([(70, 40), (5, 300), (40, 3)]), torch.randn(17)]
    for k in (1, 2, 2.5):
        results = []
        for together in (False, True):
            bucket = bucket_of([w.clone() for w in weights], triton_backend, exponent=k, target=0.6)
            grads = [0.1 * w for w in weights]
            bucket.plan.bind_grads(grads)
            if together:
                bucket.begin(3)
                bucket.finish(3, grads)
            else:
                bucket.iterate(3)
                bucket.add_gradient(bucket.state, grads, accumulate=True)
            results.append([*grads, bucket.state.scalars, bucket.state.v, bucket.state.v_next])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("dtype", "large"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
def test_rows_of_all_widths_give_what_the_reference_does(triton_backend, monkeypatch, dtype, large):
    """Aligned and not; those of 8,192 to 32,768 (16,384) columns have a kernel of their own."""
    backend = pytest.importorskip("spectral_kernels.backends.triton.backend")
    monkeypatch.setattr(backend, "LARGE", 0 if large else 2**60)
    cut_as_on_a_gpu(monkeypatch)
    widths = [(70, 8), (33, 136), (20, 520), (19, 768), (5, 2040), (3, 4096), (9, 4608), (10, 8192),
              (3, 8200), (9, 16384), (9, 20000), (2, 40000), (9, 131), (7, 9001)]  # fmt: skip
    weights = random_weights(widths, dtype)
    found = {}
    for name in (triton_backend, "reference"):
        bucket = bucket_of([w.clone() for w in weights], name)
        bucket.iterate(1)
        found[name] = bucket
    ours, true = found[triton_backend], found["reference"]
    for i, weight in enumerate(weights):
        v, true_v = (b.state.columns(i, b.state.v_next) for b in (ours, true))
        torch.testing.assert_close(v, true_v, rtol=1e-4, atol=1e-5)
        off = abs(float(ours.state.sigmas[i] - true.state.sigmas[i]))
        assert off <= 1e-5 * float(weight.float().norm())
    torch.testing.assert_close(ours.state.s, true.state.s, rtol=1e-4, atol=1e-4)


def test_nothing_is_launched_for_long_rows_of_which_there_are_none(triton_backend, monkeypatch):
    launch = pytest.importorskip("spectral_kernels.backends.triton.launch")
    grids, start = [], launch.Variant.launch
    monkeypatch.setattr(launch.Variant, "launch", lambda self, device, grid, *arguments: (
        grids.append(grid), start(self, device, grid, *arguments)))  # fmt: skip
    bucket = bucket_of([torch.randn(0, 9000)], triton_backend)
    bucket.iterate(1)
    assert grids
    assert all(grids)


def test_gradients_of_several_dtypes_at_once(triton_backend):
    weights = random_weights([(20, 24), (30, 8), (9, 16)], torch.bfloat16)
    bucket = bucket_of(weights, triton_backend)
    grads = [torch.zeros_like(w, dtype=d) for w, d in
             zip(weights, (torch.float32, torch.bfloat16, torch.float32), strict=True)]  # fmt: skip
    bucket.plan.bind_grads(grads)
    bucket.begin(1)
    bucket.finish(1, grads)
    again = gradients(bucket)
    for grad, own in zip(grads, again, strict=True):
        torch.testing.assert_close(grad.float(), own.float(), rtol=0.02, atol=1e-6)


def test_float64_weights_go_to_the_reference(triton_backend):
    model = nn.Sequential(nn.Linear(5, 4).double(), nn.Linear(4, 3))
    reg = SpectralRegularizer(model, backend=triton_backend)
    reg.accumulate_grad_()
    assert [b.backend.name for b in reg._buckets.buckets] == ["reference", "triton"]


@pytest.mark.skipif(choice.unavailable("triton") is None, reason="the Triton backend can run here")
def test_without_a_gpu_it_says_so():
    with pytest.raises(RuntimeError, match=r"backend: 'triton' cannot run here: .*CUDA device"):
        SpectralRegularizer(nn.Linear(3, 4), backend="triton")


def test_integer_exponents_are_products():
    from spectral_kernels.backends.triton.launch import integer_exponent

    assert [integer_exponent(k) for k in (1, 2.0, 16, 17, 2.5, math.pi)] == [1, 2, 16, -1, -1, -1]


# Rows and columns for many tiles and several chunks, rows that are not aligned, and none at all.
CUT = [(2100, 8), (300, 40), (9, 300), (40, 3), (64, 130), (0, 5), (5, 0), (1, 260)]


def cut_into_small_tiles(monkeypatch):
    """Make plans cut matrices as on a GPU, into tiles of few elements."""
    cut_as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(plan, "LEAST_ELEMENTS", 64)
    monkeypatch.setattr(plan, "MOST_ELEMENTS", 64)


def in_random_order(monkeypatch, seed):
    """Make the interpreter run the programs of every launch in random order."""
    from triton.runtime.interpreter import interpreter_builder

    orders, original = {}, type(interpreter_builder).set_grid_idx

    def shuffled(self, x, y, z):
        n = self.grid_dim[0]
        if n not in orders:
            generator = torch.Generator().manual_seed(seed + n)
            orders[n] = torch.randperm(n, generator=generator).tolist()
        original(self, orders[n][x], y, z)

    monkeypatch.setattr(type(interpreter_builder), "set_grid_idx", shuffled)


def steps_of(backend, weights, tolerance=0.0):
    """Run two iterations and the gradient of the second; return the bucket and the results."""
    bucket = bucket_of([w.clone() for w in weights], backend, target=0.6)
    grads = [0.1 * w for w in weights]
    bucket.plan.bind_grads(grads)
    bucket.begin(2)
    bucket.finish(2, grads)
    if tolerance:
        bucket.state.set_tolerance(tolerance)
        bucket.backend.gram_matvec(bucket.plan, bucket.state)
        bucket.backend.normalize(bucket.plan, bucket.state)
    state = bucket.state
    # The residual itself is the root of a difference of two large numbers.
    relative = (state.residual / state.sigma.clamp(min=1e-30)) ** 2
    return bucket, [state.sigma, relative, state.raw_penalty, state.v, state.v_next, *grads]


@pytest.mark.parametrize("tolerance", [0.0, 0.05])
def test_many_tiles_and_chunks_make_what_the_reference_makes(
    triton_backend, monkeypatch, tolerance
):
    cut_into_small_tiles(monkeypatch)
    weights = [*random_weights(CUT), torch.randn(17)]
    bucket, own = steps_of(triton_backend, weights, tolerance)
    assert bucket.plan.table["n_tiles"].max() > 256
    assert len(bucket.plan.chunks) > len(bucket.plan.matrices)
    _, expected = steps_of("reference", weights, tolerance)
    for a, b in zip(own, expected, strict=True):
        size = float(b.nan_to_num().abs().max()) if b.numel() else 0
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * size, equal_nan=True)
    assert not bucket.plan.arrivals.any()  # ready for the next launch
    sums = []
    for calls in (bucket.backend, Reference()):
        t, gram = torch.full_like(bucket.state.v, math.nan), bucket.plan.gram_partial.new_empty(8)
        calls.collect(bucket.plan, bucket.state, t, gram)
        sums.append((t.double(), gram))
    for a, b in zip(*sums, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


def test_the_order_of_programs_changes_no_bit(triton_backend, monkeypatch):
    cut_into_small_tiles(monkeypatch)
    weights = [*random_weights([(100, 40), *CUT[2:]]), torch.randn(17)]
    _, expected = steps_of(triton_backend, weights, 0.05)
    for seed in range(2):
        with monkeypatch.context() as patch:
            in_random_order(patch, seed)
            _, own = steps_of(triton_backend, weights, 0.05)
        for a, b in zip(own, expected, strict=True):
            assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_weight_among_many_chunks_leaves_the_vectors(triton_backend, monkeypatch, bad):
    cut_into_small_tiles(monkeypatch)
    weights = random_weights([(50, 300), (20, 300)])
    weights[0][49, 299] = bad
    bucket = bucket_of(weights, triton_backend)
    before = bucket.state.v_next.clone()
    bucket.iterate(1)
    assert not math.isfinite(float(bucket.state.sigma[0]))
    assert torch.equal(bucket.state.columns(0, bucket.state.v_next), before[:300].view(1, -1))
    assert float(bucket.state.columns(1, bucket.state.v_next).norm()) == pytest.approx(1, abs=1e-6)

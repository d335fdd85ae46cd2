"""The CUDA C++ kernels on an emulator: some tests of all backends, and some of their own."""

import subprocess
import sys

import pytest
import torch

from spectral_kernels.tables import plan as plan_module
from spectral_kernels.tables.state import State

from .. import TIMEOUT
from ..support import cuda_emulator
from ..support.buckets import bucket_of, poison

pytestmark = pytest.mark.usefixtures("seeded")
# Together these call every kernel; all tests of these files would take minutes.
OF_EVERY_BACKEND = [
    "tests/backends/test_backends.py::test_one_iteration_is_as_exact_as_pytorch",
    "tests/backends/test_backends.py::test_nothing_outside_of_a_matrix_is_read_or_written",
    "tests/backends/test_partials.py::test_transposed_in_every_layout",
    "tests/backends/test_partials.py::test_collect_sums_tiles_in_their_order",
    "tests/backends/test_partials.py::test_normalize_needs_the_sums_alone",
    "tests/backends/test_subspace.py::test_gradient_is_that_of_the_largest_ritz_value",
    "tests/backends/test_elementwise.py::test_value_norm_and_gradient",
    "tests/optim/test_elementwise.py::test_no_step_carries_a_norm_past_its_target",
    "tests/optim/test_elementwise.py::test_16_bit_parameters",
    "tests/optim/test_optim.py::test_rows_of_every_length[cuda@cuda-False-dtype0-adamw]",
    "tests/optim/test_optim.py::test_rows_of_every_length[cuda@cuda-True-dtype1-adamw]",
    "tests/optim/test_optim.py::test_rows_of_every_length[cuda@cuda-True-dtype0-nesterov]",
    "tests/engine/test_sides.py::test_value_and_gradient[cuda@cuda-0.5-2-dtype0-accumulate]",
    "tests/optim/test_constraints.py::test_a_step_is_the_optimizers_and_the_bound_by_the_svd",
    "tests/optim/test_constraints.py::test_gains_and_rows_are_held_and_biases_are_not",
    "tests/optim/test_constraints.py::test_a_bias_with_a_target_is_capped",
    "tests/optim/test_constraints.py::test_found_inf_skips_a_step",
    "tests/optim/test_capped_values.py::test_a_step_caps_every_singular_value_of_the_vectors",
]
SHAPES = [(0, 5), (5, 0), (0, 0), (1, 1), (1, 129), (9, 1), (3000, 1), (7, 127), (9, 128),
          (600, 130), (20, 257), (1000, 33), (5, 4104), (3, 9001), (20, 28100)]  # fmt: skip
NAN = float("nan")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of the module built with the emulator."""
    if (reason := cuda_emulator.missing()) is not None:
        pytest.skip(reason)
    where = tmp_path_factory.mktemp("emulator")
    cuda_emulator.build(where)
    return where


@pytest.fixture
def emulated(folder, monkeypatch):
    """Backend "cuda" on a CPU."""
    cuda_emulator.emulate(monkeypatch, cuda_emulator.load(cuda_emulator.build(folder)))


def random(m, n, dtype, scale=1.0):
    """A matrix whose largest singular value is about ``scale``."""
    return (scale * torch.randn(m, n).double() / (m**0.5 + n**0.5 + 1e-9)).to(dtype)


def bucket_in_use(weights):
    """A bucket after two iterations, far from its target: nothing cancels in the gradient."""
    bucket = bucket_of(weights, "cuda", exponent=1, target=3, strength=0.3)
    assert bucket.backend.name == "cuda"
    bucket.iterate(2)
    return bucket


def copied(state, plan):
    """A copy of the state for another plan."""
    buffers = state.v, state.v_next, state.s, state.scalars
    own = State(plan, *(x.to(plan.state_dtype, copy=True) for x in buffers), state.exponent)
    own.set_tolerance(state.tolerance)
    return own


def results(backend, plan, state, in_one_launch=True):
    """Run an iteration with its gradient; return the gradients and the buffers of the state."""
    grads = [torch.full_like(t, NAN) for t in plan.tensors]
    plan.bind_grads(grads)
    poison(plan)
    plan.chunk_squares.fill_(NAN)
    backend.gram_matvec(plan, state)
    if in_one_launch:
        backend.finish(plan, state, grads, False)
    else:
        backend.normalize(plan, state)
        backend.rank_one(plan, state, grads, False)
    assert (plan.arrivals == 0).all()
    return [*grads, state.v, state.v_next, state.s, state.scalars]


def assert_same(found, others):
    torch.testing.assert_close(found, others, rtol=0, atol=0, equal_nan=True)


def assert_near(found, truth, rtol, atol=0.0):
    """Assert closeness; numbers that are not finite need not be the same ones."""
    found, truth = (torch.where(x.isfinite(), x.double(), NAN) for x in (found, truth))
    torch.testing.assert_close(found, truth, rtol=rtol, atol=atol, equal_nan=True)


def check(bucket, tolerance=0.0):
    """Assert that an iteration is right, in one launch and in two, against float64."""
    plan, state, dtype = bucket.plan, bucket.state, bucket.plan.dtype
    if not tolerance:
        state.swap()
    state.residual[::3] = 0
    state.set_tolerance(tolerance)
    before, apart = copied(state, plan), copied(state, plan)
    wide = bucket_of([w.double() for w in plan.tensors])
    truth = copied(state, wide.plan)
    apart = results(bucket.backend, plan, apart, in_one_launch=False)
    found = results(bucket.backend, plan, state)
    assert_same(apart, found)
    expected = results(wide.backend, wide.plan, truth)
    assert_near(state.sigma, truth.sigma, rtol=1e-5)
    assert_near(state.raw_penalty, truth.raw_penalty, rtol=1e-4)
    # The residual is the square root of a difference.
    assert_near(state.residual / state.sigma, truth.residual / truth.sigma, rtol=0, atol=3e-3)
    assert_near(state.v, truth.v, rtol=0)
    assert_near(state.v_next, truth.v_next, rtol=1e-5, atol=1e-6)
    for i in state.sigma.isfinite().nonzero()[:, 0].tolist():
        unit, size = torch.finfo(dtype).eps, expected[i].abs().sum() and expected[i].abs().max()
        lost = torch.finfo(dtype).smallest_normal * unit
        assert_near(found[i], expected[i], rtol=unit, atol=1e-5 * float(size) + lost)
    if tolerance:
        settled = ~(before.residual > tolerance * before.sigma)
        assert 0 < settled.sum() < len(settled)
        for i in settled.nonzero()[:, 0].tolist():
            assert torch.equal(state.columns(i, state.v_next), before.columns(i, before.v_next))


@pytest.mark.takes_seconds
def test_of_every_backend(folder):
    command = [sys.executable, "-m", "pytest", "-p", "tests.support.cuda_emulator",
               "--emulator", folder,
               "-p", "no:cacheprovider", "-rp", *OF_EVERY_BACKEND]  # fmt: skip
    done = subprocess.run(
        command, cwd=cuda_emulator.CSRC.parent, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"PASSED {name}" in done.stdout for name in OF_EVERY_BACKEND)


@pytest.mark.takes_seconds
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matrices_of_any_shape_and_size_in_one_launch(dtype):
    weights = [random(m, n, dtype) for m, n in SHAPES]
    weights += [torch.zeros(70, 40, dtype=dtype), *(random(140, 260, dtype) for _ in range(2))]
    weights[-2][70, 130], weights[-1][70, 130] = NAN, -float("inf")
    large, small = (1e3, 1e-2) if dtype == torch.float16 else (1e19, 1e-19)
    weights += [random(m, n, dtype, x) for m, n in [(70, 300), (513, 9)] for x in (large, small)]
    bucket = bucket_in_use(weights)
    assert len(bucket.plan.chunks) > 300
    for tolerance in (0.0, 1e-3, 0.0):
        check(bucket, tolerance)


@pytest.mark.takes_seconds
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("n", [8, 5])
def test_a_matrix_of_many_tiles(n, monkeypatch):
    monkeypatch.setattr(plan_module, "MOST_ROWS", 128)
    bucket = bucket_in_use([random(1030 * 128, n, torch.bfloat16), random(40, 30, torch.bfloat16)])
    assert bucket.plan.table["n_tiles"][0] == 1030
    check(bucket)


@pytest.mark.takes_seconds
@pytest.mark.usefixtures("emulated")
def test_same_bits_in_any_order_of_blocks_and_threads():
    shapes = [(300, 1300), (9, 9001), (1000, 40), (20, 3)]
    bucket = bucket_in_use([random(m, n, torch.float32) for m, n in shapes])
    plan, state = bucket.plan, bucket.state
    first, *others = (results(bucket.backend, plan, copied(state, plan)) for _ in range(8))
    for other in others:
        assert_same(other, first)

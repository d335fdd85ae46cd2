"""What belongs to the Triton backend alone; the tests of all backends run it too."""

import math

import pytest
import torch
from torch import nn

from spectral_kernels import SpectralRegularizer, backends, plan

from .buckets import bucket_of, gradients
from .cases import random_weights

tables = pytest.importorskip("spectral_kernels._triton.tables", reason="triton is not installed")


@pytest.fixture
def triton_backend():
    if not backends.interpreted():
        pytest.skip("these tests run on a CPU: set TRITON_INTERPRET=1")
    return "triton"


@pytest.mark.parametrize(
    ("struct", "names", "fields"),
    [
        (plan.MATRIX, "WEIGHT GRAD GRAD_DTYPE ROWS OUTER INNER ROW_STRIDE OUTER_STRIDE "
         "GRAD_ROW_STRIDE GRAD_OUTER_STRIDE V_OFFSET S_OFFSET FIRST_TILE N_TILES", "MATRIX_FIELDS"),
        (plan.TILE, "TILE_MATRIX ROW_BEGIN ROW_END T_OFFSET", "TILE_FIELDS"),
        (plan.VECTOR, "WEIGHT GRAD GRAD_DTYPE SIZE KIND", "VECTOR_FIELDS"),
        (plan.MOMENT, "FIRST SECOND OWNER GROUP", "MOMENT_FIELDS"),
        (plan.GROUP, "LR WEIGHT_DECAY OPTION_1 OPTION_2 EPS NESTEROV", "GROUP_FIELDS"),
    ],
)  # fmt: skip
def test_the_kernels_know_the_tables(struct, names, fields):
    known = {name.removeprefix("TILE_").lower(): getattr(tables, name).value
             for name in names.split()}  # fmt: skip
    assert known == {name: i for i, name in enumerate(struct.names)}
    assert getattr(tables, fields).value == len(struct.names)
    assert tables.GAIN.value == plan.KINDS["gain"]


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


@pytest.mark.skipif(
    backends.unavailable("triton") is None, reason="the Triton backend can run here"
)
def test_without_a_gpu_it_says_so():
    with pytest.raises(RuntimeError, match=r"backend: 'triton' cannot run here: .*CUDA device"):
        SpectralRegularizer(nn.Linear(3, 4), backend="triton")


def test_integer_exponents_are_products():
    from spectral_kernels._triton.backend import integer_exponent

    assert [integer_exponent(k) for k in (1, 2.0, 16, 17, 2.5, math.pi)] == [1, 2, 16, 0, 0, 0]

"""Memory layouts: used in place, followed by gradients, or refused by name."""

import math

import pytest
import torch
from torch import nn

from spectral_kernels.backends import formulas, reference

from ..support.buckets import bucket_of, gradients
from ..support.layouts import (
    LAYOUTS,
    bucket_in,
    channels_last,
    contiguous,
    every_layout,
    logical,
    matrices_of,
    module_with,
    oriented,
    strided,
)
from ..support.tolerances import relative_error

pytestmark = pytest.mark.usefixtures("seeded")


@every_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_an_iteration_is_one_with_the_logical_matrix(backend, layout, dtype):
    bucket, _, matrices = bucket_in(layout, backend, dtype)
    bucket.iterate(1)
    assert len(bucket.plan.matrices) == len(matrices)
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    for i, matrix in enumerate(matrices):
        assert bucket.plan.matrices[i].shape == tuple(matrix.shape)
        truth = oriented(bucket, i, matrix).double()
        s = truth @ logical(bucket, i, bucket.state.v)
        t = truth.mT @ s
        assert float(bucket.state.sigma[i]) == pytest.approx(float(s.norm()), rel=tolerance)
        found = logical(bucket, i, bucket.state.v_next)
        assert relative_error(found, t / t.norm()) < 5 * tolerance


def gradient_by_autograd(bucket, kind, weight, exponent, target, strength):
    """The gradient of the penalty given the bucket's v, by autograd in float64."""
    leaf = weight.detach().double().requires_grad_()
    total = 0.0
    for i, matrix in enumerate(matrices_of(kind, leaf)):
        v = logical(bucket, i, bucket.state.v)
        total += formulas.raw_penalty(oriented(bucket, i, matrix), v, exponent, target)
    return torch.autograd.grad(strength * total, leaf)[0]


def whole_buffer(tensor):
    """All elements of the storage that ``tensor`` is a view of."""
    n = tensor.untyped_storage().nbytes() // tensor.itemsize
    return tensor.as_strided((n,), (1,), 0)


def assert_gradient(bucket, kind, weight, grad, accumulate):
    """Assert that rank_one adds to (or overwrites) ``grad`` and touches no other memory."""
    before, outside = grad.double(), torch.isnan(whole_buffer(grad))
    assert int((~outside).sum()) == grad.numel()
    gradients(bucket, accumulate, [grad])
    expected = gradient_by_autograd(bucket, kind, weight, 3, 0.7, 0.3)
    assert float(expected.norm()) > 0
    if accumulate:
        expected = expected + before
    tolerance = 1e-13 if grad.dtype == torch.float64 else 5e-6
    assert relative_error(grad, expected) < tolerance
    assert torch.equal(torch.isnan(whole_buffer(grad)), outside)


PENALTY = {"exponent": 3, "target": 0.7, "strength": 0.3}


@every_layout
@pytest.mark.parametrize("accumulate", [False, True])
def test_a_gradient_lands_in_its_elements_and_nowhere_else(backend, layout, accumulate):
    kind, shape, strides = LAYOUTS[layout]
    bucket, weight, _ = bucket_in(layout, backend, **PENALTY)
    bucket.iterate(1)
    assert_gradient(bucket, kind, weight, strided(shape, strides), accumulate)


@every_layout
def test_gradients_agree_with_the_reference(backend, layout):
    _, shape, strides = LAYOUTS[layout]
    grads = []
    for name in (backend, "reference"):
        torch.manual_seed(1)
        bucket, _, _ = bucket_in(layout, name, torch.float64, **PENALTY)
        bucket.iterate(2)
        grad = strided(shape, strides, torch.float64)
        grads += gradients(bucket, grads=[grad])
    assert relative_error(grads[0], grads[1]) < 1e-13


# kind, shape, strides of the weight, strides of the gradient.
FITTING = {
    "rows apart in the weight": ("linear", (7, 33), (40, 1), (33, 1)),
    "rows apart in the gradient": ("linear", (7, 33), (33, 1), (50, 1)),
    "columns apart in the gradient": ("linear", (33, 7), (1, 33), (1, 40)),
    "one column, apart in the weight": ("linear", (33, 1), (4, 1), (1, 1)),
    "one row, apart in the weight": ("linear", (1, 33), (66, 2), (33, 1)),
    "one column, apart in both": ("linear", (33, 1), (4, 1), (5, 1)),
    "filters apart in the gradient": ("conv", (6, 4, 3, 2), (24, 6, 2, 1), (30, 6, 2, 1)),
    "channels_last filters apart": ("conv", (6, 4, 3, 2), (24, 1, 8, 4), (31, 1, 8, 4)),
    "strides of sizes of one differ": ("conv", (6, 4, 1, 1), (4, 1, 1, 1), (4, 1, 4, 4)),
    "inputs apart in the gradient": ("up", (4, 6, 3), (18, 3, 1), (20, 3, 1)),
    "kernels apart in the gradient": ("up", (4, 6, 3), (18, 3, 1), (30, 5, 1)),
    "parts of one parameter": ("attention", (36, 12), (12, 1), (15, 1)),
    "parts of columns": ("in, out", (5, 12), (12, 1), (17, 1)),
    "experts apart in the gradient": ("stack", (3, 6, 5), (30, 5, 1), (50, 7, 1)),
    "stack of splits": ("stack of splits", (3, 6, 5), (40, 6, 1), (30, 5, 1)),
}


@pytest.mark.parametrize("case", FITTING)
def test_a_gradient_may_have_other_strides_between_its_rows(backend, case):
    kind, shape, strides, grad_strides = FITTING[case]
    weight = strided(shape, strides)
    module, options = module_with(kind, weight)
    bucket = bucket_of(module, backend, **PENALTY, **options)
    bucket.iterate(1)
    assert_gradient(bucket, kind, weight, strided(shape, grad_strides), accumulate=True)
    # And back to one like the weight.
    assert_gradient(bucket, kind, weight, strided(shape, strides), accumulate=False)


# Where elements are apart, autograd makes a contiguous gradient: another order of columns.
REORDERED = {
    "transposed, columns apart", "conv2d channels_last, filters apart", "conv2d channels apart"
}  # fmt: skip


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in REORDERED])
def test_what_autograd_makes_fits(layout):
    kind, shape, strides = LAYOUTS[layout]
    weight = nn.Parameter(strided(shape, strides))
    module, options = module_with(kind, weight)
    plan_ = bucket_of(module, **options).plan
    (weight * torch.randn(shape)).sum().backward()
    plan_.bind_grads([weight.grad])
    assert (plan_.table["grad"] >= weight.grad.data_ptr()).all()


# ---------------------------------------------------------------------------- what is refused

INCOMPATIBLE = {
    "transposed": ("linear", (7, 5), (5, 1), (1, 7)),
    "contiguous": ("linear", (7, 5), (1, 7), (5, 1)),
    "elements apart": ("linear", (7, 5), (5, 1), (10, 2)),
    "expanded": ("linear", (7, 5), (5, 1), (0, 0)),
    "rows that share memory": ("linear", (7, 5), (5, 1), (4, 1)),
    "channels_last": ("conv", (6, 4, 3, 2), (24, 6, 2, 1), (24, 1, 8, 4)),
    "contiguous for channels_last": ("conv", (6, 4, 3, 2), (24, 1, 8, 4), (24, 6, 2, 1)),
    "channels apart": ("conv", (6, 4, 3, 2), (24, 6, 2, 1), (32, 8, 2, 1)),
    "kernel turned": ("conv", (6, 4, 3, 2), (24, 6, 2, 1), (24, 6, 1, 3)),
    "up channels_last": ("up", (4, 6, 3, 2), (36, 6, 2, 1), (36, 1, 12, 6)),
}


def assert_refused(bucket, grad, *parts):
    """Assert an error with the parameter and what was expected, and unchanged tables."""
    good = [torch.zeros_like(t) for t in bucket.plan.tensors]
    bucket.plan.bind_grads(good)
    before = bucket.plan.table.tobytes(), bucket.plan.elementwise_table.tobytes()
    for _ in range(2):
        with pytest.raises(ValueError, match=r": expected .*, got ") as caught:
            bucket.plan.bind_grads([grad, *good[1:]])
        for part in (f"gradient of parameter {bucket.plan.refs[0].name!r}", *parts):
            assert part in str(caught.value)
    assert (bucket.plan.table.tobytes(), bucket.plan.elementwise_table.tobytes()) == before


@pytest.mark.parametrize("case", INCOMPATIBLE)
def test_a_gradient_laid_out_otherwise_is_refused(case):
    kind, shape, strides, grad_strides = INCOMPATIBLE[case]
    module, options = module_with(kind, strided(shape, strides))
    grad = torch.randn(500).as_strided(shape, grad_strides)
    assert_refused(
        bucket_of(module, **options), grad, f"got {grad_strides}", f"strides {strides}", "like the"
    )


def freed(*shape):
    tensor = torch.randn(shape)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize(
    ("grad", "parts"),
    [
        (torch.randn(7, 5).to_sparse(), ["layout torch.sparse_coo", "dense"]),
        (torch.randn(7, 5, device="meta"), ["device cpu", "got meta"]),
        (torch.randn(7, 5).double(), ["got torch.float64", "torch.float32", "bfloat16"]),
        (torch.randn(7, 5).to(torch.complex64), ["got torch.complex64"]),
        (torch.ones(7, 5, dtype=torch.int64), ["got torch.int64"]),
        (torch.randn(5, 7), ["got (5, 7)", "shape (7, 5)"]),
        (torch.randn(35), ["got (35,)", "shape (7, 5)"]),
        (freed(7, 5), ["no memory", "a plain tensor"]),
    ],
    ids=["sparse", "meta", "float64", "complex", "int", "shape", "dimensions", "freed"],
)
def test_a_gradient_that_cannot_be_written_to_is_refused(grad, parts):
    assert_refused(bucket_of([torch.randn(7, 5), torch.randn(3)]), grad, *parts)


def test_a_float64_weight_wants_a_float64_gradient():
    bucket = bucket_of([torch.randn(7, 5).double()])
    assert_refused(bucket, torch.randn(7, 5), "got torch.float32", "dtype float64")


def test_a_strided_gradient_of_a_vector_is_refused():
    bucket = bucket_of([torch.randn(5)])
    assert_refused(bucket, torch.randn(10)[::2], "got (2,)", "strides (1,)")


@pytest.mark.parametrize(
    ("shape", "strides", "why"),
    [
        ((7, 5), (10, 2), "neither its rows nor its columns are contiguous"),
        ((7, 5), (2, 14), "neither its rows nor its columns are contiguous"),
        ((7, 5), (0, 1), "share memory"),
        ((7, 5), (1, 0), "share memory"),
        ((7, 5), (4, 1), "share memory"),
        ((7, 5), (1, 1), "share memory"),
        ((6, 4, 3, 2), (100, 20, 5, 1), "neither its rows nor its columns are contiguous"),
        ((6, 4, 3, 2), (200, 2, 8, 32), "neither its rows nor its columns are contiguous"),
    ],
)
def test_a_weight_that_cannot_be_used_in_place_is_named(shape, strides, why):
    weight = torch.randn(1100).as_strided(shape, strides)
    with pytest.raises(ValueError, match="expected a contiguous, channels_last") as caught:
        bucket_of([torch.randn(3, 4), weight])
    for part in ("'1.weight'", f"shape {shape}", f"strides {strides}", why):
        assert part in str(caught.value)


def test_a_part_that_cannot_be_used_in_place_is_named():
    module, options = module_with("attention", torch.randn(36, 24)[:, ::2])
    with pytest.raises(ValueError, match=r"'in_proj_weight\[q\]'.*strides \(24, 2\)"):
        bucket_of(module, **options)


def test_a_strided_vector_is_refused():
    with pytest.raises(
        ValueError, match=r"'0\.bias': expected a contiguous .*, got strides \(2,\)"
    ):
        bucket_of([torch.randn(10)[::2]])


@pytest.mark.parametrize("weight", [torch.randn(7, 5, device="meta"), freed(7, 5)], ids=["m", "f"])
def test_a_weight_without_memory_is_refused(weight):
    with pytest.raises(
        ValueError, match=r"'0\.weight': expected a plain tensor, got one with no memory of"
    ):
        bucket_of([weight])


def test_a_weight_whose_memory_was_freed_since_is_refused():
    weight = torch.randn(7, 5)
    plan_ = bucket_of([weight]).plan
    weight.untyped_storage().resize_(0)
    with pytest.raises(
        ValueError, match=r"'0\.weight': expected a plain tensor, got one with no memory of"
    ):
        plan_.bind_weights([weight])


# ----------------------------------------------------------------------------- order of columns


@every_layout
def test_logical_order_and_back(layout):
    bucket, weight, matrices = bucket_in(layout, "reference", torch.float64)
    for i, matrix in enumerate(matrices):
        how = bucket.plan.layouts[i]
        v = torch.randn(3, matrix.shape[1], dtype=torch.float64)
        assert torch.equal(how.from_logical(how.to_logical(v)), v)
        assert torch.equal(how.to_logical(how.from_logical(v)), v)
        stored = reference.stored(bucket.plan, i, weight).reshape(how.rows, how.cols)
        stored = stored.mT if how.side == "left" else stored
        in_memory = torch.linalg.vector_norm(stored @ v.T, dim=0)
        truth = matrix @ how.to_logical(v).T
        torch.testing.assert_close(in_memory, torch.linalg.vector_norm(truth, dim=0))


@pytest.mark.parametrize("shape", [(6, 4, 3, 2), (6, 4, 3, 2, 2)], ids=str)
def test_channels_last_and_contiguous_are_the_same_matrix(backend, shape):
    results = []
    start = torch.randn(1, math.prod(shape[1:]), dtype=torch.float64)
    weight = torch.randn(shape, dtype=torch.float64)
    for strides in (contiguous(*shape), channels_last(*shape)):
        module, _ = module_with("conv", strided(shape, strides, torch.float64).copy_(weight))
        bucket = bucket_of(module, backend)
        how, state = bucket.plan.layouts[0], bucket.state
        state.columns(0, state.v_next).copy_(how.from_logical(start / start.norm()))
        bucket.iterate(3)
        grad = strided(shape, strides, torch.float64)
        gradients(bucket, grads=[grad])
        assert grad.stride() == strides
        results.append((state.sigma, how.to_logical(state.columns(0, state.v_next)), grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)

"""Layouts used in place, tables kept in step with the tensors, and what a plan allocates."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from spectral_kernels import backends, plan, reference
from spectral_kernels.plan import Plan
from spectral_kernels.selection import select
from spectral_kernels.state import State

from .buckets import bucket_of, gradients, named_weights
from .tolerances import relative_error


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# -------------------------------------------------------- weights of every supported layout


def strided(shape, strides, dtype=torch.float32):
    """Random numbers with these strides, in a buffer that is NaN everywhere else."""
    reach = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    view = torch.full((reach + 7,), math.nan, dtype=dtype).as_strided(shape, strides, 3)
    return view.copy_(torch.randn(shape))


def contiguous(*shape):
    return torch.empty(shape, device="meta").stride()


def channels_last(*shape):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return torch.empty(shape, device="meta", memory_format=formats[len(shape)]).stride()


class Conv1D(nn.Module):
    """Like that of transformers: the weight is stored (in, out)."""

    def __init__(self):
        super().__init__()
        self.nf = 1


# kind -> a module, the name of its parameter, options of the selection, its matrices.
KINDS = {
    "linear": (lambda: nn.Linear(1, 1, bias=False), "weight", {}, lambda w: [w]),
    "conv": (lambda: nn.Conv2d(1, 1, 1, bias=False), "weight", {}, lambda w: [w.flatten(1)]),
    "up": (
        lambda: nn.ConvTranspose2d(1, 1, 1, bias=False), "weight", {},
        lambda w: [w.transpose(0, 1).flatten(1)],
    ),
    "split up": (
        lambda: nn.ConvTranspose2d(1, 1, 1, bias=False), "weight", {"splits": {"weight": 2}},
        lambda w: w.transpose(0, 1).flatten(1).chunk(2),
    ),
    "attention": (
        lambda: nn.MultiheadAttention(1, 1, bias=False), "in_proj_weight",
        {"include": ["in_proj_weight"]}, lambda w: w.chunk(3),
    ),
    "in, out": (
        Conv1D, "weight", {"splits": {"weight": [6, 3, 3]}},
        lambda w: [part.T for part in w.split([6, 3, 3], dim=1)],
    ),
    "stack": (nn.Module, "weight", {"stacked": ["weight"]}, list),
    "stack of splits": (
        nn.Module, "weight", {"stacked": ["weight"], "splits": {"weight": [2, 4]}},
        lambda w: [part for expert in w for part in expert.split([2, 4])],
    ),
}  # fmt: skip


def module_with(kind, weight):
    """A module of this kind with ``weight`` as its parameter, and the options that select it."""
    make, name, options, _ = KINDS[kind]
    module = make()
    setattr(module, name, nn.Parameter(weight))
    return module, options


def matrices_of(kind, weight):
    return list(KINDS[kind][3](weight))


LAYOUTS = {
    "contiguous": ("linear", (7, 5), (5, 1)),
    "contiguous, several tiles": ("linear", (300, 37), (37, 1)),
    "rows apart": ("linear", (7, 33), (40, 1)),
    "transposed": ("linear", (33, 7), (1, 33)),
    "transposed, several tiles": ("linear", (9, 300), (1, 9)),
    "transposed, columns apart": ("linear", (33, 7), (1, 41)),
    "one column": ("linear", (33, 1), (1, 1)),
    "one column of several": ("linear", (33, 1), (4, 1)),
    "one row": ("linear", (1, 33), (33, 1)),
    "one row, elements apart": ("linear", (1, 33), (66, 2)),
    "one element": ("linear", (1, 1), (5, 3)),
    "conv1d": ("conv", (6, 4, 3), contiguous(6, 4, 3)),
    "conv2d": ("conv", (6, 4, 3, 2), contiguous(6, 4, 3, 2)),
    "conv2d channels_last": ("conv", (6, 4, 3, 2), channels_last(6, 4, 3, 2)),
    "conv2d channels_last, several tiles": ("conv", (260, 3, 2, 2), channels_last(260, 3, 2, 2)),
    "conv2d channels_last, filters apart": ("conv", (6, 4, 3, 2), (31, 1, 8, 4)),
    "conv2d channels_last 1 x 1": ("conv", (6, 4, 1, 1), channels_last(6, 4, 1, 1)),
    "conv2d channels apart": ("conv", (6, 4, 3, 2), (32, 8, 2, 1)),
    "conv2d kernel turned": ("conv", (6, 4, 3, 2), (24, 6, 1, 3)),
    "conv2d outputs last": ("conv", (6, 4, 3, 2), (1, 6, 48, 24)),
    "conv2d one input channel": ("conv", (6, 1, 3, 2), channels_last(6, 1, 3, 2)),
    "conv2d one output channel": ("conv", (1, 4, 3, 2), channels_last(1, 4, 3, 2)),
    "conv3d": ("conv", (6, 4, 3, 2, 2), contiguous(6, 4, 3, 2, 2)),
    "conv3d channels_last": ("conv", (6, 4, 3, 2, 2), channels_last(6, 4, 3, 2, 2)),
    "up1d": ("up", (4, 6, 3), contiguous(4, 6, 3)),
    "up1d, kernel of one": ("up", (4, 6, 1), contiguous(4, 6, 1)),
    "up2d": ("up", (4, 6, 3, 2), contiguous(4, 6, 3, 2)),
    "up2d, several tiles": ("up", (3, 300, 2, 2), contiguous(3, 300, 2, 2)),
    "up2d channels_last": ("up", (4, 6, 3, 2), channels_last(4, 6, 3, 2)),
    "up2d one input": ("up", (1, 6, 3, 2), contiguous(1, 6, 3, 2)),
    "up2d one output channels_last": ("up", (4, 1, 3, 2), channels_last(4, 1, 3, 2)),
    "up3d channels_last": ("up", (4, 6, 3, 2, 2), channels_last(4, 6, 3, 2, 2)),
    "split up2d": ("split up", (4, 6, 3, 2), contiguous(4, 6, 3, 2)),
    "split up2d channels_last": ("split up", (4, 6, 3, 2), channels_last(4, 6, 3, 2)),
    "attention": ("attention", (36, 12), contiguous(36, 12)),
    "attention transposed": ("attention", (36, 12), (1, 36)),
    "in, out": ("in, out", (5, 12), contiguous(5, 12)),
    "stack": ("stack", (3, 6, 5), contiguous(3, 6, 5)),
    "stack transposed": ("stack", (3, 6, 5), (30, 1, 6)),
    "stack of splits": ("stack of splits", (3, 6, 5), contiguous(3, 6, 5)),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def bucket_in(layout, backend, dtype=torch.float32, **options):
    """A bucket over one weight of this layout, the weight, and its matrices as users see them."""
    kind, shape, strides = LAYOUTS[layout]
    weight = strided(shape, strides, dtype)
    module, selection = module_with(kind, weight)
    bucket = bucket_of(module, backend, **options, **selection)
    assert bucket.plan.tensors[0].data_ptr() == weight.data_ptr()
    return bucket, weight, matrices_of(kind, weight)


def oriented(bucket, i, matrix):
    """The matrix, or its transpose where that is what is iterated with."""
    return matrix.mT if bucket.plan.layouts[i].side == "left" else matrix


def logical(bucket, i, v):
    """Vector of matrix ``i`` in the order of the columns that users see, float64."""
    how, v = bucket.plan.layouts[i], bucket.state.columns(i, v)
    return (v if how.side == "left" else how.to_logical(v))[0].double()


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
    """The gradient of the penalty given the bucket's v, as autograd finds it in float64."""
    leaf = weight.detach().double().requires_grad_()
    total = 0.0
    for i, matrix in enumerate(matrices_of(kind, leaf)):
        v = logical(bucket, i, bucket.state.v)
        total += reference.penalty(oriented(bucket, i, matrix), v, exponent, target)
    return torch.autograd.grad(strength * total, leaf)[0]


def whole_buffer(tensor):
    """All elements of the storage that ``tensor`` is a view of."""
    n = tensor.untyped_storage().nbytes() // tensor.itemsize
    return tensor.as_strided((n,), (1,), 0)


def assert_gradient(bucket, kind, weight, grad, accumulate):
    """rank_one adds to (or overwrites) the elements of ``grad`` and touches no other memory."""
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
    """bind_grads names the parameter and says what is accepted; the tables stay as they were."""
    good = [torch.zeros_like(t) for t in bucket.plan.tensors]
    bucket.plan.bind_grads(good)
    before = bucket.plan.table.tobytes(), bucket.plan.vector_table.tobytes()
    for _ in range(2):
        with pytest.raises(ValueError, match="accepted") as caught:
            bucket.plan.bind_grads([grad, *good[1:]])
        for part in (f"gradient of parameter {bucket.plan.owners[0].name!r}", *parts):
            assert part in str(caught.value)
    assert (bucket.plan.table.tobytes(), bucket.plan.vector_table.tobytes()) == before


@pytest.mark.parametrize("case", INCOMPATIBLE)
def test_a_gradient_laid_out_otherwise_is_refused(case):
    kind, shape, strides, grad_strides = INCOMPATIBLE[case]
    module, options = module_with(kind, strided(shape, strides))
    grad = torch.randn(500).as_strided(shape, grad_strides)
    assert_refused(
        bucket_of(module, **options), grad, f"strides {grad_strides}", f"are {strides}", "like the"
    )


def freed(*shape):
    tensor = torch.randn(shape)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize(
    ("grad", "parts"),
    [
        (torch.randn(7, 5).to_sparse(), ["layout torch.sparse_coo", "dense"]),
        (torch.randn(7, 5, device="meta"), ["device meta", "cpu"]),
        (torch.randn(7, 5).double(), ["dtype torch.float64", "torch.float32", "bfloat16"]),
        (torch.randn(7, 5).to(torch.complex64), ["dtype torch.complex64"]),
        (torch.ones(7, 5, dtype=torch.int64), ["dtype torch.int64"]),
        (torch.randn(5, 7), ["shape (5, 7)", "(7, 5)"]),
        (torch.randn(35), ["shape (35,)", "(7, 5)"]),
        (freed(7, 5), ["no memory", "plain tensors"]),
    ],
    ids=["sparse", "meta", "float64", "complex", "int", "shape", "dimensions", "freed"],
)
def test_a_gradient_that_cannot_be_written_to_is_refused(grad, parts):
    assert_refused(bucket_of([torch.randn(7, 5), torch.randn(3)]), grad, *parts)


def test_a_float64_weight_wants_a_float64_gradient():
    bucket = bucket_of([torch.randn(7, 5).double()])
    assert_refused(bucket, torch.randn(7, 5), "dtype torch.float32", "accepted", "float64")


def test_a_strided_gradient_of_a_vector_is_refused():
    bucket = bucket_of([torch.randn(5)])
    assert_refused(bucket, torch.randn(10)[::2], "strides (2,)", "(1,)")


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
    with pytest.raises(ValueError, match="accepted are contiguous, channels_last") as caught:
        bucket_of([torch.randn(3, 4), weight])
    for part in ("'1.weight'", f"shape {shape}", f"strides {strides}", why):
        assert part in str(caught.value)


def test_a_part_that_cannot_be_used_in_place_is_named():
    module, options = module_with("attention", torch.randn(36, 24)[:, ::2])
    with pytest.raises(ValueError, match=r"'in_proj_weight\[q\]'.*strides \(24, 2\)"):
        bucket_of(module, **options)


def test_a_strided_vector_is_refused():
    with pytest.raises(ValueError, match=r"'0\.bias' has strides \(2,\); accepted are contiguous"):
        bucket_of([torch.randn(10)[::2]])


@pytest.mark.parametrize("weight", [torch.randn(7, 5, device="meta"), freed(7, 5)], ids=["m", "f"])
def test_a_weight_without_memory_is_refused(weight):
    with pytest.raises(ValueError, match=r"'0\.weight' has no memory of its own.*accepted"):
        bucket_of([weight])


def test_a_weight_whose_memory_was_freed_since_is_refused():
    weight = torch.randn(7, 5)
    plan_ = bucket_of([weight]).plan
    weight.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"'0\.weight' has no memory of its own.*accepted"):
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


# --------------------------------------------------------------------- tensors that move or change


def tables(plan_):
    return plan_.table.tobytes(), plan_.vector_table.tobytes()


def test_nothing_changes_while_nothing_moves():
    weights = [torch.randn(7, 5), torch.randn(3)]
    plan_ = bucket_of(weights).plan
    before = tables(plan_)
    assert plan_.bind_weights(weights)
    assert tables(plan_) == before


@every_layout
def test_a_moved_weight_is_followed(backend, layout):
    bucket, weight, _ = bucket_in(layout, backend)
    moved = strided(weight.shape, weight.stride())
    before = bucket.plan.table.copy()
    assert bucket.plan.bind_weights([moved])
    distance = moved.data_ptr() - weight.data_ptr()
    assert distance != 0
    assert (bucket.plan.table["weight"] == before["weight"] + distance).all()
    others = [name for name in before.dtype.names if name != "weight"]
    assert (bucket.plan.table[others] == before[others]).all()
    weight.fill_(math.nan)
    bucket.iterate(1)
    for i, matrix in enumerate(matrices_of(LAYOUTS[layout][0], moved)):
        s = oriented(bucket, i, matrix).double() @ logical(bucket, i, bucket.state.v)
        assert float(bucket.state.sigma[i]) == pytest.approx(float(s.norm()), rel=1e-6)


def test_a_parameter_with_new_data_is_followed(backend):
    layer = nn.Linear(5, 7)
    bucket = bucket_of(layer, backend)
    for parameter in layer.parameters():
        parameter.data = 2 * parameter.data.clone()
    assert bucket.plan.bind_weights([layer.weight, layer.bias])
    assert bucket.plan.table["weight"][0] == layer.weight.data_ptr()
    assert bucket.plan.vector_table["weight"][0] == layer.bias.data_ptr()
    bucket.iterate(1)
    s = layer.weight.detach() @ bucket.state.v
    assert float(bucket.state.sigma) == pytest.approx(float(s.norm()), rel=1e-5)
    assert float(bucket.state.norm) == pytest.approx(float(layer.bias.detach().norm()), rel=1e-5)


def test_only_the_moved_weight_gets_another_address():
    weights = [torch.randn(7, 5), torch.randn(4, 4), torch.randn(3)]
    plan_ = bucket_of(weights).plan
    moved = [weights[0], weights[1].clone(), weights[2]]
    assert plan_.bind_weights(moved)
    assert list(plan_.table["weight"]) == [moved[0].data_ptr(), moved[1].data_ptr()]
    assert plan_.vector_table["weight"][0] == weights[2].data_ptr()


CHANGES = {
    "rows": lambda w, b: (torch.randn(8, *w.shape[1:]), b),
    "columns": lambda w, b: (torch.randn(6, 4, 3, 5), b),
    "fewer rows of the same memory": lambda w, b: (w[:4], b),
    "sizes in another order": lambda w, b: (w.reshape(6, 3, 4, 2), b),
    "dtype": lambda w, b: (w.bfloat16(), b.bfloat16()),
    "dtype of the vector": lambda w, b: (w, b.double()),
    "device": lambda w, b: (w.to("meta"), b.to("meta")),
    "channels_last": lambda w, b: (w.to(memory_format=torch.channels_last), b),
    "filters apart": lambda w, b: (strided(w.shape, (30, 6, 2, 1)), b),
    "length of the vector": lambda w, b: (w, torch.randn(9)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_shape_dtype_device_or_layout_needs_a_new_plan(change):
    module = nn.Conv2d(4, 6, (3, 2))
    plan_ = bucket_of(module).plan
    before, tensors = tables(plan_), plan_.tensors
    weight, bias = module.weight.detach(), module.bias.detach()
    changed = CHANGES[change](weight, bias)
    for _ in range(2):
        assert not plan_.bind_weights(changed)
        assert tables(plan_) == before
        assert plan_.tensors is tensors
    assert plan_.bind_weights([weight, bias])


@pytest.mark.parametrize("kind", ["attention", "in, out", "stack", "stack of splits"])
def test_a_divided_parameter_must_keep_its_shape(kind):
    shape = next(s for k, s, _ in LAYOUTS.values() if k == kind)
    module, options = module_with(kind, torch.randn(shape))
    plan_ = bucket_of(module, **options).plan
    name, before = plan_.owners[0].name, tables(plan_)
    for dim in range(len(shape)):
        for n in (shape[dim] + 3, shape[dim] - 1):
            other = torch.randn(*shape[:dim], n, *shape[dim + 1 :])
            with pytest.raises(ValueError, match=re.escape(f"had shape {shape}")) as caught:
                plan_.bind_weights([other])
            assert f"'{name}[" in str(caught.value)
            assert f"now {tuple(other.shape)}" in str(caught.value)
    assert tables(plan_) == before


@pytest.mark.parametrize("shape", [(), (35,), (7, 5, 1)], ids=str)
def test_a_matrix_must_keep_its_number_of_dimensions(shape):
    plan_ = bucket_of([torch.randn(7, 5)]).plan
    with pytest.raises(ValueError, match=r"'0\.weight' had shape \(7, 5\) when it was selected"):
        plan_.bind_weights([torch.randn(shape)])


def test_a_weight_moved_to_an_unusable_layout_is_named():
    plan_ = bucket_of([torch.randn(7, 5)]).plan
    with pytest.raises(ValueError, match=r"'0\.weight'.*strides \(10, 2\).*accepted"):
        plan_.bind_weights([torch.randn(7, 10)[:, ::2]])


def test_parts_of_a_parameter_share_it_at_different_offsets():
    module, options = module_with("attention", torch.randn(36, 12))
    plan_ = bucket_of(module, **options).plan
    base = module.in_proj_weight.data_ptr()
    assert list(plan_.matrix_owner) == [0, 0, 0]
    assert len(plan_.tensors) == 1
    assert list(plan_.table["weight"]) == [base, base + 4 * 144, base + 4 * 288]
    grad = torch.zeros(36, 15)[:, :12]
    plan_.bind_grads([grad])
    assert list(plan_.table["grad"]) == [grad.data_ptr() + 4 * 12 * 15 * i for i in range(3)]
    assert (plan_.table["grad_row_stride"] == 15).all()
    module, options = module_with("in, out", torch.randn(5, 12))
    plan_ = bucket_of(module, **options).plan
    base = module.weight.data_ptr()
    assert list(plan_.table["weight"]) == [base, base + 4 * 6, base + 4 * 9]


def test_gradients_may_come_and_go_and_move(backend):
    weights = [torch.randn(7, 5), torch.randn(4, 4), torch.randn(3)]
    bucket = bucket_of(weights, backend)
    bucket.iterate(1)
    truth = gradients(bucket)
    for missing in range(3):
        grads = [None if i == missing else torch.zeros_like(w) for i, w in enumerate(weights)]
        gradients(bucket, grads=grads)
        for i in range(3):
            assert i == missing or torch.equal(grads[i], truth[i])
    old = [torch.zeros_like(w) for w in weights]
    gradients(bucket, grads=old)
    saved = [g.clone() for g in old]
    new = [torch.zeros_like(w) for w in weights]
    for i, g in enumerate(gradients(bucket, accumulate=True, grads=new)):
        assert torch.equal(g, truth[i])
        assert torch.equal(old[i], saved[i])


# --------------------------------------------------------------------------- tables and memory


def native_table_sizes():
    if (reason := backends.unavailable("cpu")) is not None:
        pytest.skip(reason)
    return backends.native_module().table_sizes


def rows_of(name):
    if name.lower() == "header":
        return np.dtype([(n, "f8" if n == "exponent" else "i8") for n in plan.HEADER])
    return getattr(plan, name.upper())


@pytest.mark.parametrize("name", ["matrix", "tile", "vector", "header"])
def test_rows_have_the_size_of_the_structs(name):
    assert rows_of(name).itemsize == native_table_sizes()[name]


@pytest.mark.parametrize("name", ["Matrix", "Tile", "Vector", "Header"])
def test_rows_have_the_fields_of_the_structs_in_order(name):
    source = Path(__file__).parent.parent / "csrc" / "table.h"
    if not source.exists():
        pytest.skip("the sources of the compiled module are not here")
    text = re.sub(r"//.*", "", source.read_text())
    body = re.search(rf"struct {name} {{(.*?)}};", text, re.DOTALL)[1]
    fields = [
        (field.strip(), {"int64_t": "i8", "double": "f8"}[kind])
        for kind, line in re.findall(r"(\w+) ([^;]+);", body)
        for field in line.split(",")
    ]
    assert np.dtype(fields) == rows_of(name)


TILED = [(1, 1), (127, 3), (128, 3), (129, 3), (300, 7), (8191, 2), (8192, 2), (8193, 2),
         (20000, 3), (0, 5), (5, 0), (5, 1000)]  # fmt: skip


def test_tiles_cover_every_row_once():
    plan_ = bucket_of([torch.randn(shape) for shape in TILED]).plan
    claimed = np.zeros(plan_.t_partial.numel(), dtype=int)
    for i, layout in enumerate(plan_.layouts):
        first, n = int(plan_.table["first_tile"][i]), int(plan_.table["n_tiles"][i])
        tiles = plan_.tiles[first : first + n]
        assert (tiles["matrix"] == i).all()
        assert n <= 64
        rows = [r for t in tiles for r in range(int(t["row_begin"]), int(t["row_end"]))]
        assert rows == (list(range(layout.rows)) if layout.cols else [])
        assert all(t["row_begin"] < t["row_end"] for t in tiles)
        for tile in tiles:
            claimed[int(tile["t_offset"]) : int(tile["t_offset"]) + layout.cols] += 1
    assert (claimed == 1).all()
    assert plan_.table["n_tiles"].sum() == len(plan_.tiles) == plan_.norm_partial.numel()


def test_tiles_do_not_depend_on_the_number_of_threads(threads):
    found = []
    for n in (1, 2, 7):
        threads(n)
        found.append(bucket_of([torch.empty(shape) for shape in TILED]).plan.tiles.tobytes())
    assert found[0] == found[1] == found[2]


def plan_of(tensors, r=1):
    found = select(list(named_weights(tensors)), trainable_only=False)
    return Plan(found.matrices, found.vectors, tensors, r)


@pytest.mark.parametrize("r", [1, 3])
def test_state_has_room_for_r_vectors(r):
    shapes = [(7, 5), (4, 9), (1, 1), (0, 3), (300, 2)]
    tensors = [*(torch.randn(shape) for shape in shapes), torch.randn(6), torch.randn(2)]
    plan_ = plan_of(tensors, r)
    state = State.fresh(plan_, exponent=2)
    m, n = sum(x.rows for x in plan_.layouts), sum(x.cols for x in plan_.layouts)
    assert state.v.shape == state.v_next.shape == (r * n,)
    assert state.s.shape == (r * m,)
    for name, size in {
        "sigma": 5, "residual": 5, "norm": 2, "penalty": 7, "strength": 7, "target": 5
    }.items():  # fmt: skip
        assert getattr(state, name).shape == (size,), name
        assert state.header[plan.SLOT[name]] == getattr(state, name).data_ptr()
    assert torch.isnan(torch.cat((state.v, state.v_next, state.s, state.scalars))).all()
    # The parts of the matrices are disjoint and leave nothing over.
    for i, layout in enumerate(plan_.layouts):
        assert state.columns(i, state.v).shape == (r, layout.cols)
        assert state.rows(i).shape == (r, layout.rows)
        assert torch.isnan(state.columns(i, state.v)).all()
        assert torch.isnan(state.rows(i)).all()
        state.columns(i, state.v).fill_(i)
        state.rows(i).fill_(i)
    assert not torch.isnan(torch.cat((state.v, state.s))).any()
    pieces = plan_.table["n_tiles"] * [x.cols for x in plan_.layouts]
    assert plan_.t_partial.numel() == r * pieces.sum()


@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_state_is_float32_or_as_wide_as_the_weights(dtype, state_dtype):
    plan_ = plan_of([torch.randn(7, 5).to(dtype), torch.randn(3).to(dtype)])
    state = State.fresh(plan_, exponent=2)
    assert plan_.state_dtype == state_dtype
    for tensor in (state.v, state.v_next, state.s, state.scalars, plan_.t_partial):
        assert tensor.dtype == state_dtype
    assert plan_.norm_partial.dtype == torch.float64


def allocated(*owners):
    """Bytes of all tensors and arrays that the objects hold, weights aside."""
    found = {}
    for owner in owners:
        for value in vars(owner).values():
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
            elif isinstance(value, np.ndarray):
                found[id(value)] = value.nbytes
    return sum(found.values())


@pytest.mark.parametrize("shape", [(2000, 2000), (20000, 50), (50, 20000), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_memory_grows_with_rows_plus_columns(shape, dtype):
    weight = torch.empty(shape, dtype=dtype)
    for tensor in (weight, weight.T):
        plan_ = plan_of([tensor])
        state = State.fresh(plan_, exponent=2)
        rows, cols = plan_.layouts[0].rows, plan_.layouts[0].cols
        # v, v_next and at most 64 partial t's; s; scalars, tables and tiles.
        limit = dtype.itemsize * (66 * cols + rows) + 64 * (32 + 8) + 1000
        n = allocated(plan_, state)
        assert 2 * dtype.itemsize * cols < n <= limit
        if weight.numel() > 10**6:
            assert n < 0.1 * weight.nbytes


def test_a_plan_holds_the_tensors_themselves():
    weights = [torch.randn(7, 5), torch.randn(3)]
    plan_ = plan_of(weights)
    assert all(a is b for a, b in zip(plan_.tensors, weights, strict=True))


def test_vectors_have_a_size_and_a_kind():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm((2, 5)))
    table = bucket_of(model).plan.vector_table
    assert list(table["size"]) == [4, 10, 10]
    assert list(table["kind"]) == [0, 1, 0]
    assert list(table["weight"]) == [
        p.data_ptr() for p in (model[0].bias, model[1].weight, model[1].bias)
    ]


def test_a_plan_of_vectors_alone(backend):
    bias = torch.randn(5)
    bucket = bucket_of([bias], backend)
    bucket.iterate(1)
    (grad,) = gradients(bucket)
    torch.testing.assert_close(grad, 4 * bias.square().sum() * bias)


def test_a_snapshot_keeps_the_gradient_of_its_moment(backend):
    bucket = bucket_of([torch.randn(30, 40), torch.randn(4, 9)], backend)
    bucket.iterate(1)
    snapshot, truth = bucket.state.snapshot(), gradients(bucket)
    bucket.iterate(3)
    bucket.state.strength.fill_(5)
    grads = [torch.full_like(g, math.nan) for g in truth]
    bucket.plan.bind_grads(grads)
    bucket.add_gradient(snapshot, grads, False)
    assert all(torch.equal(a, b) for a, b in zip(grads, truth, strict=True))
    assert not torch.equal(gradients(bucket)[0], truth[0])

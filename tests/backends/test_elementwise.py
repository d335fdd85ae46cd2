"""Rows, and shifts and gains with targets of their own, on every backend against float64."""

import pytest
import torch

from spectral_kernels.backends import reference
from spectral_kernels.selection.matrices import Elementwise

from ..support.buckets import gradients
from ..support.elementwise import bucket_of_entries, entry, penalty_of

pytestmark = pytest.mark.usefixtures("seeded")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Rows and their length.
SHAPES = [(1, 1), (1, 9), (3, 49), (129, 1), (129, 9), (3, 300), (1, 257), (5, 1030), (2, 16)]


def zoo(dtype):
    """Entries of every kind, with the target of each as ``Plan.set_targets`` takes it."""
    entries, targets = [], []
    for i, (n, length) in enumerate(SHAPES):
        rows = torch.randn(n, length).to(dtype) * 1.5 / length**0.5
        rows[n // 2] *= n < 3  # zeros
        entries.append(entry(f"rows{i}", rows, "rows", length))
        targets.append((0.0, 1.0, torch.rand(n) + 0.2)[i % 3])
    for size in (1, 5, 37, 300):
        gain = torch.randn(size).to(dtype)
        gain[size // 2] = 0
        entries += [entry(f"gain{size}.{j}", gain.clone(), "gain") for j in range(3)]
        targets += [None, 0.7, torch.rand(size) + 0.2]
        shift = 0.5 * torch.randn(size).to(dtype) / size**0.5
        entries += [entry(f"shift{size}.{j}", shift.clone(), "shift") for j in range(3)]
        targets += [None, 0.4, torch.tensor([1.3])]
    return entries, targets


def truth_of(own, target, exponent):
    """The float64 elements, R and its gradient, 0 where the norm is 0."""
    x = own.ref.get().detach().double().requires_grad_()
    if target is None:
        target = 1.0 if own.kind == "gain" else 0.0
    value = penalty_of(x, own.kind, own.length, target, exponent)
    gradient = torch.autograd.grad(value, x)[0].nan_to_num(0)
    x = x.detach()
    if own.kind == "rows":  # the SVD of zero has some direction
        gradient[x.norm(dim=1) == 0] = 0
    return x, value.detach(), gradient


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exponent", [1, 2, 2.5])
def test_value_norm_and_gradient(backend, dtype, exponent):
    entries, targets = zoo(dtype)
    bucket = bucket_of_entries(entries, backend, exponent, targets=targets)
    bucket.iterate(1)
    grads = gradients(bucket)
    start = [torch.randn_like(g) for g in grads]
    added = gradients(bucket, accumulate=True, grads=[g.clone() for g in start])
    unit = torch.finfo(dtype).eps
    for i, (own, target) in enumerate(zip(entries, targets, strict=True)):
        x, value, gradient = truth_of(own, target, exponent)
        norms = x.reshape(-1, own.length).norm(dim=1) if own.kind == "rows" else x.norm()[None]
        assert float(bucket.state.norm[i]) == pytest.approx(float(norms.max()), rel=1e-6), own
        # A norm may lie near its target: what is left is compared with what has cancelled.
        size = float(value) + 1e-6 * float((norms ** (2 * exponent)).sum() + 1)
        error = abs(float(bucket.state.raw_penalty[i]) - float(value))
        assert error <= 2e-5 * size, own
        assert grads[i].dtype == dtype
        tolerance = {"rtol": unit + 1e-5, "atol": 2e-6 * float(1 + norms.max() ** (2 * exponent))}
        torch.testing.assert_close(grads[i].double(), 0.5 * gradient, **tolerance)
        whole = start[i].double() + grads[i].double()
        allowed = 2 * unit * (whole.abs() + grads[i].double().abs()) + 1e-6
        assert ((added[i].double() - whole).abs() <= allowed).all(), own


def test_the_differentiable_penalty_has_these_gradients(backend):
    entries, targets = zoo(torch.float32)
    bucket = bucket_of_entries(entries, backend, 2.5, targets=targets)
    bucket.iterate(1)
    weights = [w.requires_grad_() for w in bucket.plan.tensors]
    total = reference.differentiable_penalty(bucket.plan, bucket.state, weights)
    torch.testing.assert_close(total, bucket.value(bucket.state), rtol=1e-5, atol=1e-6)
    expected = torch.autograd.grad(total, weights)
    for found, wanted in zip(gradients(bucket), expected, strict=True):
        torch.testing.assert_close(found, wanted.nan_to_num(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_another_dtype(backend, dtype, grad_dtype):
    entries, targets = zoo(dtype)
    bucket = bucket_of_entries(entries, backend, targets=targets)
    bucket.iterate(1)
    like = bucket.plan.tensors
    wide = gradients(bucket, grads=[torch.zeros_like(w, dtype=torch.float32) for w in like])
    found = gradients(bucket, grads=[torch.zeros_like(w, dtype=grad_dtype) for w in like])
    for a, b in zip(found, wide, strict=True):
        assert a.dtype == grad_dtype
        rtol = torch.finfo(grad_dtype).eps
        torch.testing.assert_close(a, b.to(grad_dtype), rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("scale", [1e19, 1e-19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("length", [9, 300])
def test_extreme_rows(backend, dtype, scale, length):
    rows = (torch.randn(5, length, dtype=torch.float64) * scale).to(dtype)
    rows[3], rows[2, 1] = 0, 0
    bucket = bucket_of_entries([entry("x", rows, "rows", length)], backend, 1, targets=[0.7])
    bucket.iterate(1)
    (found,) = gradients(bucket)
    wide = rows.double()
    norms = wide.norm(dim=1)
    assert float(bucket.state.norm[0]) == pytest.approx(float(norms.max()), rel=1e-6)
    expected = torch.nan_to_num((norms - 0.7) / norms, posinf=0, neginf=0)[:, None] * wide
    torch.testing.assert_close(found.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [9, 300])
def test_a_row_that_is_not_finite_shows_and_leaves_the_others(backend, dtype, value, length):
    rows = torch.randn(140, length).to(dtype)
    rows[130, 5] = value
    bucket = bucket_of_entries([entry("x", rows, "rows", length)], backend)
    bucket.iterate(1)
    (found,) = gradients(bucket)
    assert not torch.isfinite(bucket.state.norm).any()
    assert not torch.isfinite(bucket.state.raw_penalty).any()
    others = torch.arange(140) != 130
    assert torch.isfinite(found[others]).all()
    assert not torch.isfinite(found[130, 5])


@pytest.mark.parametrize("shape", [(0, 9), (9, 0), (0, 0)])
def test_no_rows(backend, shape):
    own = entry("x", torch.zeros(shape), "rows", shape[1])
    other = entry("y", torch.ones(3, 4), "rows", 4)
    bucket = bucket_of_entries([own, other], backend)
    bucket.iterate(1)
    gradients(bucket)
    assert bucket.state.norm.tolist() == [0, 2]
    assert bucket.state.raw_penalty.tolist() == [0, 27]


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_outside_of_the_rows_is_read_or_written(backend, dtype):
    for n, length in SHAPES:
        buffer = torch.full((n * length + 32,), float("nan"), dtype=dtype)
        rows = buffer[16:-16].view(n, length)
        rows.copy_(torch.randn(n, length))
        place = torch.full_like(buffer, 7)
        bucket = bucket_of_entries([entry("x", rows, "rows", length)], backend)
        bucket.iterate(1)
        assert torch.isfinite(bucket.state.norm).all()
        gradients(bucket, grads=[place[16:-16].view(n, length)])
        assert torch.isfinite(place).all()
        assert (place[:16] == 7).all()
        assert (place[-16:] == 7).all()


def test_same_bits_at_any_number_of_threads(threaded, threads):
    rows, results = [torch.randn(3000, 49), torch.randn(7, 5000)], []
    for n in (1, 2, 3):
        threads(n)
        entries = [entry(f"{i}", x, "rows", x.shape[1]) for i, x in enumerate(rows)]
        bucket = bucket_of_entries(entries, threaded)
        bucket.iterate(1)
        results.append((bucket.state.scalars.nan_to_num(7), *gradients(bucket)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_elements_of_a_row_may_be_in_any_order(backend):
    kernels = torch.randn(6, 1, 3, 5)
    plain = bucket_of_entries([entry("x", kernels, "rows", 15)], backend)
    turned = kernels.transpose(2, 3).contiguous().transpose(2, 3)
    last = kernels.contiguous(memory_format=torch.channels_last)
    for other in (turned, last):
        bucket = bucket_of_entries([entry("x", other, "rows", 15)], backend)
        for own in (plain, bucket):
            own.iterate(1)
        torch.testing.assert_close(bucket.state.norm, plain.state.norm)
        torch.testing.assert_close(gradients(bucket), gradients(plain))
    with pytest.raises(ValueError, match=r"gradient of parameter 'x': expected strides"):
        gradients(bucket_of_entries([entry("x", turned, "rows", 15)], backend),
                  grads=[torch.empty(6, 1, 3, 5)])  # fmt: skip


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(9, 6).T, torch.zeros(6, 12)[:, :9], torch.zeros(6, 2, 9)[:, 0], torch.zeros(54)],
)
def test_rows_that_are_not_one_after_the_other_are_refused(tensor):
    with pytest.raises(ValueError, match=r"parameter 'x': expected contiguous rows of 9"):
        bucket_of_entries([entry("x", tensor, "rows", 9)], "reference")


def test_a_target_of_the_entry_counts_without_others():
    entries = [
        entry("a", torch.full((2, 4), 0.5), "rows", 4),
        entry("b", torch.full((2, 4), 0.5), "rows", 4, 0.0),
        entry("c", torch.full((4,), 0.5), "gain", target=0.5),
        Elementwise("d", entry("d", torch.full((4,), 0.5), "shift").ref, "shift", target=1.0),
    ]
    bucket = bucket_of_entries(entries, "reference")
    bucket.iterate(1)
    assert bucket.state.raw_penalty.tolist() == [0, 2, 0, 0]


def test_a_snapshot_keeps_its_targets(backend):
    bucket = bucket_of_entries(*zoo(torch.float32)[:1], backend, targets=zoo(torch.float32)[1])
    bucket.iterate(1)
    snapshot, truth = bucket.state.snapshot(), gradients(bucket)
    bucket.set_targets([3.0] * len(bucket.plan.elementwise))
    assert not torch.equal(gradients(bucket)[3], truth[3])
    grads = [torch.full_like(g, float("nan")) for g in truth]
    bucket.plan.bind_grads(grads)
    bucket.add_gradient(snapshot, grads, False)
    assert all(torch.equal(a, b) for a, b in zip(grads, truth, strict=True))
    assert not torch.equal(gradients(bucket)[3], truth[3])


def test_shifts_and_gains_without_targets_have_no_address():
    entries, targets = zoo(torch.float32)
    bucket = bucket_of_entries(entries, "reference", targets=targets)
    found = bucket.plan.elementwise_table["targets"]
    assert [x == 0 for x in found] == [x is None for x in targets]

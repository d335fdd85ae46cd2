"""Convolutions as operators, on every backend, against exact operators and the reference."""

import copy
import math

import pytest
import torch
from torch import nn

from spectral_kernels import SpectralAdamW, SpectralSGD
from spectral_kernels.backends import choice, operators, reference
from spectral_kernels.engine.bucket import Bucket
from spectral_kernels.engine.operators import search_again
from spectral_kernels.selection.matrices import refs_of
from spectral_kernels.selection.rules import select

from ..support import convolutions
from ..support.buckets import gradients, poison

pytestmark = pytest.mark.usefixtures("seeded")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FEW = ["3x3", "stride 2", "depthwise", "three dimensions"]


@pytest.fixture(autouse=True)
def few_in_the_interpreter(request):
    """In Triton's interpreter, which is slow, few kinds and dtypes."""
    given = request.node.callspec.params
    dtype, name = given.get("dtype", torch.float32), given.get("name", FEW[0])
    if given.get("backend") == "triton" and (dtype == torch.float16 or name not in FEW):
        pytest.skip("slow in the interpreter")


def bucket_of(conv, backend, exponent=2.0, target=1.0, strength=1.0, seed=0, extra_iterations=0):
    """A bucket of a convolution's operators, from random vectors, with poisoned scratch."""
    found = select(conv, biases=False, trainable_only=False, convolutions="operator")
    tensors = [ref.get() for ref in refs_of(found.matrices, ())]
    kind = choice.choose(backend, tensors[0].device, tensors[0].dtype)
    bucket = Bucket.of(found.matrices, [], tensors, kind, exponent,
                       extra_iterations=extra_iterations)  # fmt: skip
    bucket.state.target.fill_(target)
    bucket.state.strength.fill_(strength)
    generator = torch.Generator().manual_seed(seed)
    for i, layout in enumerate(bucket.plan.layouts):
        x = torch.randn(2, layout.cols, generator=generator, dtype=torch.float64, device="cpu")
        v = operators.projected(
            layout.to_logical(x).view(2, -1, taps_of(bucket, i).n), taps_of(bucket, i)
        )
        bucket.put_vectors(i, layout.from_logical(v.flatten(1)).to(bucket.state.v))
    poison(bucket.plan)
    return bucket


def taps_of(bucket, i):
    return reference.taps(bucket.plan, i)


def kernel_of(bucket, i):
    """The kernel [M, C, taps...] of operator ``i``, float64."""
    return bucket.plan.matrices[i].of(bucket.plan.tensors[0].detach()).double()


def vector_of(bucket, i, v):
    """Vector ``i`` of a buffer as complex numbers [C, taps]."""
    own = bucket.plan.layouts[i].to_logical(bucket.state.columns(i, v))
    return operators.as_complex(own.view(2, -1, taps_of(bucket, i).n))


def eps(bucket):
    return torch.finfo(bucket.plan.state_dtype).eps


def assert_is_a_vector(v, taps, tolerance):
    """``v`` is a wave with the frequency that is in it, times a vector of length one."""
    theta = operators.frequency_of(v, taps)
    nearest = operators.projected(operators.as_parts(v), taps)
    assert (operators.as_complex(nearest) - v).abs().max() <= tolerance
    a = operators.contracted(v, theta, taps) / taps.in_phase
    assert abs(float(torch.linalg.vector_norm(a)) - 1) <= tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", convolutions.KINDS)
def test_one_iteration_is_that_of_the_formulas(backend, name, dtype):
    conv = convolutions.made(name, dtype)
    bucket = bucket_of(conv, backend, exponent=3, target=0.7, strength=0.3)
    before = [vector_of(bucket, i, bucket.state.v_next) for i in range(len(bucket.plan.matrices))]
    bucket.iterate(1)
    grad = gradients(bucket)[0].double()
    state, unit = bucket.state, eps(bucket)
    for i, v in enumerate(before):
        kernel, taps = kernel_of(bucket, i).flatten(2), taps_of(bucket, i)
        s = torch.einsum("mcp,cp->m", kernel.to(v.dtype), v)
        sigma = float(torch.linalg.vector_norm(s))
        assert math.isclose(float(state.sigma[i]), sigma, rel_tol=30 * unit), name
        t = torch.einsum("mcp,m->cp", kernel.to(v.dtype), s)
        found = vector_of(bucket, i, state.v_next)
        assert_is_a_vector(found, taps, 30 * unit)
        # The next v is A at its frequency, and that is no worse than the one before.
        theta = operators.frequency_of(found, taps)
        a = operators.contracted(t, theta, taps)
        height = float(torch.linalg.vector_norm(a))
        expected = operators.vector_of(a / height, theta, taps)
        # A is small in some channels: its error is relative to all of t.
        assert (found - expected).abs().max() <= 100 * unit * math.sqrt(taps.n), name
        own = float(
            torch.linalg.vector_norm(operators.contracted(t, operators.frequency_of(v, taps), taps))
        )
        assert height >= own * (1 - 30 * unit)
        residual = math.sqrt(max((own / sigma) ** 2 - sigma**2, 0))
        assert abs(float(state.residual[i]) - residual) <= 100 * math.sqrt(unit) * sigma
        factor = 0.3 * 6 * (sigma**3 - 0.7**3) * sigma**2 / sigma
        truth = factor * (s[:, None, None] * v.conj()).real
        own_grad = bucket.plan.matrices[i].of(grad).flatten(2)
        tolerance = 30 * unit + torch.finfo(dtype).eps
        assert (own_grad - truth).abs().max() <= tolerance * truth.abs().max(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", convolutions.KINDS)
def test_iterations_follow_the_reference(backend, name, dtype):
    """Newton's steps too: to the same frequency, from the same vector."""
    conv = convolutions.made(name, dtype)
    found, truth = bucket_of(conv, backend), bucket_of(copy.deepcopy(conv).double(), "reference")
    n = 3 if backend == "triton" else 12
    for bucket in (found, truth):
        bucket.iterate(n)
    for i in range(len(found.plan.matrices)):
        a, b = (vector_of(bucket, i, bucket.state.v_next) for bucket in (found, truth))
        tolerance = 1e-3 if dtype == torch.float32 else 1e-9
        # A phase is free.
        turn = (a.conj() * b).sum()
        assert (a * turn / turn.abs() - b).abs().max() <= tolerance, name
        assert math.isclose(
            float(found.state.sigma[i]), float(truth.state.sigma[i]), rel_tol=tolerance
        )


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", convolutions.KINDS)
def test_sigma_rises_to_the_norm_and_never_above(backend, name):
    if backend == "triton":
        pytest.skip("slow in the interpreter")
    conv = convolutions.made(name, torch.float32)
    bucket = bucket_of(conv, backend)
    search_again(bucket, torch.full_like(bucket.state.sigma, math.nan))
    truth = [convolutions.norm_over_frequencies(k, conv) for k in convolutions.kernels_of(conv)]
    highest = convolutions.norm_on(copy.deepcopy(conv).double(), convolutions.image_of(name))
    between = 0.01 if len(conv.kernel_size) == 3 else 4e-3
    before = torch.zeros(len(truth))
    for _ in range(60):
        bucket.iterate(1)
        sigma = bucket.state.sigma.clone()
        assert (sigma >= before * (1 - 1e-6)).all(), name
        before = sigma
    for sigma, exact in zip(before.tolist(), truth, strict=True):
        # Between the frequencies of the grid there may be a higher one.
        assert 0.999 * exact <= sigma <= exact * (1 + between), name
    assert highest <= max(before.tolist()) * (1 + 1e-3), name


@pytest.mark.takes_seconds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_steps_of_optimizers_are_those_of_the_reference(backend, dtype):
    kinds = "3x3", "stride 2", "transposed by groups"
    if backend == "triton":  # slow in the interpreter
        kinds = kinds[:1]
    for cls in (SpectralAdamW, SpectralSGD):
        for decoupled in (False, True):
            results = []
            for name in (backend, "reference"):
                model = nn.ModuleList(convolutions.made(kind, dtype) for kind in kinds)
                optimizer = cls(model.parameters(), 0.05, model=model, strength=0.5, target=0.3,
                                convolutions="operator", decoupled=decoupled,
                                backend=name, state_dtype=torch.float32, warmup=3)  # fmt: skip
                for bucket in optimizer._buckets.bound():
                    bucket.warmup = 0  # a GPU does not see which operators to warm up again
                generator = torch.Generator().manual_seed(1)
                for _ in range(3):
                    for p in model.parameters():
                        x = torch.randn(
                            p.shape, generator=generator, device="cpu", dtype=torch.float64
                        )
                        p.grad = (0.1 * x).to(p)
                    optimizer.step()
                results.append([*model.parameters(), optimizer.sigma])
            for found, truth in zip(*results, strict=True):
                tolerance = 0.05 if dtype == torch.bfloat16 else 1e-4
                error = (found.double() - truth.double()).abs().max()
                assert error <= tolerance * truth.double().abs().max(), (cls, decoupled)


@pytest.mark.parametrize("kind", ["zero", "nan", "large", "small"])
def test_extreme_kernels(backend, kind):
    conv = convolutions.made("3x3", torch.float32)
    sigma = convolutions.norm_over_frequencies(conv.weight, conv)
    factor = {"zero": 0.0, "nan": math.nan, "large": 1e19, "small": 1e-19}[kind]
    with torch.no_grad():
        conv.weight.mul_(factor)
    bucket = bucket_of(conv, backend)
    before = bucket.state.v_next.clone()
    bucket.iterate(3)
    found = float(bucket.state.sigma[0])
    assert torch.isfinite(bucket.state.v_next).all()
    if kind in ("zero", "nan"):
        assert (bucket.state.v_next == before).all()
        assert found == 0 if kind == "zero" else math.isnan(found)
        grad = gradients(bucket)[0]
        assert (grad == 0).all() if kind == "zero" else grad.isnan().all()
    else:
        assert 0.5 * sigma * factor <= found <= 1.001 * sigma * factor


def test_stale_operators_alone_take_extra_iterations(backend):
    conv = convolutions.made("groups", torch.float32)
    bucket = bucket_of(conv, backend, extra_iterations=8)
    bucket.iterate(2)
    ratio = bucket.state.residual / bucket.state.sigma
    assert (ratio < 0.3).all()

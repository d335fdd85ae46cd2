"""On a CUDA device: the regularizer, and the benches' clock and gate."""

import pytest
import torch
from torch import nn

from bench import baselines, devices, gate, memory
from spectral_kernels import SpectralRegularizer

from . import cases
from .buckets import bucket_of
from .models import close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SHAPES = [(30, 40), (64, 16), (30, 40)]


def gradients(device, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20), nn.LayerNorm(20), nn.Linear(20, 7))
    reg = SpectralRegularizer(model.to(device, dtype), 0.1, backend="reference")
    reg.penalty().backward()
    reg.accumulate_grad_()
    return [p.grad.cpu().double() for p in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_gradients_as_on_a_cpu(dtype):
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    close(gradients("cuda", dtype), gradients("cpu", dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_agrees_with_the_reference_over_the_zoo(dtype):
    pytest.importorskip("triton")
    found = {}
    for backend in ("triton", "reference"):
        weights = [w.cuda() for w in cases.random_weights(cases.ZOO, dtype)]
        bucket = bucket_of([*weights, torch.ones(70, dtype=dtype, device="cuda")], backend)
        grads = [0.01 * torch.ones_like(t) for t in bucket.plan.tensors]
        bucket.plan.bind_grads(grads)
        bucket.iterate_and_add_gradient(3, grads)
        found[backend] = [bucket.state.sigma, *(g.float() for g in grads)]
    unit = torch.finfo(dtype).eps
    for a, b in zip(found["triton"], found["reference"], strict=True):
        torch.testing.assert_close(a, b, rtol=max(1e-4, 2 * unit), atol=1e-5)


def test_the_cpu_backend_refuses_cuda_weights():
    reg = SpectralRegularizer(nn.Linear(3, 4).cuda(), backend="cpu", warmup=0)
    with pytest.raises(RuntimeError, match="weights on a CPU"):
        reg.penalty()


@pytest.mark.parametrize("name", [n for n, c in baselines.CONTENDERS.items()
                                  if "cuda" in c.devices])  # fmt: skip
def test_every_contender_passes_the_gate(name):
    weights = gate.leaves(SHAPES, torch.float32, "cuda")
    assert gate.first_step(baselines.CONTENDERS[name], weights).problem is None


def test_the_clock_measures_the_device_and_not_the_launch():
    x = torch.randn(2**28, device="cuda")
    seconds = devices.seconds_on_cuda(lambda: x.mul_(1.0001), 0.02)
    assert 2 * x.nbytes / seconds < 10e12  # bytes per second, above any memory's


def test_input_sets_outgrow_the_cache():
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    assert devices.input_sets("cuda", 10**6) * 10**6 >= 4 * cache
    assert devices.input_sets("cuda", 100 * cache) == 1


def test_memory_of_a_step():
    of_weights = 4 * 500 * 64 * 64
    peak = memory.measure("many_small", "cuda", "float32", "stacked_bmm").bytes
    assert of_weights < peak < 10 * of_weights

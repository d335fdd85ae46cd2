"""On a CUDA device: streams, graphs, synchronization, the regularizer, the benches' clock and gate.

The tests of tests/backends/test_backends.py and others run on the device too, by their fixture.
"""

import copy
import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

from bench.support import baselines, devices, gate, memory
from spectral_kernels import SpectralRegularizer, spectral_norms
from spectral_kernels.backends import choice

from ..support.gpu_like import WAYS, check_graph, training
from ..support.models import captured, close, net, with_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("exact"),
]
SHAPES = [(30, 40), (64, 16), (30, 40)]
SEVERAL = pytest.mark.parametrize(
    ("n_vectors", "iterations"), [(1, 1), (1, 2), (1, "auto"), (4, 1), (4, "auto"), (16, 1)]
)


def grads_of(model):
    return [p.grad for p in model.parameters()]


def loss_of(model):
    return model(torch.linspace(-1, 1, 1200, device="cuda").view(4, 300)).square().mean()


def are_close(first, second):
    """Compare with a tolerance: products in a graph may be rounded in another order."""
    close(first, second, rtol=1e-4, atol=1e-6)
    return True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_gradients_as_on_a_cpu(kernels, dtype):
    found = []
    for device, backend in (("cuda", kernels), ("cpu", "reference")):
        model = net().to(device, dtype)
        reg = SpectralRegularizer(model, 0.1, backend=backend)
        reg.penalty().backward()
        reg.accumulate_grad_()
        found.append([g.cpu().double() for g in grads_of(model)])
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    close(*found, rtol=tolerance, atol=tolerance)


def test_several_dtypes_in_a_model(kernels):
    found = []
    for backend in (kernels, "reference"):
        model = with_gradients(net((torch.bfloat16, torch.float32)))
        reg = SpectralRegularizer(model, 0.1, backend=backend)
        for _ in range(3):
            reg.accumulate_grad_()
        found.append([g.double() for g in grads_of(model)])
    close(*found, rtol=2e-2, atol=1e-4)


@SEVERAL
def test_same_bits_on_ten_runs(kernels, n_vectors, iterations):
    runs = []
    for _ in range(10):
        model = with_gradients(net())
        reg = SpectralRegularizer(
            model, 0.1, n_power_iterations=iterations, n_vectors=n_vectors, backend=kernels
        )
        for _ in range(3):
            reg.accumulate_grad_()
        runs.append([*grads_of(model), reg.singular_values, reg.residuals])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def test_a_step_runs_in_the_current_stream(kernels):
    """The step reads weights that the current stream writes late."""
    expected, model = (with_gradients(net()) for _ in range(2))
    regs = [SpectralRegularizer(m, 0.1, backend=kernels) for m in (expected, model)]
    for reg in regs:
        reg.accumulate_grad_()
    with torch.no_grad():
        expected[0].weight.mul_(3)
    regs[0].accumulate_grad_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(200_000_000)
        model[0].weight.mul_(3)
        regs[1].accumulate_grad_()
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(grads_of(expected), grads_of(model), strict=True))


@SEVERAL
def test_a_step_with_static_addresses_neither_waits_nor_allocates(kernels, n_vectors, iterations):
    model = with_gradients(net())
    reg = SpectralRegularizer(
        model, 0.1, n_power_iterations=iterations, n_vectors=n_vectors, backend=kernels
    )
    for _ in range(2):
        reg.accumulate_grad_()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            reg.accumulate_grad_()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@SEVERAL
def test_a_captured_step_replays_bit_for_bit(kernels, n_vectors, iterations):
    strength = torch.tensor(0.1, device="cuda")
    model = with_gradients(net())
    twin = copy.deepcopy(model)
    regs = [
        SpectralRegularizer(
            m, strength, n_power_iterations=iterations, n_vectors=n_vectors, backend=kernels
        )
        for m in (model, twin)
    ]
    graph = captured(regs[0].accumulate_grad_)
    regs[1].accumulate_grad_()
    for i in range(4):
        strength.fill_(0.1 * (i + 1))
        with torch.no_grad():
            for m in (model, twin):
                m[0].weight.mul_(1.1)
        graph.replay()
        regs[1].accumulate_grad_()
        own, expected = grads_of(model), grads_of(twin)
        assert all(torch.equal(a, b) for a, b in zip(own, expected, strict=True)), i
        assert torch.equal(regs[0].singular_values, regs[1].singular_values)


@pytest.mark.parametrize("n_vectors", [1, 4])
@pytest.mark.parametrize("way", [way for way in WAYS if way != "optimizer"])
def test_a_whole_step_is_captured_after_gradients_were_set_to_none(kernels, way, n_vectors):
    """The graph has its own gradients and tables of addresses; eager steps still work."""
    options = {"n_vectors": n_vectors}
    check_graph(captured, lambda: training(net(), way, kernels, loss_of, **options), are_close)


def test_a_gradient_that_a_graph_makes_starts_from_zero_in_every_replay(kernels):
    model, twin = net(), net()
    regs = [SpectralRegularizer(m, 0.1, backend=kernels) for m in (model, twin)]
    for m, reg in zip((model, twin), regs, strict=True):
        reg.accumulate_grad_()
        m.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        regs[0].accumulate_grad_()
    for _ in range(3):
        twin.zero_grad()
        graph.replay()
        regs[1].accumulate_grad_()
        assert all(torch.equal(*pair) for pair in zip(*map(grads_of, (model, twin)), strict=True))


def test_an_eager_step_does_not_move_the_gradients_of_a_graph(kernels):
    model = with_gradients(net())
    reg = SpectralRegularizer(model, 0.1, warmup=60, backend=kernels)
    graph = captured(reg.accumulate_grad_)
    own = grads_of(model)
    model.zero_grad()
    reg.accumulate_grad_()
    eager = [g.clone() for g in grads_of(model)]
    for grad in own:
        grad.zero_()
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(eager, grads_of(model), strict=True))
    close(own, eager, rtol=1e-2, atol=1e-4)


def test_a_capture_without_a_step_before_it_is_an_error(kernels):
    """The tables are built, but not used yet."""
    reg = SpectralRegularizer(with_gradients(net()), 0.1, warmup=0, backend=kernels)
    reg._buckets.bound()
    graph = torch.cuda.graph(torch.cuda.CUDAGraph())
    with pytest.raises(RuntimeError, match="run a step before"), graph:
        reg.accumulate_grad_()


def test_what_is_set_between_steps_is_not_waited_for(kernels):
    model = with_gradients(net())
    reg = SpectralRegularizer(model, 0.1, backend=kernels)
    reg.accumulate_grad_()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for strength in (0.2, {"0.*": 0.1, "*": 0.3}, torch.tensor(0.2)):
            reg.strength = strength
            reg.accumulate_grad_(grad_scale=4.0)
        reg.accumulate_grad_(grad_scale=torch.tensor(4.0))
        model.zero_grad()
        reg.accumulate_grad_()
        reg.penalty().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_first_use_in_inference_mode_changes_nothing(kernels):
    found = []
    for mode in (True, False):
        model = net()
        reg = SpectralRegularizer(model, 0.1, backend=kernels)
        with torch.inference_mode(mode):
            reg.sigma  # noqa: B018
        for _ in range(2):
            model.zero_grad()
            reg.penalty().backward()
            reg.accumulate_grad_()
        found.append([*grads_of(model), reg.sigma])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_float64_weights_are_measured(kernels):
    model = nn.Linear(40, 30).cuda().double()
    truth = float(torch.linalg.svdvals(model.weight.detach())[0])
    reg = SpectralRegularizer(model, target="initial", backend=kernels)
    assert spectral_norms(model, backend=kernels)["weight"] == pytest.approx(truth, rel=1e-4)
    assert reg.state_dict()["initial"]["weight"] == pytest.approx(truth, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(kernels, tool):
    if (program := shutil.which("compute-sanitizer")) is None:
        pytest.skip("compute-sanitizer is not on the PATH")
    result = subprocess.run(
        [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m",
         "tests.support.sanitized",
         kernels],
        capture_output=True, text=True, check=False,
        # Each tensor is an allocation of its own, so that accesses beyond it are detected.
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    clean = {"memcheck": "0 errors", "racecheck": "0 hazards"}
    assert clean[tool] in result.stdout + result.stderr


def test_auto_takes_the_first_that_can_run(recwarn):
    names = [n for n in ("triton", "cuda") if choice.unavailable(n) is None]
    chosen = choice.choose("auto", torch.device("cuda", 0)).name
    assert chosen == (names[0] if names else "reference")
    assert not [w for w in recwarn if "failed its check" in str(w.message)]


def test_the_cpu_backend_refuses_cuda_weights():
    reg = SpectralRegularizer(nn.Linear(3, 4).cuda(), backend="cpu", warmup=0)
    with pytest.raises(RuntimeError, match="weights on a CPU"):
        reg.penalty()


@pytest.mark.parametrize("name", [n for n, c in baselines.CONTENDERS.items()
                                  if "cuda" in c.devices])  # fmt: skip
def test_every_contender_passes_the_gate(name):
    if name.removesuffix("_replay") in choice.NAMES and (
        reason := choice.unavailable(name.removesuffix("_replay"))
    ):
        pytest.skip(reason)
    weights = gate.leaves(SHAPES, torch.float32, "cuda")
    assert gate.first_step(baselines.CONTENDERS[name], weights).problem is None


def test_the_clock_measures_the_device_and_not_the_launch():
    x = torch.randn(2**28, device="cuda")
    seconds = devices.seconds_on_cuda(lambda: x.mul_(1.0001), 0.02)
    assert 2 * x.nbytes / seconds < 10e12  # bytes per second, above any memory's bandwidth


def test_input_sets_outgrow_the_cache():
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    assert devices.input_sets("cuda", 10**6) * 10**6 >= 4 * cache
    assert devices.input_sets("cuda", 100 * cache) == 1


def test_memory_of_a_step():
    of_weights = 4 * 500 * 64 * 64
    peak = memory.measure("many_small", "cuda", "float32", "stacked_bmm").bytes
    assert of_weights < peak < 10 * of_weights

"""Optimizers on a CUDA device: streams, graphs, synchronization, numbers that stay on the device.

The tests of test_optim.py and test_changes.py run on the device too, by their fixture.
"""

import copy

import pytest
import torch

from spectral_kernels import SpectralAdamW, SpectralSGD
from spectral_kernels.tables import device as device_tables

from ..backends.test_gpu import are_close, loss_of
from ..support.gpu_like import check_graph, training
from ..support.models import captured, net, with_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("exact"),
]
SEVERAL = pytest.mark.parametrize(
    ("n_vectors", "iterations"), [(1, 1), (1, "auto"), (4, 1), (4, "auto"), (16, 1)]
)


def adamw(model, kernels, **options):
    return SpectralAdamW(with_gradients(model), 1e-2, strength=0.1, backend=kernels, **options)


def state_of(model, optimizer):
    moments = [x for state in optimizer.state.values() for x in state.values()]
    return [*(p.detach() for p in model.parameters()), *moments, optimizer.sigma,
            optimizer.residual]  # fmt: skip


def same_bits(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [SpectralAdamW, SpectralSGD])
def test_same_steps_as_on_a_cpu(kernels, dtype, kind):
    found = []
    for device, backend in (("cuda", kernels), ("cpu", "reference")):
        model = with_gradients(net().to(device, dtype))
        optimizer = kind(model, 1e-2, strength=0.1, backend=backend)
        for _ in range(5):
            optimizer.step()
        found.append([p.detach().cpu().double() for p in model.parameters()])
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for own, expected in zip(*found, strict=True):
        torch.testing.assert_close(own, expected, rtol=tolerance, atol=tolerance)


def test_same_bits_on_ten_runs(kernels):
    runs = []
    for _ in range(10):
        model = net()
        optimizer = adamw(model, kernels)
        for _ in range(3):
            optimizer.step()
        runs.append(state_of(model, optimizer))
    assert all(same_bits(runs[0], run) for run in runs[1:])


def test_a_step_runs_in_the_current_stream(kernels):
    """The step reads gradients that the current stream writes late."""
    models = net(), net()
    optimizers = [adamw(m, kernels) for m in models]
    for optimizer in optimizers:
        optimizer.step()
    models[0][0].weight.grad.mul_(-3)
    optimizers[0].step()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        models[1][0].weight.grad.mul_(-3)
        optimizers[1].step()
    stream.synchronize()
    assert same_bits(*(state_of(*pair) for pair in zip(models, optimizers, strict=True)))


@SEVERAL
def test_a_step_with_static_addresses_neither_waits_nor_allocates(kernels, n_vectors, iterations):
    optimizer = adamw(net(), kernels, n_vectors=n_vectors, n_power_iterations=iterations)
    for _ in range(2):
        optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_new_gradients_and_what_a_scaler_says_are_not_waited_for(kernels):
    model = net()
    optimizer = adamw(model, kernels)
    optimizer.step()
    optimizer.grad_scale = torch.tensor(4.0, device="cuda")
    optimizer.found_inf = torch.tensor(0.0, device="cuda")
    optimizer.step()
    kept = [p.grad for p in model.parameters()]  # or the new ones might get their addresses
    torch.cuda.set_sync_debug_mode("error")
    try:
        with_gradients(model)
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    del kept


def test_a_step_that_found_inf_leaves_everything(kernels):
    model = net()
    optimizer = adamw(model, kernels)
    for _ in range(2):
        optimizer.step()
    before = copy.deepcopy(state_of(model, optimizer))
    optimizer.grad_scale, optimizer.found_inf = torch.ones(2, device="cuda")
    model[0].weight.grad[0, 0] = torch.inf
    optimizer.step()
    assert same_bits(before[:-2], state_of(model, optimizer)[:-2])
    torch.testing.assert_close(state_of(model, optimizer)[-2:], before[-2:])
    with_gradients(model)
    optimizer.found_inf.zero_()
    optimizer.step()
    assert not torch.equal(before[0], model[0].weight)


@SEVERAL
def test_captured_steps_replay_bit_for_bit(kernels, n_vectors, iterations):
    """With a learning rate and a strength that change between replays."""
    lr, strength = torch.tensor([1e-2, 0.1], dtype=torch.float32, device="cuda")
    model = net()
    twin = copy.deepcopy(model)
    optimizers = [
        SpectralAdamW(
            with_gradients(m),
            lr,
            strength=strength,
            n_vectors=n_vectors,
            n_power_iterations=iterations,
            backend=kernels,
        )
        for m in (model, twin)
    ]
    graph = captured(optimizers[0].step)
    optimizers[1].step()
    for i in range(4):
        lr.fill_(1e-2 / (i + 1))
        strength.fill_(0.1 * (i + 1))
        for own, other in zip(model.parameters(), twin.parameters(), strict=True):
            own.grad.copy_(0.1 * own.detach().sin())
            other.grad.copy_(own.grad)
        graph.replay()
        optimizers[1].step()
        assert same_bits(state_of(model, optimizers[0]), state_of(twin, optimizers[1])), i


@pytest.mark.parametrize("n_vectors", [1, 4])
def test_a_whole_step_is_captured_after_gradients_were_set_to_none(kernels, n_vectors):
    options = {"n_vectors": n_vectors}
    check_graph(
        captured, lambda: training(net(), "optimizer", kernels, loss_of, **options), are_close
    )


def test_a_hyperparameter_in_a_graph_is_that_of_its_capture(kernels):
    """As in torch.optim: numbers are constants of a graph."""
    model = with_gradients(net())
    optimizer = SpectralSGD(model, 1e-2, strength=0.0, backend=kernels)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.5
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.25
    for lr, step in ((0.5, graph.replay), (0.25, optimizer.step), (0.5, graph.replay)):
        before = model[0].weight.detach().clone()
        step()
        torch.testing.assert_close(model[0].weight, before - lr * model[0].weight.grad)


def test_more_changes_than_a_capture_has_tables_for_are_an_error(kernels):
    model = net()
    optimizer = adamw(model, kernels)
    optimizer.step()
    grads = [torch.zeros_like(model[0].weight) for _ in range(device_tables.SPARES + 1)]

    def steps():
        for grad in grads:
            model[0].weight.grad = grad
            optimizer.step()

    graph = torch.cuda.graph(torch.cuda.CUDAGraph())
    with pytest.raises(RuntimeError, match="has changed since the last step outside"), graph:
        steps()


def test_a_changed_set_of_gradients_is_not_waited_for(kernels):
    model = net()
    optimizer = adamw(model, kernels)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model[0].weight.grad = model[2].bias.grad = None
        model[2].bias.requires_grad_(False)  # rebuilds the tables
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 2e-2
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_kernels_without_a_fault_pass_their_check(recwarn):
    optimizer = SpectralAdamW(with_gradients(net()))
    optimizer.step()
    assert not [w for w in recwarn if "failed its check" in str(w.message)]

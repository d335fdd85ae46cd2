"""Behaviour on a GPU, with a simulated one: tables are copies, nothing waits, graphs."""

import ast

import numpy as np
import pytest
import torch
from torch import nn

from spectral_kernels import SpectralAdamW, SpectralRegularizer, SpectralSGD, spectral_norms
from spectral_kernels.backends import choice
from spectral_kernels.backends.base import Reference
from spectral_kernels.tables.device import SPARES, DeviceTables
from tests import ROOT

from ..support.gpu_like import WAYS, check_graph, training
from ..support.models import close, grads

CPU = torch.device("cpu")


def small():
    """A model whose last layer gets no gradient from the loss."""
    torch.manual_seed(0)
    used = nn.Linear(20, 30), nn.LayerNorm(30), nn.Tanh(), nn.Linear(30, 5)
    return nn.Sequential(*used, nn.Linear(6, 4))


def skip_without(backend):
    if backend == "triton" and not (choice.unavailable(backend) is None and
                                    choice.interpreted()):  # fmt: skip
        pytest.skip("set TRITON_INTERPRET=1")


def same_bits(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def loss_of(model):
    x = torch.linspace(-1, 1, 80).view(4, 20)
    return model[:4](x).square().mean()


# ----------------------------------------------------------------------------------- tables


def tables_of(*values):
    table = np.array([values], np.int64)
    return table, DeviceTables([table], CPU, "an address")


def test_tables_are_copies_that_a_refresh_brings_up_to_date(gpu_like):
    table, tables = tables_of(1, 2)
    tables.refresh(1)
    table[0, 0] = 7
    tables.refresh(1)
    assert tables.views[0].tolist() == [1, 2]
    tables.refresh(2)
    assert tables.views[0].tolist() == [7, 2]
    assert tables.addresses == (tables.views[0].data_ptr(),)


def test_tables_that_changed_before_a_capture_are_copied_in_every_replay(gpu_like):
    table, tables = tables_of(1, 2)
    tables.refresh(1)
    eager = tables.addresses
    table[0, 0] = 7
    graph = gpu_like.captured(lambda: tables.refresh(2))
    captured = tables.views[0]
    assert tables.addresses != eager
    table[0, 0] = 8
    tables.refresh(3)
    assert tables.addresses == eager
    assert tables.views[0].tolist() == [8, 2]
    for _ in range(2):
        captured.zero_()
        graph.replay()
        assert captured.tolist() == [7, 2]
    assert tables.views[0].tolist() == [8, 2]


def test_another_capture_does_not_rely_on_the_replay_of_the_first(gpu_like):
    """Both may find gradients at the same addresses, in a memory pool that they share."""
    _, tables = tables_of(1, 2)
    tables.refresh(1)
    gpu_like.captured(lambda: tables.refresh(2))
    second = gpu_like.captured(lambda: tables.refresh(2))
    tables.views[0].zero_()
    second.replay()
    assert tables.views[0].tolist() == [1, 2]


def test_tables_that_a_graph_has_found_up_to_date_stay_as_they_are(gpu_like):
    table, tables = tables_of(1, 2)
    tables.refresh(1)
    graph = gpu_like.captured(lambda: tables.refresh(1))
    assert graph.calls == []
    captured = tables.views[0]
    table[0, 0] = 7
    tables.refresh(2)
    assert captured.tolist() == [1, 2]
    assert tables.views[0].tolist() == [7, 2]
    assert tables.addresses != (captured.data_ptr(),)


def test_spares_last_for_a_few_changes_and_come_back(gpu_like):
    _, tables = tables_of(1, 2)
    with pytest.raises(RuntimeError, match="none yet; run a step before the capture"):
        gpu_like.captured(lambda: tables.refresh(1))
    tables.refresh(1)

    def changes():
        for version in range(2, 2 + SPARES):
            tables.refresh(version)

    gpu_like.captured(changes)
    with pytest.raises(RuntimeError, match="an address has changed"):
        gpu_like.captured(lambda: tables.refresh(100))
    tables.refresh(101)
    gpu_like.captured(lambda: tables.refresh(102))


# ------------------------------------------------------------------------------ inference mode


def test_tables_of_inference_mode_are_written_and_captured_outside(gpu_like):
    with torch.inference_mode():
        _, tables = tables_of(1, 2)
        tables.refresh(1)
    gpu_like.captured(lambda: tables.refresh(1))
    with torch.inference_mode():
        tables.refresh(2)
    tables.refresh(3)
    graph = gpu_like.captured(lambda: tables.refresh(4))
    graph.replay()
    assert tables.views[0].tolist() == [1, 2]


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_first_use_in_inference_mode_changes_nothing(gpu_like, backend):
    """As in the sanity check of a trainer, which validates before it trains."""
    skip_without(backend)
    found = []
    for mode in (True, False):
        model = small()
        reg = SpectralRegularizer(model, 0.1, warmup=2, backend=backend)
        with torch.inference_mode(mode):
            reg.sigma  # noqa: B018
        for _ in range(2):
            model.zero_grad()
            (loss_of(model) + reg.penalty()).backward()
            reg.accumulate_grad_()
        reg.strength = 0.2
        reg.load_state_dict(reg.state_dict())
        reg.accumulate_grad_()
        found.append([*grads(model), reg.sigma])
    assert same_bits(*found)


@pytest.mark.parametrize("kind", [SpectralAdamW, SpectralSGD])
def test_an_optimizer_may_be_used_first_in_inference_mode(gpu_like, kind):
    found = []
    for mode in (True, False):
        model = small()
        loss_of(model).backward()
        optimizer = kind(model, 1e-2, strength=0.1, backend="cpu")
        with torch.inference_mode(mode):
            optimizer.sigma  # noqa: B018
            optimizer.step()
            optimizer.state_dict()
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
        found.append([*model.parameters(), optimizer.sigma])
        kept = [x for state in optimizer.state.values() for x in state.values()]
        assert not any(x.is_inference() for x in kept if isinstance(x, torch.Tensor))
    assert same_bits(*found)


def test_gradients_that_are_made_in_inference_mode_can_be_added_to(gpu_like):
    model = small()
    reg = SpectralRegularizer(model, 0.1, backend="cpu")
    with torch.inference_mode():
        reg.accumulate_grad_()
    loss_of(model).backward()
    assert not any(p.grad.is_inference() for p in model.parameters())


# -------------------------------------------------------------------------------------- waits


def test_a_step_and_what_is_set_between_steps_do_not_wait(gpu_like):
    model = small()
    reg = SpectralRegularizer(model, 0.1, backend="cpu")
    reg.accumulate_grad_()
    with gpu_like.without_waits():
        reg.accumulate_grad_()
        reg.accumulate_grad_(grad_scale=4.0)
        reg.accumulate_grad_(grad_scale=torch.full((), 4.0))
        for strength in (0.2, {"0.*": 0.1, "*": 0.3}, torch.full((), 0.4)):
            reg.strength = strength
            reg.accumulate_grad_()
        model.zero_grad()
        reg.accumulate_grad_()
        reg.penalty().backward()
    (bucket,) = reg._buckets.buckets
    assert bucket.state.strength.tolist() == pytest.approx([0.4] * 8)


def test_strengths_by_name_arrive(gpu_like):
    model = small()
    reg = SpectralRegularizer(model, 0.1, backend="cpu")
    reg.accumulate_grad_()
    reg.strength = {"0.*": 0.1, "*": 0.3}
    (bucket,) = reg._buckets.buckets
    names = [x.name for x in (*bucket.plan.matrices, *bucket.plan.elementwise)]
    expected = [0.1 if name.startswith("0.") else 0.3 for name in names]
    assert bucket.state.strength.tolist() == pytest.approx(expected)


def test_a_float_and_a_tensor_scale_alike(gpu_like):
    found = []
    for scale in (4.0, torch.tensor(4.0, dtype=torch.float64)):
        model = small()
        SpectralRegularizer(model, 0.1, backend="cpu").accumulate_grad_(grad_scale=scale)
        found.append(grads(model))
    assert same_bits(*found)


def test_a_step_of_an_optimizer_does_not_wait(gpu_like):
    model = small()
    optimizer = SpectralAdamW(model, 1e-2, strength=0.1, backend="cpu")
    loss_of(model).backward()
    optimizer.step()
    optimizer.grad_scale = torch.full((), 2.0)
    with gpu_like.without_waits():
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 2e-2
        model[0].weight.grad = None
        model[3].bias.grad = None
        model[3].bias.requires_grad_(False)  # rebuilds the tables
        optimizer.step()
        optimizer.strength = {"0.*": 0.1, "*": 0.3}
        optimizer.step()


def test_a_decoupled_penalty_does_not_wait(gpu_like):
    class Idle(torch.optim.SGD):
        """Changes nothing by itself, and lets GradScaler say what it has found."""

        def step(self, closure=None):
            pass

    model = small()
    groups = [{"params": model[:1].parameters()}, {"params": model[1:].parameters()}]
    optimizer = Idle(groups, 1e-2)
    SpectralRegularizer(model, 0.1, backend="cpu").attach(optimizer, decoupled=True)
    for own in optimizer.param_groups:  # the tables change once
        own["lr"] = 0.0
        optimizer.step()
    with gpu_like.without_waits():
        optimizer.param_groups[0]["lr"] = 2e-2
        optimizer.step()
        optimizer.param_groups[1]["lr"] = 2e-2
        optimizer.step()
        optimizer.found_inf = torch.zeros(())
        optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.found_inf = torch.ones(())
    with gpu_like.without_waits():
        optimizer.step()
    assert same_bits(before, list(model.parameters()))
    optimizer.found_inf.zero_()
    optimizer.step()
    assert not torch.equal(before[0], model[0].weight)


def test_each_way_of_waiting_would_be_found(gpu_like):
    x, pinned = torch.zeros(2), gpu_like._pin(2, torch.float32).zero_()
    for wait in (lambda: float(x[0]), lambda: x.copy_(torch.tensor([1.0, 2.0])),
                 lambda: x.copy_(pinned)):  # fmt: skip
        with pytest.raises(AssertionError), gpu_like.without_waits():
            wait()


# ------------------------------------------------------------------------------------- graphs


@pytest.mark.parametrize("way", WAYS)
def test_a_whole_step_is_captured_after_gradients_were_set_to_none(gpu_like, way):
    def captured(step):
        step()
        return gpu_like.captured(step)

    check_graph(captured, lambda: training(small(), way, "cpu", loss_of), same_bits)


def test_a_gradient_that_a_graph_makes_starts_from_zero_in_every_replay(gpu_like):
    model = small()
    reg = SpectralRegularizer(model, 0.1, n_power_iterations=2, warmup=60, backend="cpu")
    reg.accumulate_grad_()
    expected = grads(model)
    model.zero_grad()
    graph = gpu_like.captured(reg.accumulate_grad_)
    for _ in range(3):
        graph.replay()
        close(grads(model), expected, rtol=1e-2, atol=1e-4)


def test_an_eager_step_does_not_move_the_gradients_of_a_graph(gpu_like):
    model = small()
    reg = SpectralRegularizer(model, 0.1, warmup=60, backend="cpu")
    reg.accumulate_grad_()
    graph = gpu_like.captured(reg.accumulate_grad_)
    own = [p.grad for p in model.parameters()]
    model.zero_grad()
    reg.accumulate_grad_()
    eager = grads(model)
    for grad in own:
        grad.zero_()
    graph.replay()
    assert same_bits(eager, grads(model))
    close(own, eager, rtol=1e-2, atol=1e-4)


def test_a_hyperparameter_in_a_graph_is_that_of_its_capture(gpu_like):
    """As in torch.optim: numbers are constants of a graph."""
    model = small()
    loss_of(model).backward()
    optimizer = SpectralSGD(model, 1e-2, strength=0.0, backend="cpu")
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.5
    graph = gpu_like.captured(optimizer.step)
    optimizer.param_groups[0]["lr"] = 0.25
    for lr, step in ((0.5, graph.replay), (0.25, optimizer.step), (0.5, graph.replay)):
        before = model[0].weight.detach().clone()
        step()
        torch.testing.assert_close(model[0].weight, before - lr * model[0].weight.grad)


# --------------------------------------------------------------------------------- which kernels


@pytest.mark.parametrize("n_vectors", [1, 2])
def test_float64_weights_are_measured_beside_kernels_that_do_not_know_them(n_vectors):
    skip_without("triton")
    model = nn.Linear(7, 5).double()
    truth = torch.linalg.svdvals(model.weight.detach())[:n_vectors].tolist()
    found = spectral_norms(model, n_vectors=n_vectors, backend="triton")["weight"]
    assert found == pytest.approx(truth[0] if n_vectors == 1 else truth, rel=1e-3)
    reg = SpectralRegularizer(model, target="initial", backend="triton")
    assert reg.state_dict()["initial"]["weight"] == pytest.approx(truth[0], rel=1e-3)


@pytest.mark.parametrize("n_vectors", [1, 2])
def test_float64_weights_are_measured_by_a_backend_for_them(monkeypatch, n_vectors):
    """GPU kernels do not support float64."""
    asked = []

    def make(name, dtype):
        asked.append(dtype)
        return Reference()

    monkeypatch.setattr(choice, "_make", make)
    model = nn.Linear(7, 5).double()
    found = spectral_norms(model, n_vectors=n_vectors, backend="cpu")["weight"]
    SpectralRegularizer(model, target="initial", n_vectors=n_vectors, backend="cpu").report()
    assert set(asked) == {torch.float64}
    truth = torch.linalg.svdvals(model.weight.detach())[:n_vectors].tolist()
    assert found == pytest.approx(truth[0] if n_vectors == 1 else truth, rel=1e-3)


# ------------------------------------------------------------------------------ tests on a GPU


def test_numbers_of_a_generator_on_a_cpu_are_drawn_there():
    """Otherwise they fail if torch's default device is a GPU, as in the fixture ``backend``."""
    functions = []
    for path in (ROOT / "tests").rglob("*.py"):
        found = [x for x in ast.walk(ast.parse(path.read_text())) if isinstance(x, ast.FunctionDef)]
        given = {a.arg for x in found if x.name.startswith("test_") for a in x.args.args}
        if "backend" in given or path.stem == "buckets":
            functions += found
    looked_at = 0
    for function in functions:
        calls = [x for x in ast.walk(function) if isinstance(x, ast.Call)]
        if not any(ast.unparse(call) == "torch.Generator()" for call in calls):
            continue
        for call in calls:
            given = {keyword.arg for keyword in call.keywords}
            if "generator" in given:
                looked_at += 1
                assert given & {"device", None}, f"{function.name}: {ast.unparse(call)}"
    assert looked_at > 3


def test_exact_products_are_a_matter_of_the_test(exact_before, exact):
    cudnn = torch.backends.cudnn
    assert (cudnn.deterministic, cudnn.allow_tf32, cudnn.benchmark) == (True, False, False)
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.fixture
def exact_before():
    """Assert that the settings are restored after a test that requests this fixture first."""
    cudnn = torch.backends.cudnn

    def settings():
        return (cudnn.enabled, cudnn.deterministic, cudnn.allow_tf32, cudnn.benchmark,
                torch.get_float32_matmul_precision())  # fmt: skip

    torch.set_float32_matmul_precision("high")
    before = settings()
    yield
    assert settings() == before
    torch.set_float32_matmul_precision("highest")

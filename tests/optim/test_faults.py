"""Steps that are interrupted, and threads that meet: the next gradient is right."""

import copy
import sys
import threading

import pytest
import torch
from torch import nn

from spectral_kernels import SpectralAdamW, SpectralRegularizer, SpectralSGD

LR = 0.05


class Interrupt(KeyboardInterrupt):
    pass


def interrupting(n):
    """A tracer that raises at the ``n``-th line of the package that is run."""
    lines = 0

    def trace(frame, event, argument):
        if not frame.f_globals.get("__name__", "").startswith("spectral_kernels."):
            return None

        def line(frame, event, argument):
            nonlocal lines
            if event == "line":
                lines += 1
                if lines == n:
                    raise Interrupt
            return line

        return line

    return trace


def interrupt(function, n):
    """Call ``function`` and raise at its ``n``-th line; return whether it was that long."""
    sys.settrace(interrupting(n))
    try:
        function()
    except Interrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def error_of_gradient(weight, found):
    """How far ``found`` is from the penalty's gradient at its own right singular vector."""
    w, g = weight.double(), found.double()
    v = torch.linalg.svd(g)[2][0]
    s = w @ v
    wanted = 4 * (s.square().sum() - 1) * torch.outer(s, v)
    sigma = torch.linalg.matrix_norm(w, 2)
    assert s.norm() > 0.7 * sigma  # v is near the first singular vector
    return float((g - wanted).norm() / wanted.norm())


def of_an_optimizer(r, backend):
    """A step of SpectralSGD, and the penalty's gradient in the next one."""
    torch.manual_seed(0)
    model = nn.Linear(20, 15)
    optimizer = SpectralSGD(model, lr=LR, strength=1.0, warmup=20, n_vectors=r, backend=backend)

    def step(scale=2.0):
        for p in model.parameters():
            p.grad = torch.randn_like(p) * scale
        optimizer.step()

    def gradient():
        before = model.weight.detach().clone()
        step(0)
        return before, (before - model.weight.detach()) / LR

    return step, gradient


def of_a_regularizer(r, backend):
    """accumulate_grad_ between steps that move the weights far."""
    torch.manual_seed(0)
    model = nn.Linear(20, 15)
    reg = SpectralRegularizer(model, 1.0, warmup=20, n_vectors=r, backend=backend,
                              n_power_iterations="auto")  # fmt: skip

    def step():
        model.zero_grad()
        with torch.no_grad():
            model.weight.add_(torch.randn_like(model.weight) * 0.02)
        reg.accumulate_grad_()

    def gradient():
        model.zero_grad()
        reg.accumulate_grad_()
        return model.weight.detach(), model.weight.grad

    return step, gradient


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("r", [1, 4])
@pytest.mark.parametrize("make", [of_an_optimizer, of_a_regularizer])
@pytest.mark.parametrize("first", [False, True], ids=["later step", "first step"])
def test_a_step_after_an_interrupted_one_is_right_wherever_it_was_interrupted(
    make, r, backend, first
):
    # The first step builds everything, and the reference has many lines: some of them.
    stride = 1 if backend == "cpu" and not first else 29
    n = 1 + r
    while True:
        step, gradient = make(r, backend)
        for _ in range(0 if first else 2):
            step()
        if not interrupt(step, n):
            break
        assert error_of_gradient(*gradient()) < 1e-3, n
        n += stride
    assert n > 50


def test_an_interrupted_step_is_counted_if_it_was_taken():
    counted = set()
    for n in range(1, 1000):
        torch.manual_seed(0)
        model = nn.Linear(6, 5)
        optimizer = SpectralAdamW(model, strength=0, lr=0.1, weight_decay=0)
        for _ in range(2):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
        before = model.weight.detach().clone()
        if not interrupt(optimizer.step, n):
            break
        taken = not torch.equal(before, model.weight)
        assert optimizer.state[model.weight]["step"] == 2 + taken
        counted.add(taken)
    assert counted == {True, False}


def test_a_first_use_in_two_threads_is_right():
    """A logging thread reads metrics while the trainer takes its first step."""
    for trial in range(20):
        torch.manual_seed(trial)
        model = nn.Sequential(*[nn.Linear(48, 48) for _ in range(12)])
        reg, twin = SpectralRegularizer(model, 1.0), SpectralRegularizer(model, 1.0)
        twin.accumulate_grad_()
        wanted = [p.grad for p in model.parameters()]
        model.zero_grad()
        gate = threading.Barrier(2)

        def read(reg=reg, gate=gate):
            gate.wait()
            reg.metrics()

        thread = threading.Thread(target=read)
        thread.start()
        gate.wait()
        reg.accumulate_grad_()
        thread.join()
        for p, grad in zip(model.parameters(), wanted, strict=True):
            torch.testing.assert_close(p.grad, grad, rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("use", ["penalty", "step"])
def test_one_object_in_several_threads_is_used_by_one_at_a_time(use):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(48, 48, bias=False) for _ in range(4)])
    alone, errors = copy.deepcopy(model), [0.0]
    if use == "penalty":
        reg = SpectralRegularizer(model, 1.0)

        def once():
            for p, grad in zip(
                model.parameters(), torch.autograd.grad(reg.penalty(), model.parameters()),
                strict=True,
            ):  # fmt: skip
                errors.append(error_of_gradient(p.detach(), grad))
    else:
        optimizer, one = (SpectralSGD(m, lr=1e-3, strength=1.0) for m in (model, alone))
        for p in (*model.parameters(), *alone.parameters()):
            p.grad = torch.zeros_like(p)
        for _ in range(100):
            one.step()
        once = optimizer.step

    gate, raised = threading.Barrier(4), []

    def many():
        try:
            gate.wait()
            for _ in range(25):
                once()
        except Exception as error:
            raised.append(error)

    threads = [threading.Thread(target=many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not raised
    assert max(errors) < 1e-3
    if use == "step":  # the same bits as one after the other
        assert all(map(torch.equal, model.parameters(), alone.parameters()))


def stored(kind):
    """A layer whose weight is stored by rows, by columns, or is a single column."""
    torch.manual_seed(0)
    layer = nn.Linear(1, 40) if kind == "one column" else nn.Linear(24, 16)
    if kind == "transposed":
        layer.weight.data = layer.weight.data.t().contiguous().t()
    return layer


@pytest.mark.parametrize("way", ["attach", "optimizer"])
@pytest.mark.parametrize("r", [1, 2])
@pytest.mark.parametrize("kind", ["rows", "transposed", "one column"])
def test_training_resumes_with_the_same_bits_whatever_the_layout(kind, r, way):
    def start():
        layer = stored(kind)
        if way == "optimizer":
            made = SpectralAdamW(layer, lr=1e-2, strength=1e-2, n_vectors=r)
            return layer, made, made.regularizer
        made = torch.optim.AdamW(layer.parameters(), lr=1e-2)
        reg = SpectralRegularizer(layer, strength=1e-2, n_vectors=r)
        reg.attach(made)
        return layer, made, reg

    def train(layer, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(4):
            for p in layer.parameters():
                p.grad = torch.empty_like(p).copy_(
                    torch.randn(p.shape, generator=generator, device="cpu")
                )
            optimizer.step()

    layer, optimizer, reg = start()
    train(layer, optimizer, 1)
    saved = layer.state_dict(), optimizer.state_dict(), reg.state_dict()
    saved = torch.utils._pytree.tree_map(
        lambda x: x.clone() if isinstance(x, torch.Tensor) else x, saved
    )
    train(layer, optimizer, 2)
    resumed, other, other_reg = start()
    resumed.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    if way == "attach":
        other_reg.load_state_dict(saved[2])
    train(resumed, other, 2)
    if r > 1 and way == "optimizer":
        # Its vectors have been rotated to the Ritz vectors already, and are once more.
        torch.testing.assert_close(layer.weight, resumed.weight, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(layer.weight, resumed.weight)

"""A matrix that is replaced between two steps: its vectors are warmed up again, no others."""

import pytest
import torch
from torch import nn

from spectral_kernels import SpectralAdamW, SpectralRegularizer, SpectralSGD
from spectral_kernels.backends import choice
from spectral_kernels.backends.base import Reference
from spectral_kernels.backends.native import Cpu
from spectral_kernels.engine.bucket import JUMP, JUMP_FACTOR
from spectral_kernels.tables.state import Ratios

from ..support.small_nets import zero_gradients

NAMES = ("reference", "cpu")


@pytest.fixture(params=NAMES)
def counted(request):
    """A backend for a CPU that counts its reads of the weights, in ``reads``."""
    if (reason := choice.unavailable(request.param)) is not None:
        pytest.skip(reason)
    base = Reference if request.param == "reference" else Cpu

    class Counted(base):
        reads = 0

        def gram_matvec(self, plan, state):
            self.reads += 1
            super().gram_matvec(plan, state)

    return Counted() if base is Reference else Counted(choice.native_module().cpu)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 30, bias=False), nn.Linear(30, 12, bias=False))


def attached(model, **options):
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    reg = SpectralRegularizer(model, **options)
    reg.attach(optimizer)
    return reg, optimizer.step


def beside(model, **options):
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    reg = SpectralRegularizer(model, **options)
    reg.attach(optimizer, decoupled=True)
    return reg, optimizer.step


def accumulated(model, **options):
    reg = SpectralRegularizer(model, **options)
    return reg, reg.accumulate_grad_


def in_the_loss(model, **options):
    reg = SpectralRegularizer(model, **options)
    return reg, lambda: reg.penalty().backward()


def sgd(model, **options):
    optimizer = SpectralSGD(model, 1e-4, **options)
    return optimizer, optimizer.step


def adamw(model, **options):
    optimizer = SpectralAdamW(model, 1e-6, **options)
    return optimizer, optimizer.step


BEFORE = attached, beside, accumulated, in_the_loss  # which iterate at the start of a step
every_way = pytest.mark.parametrize("make", [*BEFORE, sgd, adamw])


def stepped(model, step, n=1):
    for _ in range(n):
        zero_gradients(model)
        step()


def replaced(weight, seed=5):
    """Draw the elements of a weight anew."""
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))


def first_estimates(model, make, **options):
    """Return estimate / sigma_1 of the first matrix in the step after it was replaced."""
    reg, step = make(model, **options)
    stepped(model, step, 30)
    replaced(model[0].weight)
    truth = float(torch.linalg.matrix_norm(model[0].weight.detach(), 2))
    stepped(model, step)
    return float(reg.sigma[0]) / truth, reg


@every_way
@pytest.mark.parametrize("r", [1, 4])
def test_the_first_estimate_is_as_good_as_after_a_warm_up(counted, make, r):
    found, _ = first_estimates(net(), make, backend=counted, n_vectors=r)
    model = net()
    replaced(model[0].weight)
    new, step = make(model, backend=counted, n_vectors=r)
    stepped(model, step)
    truth = float(torch.linalg.matrix_norm(model[0].weight.detach(), 2))
    assert found > 0.9
    assert found == pytest.approx(float(new.sigma[0]) / truth, abs=0.08)


@every_way
def test_without_a_warm_up_it_is_far_too_low(counted, make):
    """What the tests above would see without it; optimizers are an iteration ahead."""
    found, _ = first_estimates(net(), make, backend=counted, warmup=0)
    assert found < (0.6 if make in BEFORE else 0.88)


@pytest.mark.parametrize("make", [sgd, adamw])
def test_an_edit_that_torch_does_not_track_is_warmed_up_after_the_step(counted, make):
    """As ``weight.data.normal_()``, without refresh()."""
    model = net()
    optimizer, step = make(model, backend=counted)
    stepped(model, step, 30)
    model[0].weight.data.normal_(generator=torch.Generator().manual_seed(5))
    stepped(model, step)
    truth = float(torch.linalg.matrix_norm(model[0].weight.detach(), 2))
    assert float(optimizer.sigma[0]) / truth > 0.9


@every_way
def test_other_matrices_keep_their_bits(counted, make):
    found = []
    for is_replaced in (True, False):
        model = net()
        reg, step = make(model, backend=counted)
        stepped(model, step, 30)
        if is_replaced:
            replaced(model[0].weight)
        else:
            with torch.no_grad():  # an edit that changes nothing
                model[0].weight.mul_(1)
        stepped(model, step, 2)
        found.append((reg.sigma[1], reg.residual[1], reg.singular_values[1]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@every_way
def test_the_extra_reads_are_at_most_those_of_a_warm_up(counted, make):
    model = net()
    _, step = make(model, backend=counted, warmup=7)
    stepped(model, step, 30)
    replaced(model[0].weight)
    counted.reads = 0
    stepped(model, step)
    assert 4 <= counted.reads <= 1 + 7
    counted.reads = 0
    stepped(model, step, 5)
    assert counted.reads <= 5


@every_way
def test_training_reads_the_weights_once_per_step(counted, make):
    """In usual training nothing is warmed up again, whatever the spectrum."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(),
                          nn.Linear(24, 5))  # fmt: skip
    nn.init.orthogonal_(model[2].weight)
    reg, step = make(model, backend=counted, strength=0.05)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    x, y = torch.randn(64, 20), torch.randint(5, (64,))
    stepped(model, step)
    counted.reads, n, largest = 0, 100, 0.0
    for _ in range(n):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        step()
        largest = max(largest, float((reg.residual / reg.sigma).max()))
    assert counted.reads <= n + 1  # an optimizer of ours reads once more after an edit
    assert largest > 0.05  # the estimates were not settled


def test_edits_in_every_step_do_not_warm_up_in_every_step(counted):
    """As where weights are clipped, here with a residual that stays large."""
    model = net()
    _, step = sgd(model, backend=counted)
    stepped(model, step, 20)
    counted.reads = 0
    for seed in range(10):
        replaced(model[0].weight, seed)
        stepped(model, step)
    assert counted.reads <= 10 * 12
    counted.reads = 0
    for _ in range(10):
        with torch.no_grad():
            model[0].weight.clamp_(-1.5, 1.5)
        stepped(model, step)
    assert counted.reads == 10


@pytest.mark.parametrize("make", [attached, in_the_loss])
def test_a_module_that_is_replaced_with_another_dtype_is_warmed_up(make):
    """Its plan is built anew, with the vectors from before."""
    model = net()
    reg, step = make(model, backend="reference")
    if make is attached:  # which holds the parameters of its optimizer
        reg, step = accumulated(model, backend="reference")
    stepped(model, step, 30)
    model.double()
    replaced(model[0].weight)
    truth = float(torch.linalg.matrix_norm(model[0].weight.detach(), 2))
    stepped(model, step)
    assert float(reg.sigma[0]) / truth > 0.9


def test_a_zero_matrix_that_gets_elements_is_warmed_up(counted):
    model = net()
    with torch.no_grad():
        model[0].weight.zero_()
    found, _ = first_estimates(model, attached, backend=counted)
    assert found > 0.9


def test_a_matrix_that_is_not_finite_reads_nothing_more(counted):
    model = net()
    _, step = attached(model, backend=counted)
    stepped(model, step, 10)
    with torch.no_grad():
        model[0].weight[0, 0] = torch.inf
    counted.reads = 0
    stepped(model, step, 4)
    assert counted.reads == 4


def test_loaded_vectors_are_used_as_they_are(counted):
    """A resumed run keeps its bits, however large the residual is."""
    model = net()
    reg, step = accumulated(model, backend=counted)
    stepped(model, step, 5)
    saved = reg.state_dict()
    replaced(model[0].weight)
    other, step = accumulated(model, backend=counted)
    other.load_state_dict(saved)
    counted.reads = 0
    stepped(model, step)
    assert counted.reads == 1


def test_an_interrupted_warm_up_leaves_a_state_that_goes_on(counted):
    model = net()
    reg, step = attached(model, backend=counted)
    stepped(model, step, 30)
    replaced(model[0].weight)
    original, calls = counted.normalize, [0]

    def interrupted(plan, state):
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        original(plan, state)

    counted.normalize = interrupted
    with pytest.raises(KeyboardInterrupt):
        stepped(model, step)
    counted.normalize = original
    stepped(model, step, 20)
    truth = torch.stack([torch.linalg.matrix_norm(p.detach(), 2) for p in model.parameters()])
    torch.testing.assert_close(reg.sigma, truth, rtol=0.02, atol=0)


def test_on_a_gpu_an_edited_optimizer_recovers_without_a_wait(gpu_like):
    model = net()
    optimizer, step = adamw(model, backend="cpu")
    stepped(model, step, 30)
    truth = []
    with gpu_like.without_waits():
        zero_gradients(model)
        with torch.no_grad():
            model[0].weight.normal_()
        step()
    truth = float(torch.linalg.matrix_norm(model[0].weight.detach(), 2))
    assert float(optimizer.sigma[0]) / truth > 0.93


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_jumps_are_the_same_for_both_backends(dtype):
    if (reason := choice.unavailable("cpu")) is not None:
        pytest.skip(reason)
    model = net().to(dtype)
    reg = SpectralRegularizer(model, backend="cpu")
    reg.accumulate_grad_()
    state = reg._buckets.buckets[0].state
    backends = Reference(), Cpu(choice.native_module().cpu)
    cases = [  # sigma, residual, ratio before; whether it is a jump
        (1, JUMP * 1.01, 0.01, True), (1, JUMP * 0.99, 0.01, False), (2, 1, 0.1, True),
        (2, 1, 0.5 / JUMP_FACTOR * 1.01, False), (0, 0, 0, False), (1, 1, torch.inf, False),
        (torch.inf, torch.inf, 0, False), (torch.nan, torch.nan, 0, False), (1e-9, 1e-9, 0, True),
    ]  # fmt: skip
    for sigma, residual, before, expected in cases:
        for backend in backends:
            ratios = Ratios(2)
            ratios.values[:] = torch.tensor([0.0, before])
            state.sigma[:] = torch.tensor([1.0, sigma])
            state.residual[:] = torch.tensor([0.2, residual])
            assert backend.jumps(state, ratios, JUMP, JUMP_FACTOR) == expected, (sigma, residual)
            now = torch.tensor([0.2, residual / sigma if sigma else 0.0], dtype=torch.float64)
            kept = torch.tensor([0.0, before], dtype=torch.float64)
            torch.testing.assert_close(
                ratios.values, kept if expected else now, rtol=1e-6, atol=0, equal_nan=True
            )

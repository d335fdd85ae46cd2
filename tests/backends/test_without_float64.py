"""The reference on a device without float64, a simulated one of Apple's."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from spectral_kernels import SpectralAdamW, SpectralRegularizer, SpectralSGD, spectral_norms
from spectral_kernels.backends import formulas
from spectral_kernels.diagnostics import dormant_units, spectra, weight_norm
from spectral_kernels.tables import addresses
from spectral_kernels.tables.device import wide_dtype

from ..support.models import close
from ..support.mps_like import DEVICE, OnMps, moved, mps_like

pytestmark = pytest.mark.filterwarnings("ignore:spectral_kernels uses its PyTorch reference")


@pytest.fixture
def on_mps(monkeypatch):
    """The device, while the test runs."""
    # It would look into the memory of wrappers.
    monkeypatch.setattr(addresses, "tensor_reader", lambda: None)
    with mps_like():
        yield


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 4))


def attached(model, **options):
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    reg = SpectralRegularizer(model, 0.1, **options)
    reg.attach(optimizer)
    return optimizer.step, reg


def in_the_loss(model, **options):
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    reg = SpectralRegularizer(model, 0.1, **options)

    def step():
        reg.penalty().backward()
        optimizer.step()

    return step, reg


def adamw(model, **options):
    optimizer = SpectralAdamW(model, 0.01, eps=1e-3, strength=0.1, **options)
    return optimizer.step, optimizer


def decoupled(model, **options):
    optimizer = SpectralSGD(model, 0.01, 0.9, strength=0.1, decoupled=True, **options)
    return optimizer.step, optimizer


def trained(model, make, **options):
    """Return parameters and sigma after three steps."""
    step, reg = make(model, target={"3.*": "initial", "*": 1.0}, warmup=2, **options)
    x = torch.linspace(-1, 1, 16).view(2, 8).to(next(model.parameters()).device)
    for _ in range(3):
        model.zero_grad()
        model(x).square().mean().backward()
        step()
    return [
        x.held if isinstance(x, OnMps) else x.detach() for x in (*model.parameters(), reg.sigma)
    ]


@pytest.mark.takes_seconds
@pytest.mark.parametrize("make", [attached, in_the_loss, adamw, decoupled])
@pytest.mark.parametrize(("r", "iterations"), [(1, 1), (4, "auto")])
def test_training_is_that_on_a_cpu(on_mps, make, r, iterations):
    options = {"n_vectors": r, "n_power_iterations": iterations}
    found = trained(moved(net()), make, **options)
    expected = trained(net(), make, backend="reference", **options)
    close(found, expected, rtol=1e-3, atol=1e-5)
    assert all(p.device == DEVICE for p in moved(net()).parameters())


@pytest.mark.parametrize("r", [1, 4])
def test_singular_values_are_those_of_the_svd(on_mps, r):
    model = net()
    expected = [torch.linalg.svdvals(m.weight.detach())[:r] for m in (model[0], model[3])]
    found = spectral_norms(moved(model), n_vectors=r)
    for name, truth in zip(("0.weight", "3.weight"), expected, strict=True):
        close([torch.tensor(found[name]).view(-1)], [truth], rtol=2e-4)


@pytest.mark.takes_seconds
def test_singular_values_of_a_matrix_of_rank_two(on_mps):
    """Rounding in float32 counts as zero, and the search for more directions ends."""
    torch.manual_seed(0)
    w = torch.randn(10, 2) @ torch.randn(2, 12)
    truth = torch.linalg.svdvals(w)[:4]
    truth[2:] = 0
    found = spectral_norms([("w", OnMps(w))], n_vectors=4)
    close([torch.tensor(found["w"])], [truth], rtol=2e-4, atol=2e-3)
    reg = SpectralRegularizer([("w", nn.Parameter(OnMps(w)))], n_vectors=4)
    close([reg.singular_values[0].held], [truth], rtol=2e-4, atol=0)


def test_diagnostics_are_those_on_a_cpu(on_mps):
    model = net()
    twin = moved(copy.deepcopy(model))
    assert weight_norm(twin) == pytest.approx(weight_norm(model))
    x = torch.randn(5, 8)
    assert dormant_units(twin, OnMps(x)) == dormant_units(model, x)
    for name, expected in spectra(model).items():
        assert spectra(twin)[name] == pytest.approx(expected, rel=1e-4)


def test_a_checkpoint_resumes(on_mps):
    model = moved(net())
    step, optimizer = adamw(model, target="initial")
    step()
    saved = optimizer.state_dict()
    _, other = adamw(moved(net()), target="initial")
    other.load_state_dict(saved)
    close([other.sigma.held], [optimizer.sigma.held], rtol=0.2)
    reg = SpectralRegularizer(model)
    assert reg.load_state_dict(SpectralRegularizer(model).state_dict()) == ([], [])


def test_which_devices_have_float64(monkeypatch):
    assert wide_dtype(torch.device("cpu")) == wide_dtype(torch.device("cuda:1")) == torch.float64
    assert wide_dtype(torch.device("mps")) == torch.float32
    for has, dtype in ((True, torch.float64), (False, torch.float32)):
        properties = SimpleNamespace(has_fp64=has)
        monkeypatch.setattr(torch.xpu, "get_device_properties", lambda _, p=properties: p)
        assert wide_dtype(torch.device("xpu:0")) == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_inverse_power_of_two_brings_every_sigma_to_about_one(dtype):
    info = torch.finfo(dtype)
    numbers = [info.tiny / 8, info.tiny, 1e-3, 0.75, 1, 1.99, 2, 3e9, info.max / 2, info.max]
    sigma = torch.tensor(numbers, dtype=dtype)
    found = formulas.inverse_power_of_two(sigma)
    brought = found.double() * sigma.double()
    assert ((brought >= 0.1) & (brought < 4)).all()
    assert ((brought[1:-2] >= 1) & (brought[1:-2] < 2)).all()
    assert (torch.frexp(found)[0] == 0.5).all()  # powers of two
    unknown = torch.tensor([0, torch.inf, torch.nan, -1], dtype=dtype)
    assert formulas.inverse_power_of_two(unknown).tolist() == [1, 1, 1, 1]

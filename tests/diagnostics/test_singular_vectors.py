"""singular_vectors(): u, sigma and v of every matrix, in the parameter's own order."""

import pytest
import torch
from torch import nn

from spectral_kernels import SpectralAdamW, SpectralRegularizer

pytestmark = pytest.mark.usefixtures("seeded")


class Layers(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.linear = nn.Linear(7, 5)
        self.transposed = nn.Linear(6, 9)
        self.conv = nn.Conv2d(3, 4, 3)
        self.last = nn.Conv2d(3, 4, 2)
        self.up = nn.ConvTranspose2d(3, 4, 2)
        self.column, self.row = nn.Linear(1, 4), nn.Linear(4, 1)
        self.zero = nn.Linear(3, 3)
        self.to(dtype)
        self.last.to(memory_format=torch.channels_last)
        with torch.no_grad():
            self.zero.weight.zero_()
            x = self.transposed.weight.detach().t().contiguous().t()
        self.transposed.weight = nn.Parameter(x)
        self.to(torch.get_default_device())


def matrix_of(model, name):
    module, _, attribute = name.partition(".")
    p = getattr(getattr(model, module), attribute).detach().double()
    return (p.transpose(0, 1) if module == "up" else p).flatten(1)


def check(model, found, names, rtol=1e-3):
    assert list(found) == names
    for name, (u, sigma, v) in found.items():
        w = matrix_of(model, name)
        truth_u, truth, truth_v = torch.linalg.svd(w, full_matrices=False)
        assert (u.shape, sigma.shape, v.shape) == ((w.shape[0],), (), (w.shape[1],)), name
        assert float(sigma) == pytest.approx(float(truth[0]), rel=rtol)
        # One of the two holds by definition, the other one up to the residual.
        errors = [(x @ b.double() - sigma.double() * a.double()).abs().max()
                  for x, a, b in ((w, u, v), (w.mT, v, u))]  # fmt: skip
        assert float(min(errors)) < 1e-6, name
        assert float(max(errors)) < 5e-3, name
        if name == "zero.weight":
            assert float(u.abs().max()) == 0 or float(v.abs().max()) == 0
            continue
        outer = torch.outer(truth_u[:, 0], truth_v[0])
        torch.testing.assert_close(
            torch.outer(u.double(), v.double()), outer, rtol=0, atol=0.05, msg=name
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_they_are_those_of_the_svd(backend, dtype):
    model = Layers(dtype)
    reg = SpectralRegularizer(model, warmup=200, backend=backend)
    check(model, reg.singular_vectors(), reg.names)  # before the first step
    assert all(x[0].dtype == dtype for x in reg.singular_vectors().values())
    for _ in range(2):
        reg.accumulate_grad_()
        check(model, reg.singular_vectors(), reg.names)
    torch.testing.assert_close(
        torch.stack([sigma for _, sigma, _ in reg.singular_vectors().values()]), reg.sigma
    )


def test_of_an_optimizer_they_are_of_the_weights_after_its_step(backend):
    model = Layers(torch.float32)
    optimizer = SpectralAdamW(model, 1e-4, warmup=200, backend=backend)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    model.zero.weight.data.zero_()
    optimizer.refresh()
    found = optimizer.singular_vectors()
    del found["zero.weight"]
    check(model, found, [n for n in optimizer.names if n != "zero.weight"])


def test_several_vectors_have_a_row_each(backend):
    model = nn.Linear(9, 6, bias=False).to(torch.get_default_device())
    reg = SpectralRegularizer(model, n_vectors=4, warmup=100, backend=backend)
    reg.accumulate_grad_()
    ((u, sigma, v),) = reg.singular_vectors().values()
    assert (u.shape, sigma.shape, v.shape) == ((4, 6), (4,), (4, 9))
    torch.testing.assert_close(v @ v.mT, torch.eye(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(u @ u.mT, torch.eye(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(
        sigma.double(), torch.linalg.svdvals(model.weight.detach().double())[:4], rtol=1e-3, atol=0
    )


def test_what_needs_no_copy_is_a_view():
    model = Layers(torch.float32)
    reg = SpectralRegularizer(model)
    reg.accumulate_grad_()
    (bucket,) = reg._buckets.buckets
    found = reg.singular_vectors()

    def is_view(x):
        own = bucket.state.v, bucket.state.v_next, bucket.state.scalars
        return any(x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr() for y in own)

    assert all(is_view(sigma) for _, sigma, _ in found.values())
    assert is_view(found["linear.weight"][2])
    assert not is_view(found["linear.weight"][0])
    assert is_view(found["transposed.weight"][0])
    assert not is_view(found["transposed.weight"][2])
    before = reg.sigma
    found["linear.weight"][0].zero_()
    assert torch.equal(reg.sigma, before)


@pytest.mark.parametrize("n_vectors", [1, 4])
def test_u_belongs_to_v_while_both_are_far_from_those_of_the_svd(backend, n_vectors):
    model = nn.Linear(20, 30, bias=False).to(torch.get_default_device())
    reg = SpectralRegularizer(model, n_vectors=n_vectors, warmup=1, backend=backend)
    for _ in range(2):
        ((u, sigma, v),) = reg.singular_vectors().values()
        sigma = sigma[..., None] if n_vectors > 1 else sigma
        product = v @ model.weight.detach().mT
        torch.testing.assert_close(product, sigma * u, rtol=0, atol=1e-5)
        reg.accumulate_grad_()

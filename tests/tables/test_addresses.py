"""Addresses of tensors are the same through DLPack's table and tensor by tensor."""

import pytest
import torch
from torch import nn

from spectral_kernels import SpectralRegularizer
from spectral_kernels.tables import addresses

from ..support import models
from ..support.models import close


@pytest.fixture(params=["native", "python"])
def way(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(addresses, "_describe", None)
    elif addresses._describe is None:
        pytest.skip("no compiled module")
    elif addresses._describe(torch.Tensor, []) is None:
        pytest.skip("this torch has no DLPack exchange table")
    return request.param


def test_addresses(way):
    base = torch.randn(6, 5)
    tensors = [base, base[2:], nn.Parameter(base[:, 1:]), torch.empty(0, 3), torch.tensor(1.0)]
    found = addresses.memory_of(tensors)
    assert found.address_array().tolist() == [t.data_ptr() for t in tensors]
    assert isinstance(found.layouts, bytes) == (way == "native")


SAME = [torch.zeros(4, 6), nn.Parameter(torch.ones(4, 6)), torch.zeros(9, 6)[3:7]]
OTHERS = [
    torch.zeros(6, 4), torch.zeros(4, 7)[:, :6], torch.zeros(6, 4).t(), torch.zeros(4, 6).double(),
    torch.zeros(4, 6).bfloat16(), torch.zeros(4, 6).half(), torch.zeros(4, 6, 1), torch.zeros(24),
    torch.zeros(3, 6), torch.zeros(4, 6, dtype=torch.int32),
]  # fmt: skip


@pytest.mark.usefixtures("way")
def test_layouts_are_equal_for_the_same_and_differ_for_others():
    layouts = [addresses.memory_of([t]).layouts for t in (*SAME, *OTHERS)]
    assert layouts[0] == layouts[1] == layouts[2]
    assert all(a != b for i, a in enumerate(layouts[2:]) for b in layouts[i + 3 :])


@pytest.mark.usefixtures("way")
def test_a_tensor_without_an_address_raises():
    with pytest.raises(RuntimeError):
        addresses.memory_of([torch.zeros(2), torch.zeros(2, 2).to_sparse()])


@pytest.mark.usefixtures("way")
def test_a_training_step_notices_what_changes_in_place():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6).double(), nn.Linear(6, 4).bfloat16())
    reg = SpectralRegularizer(model, 0.1)

    def expected():
        fresh = SpectralRegularizer(model, 0.1, backend="reference", warmup=0)
        fresh.load_state_dict(reg.state_dict())
        before = models.grads(model)
        fresh.accumulate_grad_()
        after = models.grads(model)
        for p, grad in zip(model.parameters(), before, strict=True):
            p.grad = grad
        return after

    first = model[0].weight
    for change in (
        lambda: None,
        lambda: setattr(first, "data", first.data.t()),  # the same memory, transposed
        lambda: setattr(first, "grad", None),
        lambda: setattr(model[1].bias, "data", torch.randn(6).double()),
        lambda: setattr(model[2].weight, "grad", None),
        lambda: model.zero_grad(),
        lambda: setattr(first, "data", first.data[:4]),  # the same memory, less of it
    ):
        change()
        if first.grad is not None and first.grad.shape != first.shape:
            first.grad = None
        if first.grad is not None and first.grad.stride() != first.stride():
            first.grad = torch.randn_like(first)
        wanted = expected()
        reg.accumulate_grad_()
        close(models.grads(model), wanted, rtol=2e-2, atol=1e-5)

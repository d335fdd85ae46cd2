"""What tensors are in memory is seen alike in one native call and tensor by tensor."""

import numpy as np
import pytest
import torch
from torch import nn

from spectral_kernels import SpectralRegularizer
from spectral_kernels.tables import addresses
from spectral_kernels.tables.schema import MOMENT

from ..support import models
from ..support.models import close


@pytest.fixture(params=["native", "python"])
def way(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(addresses, "native_or_none", lambda: None)
        monkeypatch.setattr(addresses, "tensor_reader", lambda: None)
    elif addresses.tensor_reader() is None:
        pytest.skip("no compiled module, or a torch without the C functions that it calls")
    return request.param


def test_addresses(way):
    base = torch.randn(6, 5)
    tensors = [
        base,
        base[2:],
        None,
        nn.Parameter(base[:, 1:]),
        torch.empty(0, 3),
        torch.tensor(1.0),
    ]
    found = addresses.look(tensors[:1], tensors)
    wanted = [0 if t is None else t.data_ptr() for t in tensors]
    assert found.read.address_array().tolist() == wanted
    assert found.written.address_array().tolist() == wanted[:1]
    assert isinstance(found.read.layouts, bytes) == (way == "native")


SAME = [torch.zeros(4, 6), nn.Parameter(torch.ones(4, 6)), torch.zeros(9, 6)[3:7]]
OTHERS = [
    torch.zeros(6, 4), torch.zeros(4, 7)[:, :6], torch.zeros(6, 4).t(), torch.zeros(4, 6).double(),
    torch.zeros(4, 6).bfloat16(), torch.zeros(4, 6).half(), torch.zeros(4, 6, 1), torch.zeros(24),
    torch.zeros(3, 6), torch.zeros(4, 6, dtype=torch.int32),
]  # fmt: skip


@pytest.mark.usefixtures("way")
def test_layouts_are_equal_for_the_same_and_differ_for_others():
    layouts = [addresses.look(read=[t]).read.layouts for t in (*SAME, *OTHERS, None)]
    assert layouts[0] == layouts[1] == layouts[2]
    assert all(a != b for i, a in enumerate(layouts[2:]) for b in layouts[i + 3 :])


@pytest.mark.usefixtures("way")
def test_a_tensor_without_an_address_raises():
    with pytest.raises(RuntimeError):
        addresses.look(read=[torch.zeros(2), torch.zeros(2, 2).to_sparse()])


def shrunk(n_bytes: int) -> torch.Tensor:
    """Return [4, 6] float32 at an offset of 3, with a storage of ``n_bytes``; do not print it."""
    found = torch.randn(27)[3:].view(4, 6)
    found.untyped_storage().resize_(n_bytes)
    return found


BASE = torch.randn(8, 6)
PROBLEMS = {
    "a freed storage": (lambda: ([], [BASE, shrunk(0)]), ("freed", 1, 1)),
    "a smaller storage": (lambda: ([shrunk(107)], []), ("freed", 0, 0)),
    "a storage that is just large enough": (lambda: ([shrunk(108)], []), None),
    "a negative bit": (lambda: ([None], [BASE, torch._neg_view(BASE)]), ("negative", 2, 2)),
    "the same twice": (lambda: ([BASE, BASE], []), ("overlap", 0, 1)),
    "one row in common": (lambda: ([BASE[4:]], [None, BASE[:5]]), ("overlap", 2, 0)),
    "inside": (lambda: ([torch.randn(3), BASE], [BASE[2:3, 1:2]]), ("overlap", 1, 2)),
    "behind": (lambda: ([BASE[:1], BASE[2:]], [BASE[0, 3:4]]), ("overlap", 0, 2)),
    "read twice": (lambda: ([torch.randn(3)], [BASE, BASE]), None),
    "side by side": (lambda: ([BASE[:4], BASE[4:]], [torch.randn(2)]), None),
    "without elements": (lambda: ([BASE, BASE[:0]], [BASE[:, :0]]), None),
    "nothing": (lambda: ([], []), None),
}


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("case", PROBLEMS)
def test_memory_that_kernels_must_not_touch_is_found(case):
    make, problem = PROBLEMS[case]
    found = addresses.look(*make())
    assert found.problem == problem
    if problem is None:
        found.check(str)
    else:
        with pytest.raises(ValueError, match=f"tensor {problem[1]}"):
            found.check(lambda i: f"tensor {i}")


@pytest.mark.usefixtures("way")
def test_overlaps_are_those_that_comparing_all_pairs_finds():
    generator = torch.Generator().manual_seed(0)
    base = torch.zeros(64)
    kinds = set()
    for _ in range(300):
        starts = torch.randint(64, (6,), generator=generator).tolist()
        sizes = torch.randint(6, (6,), generator=generator).tolist()
        spans = [range(a, min(a + n, 64)) for a, n in zip(starts, sizes, strict=True)]
        tensors = [base[span.start : span.stop] for span in spans]
        for n_written in (1, 3, 6):
            wanted = any(
                {*one} & {*other}
                for i, one in enumerate(spans[:n_written])
                for j, other in enumerate(spans)
                if i != j
            )
            found = addresses.look(tensors[:n_written], tensors[n_written:]).problem
            assert (found is not None) == wanted
            kinds.add(wanted)
    assert kinds == {True, False}


@pytest.mark.usefixtures("way")
def test_a_column_holds_addresses_of_parts():
    table = np.zeros(4, MOMENT)
    tensors = [torch.zeros(5), None, torch.zeros(7)]
    refs, offsets = np.array([2, 0, 1, 2]), np.array([0, 4, 8, 12])
    addresses.Column(table, "second", refs, offsets).write(addresses.look(tensors).written)
    first, last = tensors[0].data_ptr(), tensors[2].data_ptr()
    assert table["second"].tolist() == [last, first + 4, 0, last + 12]
    assert not table["first"].any()
    with pytest.raises(IndexError):
        addresses.Column(table, "first", refs + 1, offsets).write(addresses.look(tensors).written)


@pytest.mark.usefixtures("way")
def test_entries_of_dicts():
    dicts = [{"a": 1, "b": 2}, {"b": 3}]
    assert addresses.entries(dicts, ("b", "a")) == [2, 1, 3, None]


@pytest.mark.usefixtures("way")
def test_a_training_step_notices_what_changes_in_place():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6).double(), nn.Linear(6, 4).bfloat16())
    reg = SpectralRegularizer(model, 0.1, warmup=0)  # vectors go on, however large a residual is

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

"""constraint="cap" with several vectors: every singular value that they follow is capped."""

import copy

import pytest
import torch
from torch import nn

from spectral_kernels import SpectralAdamW, SpectralRegularizer, SpectralSGD
from spectral_kernels.engine.bucket import Bucket

from ..support.constrained import (
    TARGET,
    Layers,
    assert_step_takes,
    converged,
    flat,
    put_gradients,
    with_values,
)

pytestmark = pytest.mark.usefixtures("seeded")
SEVERAL = [9.0, 5.0, 3.0, 2.0, 0.1]  # four above the target


def several(values, dtype=torch.float32):
    """Layers of other singular values: three quarters as large in every second matrix."""
    model = Layers(dtype=dtype)
    with torch.no_grad():
        for i, layer in enumerate((*model.layers, model.conv, model.transposed)):
            shape = flat(layer.weight).shape
            x = with_values(*shape, [s * (0.75 if i % 2 else 1) for s in values])
            layer.weight.copy_(x.view(layer.weight.shape))
    return model


def capped_by_svd(before, r, target=TARGET):
    u, s, vh = torch.linalg.svd(flat(before), full_matrices=False)
    excess = (s[:r] - target).clamp(min=0)
    return ((u[:, :r] * excess) @ vh[:r]).view(before.shape)


@pytest.mark.parametrize("kind", ["adamw", "momentum"])
@pytest.mark.parametrize(("dtype", "r"), [
    (torch.float32, 2), (torch.float32, 8), (torch.float64, 4), (torch.bfloat16, 4),
])  # fmt: skip
def test_a_step_caps_every_singular_value_of_the_vectors(backend, kind, dtype, r):
    model = several(SEVERAL, dtype)
    limit = {torch.float32: 1e-5, torch.float64: 1e-9, torch.bfloat16: 0.01}[dtype]
    assert_step_takes(
        kind, model, {"constraint": "cap", "n_vectors": r, "backend": backend},
        converged(model, r), lambda weight: capped_by_svd(weight, r), limit,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_singular_values_below_the_cap_keep_their_bits(backend, dtype):
    model = several([1.4, 1.3, 1.1, 0.1], dtype)
    before = copy.deepcopy(model)
    optimizer = SpectralSGD(model, 0.0, target=TARGET, decoupled=True, constraint="cap",
                            n_vectors=4, backend=backend)  # fmt: skip
    for _ in range(2):
        put_gradients(model)
        optimizer.step()
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q)


def test_several_vectors_hold_what_one_cannot(backend):
    """All singular values grow in every step, as Muon's do: one vector loses, sixteen hold."""
    found = {}
    for r in (1, 16):
        torch.manual_seed(0)
        w = nn.Parameter(torch.eye(12, 20, device=torch.get_default_device()) * TARGET)
        optimizer = SpectralSGD([("w", w)], 1.0, target=TARGET, decoupled=True, constraint="cap",
                                n_vectors=r, backend=backend)  # fmt: skip
        for _ in range(10):
            u, _, vh = torch.linalg.svd(w.detach(), full_matrices=False)
            w.grad = -0.1 * (u @ vh)
            optimizer.step()
        found[r] = float(torch.linalg.svdvals(flat(w))[0])
    assert found[16] == pytest.approx(TARGET + 0.1, rel=1e-3)  # what the last step added
    assert found[1] > TARGET + 0.5


def test_a_cap_below_other_singular_values_does_not_warm_up_in_every_step(monkeypatch):
    warmed, step = [], 0
    own = Bucket._warm_up_again

    def watched(self, is_new):
        warmed.extend([step] * bool(is_new.any()))
        own(self, is_new)

    monkeypatch.setattr(Bucket, "_warm_up_again", watched)
    w = nn.Parameter(torch.randn(64, 64, device=torch.get_default_device()))
    optimizer = SpectralAdamW([("w", w)], 1e-3, target=0.05, decoupled=True, constraint="cap")
    w.grad = torch.randn_like(w)
    for step in range(300):  # noqa: B007, watched() reads it
        optimizer.step()
    assert 2 <= len(warmed) <= 8, warmed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attach_caps_several_singular_values_too(backend, dtype):
    model = several(SEVERAL, dtype)
    other = copy.deepcopy(model)
    options = {"target": TARGET, "backend": backend, "n_vectors": 4, "warmup": 2}
    mine = SpectralSGD(model, 0.01, decoupled=True, constraint="cap", **options)
    reg = SpectralRegularizer(other, **options)
    yours = torch.optim.SGD(other.parameters(), 0.01)
    reg.attach(yours, decoupled=True, constraint="cap")
    for seed in range(3):
        for one, optimizer in ((model, mine), (other, yours)):
            with torch.no_grad():
                one.layers[0].weight.mul_(1.5)
            put_gradients(one, seed=seed)
            optimizer.step()
    limit = 1e-7 if dtype == torch.float64 else 5e-5
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=limit, atol=limit, msg=name)

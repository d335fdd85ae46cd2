"""Parametrized and pruned weights of checkpoints, as the modules compute them."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from spectral_kernels.diagnostics.checkpoints import open_checkpoint

pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning"),
]

LAYERS = {
    "linear": lambda: nn.Linear(6, 5),
    "convolution": lambda: nn.Conv2d(4, 4, 3),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3),
    "square, transposed": lambda: nn.ConvTranspose1d(4, 4, 3),
}


def opened(folder, model):
    path = folder / "model.pt"
    torch.save(model.state_dict(), path)
    checkpoint = open_checkpoint(path)
    return dict(checkpoint), {s.name: s.reason for s in checkpoint.skipped}


def check(weights, name, module, made_by, parameter="weight"):
    expected = getattr(module, parameter).detach()
    tensor = weights[name].read()
    assert weights[name].made_by == made_by
    assert weights[name].shape == tuple(expected.shape)
    torch.testing.assert_close(tensor, expected.to(tensor.dtype), rtol=2e-6, atol=1e-7)
    assert not any("original" in other or other.endswith(("_g", "_v", "_u")) for other in weights)


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("norm", [parametrizations.weight_norm, nn.utils.weight_norm])
def test_weight_norm_old_and_new(tmp_path, norm, layer, dim):
    module = norm(LAYERS[layer](), dim=dim)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(torch.rand(()) + 0.5)
    module(torch.randn((3, 6) if layer == "linear" else (2, 4) + (5,) * (module.weight.dim() - 2)))
    weights, skipped = opened(tmp_path, nn.ModuleDict({"a": module}))
    check(weights, "a.weight", module, "weight_norm")
    assert set(weights) == {"a.weight", "a.bias"}
    assert not skipped


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_spectral_norm_old_and_new(tmp_path, norm, layer):
    module = LAYERS[layer]()
    with torch.no_grad():
        module.weight.mul_(3)
    module = norm(module, n_power_iterations=5)
    inputs = torch.randn((3, 6) if layer == "linear" else (2, 4) + (5,) * (module.weight.dim() - 2))
    module(inputs)
    module.eval()(inputs)
    weights, _ = opened(tmp_path, nn.Sequential(module))
    check(weights, "0.weight", module, "spectral_norm")


def test_a_recurrent_layer_and_a_root_without_a_name(tmp_path):
    lstm = parametrizations.weight_norm(nn.LSTM(4, 3), "weight_hh_l0")
    weights, _ = opened(tmp_path, lstm)
    check(weights, "weight_hh_l0", lstm, "weight_norm", "weight_hh_l0")


def test_pruned_weights_are_masked(tmp_path):
    module = prune.random_unstructured(nn.Linear(8, 6), "weight", 0.4)
    weights, _ = opened(tmp_path, nn.Sequential(module))
    check(weights, "0.weight", module, "pruned")
    assert int((weights["0.weight"].read() == 0).sum()) == 19


def test_float64_and_bfloat16_are_computed_in_enough_digits(tmp_path):
    for dtype, expected in ((torch.float64, "float64"), (torch.bfloat16, "float32")):
        module = parametrizations.weight_norm(nn.Linear(6, 5, dtype=dtype))
        weights, _ = opened(tmp_path, nn.Sequential(module))
        v = module.parametrizations.weight.original1.detach().double()
        g = module.parametrizations.weight.original0.detach().double()
        assert weights["0.weight"].dtype == expected
        exact = g * v / v.norm(dim=1, keepdim=True)
        rtol = 1e-14 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(weights["0.weight"].read().double(), exact, rtol=rtol, atol=0)


def test_what_a_file_does_not_say_is_skipped_with_the_reason(tmp_path):
    twice = parametrizations.weight_norm(nn.Linear(4, 4))
    parametrizations.spectral_norm(twice)
    model = nn.ModuleDict({"a": parametrizations.orthogonal(nn.Linear(4, 4)), "b": twice})
    weights, skipped = opened(tmp_path, model)
    assert set(weights) == {"a.bias", "b.bias"}
    assert len(skipped) == 2
    for name, reason in skipped.items():
        assert ".parametrizations.weight.original" in name
        assert "save the weight itself" in reason


def test_parts_that_do_not_fit_are_skipped_and_a_name_is_not_taken_twice(tmp_path):
    path = tmp_path / "odd.pt"
    stored = {
        "a.weight_g": torch.rand(3, 1), "a.weight_v": torch.randn(4, 5),
        "b.weight_orig": torch.randn(4, 5), "b.weight_u": torch.randn(3), "b.weight_v":
        torch.randn(5), "c.weight": torch.randn(2, 2), "c.weight_g": torch.rand(2, 1),
        "c.weight_v": torch.randn(2, 2), "d.weight_orig": torch.randn(4, 5),
        "d.weight_u": torch.randn(4),
    }  # fmt: skip
    torch.save(stored, path)
    checkpoint = open_checkpoint(path)
    assert [name for name, _ in checkpoint] == ["c.weight"]
    assert {s.name: s.reason for s in checkpoint.skipped} == {
        "a.weight_v": "parametrized, and not by a norm: shapes [3, 1] and [4, 5]",
        "b.weight_orig": "spectral_norm whose vectors [3] and [5] do not fit [4, 5]",
        "c.weight_v": "c.weight is stored too",
        "d.weight_orig": "spectral_norm without its weight_v",
    }

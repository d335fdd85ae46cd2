"""``spectral-kernels inspect --convolutions operator``."""

import json

import pytest
import torch
from torch import nn

from spectral_kernels import spectral_norms
from spectral_kernels.__main__ import main

save_file = pytest.importorskip("safetensors.torch").save_file
pytestmark = pytest.mark.usefixtures("seeded")


def test_both_values_are_shown(tmp_path, capsys):
    path = tmp_path / "weights.safetensors"
    tensors = {"conv.weight": torch.randn(6, 4, 3, 3), "down.weight": torch.randn(5, 6, 1, 1),
               "head.weight": torch.randn(3, 5)}  # fmt: skip
    save_file(tensors, path)
    conv = nn.Conv2d(4, 6, 3, bias=False)
    conv.load_state_dict({"weight": tensors["conv.weight"]})
    (norm,) = spectral_norms(conv, convolutions="operator").values()
    (flattened,) = spectral_norms(conv).values()

    assert main(["inspect", str(path), "--convolutions", "operator", "--json", "-"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["matrices"]}
    assert rows["conv.weight"]["operator_norm"] == pytest.approx(norm, rel=1e-3)
    assert rows["conv.weight"]["sigma"] == pytest.approx(flattened, rel=1e-3)
    assert norm > 1.2 * flattened
    assert rows["down.weight"]["operator_norm"] is rows["head.weight"]["operator_norm"] is None

    assert main(["inspect", str(path), "--convolutions", "operator"]) == 0
    shown = capsys.readouterr().out
    assert "as an\n" in shown
    assert f"{norm:.3f}" in shown
    assert main(["inspect", str(path)]) == 0
    assert "as an" not in capsys.readouterr().out

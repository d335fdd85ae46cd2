"""``inspect ADAPTER --base MODEL``: what was added to the weights of a model."""

import csv
import io
import json

import pytest
import torch

from spectral_kernels import cli
from spectral_kernels.cli.inspect import base
from tests.support.checkpoints import values

safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("rich")
pytestmark = pytest.mark.usefixtures("seeded")

SHAPES = {"h.0.q.weight": (24, 20), "h.0.up.weight": (40, 24), "h.1.q.weight": (24, 20)}


def intruders(before, after):
    x, y = (torch.linalg.svd(w.double().flatten(1), full_matrices=False).U for w in (before, after))
    return sum(float((u @ x).abs().max()) < 0.5 for u in y.T[:10])


def check(added, before, update):
    sigmas = {"base_sigma": before, "sum_sigma": before + update, "update_sigma": update}
    for key, matrix in sigmas.items():
        exact = float(torch.linalg.svdvals(matrix.double().flatten(1))[0])
        assert added[key] == pytest.approx(exact, rel=1e-4)
    assert added["relative_update"] == pytest.approx(float(update.norm() / before.norm()), rel=1e-5)
    assert added["intruders"] == intruders(before, before + update)


@pytest.fixture
def model(tmp_path):
    """A base model, and its tensors."""
    tensors = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    safetensors.save_file({f"model.{n}": t for n, t in tensors.items()},
                          tmp_path / "base.safetensors")  # fmt: skip
    return tmp_path / "base.safetensors", tensors


@pytest.fixture
def adapter(tmp_path):
    """An adapter of peft, and its updates by the names of weights."""
    stored, updates = {}, {}
    for size, (name, (m, n)) in enumerate(SHAPES.items()):
        a, b = torch.randn(2, n), torch.randn(m, 2) * size
        place = f"base_model.model.model.{name.removesuffix('.weight')}"
        stored |= {f"{place}.lora_A.weight": a, f"{place}.lora_B.weight": b}
        updates[name] = 2 * b @ a
    folder = tmp_path / "adapter"
    folder.mkdir()
    safetensors.save_file(stored, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4}))
    return folder, updates


def test_updates_of_an_adapter_and_their_intruders(model, adapter, capsys):
    (path, weights), (folder, updates) = model, adapter
    document = values(folder, "--base", path, capsys=capsys)
    assert document["base"]["checkpoint"] == str(path)
    assert not document["base"]["unmatched"]
    rows = {row["added"]["base"].removeprefix("model."): row for row in document["matrices"]}
    for name, before in weights.items():
        check(rows[name]["added"], before, updates[name])
        assert rows[name]["sigma"] == pytest.approx(rows[name]["added"]["update_sigma"], rel=1e-4)
    counts = [rows[name]["added"]["intruders"] for name in SHAPES]
    assert counts[0] == 0
    assert counts[2] > 0


def test_a_random_direction_is_an_intruder_and_one_of_the_base_is_not(tmp_path, capsys):
    before = torch.randn(60, 60)
    left, _, right = torch.linalg.svd(before)
    directions = torch.nn.functional.normalize(torch.randn(2, 60), dim=1)
    cases = {"own": (left[:, 4], right[4]), "new": directions.unbind()}
    found = {}
    for name, (u, v) in cases.items():
        stored = {"q.lora_A.weight": v[None] * 50, "q.lora_B.weight": u[:, None].contiguous()}
        safetensors.save_file(stored, tmp_path / f"{name}.safetensors")
        safetensors.save_file({"q.weight": before}, tmp_path / "base.safetensors")
        arguments = tmp_path / f"{name}.safetensors", "--base", tmp_path / "base.safetensors"
        (row,) = values(*arguments, capsys=capsys)["matrices"]
        found[name] = row["added"]["intruders"]
    assert found == {"own": 0, "new": 1}


def test_a_model_that_was_fine_tuned_as_a_whole(model, tmp_path, capsys):
    path, weights = model
    after = {name: w + 0.1 * torch.randn(w.shape) for name, w in weights.items()}
    stored = {f"module.{name}": w for name, w in after.items()} | {"head.weight": torch.randn(4, 5)}
    torch.save(stored, tmp_path / "tuned.pt")
    document = values(tmp_path / "tuned.pt", "--base", path, capsys=capsys)
    rows = {row["name"].removeprefix("module."): row for row in document["matrices"]}
    for name, before in weights.items():
        check(rows[name]["added"], before, after[name] - before)
    assert rows["head.weight"]["added"] is None
    (unmatched,) = document["base"]["unmatched"]
    assert unmatched == {"name": "head.weight", "reason": "no weight of that name and shape"}


def test_weights_of_conv1d_are_turned_and_fused_ones_split(tmp_path, capsys):
    weight, a, b = torch.randn(16, 48), torch.randn(2, 16), torch.randn(48, 2)
    safetensors.save_file({"transformer.h.0.c_attn.weight": weight}, tmp_path / "base.safetensors")
    folder = tmp_path / "adapter"
    folder.mkdir()
    stored = {"base_model.model.h.0.c_attn.lora_A.weight": a,
              "base_model.model.h.0.c_attn.lora_B.weight": b}  # fmt: skip
    safetensors.save_file(stored, folder / "adapter_model.safetensors")
    config = {"r": 2, "lora_alpha": 2, "fan_in_fan_out": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    arguments = folder, "--base", tmp_path / "base.safetensors", "--splits", "*.c_attn.lora=3"
    document = values(*arguments, capsys=capsys)
    parts = zip(document["matrices"], weight.T.split(16), (b @ a).split(16), strict=True)
    for row, before, update in parts:
        check(row["added"], before, update)


def test_names_of_kohya_have_underscores_for_dots(tmp_path, capsys):
    weight, a, b = torch.randn(12, 8), torch.randn(2, 8), torch.randn(12, 2)
    stored = {f"mid_block.{i}.to_q.weight": weight + i for i in (1, 11)}
    safetensors.save_file(stored, tmp_path / "base.safetensors")
    stored = {"lora_unet_mid_block_1_to_q.lora_down.weight": a,
              "lora_unet_mid_block_1_to_q.lora_up.weight": b,
              "lora_unet_mid_block_1_to_q.alpha": torch.tensor(2.0)}  # fmt: skip
    safetensors.save_file(stored, tmp_path / "kohya.safetensors")
    arguments = tmp_path / "kohya.safetensors", "--base", tmp_path / "base.safetensors"
    (row,) = values(*arguments, capsys=capsys)["matrices"]
    assert row["added"]["base"] == "mid_block.1.to_q.weight"
    check(row["added"], weight + 1, b @ a)


def test_the_table_and_the_csv_say_what_was_added(model, adapter, capsys, monkeypatch):
    monkeypatch.setattr(base, "LIMIT", 22)
    assert cli.main(["inspect", str(adapter[0]), "--base", str(model[0]), "--csv", "-"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["base"] for row in rows] == [f"model.{name}" for name in SHAPES]
    assert rows[1]["intruders"] == ""
    assert rows[1]["made_by"] == "2 B A (LoRA)"
    assert cli.main(["inspect", str(adapter[0]), "--base", str(model[0])]) == 0
    out = capsys.readouterr().out
    assert "intruders not counted for 1 matrix: both sides are above 22\n" in out
    assert "below 0.5 (arXiv 2410.21228)\n" in out
    assert "made of stored tensors: 3 matrices, 2 B A (LoRA)\n" in out
    assert float(rows[0]["sum_sigma"]) == pytest.approx(
        float(torch.linalg.svdvals(model[1]["h.0.q.weight"])[0]), rel=1e-4
    )


def test_a_base_without_the_weights_is_an_error_that_names_them(tmp_path, adapter, capsys):
    safetensors.save_file({"other.weight": torch.randn(24, 20)}, tmp_path / "base.safetensors")
    arguments = ["inspect", str(adapter[0]), "--base", str(tmp_path / "base.safetensors")]
    assert cli.main(arguments) == 1
    err = capsys.readouterr().err
    assert "has none of the weights of" in err
    assert "model.h.0.q.weight [24, 20]" in err
    assert err.count("\n") == 1
    assert cli.main([*arguments[:2], *arguments[1:]]) == 2
    assert "--base: expected one checkpoint, got two" in capsys.readouterr().err

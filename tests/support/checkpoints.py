"""Helpers for tests of checkpoints on disk."""

import json

import pytest
import torch

from spectral_kernels import cli


def values(path, *arguments, capsys):
    """Return the document that --json writes."""
    assert cli.main(["inspect", str(path), *map(str, arguments), "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


def error_of(path, capsys, code=1):
    """Return the only line on stderr of a call that fails."""
    assert cli.main(["inspect", str(path)]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("spectral-kernels: ")
    assert err.count("\n") == 1
    return err


def check_against_svd(document, tensors):
    assert {row["name"] for row in document["matrices"]} == {
        name for name, t in tensors.items() if t.dim() > 1
    }
    for row in document["matrices"]:
        weight = tensors[row["name"]].double()
        exact = torch.linalg.svdvals(weight.flatten(1))
        assert row["shape"] == list(weight.shape)
        assert row["sigma"] == pytest.approx(float(exact[0]), rel=1e-4)
        assert row["norm"] == pytest.approx(float(weight.norm()), rel=1e-6)
        rank = float((exact / exact[0]).square().sum())
        assert row["stable_rank"] == pytest.approx(rank, rel=3e-4)


def save_sharded(folder, tensors, suffix):
    save = torch.save
    if suffix == "safetensors":
        from safetensors.torch import save_file as save
    names = list(tensors)
    weight_map = {}
    for number, part in enumerate((names[:2], names[2:]), 1):
        file = f"model-0000{number}-of-00002.{suffix}"
        save({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    stem = "model.safetensors" if suffix == "safetensors" else "pytorch_model.bin"
    index = folder / f"{stem}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index

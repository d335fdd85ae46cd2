"""Helpers for tests of checkpoints on disk."""

import json
import os
import pathlib
import pickle
import subprocess

import pytest
import torch
from torch import nn

from spectral_kernels import cli
from spectral_kernels.diagnostics.checkpoints import Checkpoint, CheckpointError


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


def network():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def check(checkpoint, tensors):
    """The checkpoint has these tensors, bit by bit, and no others."""
    found = {name: tensor.read() for name, tensor in checkpoint}
    assert sorted(found) == sorted(tensors)
    for name, tensor in checkpoint:
        expected = tensors[name].detach()
        assert tensor.shape == tuple(expected.shape)
        assert tensor.dtype == str(expected.dtype).removeprefix("torch.")
        assert torch.equal(found[name], expected)


def left_out(checkpoint):
    """Return names and reasons of what was skipped."""
    return [(skipped.name, skipped.reason) for skipped in checkpoint.skipped]


def error(path):
    """Return what is said of a checkpoint that is refused."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(path)
    assert str(caught.value).isprintable()
    return str(caught.value)


class Touches:
    """Would make a folder when it is unpickled; ``how`` says with which function."""

    def __init__(self, how, path):
        self.how, self.path = how, str(path)

    def __reduce__(self):
        code = f"__import__('os').mkdir({self.path!r})"
        return {
            "mkdir": (os.mkdir, (self.path,)), "eval": (eval, (code,)), "exec": (exec, (code,)),
            "system": (os.system, (f"mkdir {self.path}",)),
            "popen": (subprocess.Popen, (["mkdir", self.path],)),
            "path": (pathlib.Path.mkdir, (pathlib.Path(self.path),)),
            "load": (pickle.loads, (b"cposix\nmkdir\n(V" + self.path.encode() + b"\ntR.",)),
        }[self.how]  # fmt: skip

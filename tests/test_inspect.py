"""Checkpoints on disk: what is read of them, what is shown, and what is refused."""

import csv
import gc
import io
import json
import math
import os
import pickle
import pty
import re
import signal
import struct
import subprocess
import sys
import weakref
import zipfile

import pytest
import torch

from spectral_kernels import checkpoint_files, cli, inspection_rows
from spectral_kernels.checkpoint_files import Checkpoint, CheckpointError
from spectral_kernels.inspection_rows import Patterns, Row, kind, measure
from tests import TIMEOUT

safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("rich")
pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture
def tensors():
    return {
        "h.2.fc.weight": torch.randn(24, 16),
        "h.10.fc.weight": 3 * torch.randn(24, 16),
        "conv.weight": torch.randn(8, 4, 3, 3),
        "norm.weight": torch.randn(16),
        "scale": torch.tensor(2.0),
    }


@pytest.fixture
def saved(tmp_path, tensors):
    """One safetensors file."""
    path = tmp_path / "model.safetensors"
    safetensors.save_file(tensors, path)
    return path


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
    save = safetensors.save_file if suffix == "safetensors" else torch.save
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


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "pth", "bin", "ckpt", "old.pt"])
def test_every_format_gives_the_singular_values_of_the_svd(tmp_path, tensors, capsys, suffix):
    path = tmp_path / f"model.{suffix}"
    if suffix == "safetensors":
        safetensors.save_file(tensors, path)
    else:
        is_new = not suffix.startswith("old")
        torch.save(tensors, path, _use_new_zipfile_serialization=is_new)
    document = values(path, capsys=capsys)
    check_against_svd(document, tensors)
    assert document["skipped"] == []
    assert values(tmp_path, capsys=capsys)["matrices"] == document["matrices"]


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_checkpoint_in_several_files_is_read_by_its_index(tmp_path, tensors, capsys, suffix):
    index = save_sharded(tmp_path, tensors, suffix)
    document = values(index, capsys=capsys)
    check_against_svd(document, tensors)
    assert values(tmp_path, capsys=capsys)["matrices"] == document["matrices"]
    (tmp_path / f"model-00002-of-00002.{suffix}").unlink()
    assert f"model-00002-of-00002.{suffix} is missing" in error_of(index, capsys)


def test_files_of_a_directory_that_share_names_are_told_apart(tmp_path, capsys):
    for step in (9, 10):
        torch.save({"w": step * torch.eye(2)}, tmp_path / f"step{step}.pt")
    rows = values(tmp_path, capsys=capsys)["matrices"]
    assert [(row["name"], round(row["sigma"])) for row in rows] == [
        ("step9.pt:w", 9), ("step10.pt:w", 10)
    ]  # fmt: skip


def test_pickles_beside_the_weights_are_left_alone(tmp_path, tensors, capsys):
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    torch.save(Hostile("touched"), tmp_path / "training_args.bin")
    check_against_svd(values(tmp_path, capsys=capsys), tensors)


def test_layers_come_in_the_order_of_their_numbers(saved, capsys):
    names = [row["name"] for row in values(saved, capsys=capsys)["matrices"]]
    assert names == ["conv.weight", "h.2.fc.weight", "h.10.fc.weight"]


def test_nested_dicts_give_dotted_names_and_optimizers_are_left_out(tmp_path, capsys):
    model = torch.nn.Linear(3, 4)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    path = tmp_path / "train.pt"
    inside = {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
              "more": [{"w": torch.eye(2)}], "step": 3}  # fmt: skip
    inside["model"]["self"] = inside["more"]
    inside["more"].append(inside)  # containers may hold each other
    torch.save(inside, path)
    names = [row["name"] for row in values(path, capsys=capsys)["matrices"]]
    assert names == ["model.weight", "model.self.0.w"]
    assert cli.main(["inspect", str(path)]) == 0
    assert "left out: 6 tensors of an optimizer's state" in capsys.readouterr().out
    names = [row["name"] for row in values(path, "--include", "opt*", capsys=capsys)["matrices"]]
    assert names == ["optimizer.state.0.exp_avg", "optimizer.state.0.exp_avg_sq"]


def test_tied_weights_count_once(tmp_path, capsys):
    weight = torch.randn(5, 4)
    path = tmp_path / "tied.pt"
    torch.save({"embed": weight, "head": weight, "part": weight[:3]}, path)
    document = values(path, capsys=capsys)
    assert [row["name"] for row in document["matrices"]] == ["embed", "part"]
    (skipped,) = document["skipped"]
    assert (skipped["name"], skipped["reason"]) == ("head", "it is embed under another name")


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_dtypes_that_are_no_weights_are_listed_with_the_reason(tmp_path, capsys, suffix):
    path = tmp_path / f"model.{suffix}"
    dtypes = (torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.int8,
              torch.bool)  # fmt: skip
    weight = torch.randn(12, 8)
    tensors = {str(d).removeprefix("torch."): weight.to(d) for d in dtypes}
    (safetensors.save_file if suffix == "safetensors" else torch.save)(tensors, path)
    document = values(path, capsys=capsys)
    floats = {n: t for n, t in tensors.items() if n in ("bfloat16", "float16", "float64")}
    check_against_svd(document, floats)
    assert {row["name"]: row["dtype"] for row in document["matrices"]} == {n: n for n in floats}
    assert {(s["name"], s["reason"]) for s in document["skipped"]} == {
        (n, f"dtype {n}") for n in ("float8_e4m3fn", "int8", "bool")
    }
    assert cli.main(["inspect", str(path)]) == 0
    assert "skipped, dtype int8: int8 12x8\n" in capsys.readouterr().out


def test_what_is_not_finite_empty_or_zero_is_shown(tmp_path, capsys):
    path = tmp_path / "odd.safetensors"
    weight = torch.randn(4, 4)
    odd = {"a.nan": weight.clone(), "b.inf": weight.clone(), "c.zero": torch.zeros(3, 2)}
    odd |= {"d.empty": torch.zeros(0, 5), "e.huge": weight * 1e30, "f.tiny": weight * 1e-30}
    odd["a.nan"][1, 2], odd["b.inf"][1, 2] = math.nan, -math.inf
    safetensors.save_file(odd, path)
    nan, inf, zero, empty, huge, tiny = values(path, capsys=capsys)["matrices"]
    assert nan["sigma"] is nan["stable_rank"] is nan["norm"] is nan["ratio"] is inf["sigma"] is None
    assert zero["sigma"] == zero["stable_rank"] == zero["ratio"] == empty["sigma"] == 0
    exact = float(torch.linalg.svdvals(weight)[0])
    assert huge["sigma"] == pytest.approx(exact * 1e30, rel=1e-4)
    assert tiny["sigma"] == pytest.approx(exact * 1e-30, rel=1e-4)
    picture = tmp_path / "odd.png"
    pytest.importorskip("matplotlib")
    assert cli.main(["inspect", str(path), "--plot", str(picture)]) == 0
    assert re.search(r"a\.nan +4x4 +nan +nan +nan +nan", capsys.readouterr().out)
    assert png_size(picture)[0] == 1650


def test_tensors_that_lie_in_odd_ways_are_measured_too(tmp_path, capsys):
    weight = torch.randn(12, 10)
    tensors = {
        "every.other": weight[::2, ::2],
        "transposed": weight.T,
        "row": weight[:1].expand(6, 10),
    }
    tensors["channels_last"] = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    tensors["expanded"] = torch.randn(1).expand(1 << 20, 1 << 20)
    path = tmp_path / "views.pt"
    torch.save(tensors, path)
    document = values(path, capsys=capsys)
    del tensors["expanded"]
    check_against_svd(document, tensors)
    # Such a tensor may claim any size without having it.
    assert [s["name"] for s in document["skipped"]] == ["expanded"]


def test_tensors_may_begin_at_any_byte(tmp_path, capsys):
    weight = torch.randn(9, 7)
    header = json.dumps({
        "byte": {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]},
        "w": {"dtype": "F32", "shape": [9, 7], "data_offsets": [1, 1 + weight.nbytes]},
    }).encode()  # fmt: skip
    path = tmp_path / "odd.safetensors"
    data = b"x" + weight.numpy().tobytes()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    checkpoint = Checkpoint(path)
    read = checkpoint.read(checkpoint.entries[1])
    assert read.data_ptr() % 4 == 0
    assert torch.equal(read, weight)
    check_against_svd(values(path, capsys=capsys), {"w": weight})


@pytest.mark.parametrize("shape", [(512, 256), (256, 512), (64, 32, 3, 3)])
def test_fresh_layers_of_torch_are_near_the_usual_value(shape):
    layer = torch.nn.Linear(shape[1], shape[0]) if len(shape) == 2 else torch.nn.Conv2d(32, 64, 3)
    weight = layer.weight.detach().flatten(1)
    sigma = float(torch.linalg.svdvals(weight)[0])
    row = Row("w", "w", shape, *weight.shape, "float32", sigma, float(weight.norm()))
    assert 0.95 < row.ratio < 1.03


def test_splits_and_stacks_are_those_of_the_regularizer(tmp_path, capsys):
    tensors = {"a.qkv.weight": torch.randn(12, 8), "experts.w1": torch.randn(3, 6, 5)}
    path = tmp_path / "fused.safetensors"
    safetensors.save_file(tensors, path)
    rows = values(path, "--splits", "*.qkv.weight=8,2,2", "--stacked", "experts.*", capsys=capsys)
    sigmas = {row["name"]: row["sigma"] for row in rows["matrices"]}
    parts = {f"a.qkv.weight[{i}]": p
             for i, p in enumerate(tensors["a.qkv.weight"].split((8, 2, 2)))}  # fmt: skip
    parts |= {f"experts.w1[{i}]": p for i, p in enumerate(tensors["experts.w1"])}
    assert list(sigmas) == list(parts)
    for name, part in parts.items():
        assert sigmas[name] == pytest.approx(float(torch.linalg.svdvals(part)[0]), rel=1e-4)
    found = measure(Checkpoint(path), Patterns(None, (), {"*.qkv.weight": 2}, ("experts.*",)))
    kinds = [row.kind for row in found.rows]
    assert kinds == ["a.qkv.weight[0]", "a.qkv.weight[1]", *["experts.w1[*]"] * 3]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("transformer.h.11.mlp.c_fc.weight", "transformer.h.*.mlp.c_fc.weight"),
        ("layer1.0.conv2.weight", "layer*.*.conv2.weight"),
        ("layer2.0.downsample.0.weight", "layer*.*.downsample.*.weight"),
        ("fc1.weight", "fc1.weight"),
        ("0.weight", "*.weight"),
    ],
)
def test_the_kind_of_a_layer_is_its_name_without_numbers(name, expected):
    assert kind(name) == expected


def test_rows_are_sorted_cut_and_filtered(saved, tensors, capsys):
    def names(*arguments):
        return [row["name"] for row in values(saved, *arguments, capsys=capsys)["matrices"]]

    sigma = {n: float(torch.linalg.svdvals(t.flatten(1))[0])
             for n, t in tensors.items() if t.dim() > 1}  # fmt: skip
    by_sigma = sorted(sigma, key=sigma.get, reverse=True)
    assert by_sigma[0] == "h.10.fc.weight"
    assert names("--sort", "sigma") == by_sigma
    assert names("--top", 2) == by_sigma[:2]
    assert names("--sort", "name", "--top", 1) == ["conv.weight"]
    assert names("--sort", "ratio")[0] == "h.10.fc.weight"
    assert names("--sort", "size")[:2] == ["h.2.fc.weight", "h.10.fc.weight"]
    rank = {n: float(tensors[n].norm() / s) for n, s in sigma.items()}
    assert names("--sort", "stable-rank") == sorted(rank, key=rank.get, reverse=True)
    assert names("--filter", "h.*") == ["h.2.fc.weight", "h.10.fc.weight"]
    assert names("--include", "h.*", "--include", "conv*", "--exclude", "h.2.*") == [
        "conv.weight", "h.10.fc.weight"
    ]  # fmt: skip


def test_csv_and_json_have_the_numbers_of_each_other(saved, tmp_path, capsys):
    document = values(saved, capsys=capsys)
    table, text = tmp_path / "out.csv", tmp_path / "out.json"
    assert cli.main(["inspect", str(saved), "--csv", str(table), "--json", str(text)]) == 0
    assert "conv.weight" in capsys.readouterr().out
    assert json.loads(text.read_text()) == document
    rows = list(csv.DictReader(io.StringIO(table.read_text())))
    assert [row["name"] for row in rows] == [row["name"] for row in document["matrices"]]
    for row, expected in zip(rows, document["matrices"], strict=True):
        assert float(row["sigma"]) == expected["sigma"]
        assert row["shape"] == "x".join(map(str, expected["shape"]))
    assert cli.main(["inspect", str(saved), "--csv", "-"]) == 0
    assert capsys.readouterr().out == table.read_text()


def test_two_checkpoints_are_compared_by_name(saved, tmp_path, tensors, capsys):
    other = tmp_path / "other.pt"
    changed = {n: 2 * t for n, t in tensors.items() if n != "conv.weight"}
    changed["new.weight"] = torch.eye(3)
    torch.save(changed, other)
    document = values(saved, other, "--sort", "change", capsys=capsys)
    assert {row["name"] for row in document["matrices"]} == {"h.2.fc.weight", "h.10.fc.weight"}
    for row in document["matrices"]:
        assert row["change_percent"]["sigma"] == pytest.approx(100, abs=0.05)
        assert row["change_percent"]["stable_rank"] == pytest.approx(0, abs=0.05)
        assert row["other"]["sigma"] == pytest.approx(2 * row["sigma"], rel=2e-4)
    assert [row["name"] for row in document["only_in_checkpoint"]] == ["conv.weight"]
    assert [row["name"] for row in document["only_in_other"]] == ["new.weight"]
    # A pattern may match in one of them alone.
    assert cli.main(["inspect", str(saved), str(other), "--exclude", "new.*"]) == 0
    out = capsys.readouterr().out
    assert f"only in {saved}: conv.weight\n" in out
    assert f"only in {other}" not in out
    assert out.count("+100.0 %") == 2
    assert cli.main(["inspect", str(saved), str(other), "--csv", "-"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["name"] for row in rows][2:] == ["conv.weight", "new.weight"]
    assert all(None not in row.values() for row in rows)


def test_values_above_the_limit_are_an_exit_code_and_named(saved, tmp_path, capsys):
    rows = values(saved, "--top", 2, capsys=capsys)["matrices"]
    limit = sum(row["sigma"] for row in rows) / 2
    assert cli.main(["inspect", str(saved), "--fail-above", str(limit), "--top", "1"]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"spectral-kernels: {rows[0]['name']}: sigma_1 {rows[0]['sigma']:.4g} is above {limit:g}"
    )
    assert cli.main(["inspect", str(saved), "--fail-above", "1e6"]) == 0
    broken = tmp_path / "nan.pt"
    torch.save({"w": torch.full((2, 2), math.nan)}, broken)
    assert cli.main(["inspect", str(broken), "--fail-above", "1e6"]) == 3


class Hostile:
    """Writes a file when it is unpickled without care."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("is_new", [True, False])
@pytest.mark.parametrize("set_by_user", ["", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
def test_a_hostile_pickle_is_refused_in_one_line(
    tmp_path, tensors, capsys, monkeypatch, is_new, set_by_user
):
    if set_by_user:
        monkeypatch.setenv(set_by_user, "1")
    path, touched = tmp_path / "evil.pt", tmp_path / "touched"
    torch.save({**tensors, "x": Hostile(touched)}, path, _use_new_zipfile_serialization=is_new)
    said = error_of(path, capsys)
    assert f"{path}: it holds more than tensors" in said
    assert "mkdir" in said
    assert not touched.exists()
    path.write_bytes(pickle.dumps(Hostile(touched)))
    assert str(path) in error_of(path, capsys)
    assert not touched.exists()


@pytest.mark.parametrize("keep", [0, 5, 60, 0.5, 0.99])
@pytest.mark.parametrize("suffix", ["safetensors", "pt", "old.pt"])
def test_a_file_that_is_cut_short_is_one_line(tmp_path, tensors, capsys, suffix, keep):
    path = tmp_path / f"cut.{suffix}"
    if suffix == "safetensors":
        safetensors.save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=suffix == "pt")
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    assert f"{path}: broken or truncated: " in error_of(path, capsys)


@pytest.mark.parametrize("header", [b"{", b'{"w":{"dtype":"F32","shape":[9,9]}}', b"\xff" * 40])
def test_a_header_that_is_broken_is_one_line(tmp_path, capsys, header):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)
    assert f"{path}: broken or truncated: " in error_of(path, capsys)
    path.write_bytes(struct.pack("<Q", 1 << 60) + header)
    assert f"{path}: broken or truncated: " in error_of(path, capsys)


def test_sizes_that_a_file_does_not_have_are_refused(tmp_path, tensors, capsys):
    path = tmp_path / "bomb.pt"
    torch.save(tensors, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(
        path, "w", zipfile.ZIP_DEFLATED
    ) as bomb:  # fmt: skip
        for name in good.namelist():
            bomb.writestr(name, good.read(name))
        bomb.writestr("good/data/99", b"\0" * (1 << 24))
    assert path.stat().st_size < 1 << 20
    assert f"{path}: its contents are compressed" in error_of(path, capsys)
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 40, 1 << 30],
                               "data_offsets": [0, 1 << 62]}}).encode()  # fmt: skip
    path = tmp_path / "claims.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    assert str(path) in error_of(path, capsys)


def test_what_is_no_checkpoint_is_one_line(tmp_path, capsys):
    assert "there is no such file or directory" in error_of(tmp_path / "no.safetensors", capsys)
    assert "no checkpoint in this folder" in error_of(tmp_path, capsys)
    (tmp_path / "notes.txt").write_text("hello")
    assert "not the name of a checkpoint" in error_of(tmp_path / "notes.txt", capsys)
    (tmp_path / "garbage.pt").write_bytes(b"no pickle at all")
    assert "broken or truncated" in error_of(tmp_path / "garbage.pt", capsys)
    torch.save({"step": 3}, tmp_path / "empty.pt")
    assert "holds no tensor" in error_of(tmp_path / "empty.pt", capsys)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"weight_map": {}}', '{"weight_map": {"w": 3}}',
     '{"weight_map": {"w": "../up.safetensors"}}', '{"weight_map": {"w": "/etc/passwd"}}'],
)  # fmt: skip
def test_an_index_that_is_none_is_one_line(tmp_path, capsys, text):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    assert f"{path}: not an index" in error_of(path, capsys)


def test_a_tensor_that_the_index_promises_is_missed(saved, tmp_path, capsys):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"lost\x1b[2J": saved.name, "scale": saved.name}}))
    assert r"'lost\x1b[2J' is not in model.safetensors" in error_of(path, capsys)


def test_names_cannot_steer_a_terminal(tmp_path, capsys):
    path = tmp_path / "names.pt"
    torch.save({"\x1b[2Jw[red]": torch.eye(2)}, path)
    assert cli.main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert r"\x1b[2Jw[red]" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--top", "0"], "argument --top: got '0'"),
        (["--sort", "x"], "argument --sort"),
        (["--splits", "w"], "argument --splits: got 'w'; accepted are PATTERN=N"),
        (["--fail-above", "nan"], "argument --fail-above: got 'nan'"),
        (["--plot", "x.jpg"], "argument --plot: got 'x.jpg'"),
        (["--json", "no/such/folder/x.json"], "argument --json: got"),
        (["--include", "nothing*"], "include: 'nothing*' matches no parameter"),
        (["--splits", "conv*=3"], "splits: 'conv*': 3 does not divide the 8 outputs"),
        (["--sort", "change"], "--sort change: needs a second checkpoint"),
        (["--json", "-", "--csv", "-"], "only one of them"),
    ],
)
def test_wrong_usage_is_exit_code_2(saved, capsys, arguments, said):
    try:
        code = cli.main(["inspect", str(saved), *arguments])
    except SystemExit as raised:
        code = raised.code
    assert code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err


@pytest.mark.parametrize("name", ["safetensors", "rich", "matplotlib"])
def test_a_missing_package_is_one_line(saved, tmp_path, name):
    code = (
        f"import sys; sys.modules[{name!r}] = None; from spectral_kernels.cli import main;"
        f"sys.exit(main(['inspect', {str(saved)!r}, '--plot', {str(tmp_path / 'x.png')!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.endswith(f"needs {name}: pip install 'spectral_kernels[inspect]'\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_one_tensor_is_held_at_a_time(tmp_path, tensors, monkeypatch, suffix):
    index = save_sharded(tmp_path, tensors, suffix)
    read = Checkpoint.read
    alive, most = weakref.WeakSet(), [0, 0]

    def counting(self, entry):
        gc.collect()
        assert len(alive) == 0  # before the next one is read
        tensor = read(self, entry)
        if suffix == "bin":
            # Those of a mapped file are views that take no memory of their own.
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
            tensor = tensor.view_as(tensor)
        alive.add(tensor)
        most[0], most[1] = max(most[0], len(alive)), most[1] + 1
        return tensor

    monkeypatch.setattr(Checkpoint, "read", counting)
    found = measure(Checkpoint(index), Patterns())
    assert len(found.rows) == most[1] == 3
    assert most[0] == 1


def test_a_mapped_file_is_opened_anew_after_some_bytes(saved, monkeypatch):
    checkpoint = Checkpoint(saved)
    monkeypatch.setattr(checkpoint_files, "_MAPPED_BYTES", 100)
    before = checkpoint._reader
    rows = measure(checkpoint, Patterns()).rows
    assert checkpoint._reader is not before
    assert len(rows) == 3


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_memory_is_that_of_the_largest_tensor(tmp_path, suffix):
    path = tmp_path / f"large.{suffix}"
    tensors = {f"{i}.w": torch.randn(2000, 2000) for i in range(16)}  # 16 MB each
    (safetensors.save_file if suffix == "safetensors" else torch.save)(tensors, path)
    done = subprocess.run(
        [sys.executable, "-c",
         "import re, sys, threading\n"
         "from spectral_kernels import checkpoint_files, inspection_rows as rows\n"
         "def anonymous():\n"
         "    status = open('/proc/self/status').read()\n"
         "    return int(re.search(r'RssAnon:\\s*(\\d+) kB', status)[1]) / 1000\n"
         "rows.measure(checkpoint_files.Checkpoint(sys.argv[2]), rows.Patterns())\n"
         "before, most, done = anonymous(), [], threading.Event()\n"
         "def sample():\n"
         "    while not done.wait(0.001):\n"
         "        most.append(anonymous())\n"
         "sampler = threading.Thread(target=sample)\n"
         "sampler.start()\n"
         "checkpoint = checkpoint_files.Checkpoint(sys.argv[1])\n"
         "rows.measure(checkpoint, rows.Patterns(), lambda *_: most.append(anonymous()))\n"
         "done.set()\n"
         "sampler.join()\n"
         "print(max(most) - before)\n", path, _small(tmp_path)],
        capture_output=True, text=True, timeout=TIMEOUT,
        # What has been freed goes back to the system at once, else it would be counted here.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 16  # of 256


def _small(folder):
    path = folder / "small.safetensors"
    safetensors.save_file({"w": torch.eye(4)}, path)
    return path


def test_the_norm_is_made_piece_by_piece(monkeypatch):
    monkeypatch.setattr(inspection_rows, "_PIECE", 7)
    for shape in ((5, 30), (30, 5), (1, 40), (2, 3, 4), (3, 1)):
        weight = torch.randn(shape)
        exact = float(weight.double().norm())
        assert inspection_rows._norm(weight) == pytest.approx(exact, rel=1e-12)


def png_size(path):
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])


def test_the_picture_shows_every_kind(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: drawn.append(self) or
                        save(self, *a, **k))  # fmt: skip
    path, other = tmp_path / "many.pt", tmp_path / "other.pt"
    tensors = {f"h.{i}.{n}.weight": torch.randn(4, 3) for i in range(40) for n in ("q", "k")}
    tensors["embed.weight"] = torch.randn(9, 3)
    torch.save(tensors, path)
    torch.save({n: t for n, t in tensors.items() if "39" not in n}, other)
    for more, expected in ([], 3), ([str(other)], 5):
        picture = tmp_path / "many.png"
        assert cli.main(["inspect", str(path), *more, "--plot", str(picture), "--top", "1"]) == 0
        assert f"picture: {picture}" in capsys.readouterr().out
        assert png_size(picture) == (1650, 630)
        (axes,) = drawn[-1].axes
        labels = axes.get_legend_handles_labels()[1]
        assert labels[:3] == ["h.*.q.weight", "h.*.k.weight", "embed.weight"]
        assert len(labels) == expected
        assert axes.get_yscale() == "log"
        assert axes.get_xlabel() == "layer (h.*)"
        assert 10 <= len(axes.get_xticks()) <= 24
        (legend,) = drawn[-1].legends
        assert legend.get_window_extent().x0 > axes.get_window_extent().x1
    many = {f"{'x' * i}.weight": torch.eye(2) for i in range(1, 60)}
    torch.save(many, path)
    assert cli.main(["inspect", str(path), "--plot", str(picture)]) == 0
    assert len(drawn[-1].axes[0].get_legend_handles_labels()[1]) == 37


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_the_terminal(saved, tmp_path, capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    assert cli.main(["inspect", str(saved)]) == 0
    short = capsys.readouterr().out
    assert re.search(r"h\.10\.fc\.weight +24x16 +\d+\.\d{3} +\d+\.\d +\d+\.\d\d +\d+\.\d\d", short)
    path = tmp_path / "long.pt"
    name = f"model.layers.10.{'mixture_of_experts.' * 3}down_proj.weight"
    torch.save({name: torch.eye(9), "b": torch.eye(2).half()}, path)
    for more in ([], [str(path)]):
        assert cli.main(["inspect", str(path), *more]) == 0
        table = capsys.readouterr().out.split(f"{path}")[0]
        assert max(map(len, table.splitlines())) <= width
        rows = [line for line in table.splitlines() if "…" in line]
        assert not rows
        words = re.sub(r"(?<=\.) *\n\s+|(?<=\.) [\d.x +%]+\n\s+", "", table)
        assert name.split(".")[-2] in words


def test_output_that_is_no_terminal_has_a_line_per_matrix(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    path = tmp_path / "long.pt"
    name = "model." + "block." * 30 + "weight"
    torch.save({name: torch.eye(9)}, path)
    assert cli.main(["inspect", str(path)]) == 0
    assert re.search(rf"{re.escape(name)} +9x9 +1\.000 +9\.0 +3\.00", capsys.readouterr().out)


def test_a_reader_that_goes_away_is_no_traceback(saved):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "spectral_kernels", "inspect", str(saved)],
        stdout=write, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT,
    )  # fmt: skip
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == 1


def test_ctrl_c_in_a_terminal_ends_cleanly(tmp_path):
    path = tmp_path / "large.pt"
    torch.save({f"{i}.w": torch.randn(1500, 1500) for i in range(40)}, path)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "spectral_kernels", "inspect", str(path)],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        env={**os.environ, "TERM": "xterm"},
        # Where the tests run in the background of a shell, SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    os.close(theirs)
    shown, sent = b"", False
    try:
        while piece := os.read(ours, 4096):
            shown += piece
            if not sent and b"1.w" in shown:
                os.killpg(process.pid, signal.SIGINT)
                sent = True
    except OSError:  # as Linux reports the end of a pseudo-terminal
        pass
    os.close(ours)
    assert process.wait(timeout=TIMEOUT) == 130, shown.decode()
    assert b"Traceback" not in shown
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")
    assert shown.endswith(b"spectral-kernels: interrupted\r\n")


def test_a_file_that_breaks_between_listing_and_reading_is_named(saved, monkeypatch):
    checkpoint = Checkpoint(saved)
    entry = checkpoint.entries[0]
    checkpoint.close()
    saved.write_bytes(b"")
    with pytest.raises(CheckpointError, match=re.escape(str(saved))):
        checkpoint.read(entry)

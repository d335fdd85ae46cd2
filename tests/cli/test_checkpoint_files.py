"""Checkpoints on disk: what is read of them, with how much memory, and what is refused."""

import gc
import json
import math
import os
import pickle
import re
import struct
import subprocess
import sys
import threading
import weakref
import zipfile

import pytest
import torch

from spectral_kernels import cli
from spectral_kernels.cli.inspect import measure
from spectral_kernels.cli.inspect import values as values_of_matrix
from spectral_kernels.cli.inspect.measure import Patterns
from spectral_kernels.diagnostics.checkpoints import Checkpoint, CheckpointError, safetensors_file
from tests import TIMEOUT
from tests.support import processes
from tests.support.checkpoints import check_against_svd, error_of, save_sharded, values

safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("rich")
pytestmark = pytest.mark.usefixtures("seeded")


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
    inside["more"].append(inside)  # containers may be cyclic
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
    dtypes = (torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.int8,
              torch.bool)  # fmt: skip
    weight = torch.randn(12, 8)
    tensors = {str(d).removeprefix("torch."): weight.to(d) for d in dtypes}
    (safetensors.save_file if suffix == "safetensors" else torch.save)(tensors, path)
    document = values(path, capsys=capsys)
    floats = {n: t for n, t in tensors.items() if n in ("bfloat16", "float16", "float64")}
    check_against_svd(document, floats)
    assert {row["name"]: row["dtype"] for row in document["matrices"]} == {n: n for n in floats}
    assert {(s["name"], s["reason"]) for s in document["skipped"]} == {
        (n, f"dtype {n}") for n in ("uint8", "int8", "bool")
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
    assert processes.png_size(picture)[0] == 1275


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
    # An expanded tensor may claim any size.
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
    read = checkpoint.tensors[1].read()
    assert read.data_ptr() % 4 == 0
    assert torch.equal(read, weight)
    check_against_svd(values(path, capsys=capsys), {"w": weight})


class Hostile:
    """Writes a file when it is unpickled without restrictions."""

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
    assert "got a folder without one" in error_of(tmp_path, capsys)
    (tmp_path / "notes.txt").write_text("hello")
    assert "expected a checkpoint (*.safetensors, " in error_of(tmp_path / "notes.txt", capsys)
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
    assert f"{path}: expected an index" in error_of(path, capsys)


def test_a_tensor_that_the_index_promises_is_missed(saved, tmp_path, capsys):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"lost\x1b[2J": saved.name, "scale": saved.name}}))
    assert r"'lost\x1b[2J' is not in model.safetensors" in error_of(path, capsys)


@pytest.mark.takes_seconds
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("threads", [1, 2])
def test_tensors_in_memory_are_at_most_as_large_as_the_largest(
    tmp_path, tensors, monkeypatch, suffix, threads
):
    index = save_sharded(tmp_path, tensors, suffix)
    read, lock = Checkpoint._read, threading.Lock()
    alive, most = weakref.WeakSet(), [0, 0]

    def counting(self, entry):
        tensor = read(self, entry)
        if suffix == "bin":
            # Those of a mapped file are views that take no memory of their own.
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
            tensor = tensor.view_as(tensor)
        gc.collect()
        with lock:
            alive.add(tensor)
            most[0] = max(most[0], sum(t.numel() for t in alive))
            most[1] += 1
        return tensor

    monkeypatch.setattr(Checkpoint, "_read", counting)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    found = measure.measure(measure.planned(Checkpoint(index), Patterns()))
    assert len(found.rows) == 3
    assert most[1] == len(tensors)
    assert most[0] == max(tensor.numel() for tensor in tensors.values())


def test_a_mapped_file_is_opened_anew_after_some_bytes(saved, monkeypatch):
    checkpoint = Checkpoint(saved)
    monkeypatch.setattr(safetensors_file, "MAPPED_BYTES", 100)
    before = checkpoint._opened.reader
    rows = measure.measure(measure.planned(checkpoint, Patterns())).rows
    assert checkpoint._opened.reader is not before
    assert len(rows) == 3


@pytest.mark.takes_seconds
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_memory_is_that_of_the_largest_tensor(tmp_path, suffix):
    path = tmp_path / f"large.{suffix}"
    tensors = {f"{i}.w": torch.randn(2000, 2000) for i in range(16)}  # 16 MB each
    (safetensors.save_file if suffix == "safetensors" else torch.save)(tensors, path)
    done = subprocess.run(
        [sys.executable, "-c",
         "import re, sys, threading\n"
         "from spectral_kernels.diagnostics.checkpoints import Checkpoint\n"
         "from spectral_kernels.cli.inspect.measure import Patterns, measure, planned\n"
         "def anonymous():\n"
         "    status = open('/proc/self/status').read()\n"
         "    return int(re.search(r'RssAnon:\\s*(\\d+) kB', status)[1]) / 1000\n"
         "measure(planned(Checkpoint(sys.argv[2]), Patterns()))\n"
         "before, most, done = anonymous(), [], threading.Event()\n"
         "def sample():\n"
         "    while not done.wait(0.001):\n"
         "        most.append(anonymous())\n"
         "sampler = threading.Thread(target=sample)\n"
         "sampler.start()\n"
         "large = planned(Checkpoint(sys.argv[1]), Patterns())\n"
         "measure(large, lambda *_: most.append(anonymous()))\n"
         "done.set()\n"
         "sampler.join()\n"
         "print(max(most) - before)\n", path, _small(tmp_path)],
        capture_output=True, text=True, timeout=TIMEOUT,
        # Freed memory returns to the system at once, or it would be counted here.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 16  # of 256


def _small(folder):
    path = folder / "small.safetensors"
    safetensors.save_file({"w": torch.eye(200)}, path)
    return path


def test_the_norm_is_made_piece_by_piece(monkeypatch):
    monkeypatch.setattr(values_of_matrix, "_PIECE", 7)
    for shape in ((5, 30), (30, 5), (1, 40), (2, 3, 4), (3, 1)):
        weight = torch.randn(shape)
        exact = float(weight.double().norm())
        assert values_of_matrix._norm(weight) == pytest.approx(exact, rel=1e-12)


def test_a_file_that_breaks_between_listing_and_reading_is_named(saved, monkeypatch):
    checkpoint = Checkpoint(saved)
    entry = checkpoint.tensors[0]
    checkpoint.close()
    saved.write_bytes(b"")
    with pytest.raises(CheckpointError, match=re.escape(str(saved))):
        entry.read()

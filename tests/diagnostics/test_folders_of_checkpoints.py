"""Folders: which files are taken, what is said of the others, folders in folders."""

import json
import os
import socket

import pytest
import torch

from spectral_kernels.diagnostics.checkpoints import Checkpoint, CheckpointError, folders
from tests.support.checkpoints import Touches, check, error, left_out, network

safetensors = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.usefixtures("seeded")


def saved(path, scale=1.0):
    """Save tensors to a file, whose folder is made, and return them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"a.weight": scale * torch.randn(3, 4), "a.bias": torch.randn(3)}
    (safetensors.save_file if path.suffix == ".safetensors" else torch.save)(tensors, path)
    return tensors


def prefixed(prefix, tensors):
    return {f"{prefix}:{name}": tensor for name, tensor in tensors.items()}


# --------------------------------------------------------------------------- files of a folder


def test_pickles_that_cannot_be_read_are_skipped_with_the_reason(tmp_path):
    tensors, touched = saved(tmp_path / "model.pt"), tmp_path / "touched"
    torch.save(Touches("mkdir", touched), tmp_path / "evil\x1b.pt")
    (tmp_path / "lfs.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "page.ckpt").write_text("<html>")
    os.mkfifo(tmp_path / "pipe.pth")
    checkpoint = Checkpoint(tmp_path)
    check(checkpoint, tensors)
    skipped = dict(left_out(checkpoint))
    assert list(skipped) == [r"evil\x1b.pt", "lfs.bin", "page.ckpt", "pipe.pth"]
    assert skipped[r"evil\x1b.pt"].startswith("it holds more than tensors: ")
    assert "git lfs pull" in skipped["lfs.bin"]
    assert skipped["pipe.pth"] == "expected a regular file, got a FIFO"
    assert not touched.exists()
    (tmp_path / "model.pt").unlink()
    assert "it holds more than tensors: " in error(tmp_path)


def test_of_a_training_folder_the_weights_are_taken(tmp_path):
    net = network()
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.save({"last_epoch": 1}, tmp_path / "scheduler.pt")
    torch.save({"cpu": torch.get_rng_state()}, tmp_path / "rng_state.pth")
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    checkpoint = Checkpoint(tmp_path)
    assert [t.name for t in checkpoint.tensors if not t.in_optimizer] == list(net.state_dict())
    assert len(checkpoint.tensors) == 4 + 12 + 1
    safetensors.save_file(net.state_dict(), tmp_path / "model.safetensors")
    check(Checkpoint(tmp_path), net.state_dict())


def test_one_of_several_variants_is_taken_and_the_others_are_named(tmp_path):
    tensors = saved(tmp_path / "model.safetensors")
    for name in ("model.fp16.safetensors", "consolidated.safetensors", "model.non_ema.safetensors"):
        saved(tmp_path / name, 2.0)
    checkpoint = Checkpoint(tmp_path)
    check(checkpoint, tensors)
    assert {reason for _, reason in left_out(checkpoint)} == {"model.safetensors is taken"}
    assert len(checkpoint.skipped) == 3
    only = tmp_path / "only"
    tensors = saved(only / "unet.fp16.safetensors")
    saved(only / "unet.ema.safetensors")
    assert left_out(Checkpoint(only)) == [
        ("unet.fp16.safetensors", "unet.ema.safetensors is taken")
    ]


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_the_index_decides_beside_other_files(tmp_path, suffix):
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    tensors = saved(tmp_path / f"{stem}-00001-of-00001.{suffix}")
    weight_map = dict.fromkeys(tensors, f"{stem}-00001-of-00001.{suffix}")
    fp16 = dict.fromkeys(tensors, f"{stem}.fp16-00001-of-00001.{suffix}")
    for variant, names in (("", weight_map), (".fp16", fp16)):
        index = tmp_path / f"{stem}.{suffix}.index{variant}.json"
        if variant:
            index = tmp_path / f"{stem}.fp16.{suffix}.index.json"
        index.write_text(json.dumps({"weight_map": names}))
    saved(tmp_path / f"{stem}.fp16-00001-of-00001.{suffix}", 2.0)
    checkpoint = Checkpoint(tmp_path)
    check(checkpoint, tensors)
    why = f"{stem}.{suffix}.index.json is taken"
    assert (f"{stem}.fp16.{suffix}.index.json", why) in left_out(checkpoint)


def test_files_of_unknown_names_are_looked_into(tmp_path):
    (tmp_path / "README.md").write_text("hello")
    (tmp_path / "empty").touch()
    assert "got a folder without one" in error(tmp_path)
    tensors = saved(tmp_path / "blob.safetensors")
    (tmp_path / "blob.safetensors").rename(tmp_path / "blob")
    check(Checkpoint(tmp_path), tensors)
    (tmp_path / "blob").write_bytes(b"GGUF\3\0\0\0")
    assert "GGUF" in error(tmp_path)


# --------------------------------------------------------------------------- cache of a hub


def hub(folder, snapshots, main=None):
    """Make the cache of a repository, whose snapshots have links to blobs."""
    found = {}
    (folder / "blobs").mkdir(parents=True)
    (folder / "refs").mkdir()
    for number, name in enumerate(snapshots):
        blob = folder / "blobs" / f"blob{number}.safetensors"
        found[name] = saved(blob, number + 1.0)
        blob.rename(blob.with_suffix(""))
        (folder / "snapshots" / name).mkdir(parents=True)
        link = folder / "snapshots" / name / "model.safetensors"
        link.symlink_to(f"../../blobs/blob{number}")
        os.utime(folder / "snapshots" / name, (1000 - number, 1000 - number))
    if main is not None:
        (folder / "refs" / "main").write_text(main)
    return found


@pytest.mark.parametrize(
    ("main", "taken"), [("old", "old"), ("new", "new"), (None, "new"), ("\x1b../../x", "new")]
)
def test_the_root_of_a_hubs_cache_gives_a_snapshot(tmp_path, main, taken):
    folder = tmp_path / "models--org--name"
    found = hub(folder, ["new", "old"], main)
    checkpoint = Checkpoint(folder)
    check(checkpoint, found[taken])
    assert checkpoint.path == folder / "snapshots" / taken
    other = ({"old", "new"} - {taken}).pop()
    assert left_out(checkpoint) == [(f"snapshots/{other}", f"snapshot {taken} is taken")]
    check(Checkpoint(checkpoint.path), found[taken])
    check(Checkpoint(folder / "blobs" / "blob0"), found["new"])
    assert "with 1 models; name one of them, such as models--org--name" in error(tmp_path)


def test_a_hubs_cache_that_is_incomplete_is_named(tmp_path):
    hub(tmp_path, ["abc"])
    (tmp_path / "blobs" / "blob0").unlink()
    assert "model.safetensors: there is no such file" in error(tmp_path)
    empty = tmp_path / "empty"
    hub(empty, [])
    (empty / "snapshots").mkdir()
    assert "without a snapshot" in error(empty)


# ------------------------------------------------------------------------ folders in folders


def test_the_parts_of_a_pipeline_have_their_folder_before_their_names(tmp_path):
    parts = {
        "unet": saved(tmp_path / "unet" / "diffusion_pytorch_model.safetensors"),
        "vae": saved(tmp_path / "vae" / "diffusion_pytorch_model.bin"),
        "text_encoder_2": saved(tmp_path / "text_encoder_2" / "model.safetensors"),
        "deep/er": saved(tmp_path / "deep" / "er" / "model.safetensors"),
    }
    saved(tmp_path / "much" / "too" / "deep" / "model.safetensors")
    saved(tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("{}")
    (tmp_path / "safety").mkdir()
    (tmp_path / "safety" / "model.safetensors").write_text("<html>")
    checkpoint = Checkpoint(tmp_path)
    check(
        checkpoint, {k: v for name, part in parts.items() for k, v in prefixed(name, part).items()}
    )
    assert left_out(checkpoint)[0][0] == "safety"
    assert "an HTML page" in left_out(checkpoint)[0][1]
    assert left_out(checkpoint)[1] == (
        "unet:diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.safetensors is taken",
    )


def test_of_the_steps_of_a_run_the_last_is_taken(tmp_path):
    for step in (500, 1000, 90):
        tensors = saved(tmp_path / f"checkpoint-{step}" / "model.safetensors", step)
        if step == 1000:
            last = tensors
    checkpoint = Checkpoint(tmp_path)
    check(checkpoint, prefixed("checkpoint-1000", last))
    assert left_out(checkpoint) == [("checkpoint-90", "checkpoint-1000 is taken"),
                                    ("checkpoint-500", "checkpoint-1000 is taken")]  # fmt: skip


def test_a_folder_of_an_optimizer_is_one(tmp_path):
    saved(tmp_path / "pytorch_model_0" / "model.safetensors")
    saved(tmp_path / "optimizer_0" / "state.pt")
    found = {t.name: t.in_optimizer for t in Checkpoint(tmp_path).tensors}
    assert found["optimizer_0:a.weight"]
    assert not found["pytorch_model_0:a.weight"]


def test_links_that_lead_back_end(tmp_path):
    tensors = saved(tmp_path / "a" / "model.safetensors")
    (tmp_path / "loop").symlink_to(".")
    (tmp_path / "up").symlink_to("..")
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "again").symlink_to("a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "back").symlink_to("..")
    checkpoint = Checkpoint(tmp_path)
    assert len(checkpoint) == len(tensors)


def test_too_many_folders_are_refused(tmp_path, monkeypatch):
    for number in range(6):
        saved(tmp_path / f"part{number}" / "model.safetensors")
    monkeypatch.setattr(folders, "_MOST_CHECKPOINTS", 5)
    assert "expected at most 5 folders with checkpoints, got 6" in error(tmp_path)
    monkeypatch.setattr(folders, "_MOST_FOLDERS", 3)
    assert "expected at most 3 folders, got more" in error(tmp_path)


def test_what_is_special_in_a_folder_below_is_named(tmp_path, monkeypatch):
    tensors = saved(tmp_path / "a" / "model.safetensors")
    (tmp_path / "b").mkdir()
    os.mkfifo(tmp_path / "b" / "model.safetensors")
    (tmp_path / "c").mkdir()
    monkeypatch.chdir(tmp_path / "c")
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind("model.bin")
    checkpoint = Checkpoint(tmp_path)
    check(checkpoint, prefixed("a", tensors))
    assert left_out(checkpoint) == [
        ("b", "model.safetensors: expected a regular file, got a FIFO"),
        ("c", "model.bin: expected a regular file, got a socket"),
    ]


def test_the_config_is_that_of_the_folder(tmp_path):
    saved(tmp_path / "one" / "model.safetensors")
    (tmp_path / "one" / "config.json").write_text('{"model_type": "x"}')
    assert Checkpoint(tmp_path / "one").config == {"model_type": "x"}
    assert Checkpoint(tmp_path).config == {"model_type": "x"}
    saved(tmp_path / "two" / "model.safetensors")
    assert Checkpoint(tmp_path).config == {}


def test_a_folder_below_may_be_broken_only_if_another_is_not(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "model.pt").write_bytes(b"PK\3\4")
    with pytest.raises(CheckpointError, match="the end of the archive is missing"):
        Checkpoint(tmp_path)
    tensors = saved(tmp_path / "b" / "model.pt")
    check(Checkpoint(tmp_path), prefixed("b", tensors))

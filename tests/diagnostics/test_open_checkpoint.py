"""Files that ``open_checkpoint`` opens: the right tensors, and what is said to be left out."""

import argparse
import collections
import pathlib
import pickle
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from spectral_kernels.diagnostics.checkpoints import (
    Checkpoint,
    CheckpointError,
    open_checkpoint,
)
from tests.support.checkpoints import check, error, left_out, network

pytestmark = pytest.mark.usefixtures("seeded")
NOT_LOADED = "not loaded, since it is no tensor"


@pytest.mark.parametrize("is_new", [True, False])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_objects_beside_the_weights_are_named_and_not_loaded(tmp_path, is_new, protocol):
    net, path = network(), tmp_path / "train.ckpt"
    beside = {
        "path": pathlib.PurePosixPath("/data"), "best": np.float64(0.5), "act": nn.ReLU,
        "args": argparse.Namespace(lr=1), "dtype": torch.bfloat16, "lr": 0.1, "set": {1, 2},
        "counts": collections.Counter("ab"), "tree": collections.defaultdict(list, {"a": [1]}),
    }  # fmt: skip
    torch.save({"state_dict": net.state_dict(), "beside": beside}, path, pickle_protocol=protocol,
               _use_new_zipfile_serialization=is_new)  # fmt: skip
    checkpoint = open_checkpoint(path)
    check(checkpoint, {f"state_dict.{k}": v for k, v in net.state_dict().items()})
    assert all(reason == NOT_LOADED for _, reason in left_out(checkpoint))
    names = [name for name, _ in left_out(checkpoint)]
    assert names[0].endswith("PurePosixPath")
    assert names[1].endswith("multiarray.scalar")
    assert names[2:] == ["torch.nn.modules.activation.ReLU", "argparse.Namespace"]


class Holder:
    """An object with tensors, of a class that the reader does not know."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)


Pair = collections.namedtuple("Pair", "a b")


def test_tensors_inside_of_objects_are_found(tmp_path):
    one, two, three = torch.randn(3, 2), torch.randn(2), torch.randn(4)
    held = Holder(weights={"w": one}, pair=Pair(two, [three]))
    torch.save({"ema": held}, tmp_path / "a.pt")
    checkpoint = Checkpoint(tmp_path / "a.pt")
    check(checkpoint, {"ema.weights.w": one, "ema.pair.0": two, "ema.pair.1.0": three})
    assert left_out(checkpoint) == [(f"{__name__}.Holder", NOT_LOADED)]


@pytest.mark.parametrize("is_new", [True, False])
def test_a_whole_module_has_the_names_of_its_state_dict(tmp_path, is_new):
    net = nn.Sequential(network(), nn.BatchNorm1d(4))
    nn.utils.parametrizations.orthogonal(net[0][0])
    torch.save(net[1], tmp_path / "net.pt", _use_new_zipfile_serialization=is_new)
    check(Checkpoint(tmp_path / "net.pt"), net[1].state_dict())
    torch.save({"model": network()}, tmp_path / "net.pt")
    assert [t.name for t in Checkpoint(tmp_path / "net.pt").tensors][:2] == [
        "model.0.weight", "model.0.bias"
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("how", ["script", "trace"])
def test_the_weights_of_a_torchscript_archive_are_read_without_its_code(tmp_path, how):
    net, path = network(), tmp_path / "script.pt"
    made = torch.jit.script(net) if how == "script" else torch.jit.trace(net, torch.randn(1, 8))
    made.save(str(path))
    check(Checkpoint(path), net.state_dict())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_frozen_torchscript_archive_has_its_weights_among_the_constants(tmp_path):
    net, path = network().eval(), tmp_path / "frozen.pt"
    torch.jit.freeze(torch.jit.script(net)).save(str(path))
    found = {name: tensor.read() for name, tensor in Checkpoint(path)}
    assert all(name.startswith("constants.") for name in found)
    for weight in net.state_dict().values():
        assert any(torch.equal(weight, tensor) for tensor in found.values())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_of_every_kind_are_read_or_listed_with_the_reason(tmp_path):
    dense = {
        "f8": torch.randn(3, 3).to(torch.float8_e4m3fn), "u16": torch.arange(3).to(torch.uint16),
        "bool": torch.rand(5) > 0.5, "half": torch.randn(2, 3).half(), "scalar": torch.randn(()),
        "empty": torch.zeros(0, 3), "c": torch.randn(3, 3, dtype=torch.cfloat).conj(),
        "neg": torch.randn(3, dtype=torch.cfloat).conj().imag, "view": torch.randn(4, 6)[1:, ::2],
        "p": nn.Parameter(torch.randn(2, 2)), "buffer": nn.Buffer(torch.ones(3)),
    }  # fmt: skip
    others = {
        "q": torch.quantize_per_tensor(torch.randn(4, 4), 0.1, 0, torch.qint8),
        "coo": torch.eye(3).to_sparse(), "csr": torch.eye(3).to_sparse_csr(),
        "meta": torch.empty(3, 2, device="meta"),
        "nested": torch.nested.nested_tensor([torch.randn(2, 2)]),
    }  # fmt: skip
    torch.save({**dense, **others}, tmp_path / "a.pt")
    tensors = dict(Checkpoint(tmp_path / "a.pt", effective=False))
    assert list(tensors) == [*dense, *others]
    for name, expected in dense.items():
        read, view = tensors[name].read(), torch.uint8
        assert read.dtype == expected.dtype
        if name == "f8":
            read, expected = read.view(view), expected.view(view)
        assert torch.equal(read, expected.detach())
    reasons = {name: tensors[name].unusable for name in others}
    assert reasons == {"q": "dtype qint8", "coo": "layout sparse_coo", "csr": "layout sparse_csr",
                       "meta": "device meta", "nested": "layout nested"}  # fmt: skip
    assert tensors["csr"].shape == (3, 3)
    with pytest.raises(CheckpointError, match="layout sparse_coo"):
        tensors["coo"].read()


def test_bytes_in_the_other_order_are_swapped(tmp_path):
    weight, path = torch.randn(4, 3), tmp_path / "other.pt"
    other = {"little": "big", "big": "little"}[sys.byteorder]
    torch.save({"w": weight}, tmp_path / "mine.pt")
    with zipfile.ZipFile(tmp_path / "mine.pt") as mine, zipfile.ZipFile(path, "w") as made:
        for name in mine.namelist():
            data = mine.read(name)
            if name.endswith("/byteorder"):
                data = other.encode()
            elif name.endswith("/data/0"):
                data = np.frombuffer(data, np.float32).byteswap().tobytes()
            made.writestr(name, data)
    check(Checkpoint(path), {"w": weight})


def test_an_agent_of_stable_baselines3_has_its_policy_and_an_optimizer(tmp_path):
    policy, path = network(), tmp_path / "agent.zip"
    optimizer = torch.optim.Adam(policy.parameters())
    policy(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    parts = {"policy.optimizer.pth": optimizer.state_dict(), "policy.pth": policy.state_dict()}
    with zipfile.ZipFile(path, "w") as archive:  # as the package writes it: not compressed
        archive.writestr("data", '{"policy_class": {":serialized:": "gAWV"}}')
        for name, value in parts.items():
            torch.save(value, tmp_path / name)
            archive.write(tmp_path / name, name)
    checkpoint = Checkpoint(path)
    weights = {t.name: t for t in checkpoint.tensors if not t.in_optimizer}
    assert list(weights) == list(policy.state_dict())
    assert all(torch.equal(t.read(), policy.state_dict()[n]) for n, t in weights.items())
    moments = [t.name for t in checkpoint.tensors if t.in_optimizer]
    assert moments[1] == "policy.optimizer.pth:state.0.exp_avg"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "policy.pth", "policy.pth")
    with pytest.raises(CheckpointError, match="its contents are compressed"):
        Checkpoint(path)


def test_a_file_is_known_by_its_content_whatever_its_name(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = {"w": torch.randn(3, 2)}
    for name in ("blob", "model.pth.tar", "model.safetensors"):
        torch.save(tensors, tmp_path / name)
        check(Checkpoint(tmp_path / name), tensors)
    for name in ("deadbeef", "model.bin"):
        safetensors.save_file(tensors, tmp_path / name)
        check(Checkpoint(tmp_path / name), tensors)


@pytest.mark.parametrize(
    "name",
    ["optimizer.state.0.exp_avg", "optimizer_states.0.state.1.w", "optim.state.layer.w.exp_avg_sq",
     "optimizer_state_dict.x", "lr_schedulers.0.w", "momentum_buffer", "cuda_rng_state"],
)  # fmt: skip
def test_the_state_of_an_optimizer_is_known_by_its_name(tmp_path, name):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(
        {name: torch.randn(2, 2), "w": torch.randn(2, 2)}, tmp_path / "a.safetensors"
    )
    found = {t.name: t.in_optimizer for t in Checkpoint(tmp_path / "a.safetensors").tensors}
    assert found == {name: True, "w": False}


@pytest.mark.parametrize("name", ["optimal.weight", "model.optimus.w", "schedule.w", "step_avg.w"])
def test_names_that_are_alike_are_weights(tmp_path, name):
    torch.save({name: torch.randn(2, 2)}, tmp_path / "optimus-large.pt")
    (tensor,) = Checkpoint(tmp_path / "optimus-large.pt").tensors
    assert not tensor.in_optimizer


@pytest.mark.parametrize(
    "file", ["optimizer.pt", "optimizer.bin", "optimizer_1.bin", "x_optim_states.pt",
             "scheduler.pt", "rng_state_0.pth", "policy.optimizer.pth"],
)  # fmt: skip
def test_the_state_of_an_optimizer_is_known_by_its_file(tmp_path, file):
    torch.save({"moments": torch.randn(2, 2)}, tmp_path / file)
    assert Checkpoint(tmp_path / file).tensors[0].in_optimizer


def test_several_threads_read_from_one_checkpoint(tmp_path):
    tensors = {f"{i}.w": torch.randn(30, 20) for i in range(8)}
    for half in range(2):
        torch.save({k: v for k, v in tensors.items() if int(k[0]) % 2 == half},
                   tmp_path / f"{half}.pt")  # fmt: skip
    checkpoint, wrong = Checkpoint(tmp_path), []

    def read():
        for name, tensor in checkpoint:
            if not torch.equal(tensor.read(), tensors[name]):
                wrong.append(name)

    with ThreadPoolExecutor(4) as pool:
        for reading in [pool.submit(read) for _ in range(4)]:
            reading.result()
    assert wrong == []


# --------------------------------------------------------------------------- what is refused

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 12345\n"
FOREIGN = [
    (LFS, "git lfs pull"), (b"<!DOCTYPE html><html>", "an HTML page"), (b"", "it is empty"),
    (b'{"error": "Not\x1b[2J found"}', "JSON text"), (b"\x1f\x8b\x08" + b"0" * 40, "gunzip"),
    (b"\x28\xb5\x2f\xfd" + b"0" * 40, "unzstd"), (b"\xfd7zXZ\0" + b"0" * 40, "unxz"),
    (b"7z\xbc\xaf\x27\x1c" + b"0" * 40, "7z x"), (b"BZh91AY", "bunzip2"),
    (b"x" * 257 + b"ustar" + b"0" * 300, "tar -xf"), (b"GGUF\3\0\0\0", "GGUF"),
    (b"\x89HDF\r\n\x1a\n" + b"0" * 40, "HDF5"), (b"\x93NUMPY\1\0" + b"0" * 40, "numpy"),
    (b"\x08\x07\x12\x07pytorch\x1a\x05", "ONNX"), (b"\x1c\0\0\0TFL3\0\0", "TensorFlow Lite"),
    (b"\x81\xa6params\x81\xa5dense", "msgpack"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "said"), FOREIGN)
@pytest.mark.parametrize("suffix", ["pt", "bin", "safetensors", "other"])
def test_another_kind_of_file_is_named_with_what_to_do(tmp_path, content, said, suffix):
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert said in message
    assert message.isprintable()


def test_archives_and_pickles_that_are_none_of_torch_are_named(tmp_path):
    path = tmp_path / "a.pt"
    np.savez(path.open("wb"), w=np.ones((2, 2)))
    assert "an archive of numpy" in error(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes\x1b.txt", "hello")
    assert r"without a checkpoint (notes\x1b.txt)" in error(path)
    path.write_bytes(pickle.dumps({"w": np.random.randn(4, 4)}))
    assert "a plain pickle with arrays of numpy" in error(path)
    path.write_bytes(pickle.dumps({"w": list(range(100))}))
    assert "a plain pickle, not a file of torch.save" in error(path)
    (tmp_path / "saved_model.pb").write_bytes(b"\x08\x01")
    assert "TensorFlow" in error(tmp_path / "saved_model.pb")

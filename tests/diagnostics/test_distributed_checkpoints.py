"""What ranks have written: torch.distributed.checkpoint, DTensors, shards of DeepSpeed."""

import os
import pickle
import subprocess
import sys

import pytest
import torch

from spectral_kernels.diagnostics.checkpoints import Checkpoint, CheckpointError, dtensors
from spectral_kernels.diagnostics.checkpoints.pickles import Record
from spectral_kernels.diagnostics.checkpoints.stored import StoredTensor
from tests import TIMEOUT
from tests.support.checkpoints import Touches, check, error, network

dcp = pytest.importorskip("torch.distributed.checkpoint")
metadata = pytest.importorskip("torch.distributed.checkpoint.metadata")
pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
]


@pytest.fixture
def folder(tmp_path):
    """A folder that one rank has written, and its tensors."""
    net = network()
    dcp.save({"model": net.state_dict(), "step": 3}, checkpoint_id=str(tmp_path / "dcp"))
    return tmp_path / "dcp", {f"model.{k}": v for k, v in net.state_dict().items()}


def test_a_folder_of_one_rank_is_read_without_its_pickles(folder, monkeypatch):
    path, tensors = folder
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, None)
    monkeypatch.setattr(torch, "load", None)
    check(Checkpoint(path), tensors)
    check(Checkpoint(path / ".metadata"), tensors)


def read_all(path):
    for _, tensor in Checkpoint(path):
        tensor.read()


def altered(path, change):
    """Rewrite the metadata of a folder after ``change(metadata)``."""
    with (path / ".metadata").open("rb") as file:
        held = pickle.load(file)
    change(held)
    with (path / ".metadata").open("wb") as file:
        pickle.dump(held, file)


def storage_of(held, name="model.0.weight"):
    return next(info for index, info in held.storage_data.items() if index.fqn == name)


def set_storage(held, **values):
    vars(storage_of(held)).update(values)


def set_chunk(held, **values):
    vars(held.state_dict_metadata["model.0.weight"].chunks[0]).update(values)


def set_size(held, *size):
    held.state_dict_metadata["model.0.weight"].size = torch.Size(size)


def add_chunk(held, offsets, sizes):
    chunk = metadata.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
    held.state_dict_metadata["model.0.weight"].chunks.append(chunk)
    index = metadata.MetadataIndex("model.0.weight", offsets)
    held.storage_data[index] = storage_of(held)


WRONG = {
    "an offset beyond the end": lambda m: set_storage(m, offset=1 << 60),
    "a negative offset": lambda m: set_storage(m, offset=-1),
    "a length beyond the end": lambda m: set_storage(m, length=1 << 60),
    "a length that is short": lambda m: set_storage(m, length=600),
    "a length that is tiny": lambda m: set_storage(m, length=7),
    "a file outside": lambda m: set_storage(m, relative_path="../x"),
    "a file with a path": lambda m: set_storage(m, relative_path="/etc/passwd"),
    "a folder": lambda m: set_storage(m, relative_path=".."),
    "a file that is missing": lambda m: set_storage(m, relative_path="gone.distcp"),
    "another tensor's bytes": lambda m: set_storage(m, offset=storage_of(m, "model.0.bias").offset),
    "a gigantic size": lambda m: set_size(m, 1 << 62, 1 << 62),
    "a gigantic chunk": lambda m: (set_size(m, 1 << 62, 8), set_chunk(m, sizes=(1 << 62, 8))),
    "a gap": lambda m: set_size(m, 17, 8),
    "a chunk outside": lambda m: set_chunk(m, sizes=torch.Size([8, 16])),
    "a chunk elsewhere": lambda m: set_chunk(m, offsets=torch.Size([1, 0])),
    "an overlap": lambda m: (set_size(m, 32, 8), add_chunk(m, (8, 0), (16, 8))),
    "other dimensions": lambda m: set_chunk(m, sizes=torch.Size([128])),
    "no dtype": lambda m: setattr(
        m.state_dict_metadata["model.0.weight"], "properties", metadata.BytesStorageMetadata()
    ),
    "no chunk": lambda m: m.state_dict_metadata["model.0.weight"].chunks.clear(),
    "no storage": lambda m: m.storage_data.clear(),
}  # fmt: skip


@pytest.mark.parametrize("how", WRONG)
def test_metadata_that_does_not_fit_is_an_error(folder, how):
    path, _ = folder
    altered(path, WRONG[how])
    with pytest.raises(CheckpointError) as caught:
        read_all(path)
    assert str(caught.value).startswith(f"{path}{os.sep}")


def test_gigantic_tensors_made_of_the_same_bytes_are_refused(folder):
    path, _ = folder

    def change(held):
        set_size(held, 16 * 1000, 8)
        for number in range(1, 1000):
            add_chunk(held, (16 * number, 0), (16, 8))

    altered(path, change)
    assert "overlap in their files" in error(path)


@pytest.mark.parametrize("how", ["mkdir", "eval", "path", "load"])
def test_nothing_in_hostile_metadata_is_run(folder, tmp_path, how):
    path, tensors = folder
    touched = tmp_path / "touched"
    hostile = Touches(how, touched)
    altered(path, lambda held: setattr(held, "planner_data", hostile))
    if how in ("mkdir", "eval"):
        assert "unpickling it would call" in error(path)
    else:
        check(Checkpoint(path), tensors)
    (path / ".metadata").write_bytes(pickle.dumps(hostile))
    error(path)
    (path / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    assert "no metadata of torch.distributed.checkpoint" in error(path)
    assert not touched.exists()


def test_a_hostile_chunk_is_not_run(folder, tmp_path):
    path, _ = folder
    touched = tmp_path / "touched"
    torch.save(Touches("mkdir", touched), path / "__0_0.distcp")
    size = (path / "__0_0.distcp").stat().st_size
    altered(path, lambda held: set_storage(held, offset=0, length=size))
    with pytest.raises(CheckpointError):
        read_all(path)
    assert not touched.exists()


def test_chunks_without_their_metadata_are_named(folder):
    path, _ = folder
    (path / ".metadata").unlink()
    assert "without their .metadata" in error(path)


def test_shards_of_deepspeed_are_named_with_the_script_that_merges_them(tmp_path):
    net = network()
    shard = tmp_path / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": {"flat": torch.randn(10)}}, shard)
    assert "zero_to_fp32.py" in error(tmp_path)
    torch.save({"module": net.state_dict()}, tmp_path / "mp_rank_00_model_states.pt")
    checkpoint = Checkpoint(tmp_path)
    check(checkpoint, {f"module.{k}": v for k, v in net.state_dict().items()})
    ((name, reason),) = [(s.name, s.reason) for s in checkpoint.skipped]
    assert name == shard.name
    assert "zero_to_fp32.py" in reason


RANK = """
import os, sys, torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
import torch.distributed.checkpoint as dcp
folder = sys.argv[1]
dist.init_process_group("gloo")
rank = dist.get_rank()
mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(8, 15), nn.ReLU(), nn.Linear(15, 4))
if rank == 0:
    torch.save(net.state_dict(), f"{folder}/whole.pt")
fully_shard(net, mesh=mesh)
state = net.state_dict()
state["columns"] = distribute_tensor(torch.arange(21.0).view(3, 7), mesh, [Shard(1)])
state["both"] = distribute_tensor(torch.arange(12.0).view(3, 4), mesh, [Replicate()])
state["plain"] = torch.arange(6.0).view(2, 3)
torch.save(state, f"{folder}/ranks/rank{rank}.pt")
dcp.save({"model": net.state_dict()}, checkpoint_id=f"{folder}/dcp")
dist.barrier()
dist.destroy_process_group()
os._exit(0)
"""


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory):
    """A folder with what two ranks have written: ranks/, dcp/ and the whole in whole.pt."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "ranks").mkdir()
    (folder / "save.py").write_text(RANK)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         folder / "save.py", folder],
        capture_output=True, text=True, timeout=TIMEOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.takes_seconds
def test_chunks_of_two_ranks_are_put_together(of_two_ranks):
    tensors = torch.load(of_two_ranks / "whole.pt", weights_only=True)
    check(Checkpoint(of_two_ranks / "dcp"), {f"model.{k}": v for k, v in tensors.items()})


@pytest.mark.takes_seconds
def test_files_of_two_ranks_are_put_together(of_two_ranks):
    tensors = torch.load(of_two_ranks / "whole.pt", weights_only=True)
    tensors |= {"columns": torch.arange(21.0).view(3, 7), "both": torch.arange(12.0).view(3, 4),
                "plain": torch.arange(6.0).view(2, 3)}  # fmt: skip
    checkpoint = Checkpoint(of_two_ranks / "ranks")
    check(checkpoint, tensors)
    (columns,) = [t for t in checkpoint.tensors if t.name == "columns"]
    assert columns.made_by == "shards of 2 ranks"
    assert columns.parts == ("rank0.pt:columns", "rank1.pt:columns")


@pytest.mark.takes_seconds
def test_the_file_of_one_rank_has_its_shards_marked(of_two_ranks):
    found = dict(Checkpoint(of_two_ranks / "ranks" / "rank1.pt"))
    assert found["columns"].unusable.startswith("shard 1 of 2 along dim 1; open the folder")
    assert torch.equal(found["columns"].read(), torch.arange(21.0).view(3, 7)[:, 4:])
    assert torch.equal(found["both"].read(), torch.arange(12.0).view(3, 4))
    assert found["both"].unusable is found["plain"].unusable is None


MESHES = [
    {"_layout": Record("", (), {"axes": (Record("", (), {"shape": (2,)}),)})},
    {"_layout": Record("", (), {"shape": (2,), "stride": (1,)})},
    {"_layout": Record("", (), {"shape": 2, "stride": 1})},
    {"mesh": Record("torch._utils._rebuild_tensor_v2", (None, 0, (2,), (1,)))},
]


@pytest.mark.parametrize("mesh", MESHES)
def test_meshes_are_read_as_versions_of_torch_write_them(mesh):
    module = "torch.distributed.tensor.placement_types"
    local = StoredTensor((2, 3), "float32", None)
    shard = Record(f"{module}.Shard", (), {"dim": 1})
    mesh = Record("DeviceMesh", (), {**mesh, "_coordinate_on_dim": [1]})
    spec = Record("DTensorSpec", (), {"mesh": mesh, "placements": (shard,)})
    piece = dtensors.placed((2, 7), local, spec).piece
    assert (piece.offsets, piece.said) == ((0, 4), "shard 1 of 2 along dim 1")
    partial = Record(f"{module}.Partial", (), {"reduce_op": "sum"})
    spec.state["placements"] = (partial,)
    why = dtensors.placed((2, 3), local, spec).unusable
    assert why == "the part of one rank (Partial); gather it before saving"


def test_a_quantized_tensor_of_another_package_is_named_with_its_parts(tmp_path):
    class Packed(torch.Tensor):
        """A wrapper around two tensors, as of torchao."""

        @staticmethod
        def __new__(cls, data, scale):
            return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32)

        def __init__(self, data, scale):
            self.data_, self.scale_ = data, scale

        @classmethod
        def __torch_dispatch__(cls, function, types, arguments=(), named=None):
            return function(*arguments, **(named or {}))

    Packed.__qualname__ = "Packed"
    globals()["Packed"] = Packed
    data, scale = torch.randint(-9, 9, (4, 3), dtype=torch.int8), torch.rand(4, 1)
    torch.save({"w": Packed(data, scale)}, tmp_path / "a.pt")
    found = dict(Checkpoint(tmp_path / "a.pt"))
    assert found["w"].shape == (4, 3)
    assert found["w"].unusable == f"a tensor of class {__name__}.Packed"
    assert torch.equal(found["w.data_"].read(), data)
    assert torch.equal(found["w.scale_"].read(), scale)

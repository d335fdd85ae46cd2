"""Files of torch.save that somebody has made to do harm, and files with bytes changed at random."""

import pickle
import random
import zipfile

import pytest
import torch

from spectral_kernels.diagnostics.checkpoints import Checkpoint, CheckpointError, Skipped, pickles
from tests.support.checkpoints import Touches, check, error, network

pytestmark = pytest.mark.usefixtures("seeded")
NOT_LOADED = "not loaded, since it is no tensor"


@pytest.mark.parametrize("how", ["mkdir", "eval", "exec", "system", "popen", "path", "load"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("is_new", [True, False])
def test_nothing_of_a_hostile_pickle_is_run(tmp_path, how, protocol, is_new):
    path, touched, weight = tmp_path / "evil.pt", tmp_path / "touched", torch.randn(2, 2)
    torch.save({"w": weight, "x": Touches(how, touched)}, path, pickle_protocol=max(protocol, 2),
               _use_new_zipfile_serialization=is_new)  # fmt: skip
    if how in ("path", "load"):  # what they would call is only named
        check(Checkpoint(path), {"w": weight})
    else:
        assert "it holds more than tensors: unpickling it would call" in error(path)
    path.write_bytes(pickle.dumps(Touches(how, touched), protocol))
    error(path)
    assert not touched.exists()


def zipped(path, data, **members):
    """Write an archive as torch.save does, of a pickle that somebody has made."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", data)
        for name, content in members.items():
            archive.writestr(f"a/data/{name}", content)
    return path


def tensor(offset=b"K\0", size=b"K\2K\2\x86", stride=b"K\2K\1\x86", count=b"K\4", key=b"0"):
    """Return a pickle of {"w": tensor} with the arguments given as opcodes."""
    identity = (b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + key + b"X\3\0\0\0cpu" +
                count + b"tQ")  # fmt: skip
    return (b"\x80\2}X\1\0\0\0wctorch._utils\n_rebuild_tensor_v2\n(" + identity + offset + size +
            stride + b"\x89NtRs.")  # fmt: skip


HUGE = b"\x8a\x09" + b"\xff" * 8 + b"\x7f"


@pytest.mark.parametrize(
    "arguments",
    [{"offset": b"K\1"}, {"offset": b"J\xff\xff\xff\xff"}, {"size": b"K\3K\2\x86"},
     {"size": HUGE + HUGE + b"\x86"}, {"stride": HUGE + b"K\1\x86"}, {"stride": b"K\1\x85"},
     {"count": HUGE}, {"count": b"K\5"}, {"count": b"N"}, {"key": b"9"}, {"size": b"N"},
     {"size": b"G" + b"\0" * 8}, {"offset": b"\x88"}],
)  # fmt: skip
def test_a_tensor_that_does_not_fit_its_storage_is_refused(tmp_path, arguments):
    storage = torch.randn(4)
    path = zipped(tmp_path / "a.pt", tensor(), **{"0": storage.numpy().tobytes()})
    check(Checkpoint(path), {"w": storage.view(2, 2)})
    zipped(path, tensor(**arguments), **{"0": storage.numpy().tobytes()})
    assert "broken or truncated: " in error(path)


def test_an_expanded_tensor_of_any_size_takes_no_memory(tmp_path):
    data = tensor(size=HUGE + HUGE + b"\x86", stride=b"K\0K\0\x86")
    path = zipped(tmp_path / "a.pt", data, **{"0": b"\0" * 16})
    (entry,) = Checkpoint(path).tensors
    assert "an expanded tensor" in entry.unusable


@pytest.mark.parametrize(
    "data",
    [b"", b"\x80\2", b"\x80\2.", b"\x80\2}X\1\0\0\0w", b"\x80\2h\0.", b"\x80\2(.", b"\x80\2NR.",
     b"\x80\2N)Rb.", b"\x80\2)Nb.", b"\x80\2]Ns.", b"\x80\2\x85.", b"\x80\2NN\x93.", b"\x82\1.",
     b"\x80\5\x97.", b"t.", b"\xff", b"\x80\2}(K\1u.", b"\x80\2X\xff\xff\xff\xffa."],
)  # fmt: skip
def test_a_pickle_that_is_invalid_is_one_line(tmp_path, data):
    assert "broken or truncated: " in error(zipped(tmp_path / "a.pt", data))


def test_memo_indices_names_and_keys_take_no_memory_or_time(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    # A memo at index 2^31 - 1; a list that holds itself; a key of tuples of tuples, 2^99 in all.
    zipped(path, b"\x80\2]r\xff\xff\xff\x7fj\xff\xff\xff\x7fa.")
    assert Checkpoint(path).tensors == []
    zipped(path, b"\x80\2}N" + b"2\x86" * 99 + b"Ns.")
    assert Checkpoint(path).tensors == []
    zipped(path, b"\x80\2N" + b"2\x86" * 99 + b".")
    assert Checkpoint(path).tensors == []
    long = b"X" + (5000).to_bytes(4, "little") + b"k" * 5000
    zipped(path, b"\x80\2}" + long + b"}X\1\0\0\0w}ss.")
    assert "a name has more than 4096 characters" in error(path)
    monkeypatch.setattr(pickles, "_MOST_OPCODES", 1000)
    zipped(path, b"\x80\2" + b"N0" * 1000 + b".")
    assert "its pickle has more than 1000 steps" in error(path)


def test_a_member_that_an_archive_misplaces_is_refused(tmp_path):
    path = zipped(tmp_path / "a.pt", tensor(), **{"0": b"\0" * 16})
    content = path.read_bytes()
    at = content.index(b"a/data/0") - 30
    path.write_bytes(content[:at] + b"PK\7\7" + content[at + 4 :])
    assert "is not where the archive says" in error(path)


def test_names_of_classes_are_escaped(tmp_path):
    path = zipped(tmp_path / "a.pt", b"\x80\2}X\1\0\0\0xcm\x1b[2J\nn\n)Rs.")
    assert Checkpoint(path).skipped == [Skipped(r"m\x1b[2J.n", NOT_LOADED)]


@pytest.mark.takes_seconds
@pytest.mark.parametrize("is_new", [True, False])
def test_bytes_that_are_changed_give_an_error_or_tensors(tmp_path, is_new):
    path, net = tmp_path / "a.pt", network()
    torch.save({"net": net, "state": net.state_dict()}, path, _use_new_zipfile_serialization=is_new)
    whole, refused, generator = path.read_bytes(), 0, random.Random(0)
    for _ in range(300):
        changed = bytearray(whole)
        for _ in range(generator.choice([1, 2, 20])):
            at = generator.randrange(len(changed))
            changed[at : at + generator.randrange(3)] = generator.randbytes(generator.randrange(3))
        path.write_bytes(changed)
        try:
            for _, tensor in Checkpoint(path):
                assert tensor.read().shape == tensor.shape
        except CheckpointError:
            refused += 1
    assert 0 < refused < 300

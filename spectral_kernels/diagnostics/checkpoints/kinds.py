"""What a file is by its first bytes, whatever its name: a checkpoint, or what to do with it."""

from __future__ import annotations

import re
from pathlib import Path

from ..untrusted import printable
from .distributed import METADATA
from .entries import CheckpointError

SAFETENSORS, TORCH, DISTRIBUTED = "safetensors", "torch", "distributed"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
ACCEPTED = "*.safetensors, *.bin, *.pt, *.pth, *.ckpt or *.index.json"
_ELSEWHERE = "convert it to safetensors where it was made"
_MAGIC = {
    b"\x1f\x8b": "it is compressed (gzip); unpack it first: gunzip or tar -xzf",
    b"\x28\xb5\x2f\xfd": "it is compressed (zstd); unpack it first: unzstd",
    b"\xfd7zXZ": "it is compressed (xz); unpack it first: unxz",
    b"BZh": "it is compressed (bzip2); unpack it first: bunzip2",
    b"\x04\x22\x4d\x18": "it is compressed (lz4); unpack it first: unlz4",
    b"7z\xbc\xaf\x27\x1c": "it is an archive (7z); unpack it first: 7z x",
    b"Rar!": "it is an archive (rar); unpack it first: unrar x",
    b"PK\x05\x06": "it is an empty zip archive",
    b"GGUF": "it is a GGUF file of llama.cpp, whose weights are mostly quantized; name the "
    "safetensors that it was made of",
    b"ggml": "it is a file of ggml; name the checkpoint that it was made of",
    b"\x89HDF\r\n": f"it is an HDF5 file, as Keras writes; {_ELSEWHERE}",
    b"\x93NUMPY": "it is an array of numpy (.npy); save it with safetensors.numpy.save_file",
}
_TENSORFLOW = re.compile(r"\.(pb|index|meta|data-\d+-of-\d+)$")
_HTML = re.compile(rb"(?i)\s*(<!doctype html|<html|<head|<\?xml)")
# The map of a msgpack file, with a text as its first key; pickles begin with 0x80 and 2 to 5.
_MSGPACK = re.compile(rb"(?s)([\x81-\x8f]|\xde..|\xdf....)[\xa1-\xbf\xd9\xda]")
_ONNX = re.compile(rb"(?s)\x08[\x01-\x14]\x12.(pytorch|onnx|tf2onnx|keras|skl|.{0,40}onnx)")


def kind_of(file: Path) -> str:
    """Return SAFETENSORS, TORCH or DISTRIBUTED.

    Raises:
        CheckpointError: another kind of file; the message says which, and what to do.
    """
    with file.open("rb") as opened:
        start = opened.read(512)
        size = opened.seek(0, 2)
    if file.name == METADATA:
        return DISTRIBUTED
    if (why := _other(start, size)) is not None:
        raise CheckpointError(f"{file}: {why}")
    if start.startswith(b"PK\3\4"):
        return TORCH
    if _is_safetensors(start, size) or (file.suffix == ".safetensors" and start[:1] != b"\x80"):
        return SAFETENSORS
    if file.suffix in PICKLED or start[:1] == b"\x80":
        return TORCH
    if _TENSORFLOW.search(file.name):
        raise CheckpointError(f"{file}: it is a file of TensorFlow; {_ELSEWHERE}")
    raise CheckpointError(f"{file}: expected a checkpoint ({ACCEPTED}), got another name")


def _is_safetensors(start: bytes, size: int) -> bool:
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") + 8 <= size


def _other(start: bytes, size: int) -> str | None:
    """Return what is said of a file that is no checkpoint; None if it may be one."""
    if size == 0:
        return "broken or truncated: it is empty; copy or download it again"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of git-lfs, not the weights: run `git lfs pull` in its repository"
    if _HTML.match(start):
        return "it is an HTML page, such as that of a failed download; download it again"
    if re.match(rb'\s*[{\[]\s*["\]}{]', start) and not _is_safetensors(start, size):
        shown = printable(start[:60].decode("utf-8", "replace"))
        return f"it is JSON text, not weights; download it again if it is an error: {shown}"
    for magic, why in _MAGIC.items():
        if start.startswith(magic):
            return why
    if start[257:262] == b"ustar":
        return "it is an archive (tar); unpack it first: tar -xf"
    if start[4:8] == b"TFL3":
        return f"it is a model of TensorFlow Lite; {_ELSEWHERE}"
    if _ONNX.match(start):
        return f"it is an ONNX model; {_ELSEWHERE}"
    if _MSGPACK.match(start):
        return f"it is a msgpack file, as Flax writes; {_ELSEWHERE}"
    return None

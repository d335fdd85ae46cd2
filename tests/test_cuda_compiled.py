"""The CUDA kernels compiled for GPUs that are not here: no spills, wide loads, few registers."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from spectral_kernels import backends, plan

SOURCES = Path(__file__).parent.parent / "csrc" / "cuda"
NVCC = shutil.which("nvcc")
CAPABILITIES = (80, 90, 100)
ENTRIES = {"gram_matvec": 3, "rank_one": 1}  # one per dtype of the weights, and one for all
REGISTERS = 128  # of a thread, so that a multiprocessor holds two blocks of 256
SHARED = 4 * 1024  # bytes of gram_matvec.cu's kReservedBytes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NVCC is None, reason="nvcc is not on the PATH"),
]


class Kernel(NamedTuple):
    """What ptxas says about one kernel on one architecture; bytes, but for registers."""

    capability: int
    name: str
    spills: int
    registers: int
    shared: int


def known_capabilities():
    codes = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True, check=True)
    return [c for c in CAPABILITIES if f"sm_{c}" in codes.stdout.split()]


@pytest.fixture(scope="module", params=ENTRIES)
def compiled(request, tmp_path_factory):
    """A source file's name, its kernels on every architecture, and their PTX."""
    folder = tmp_path_factory.mktemp(request.param)
    code = [f"-gencode=arch=compute_{c},code=sm_{c}" for c in known_capabilities()]
    result = subprocess.run(
        [NVCC, "-std=c++17", "-O3", "-Xptxas", "-v", *code, "-fatbin", "--keep", "--keep-dir",
         str(folder), "-o", str(folder / "out.fatbin"), str(SOURCES / f"{request.param}.cu")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    ptx = [path.read_text() for path in folder.glob("*.ptx")]
    return request.param, list(kernels(result.stdout + result.stderr)), ptx


def kernels(log):
    for block in log.split("Compiling entry function ")[1:]:
        name, capability = re.match(r"'(\w+)' for 'sm_(\d+)'", block).groups()
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", block).groups()
        (registers,) = re.search(r"Used (\d+) registers", block).groups()
        shared = re.search(r"(\d+) bytes smem", block)
        yield Kernel(int(capability), name, sum(map(int, spills)), int(registers),
                     int(shared[1]) if shared else 0)  # fmt: skip


def test_nothing_spills_and_two_blocks_fit(compiled):
    name, found, _ = compiled
    assert len(found) == ENTRIES[name] * len(known_capabilities())
    for kernel in found:
        assert kernel.spills == 0, kernel
        assert kernel.registers <= REGISTERS, kernel
        assert kernel.shared <= SHARED, kernel


def test_aligned_rows_are_read_and_written_128_bits_at_a_time(compiled):
    name, _, ptx = compiled
    assert len(ptx) == len(known_capabilities())
    for text in ptx:
        entries = text.split(".entry ")[1:]
        assert len(entries) == ENTRIES[name]
        for entry in entries:
            # Of weights and gradients alone; vectors are loaded without ".cg".
            assert "ld.global.cg.v4" in entry
            assert name != "rank_one" or "st.global.cg.v4" in entry


def test_without_a_device_a_launch_is_an_exception():
    if (reason := backends.unavailable("cpu")) is not None:
        pytest.skip(reason)
    native = backends.native_module()
    if not hasattr(native, "cuda"):
        pytest.skip("the compiled module has no CUDA kernels")
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    assert "CUDA error" in native.cuda.problem(0)
    header = np.zeros(len(plan.HEADER), np.int64)
    header[plan.SLOT["n_tiles"]] = header[plan.SLOT["n_matrices"]] = 1
    addresses = (plan.address(header), 0, 0, 0)
    with pytest.raises(RuntimeError, match="gram_matvec: CUDA error"):
        native.cuda.gram_matvec(*addresses, device=0, stream=0)
    with pytest.raises(RuntimeError, match="rank_one: CUDA error"):
        native.cuda.rank_one(
            *addresses, device=0, stream=0, finish=True, gradient=True, accumulate=True
        )
    header[plan.SLOT["weight_dtype"]] = plan.DTYPES[torch.float64]
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        native.cuda.gram_matvec(*addresses, device=0, stream=0)

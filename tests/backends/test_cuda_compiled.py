"""The CUDA kernels in the installed module: nothing spills, two blocks fit, loads are wide."""

import re
import subprocess
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pytest
import torch

from spectral_kernels.backends import choice
from spectral_kernels.tables import schema

triton = pytest.importorskip("triton", reason="triton, which brings cuobjdump, is not installed")

KIB = 1024
LOAD, STORE = "LDG.E.128.STRONG.GPU", "STG.E.128.STRONG.GPU"  # of data that no cache keeps


class Entry(NamedTuple):
    """Expectations for the kernels whose names contain a word."""

    kernels: int
    shared: int  # bytes at most, including the driver's share from sm_90 on
    code: tuple[str, ...]  # instructions
    stack: int = 8  # bytes


# Numbers of kernels: gram_matvec has one per dtype of the weights, rank_one one for all, adamw one
# per dtypes of weights and moments, and another for caps of several singular values, sgd one more
# for spheres; subspace and transposed one per dtype and number of
# vectors that a thread takes at a time, ritz one per number of vectors; the sums over tiles one for
# one vector and one for several. 5 KiB: kReservedBytes of products.cuh, and the driver's share.
ENTRIES = {
    "gram_matvec": Entry(3, 5 * KIB, (LOAD,), 24),  # of float16 on sm_100
    "rank_one": Entry(1, 9 * KIB, (LOAD, STORE)),
    "adamw": Entry(10, 5 * KIB, (LOAD, STORE)),
    "sgd": Entry(15, 5 * KIB, (LOAD, STORE)),
    "subspace": Entry(7, 12 * KIB, ("LDG.E.128.CONSTANT",)),  # the cache keeps it for a second use
    "ritz": Entry(4, 32 * KIB, ()),
    "transposed": Entry(10, 22 * KIB, (LOAD,)),
    "collect_kernel": Entry(1, 2 * KIB, ()),
    "collect_chunks": Entry(1, 6 * KIB, (LOAD,)),
}
REGISTERS = 128  # of a thread, so that a multiprocessor holds two blocks of 256
# Stack: where registers are few, two are saved there while diverged lanes shuffle, in a subroutine
# outside the loops; ptxas does not count that as a spill.


class Kernel(NamedTuple):
    """Output of cuobjdump for one kernel on one architecture; bytes, except registers."""

    registers: int
    stack: int
    shared: int
    code: str


@pytest.fixture(scope="module")
def native():
    if (reason := choice.unavailable("cpu")) is not None:
        pytest.skip(reason)
    module = choice.native_module()
    if not hasattr(module, "cuda"):
        pytest.skip("the compiled module has no CUDA kernels")
    return module


@lru_cache
def kernels(file):
    """Return the kernels in ``file`` by (architecture, name)."""

    def sections(option):
        text = subprocess.run([triton.knobs.nvidia.cuobjdump.path, option, file],
                              capture_output=True, text=True, check=True).stdout  # fmt: skip
        for part in text.split("Fatbin elf code:")[1:]:
            arch = re.search(r"arch = (\w+)", part)[1]
            for function in re.split(r"\bFunction(?: :)? ", part)[1:]:
                yield (arch, re.match(r"\w+", function)[0]), function

    code = dict(sections("-sass"))
    return {
        key: Kernel(*(int(re.search(rf"{what}:(\d+)", usage)[1])
                      for what in ("REG", "STACK", "SHARED")), code[key])
        for key, usage in sections("-res-usage")
    }  # fmt: skip


@pytest.mark.parametrize("name", ENTRIES)
def test_nothing_spills_two_blocks_fit_and_aligned_rows_are_read_128_bits_at_a_time(native, name):
    every = kernels(native.__file__)
    architectures = {arch for arch, _ in every}
    found = {key: kernel for key, kernel in every.items() if name in key[1]}
    entry = ENTRIES[name]
    assert len(found) == entry.kernels * len(architectures)
    for key, kernel in found.items():
        assert kernel.stack <= entry.stack, (key, kernel.stack)
        assert kernel.registers <= REGISTERS, (key, kernel.registers)
        assert kernel.shared <= entry.shared, (key, kernel.shared)
        # For weights and gradients only; vectors are loaded in other ways.
        assert all(instruction in kernel.code for instruction in entry.code), key


def test_every_kernel_is_looked_at(native):
    names = {name for _, name in kernels(native.__file__)}
    assert all(sum(entry in name for entry in ENTRIES) == 1 for name in names), names


def test_without_a_device_a_launch_is_an_exception(native):
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    assert "CUDA error" in native.cuda.problem(0)
    header = np.zeros(len(schema.HEADER), np.int64)
    header[schema.SLOT["n_tiles"]] = header[schema.SLOT["n_matrices"]] = 1
    addresses = (schema.address(header), 0, 0, 0, 0)
    update = np.zeros(len(schema.UPDATE), np.int64)
    step = {"update": schema.address(update), "device": 0, "stream": 0}
    for r in schema.N_VECTORS:
        header[schema.SLOT["r"]] = r
        with pytest.raises(RuntimeError, match="gram_matvec: CUDA error"):
            native.cuda.gram_matvec(*addresses, device=0, stream=0)
        with pytest.raises(RuntimeError, match="transposed: CUDA error"):
            native.cuda.transposed(*addresses, device=0, stream=0)
        with pytest.raises(RuntimeError, match="collect: CUDA error"):
            native.cuda.collect(*addresses, device=0, stream=0, t=0, gram=0)
        with pytest.raises(RuntimeError, match="rank_one: CUDA error"):
            native.cuda.rank_one(
                *addresses, device=0, stream=0, finish=True, gradient=True, accumulate=True
            )
        with pytest.raises(RuntimeError, match="update: CUDA error"):
            native.cuda.update(*addresses, **step)
    update[schema.UPDATE_SLOT["moment_dtype"]] = schema.DTYPES[torch.bfloat16]
    with pytest.raises(ValueError, match="moment_dtype: expected the weights' dtype or float32"):
        native.cuda.update(*addresses, **step)
    header[schema.SLOT["weight_dtype"]] = schema.DTYPES[torch.float64]
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        native.cuda.gram_matvec(*addresses, device=0, stream=0)
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        native.cuda.transposed(*addresses, device=0, stream=0)
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        native.cuda.update(*addresses, **step)

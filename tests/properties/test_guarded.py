"""Accesses beyond a guarded tensor are seen: what the properties rely on."""

import os

import pytest
import torch

from ..support import guarded, processes

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
CRASH = """
import ctypes, gc, signal, torch
from tests.support import guarded
from tests.support.forked import Failed, Forked

class Writer:
    def beyond(self, at_end):
        x = guarded.flat(5, torch.float32, at_end)
        ctypes.memset(x.data_ptr() + (x.nbytes if at_end else -1), 0, 1)

    def freed(self):
        x = guarded.flat(5, torch.float32, True)
        address = x.data_ptr()
        del x
        gc.collect()
        ctypes.memset(address, 0, 1)

for method, arguments in (("beyond", (True,)), ("beyond", (False,)), ("freed", ())):
    process = Forked(Writer)
    try:
        process.call(method, *arguments)
    except Failed as error:
        print("SIGSEGV" in str(error) and f"in {method}" in str(error))
    process.close()
"""


@pytest.mark.takes_seconds
def test_an_access_beyond_a_region_or_to_one_that_is_gone_is_a_crash_with_a_stack():
    result = processes.run(CRASH)
    assert result.stdout.split() == ["True"] * 3, result.stderr


@pytest.mark.parametrize("at_end", [True, False])
def test_bytes_that_belong_to_no_tensor_are_watched(at_end):
    strides = (4, 1)  # a gap after each row
    x = guarded.empty((3, 2), strides, torch.int32, at_end).zero_()
    before = guarded.Bytes()
    x.fill_(-1)
    assert before.written_outside([x]) is None
    assert "24 bytes" in before.written_outside([])
    x.as_strided((1,), (1,), 2).fill_(-1)  # in the gap
    assert "4 bytes, the first 8 bytes after" in before.written_outside([x])

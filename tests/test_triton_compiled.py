"""The Triton kernels compiled for GPUs that are not here: no spills, wide loads."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("triton interprets here", allow_module_level=True)

from .triton_compiled import (  # noqa: E402
    CAPABILITIES,
    SHARED_LIMIT,
    any_exponent,
    compiled,
    configurations,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


CASES = [
    (sm, c)
    for sm in CAPABILITIES
    for dtype in DTYPES
    for c in (*configurations(dtype), *any_exponent(dtype))
]


@pytest.mark.parametrize(("capability", "configuration"), CASES, ids=str)
def test_nothing_spills_and_aligned_rows_are_read_128_bits_at_a_time(capability, configuration):
    found = compiled(configuration, capability)
    assert found.stack == 0
    assert found.registers <= 255
    assert found.shared <= SHARED_LIMIT[capability]
    if configuration.kernel == "gram_matvec" or dict(configuration.constants)["ACCUMULATE"]:
        assert found.loads(128) > 0

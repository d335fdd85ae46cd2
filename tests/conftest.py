import pytest
import torch

from spectral_kernels import backends

LEVELS = ("baseline", "v3", "v4")


@pytest.fixture(params=["reference", "triton", *(f"cpu-{level}" for level in LEVELS)])
def backend(request):
    """Every backend and every instruction-set level; yields the backend's name."""
    name, _, level = request.param.partition("-")
    if (reason := backends.unavailable(name)) is not None:
        pytest.skip(reason)
    if name == "triton" and not backends.interpreted():
        pytest.skip("these tests run on a CPU: set TRITON_INTERPRET=1")
    if name != "cpu":
        yield name
        return
    cpu = backends.native_module().cpu
    if level not in cpu.levels():
        pytest.skip(f"this processor or build has no instruction-set level {level!r}")
    before = cpu.level()
    cpu.set_level(level)
    yield name
    cpu.set_level(before)


@pytest.fixture
def threads():
    """Give torch.set_num_threads back what it was."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def seeded():
    """Draw the same random numbers in every run; ``usefixtures`` in the files that want it."""
    torch.manual_seed(0)

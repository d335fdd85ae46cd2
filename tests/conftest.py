import contextlib
import importlib.util

import pytest
import torch

from spectral_kernels.backends import choice

from .support.gpu_like import GpuLike
from .support.interpreter import patch_language_once

LEVELS = ("baseline", "v3", "v4")


def pytest_addoption(parser):
    """Add --quick and --zoo."""
    parser.addoption(
        "--quick", action="store_true",
        help="only tests that take less than a second, with one instruction-set level, on a CPU",
    )  # fmt: skip
    parser.addoption("--zoo", action="store_true", help="with tests/zoo, for the extra zoo")


def pytest_ignore_collect(collection_path, config):
    """Leave out the tests that need many libraries, unless they are asked for."""
    return True if collection_path.name == "zoo" and not config.getoption("--zoo") else None


def pytest_configure(config):
    """Prepare Triton's interpreter where it will run."""
    if importlib.util.find_spec("triton") and choice.interpreted():
        patch_language_once()


def pytest_collection_modifyitems(config, items):
    """Leave out for --quick what takes longer, needs a GPU, or differs in the level alone."""
    if not config.getoption("--quick"):
        return
    levels = []
    if choice.unavailable("cpu") is None:
        levels = choice.native_module().cpu.levels()
    others = {f"cpu-{level}" for level in LEVELS if level not in levels[-1:]}

    def is_left_out(item):
        callspec = getattr(item, "callspec", None)
        return (
            any(item.get_closest_marker(name) for name in ("takes_seconds", "slow", "gpu"))
            or (callspec is not None and callspec.params.get("backend") in others)
        )  # fmt: skip

    kept, left_out = [], []
    for item in items:
        (left_out if is_left_out(item) else kept).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


ON_GPU = [pytest.param(f"{name}@cuda", marks=pytest.mark.gpu)
          for name in ("reference", "triton", "cuda")]  # fmt: skip


@pytest.fixture(params=["reference", "triton", *(f"cpu-{level}" for level in LEVELS), *ON_GPU])
def backend(request):
    """Every backend, every instruction-set level, and torch's default device; yields the name."""
    name, _, device = request.param.partition("@")
    name, _, level = name.partition("-")
    if (reason := choice.unavailable(name)) is not None:
        pytest.skip(reason)
    if device:
        yield from on_device(device, name)
    elif name == "triton" and not choice.interpreted():
        pytest.skip("these tests run on a CPU: set TRITON_INTERPRET=1")
    elif name == "cpu":
        yield from at_level(level, name)
    else:
        yield name


def on_device(device, name):
    """Make what the test makes on a device."""
    if not torch.cuda.is_available() or (name == "triton" and choice.interpreted()):
        pytest.skip("needs a CUDA device and Triton's compiler")
    torch.set_default_device(device)
    with exact_products():
        yield name
    torch.set_default_device(None)


@contextlib.contextmanager
def exact_products():
    """Let a GPU multiply float32 numbers as such, and convolutions give the same bits each time."""
    cudnn, precision = torch.backends.cudnn, torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


@pytest.fixture
def exact():
    """What :func:`exact_products` says; ``usefixtures`` in the files that are about a GPU."""
    with exact_products():
        yield


def at_level(level, name):
    """Let the C++ kernels run at an instruction-set level."""
    cpu = choice.native_module().cpu
    if level not in cpu.levels():
        pytest.skip(f"this processor or build has no instruction-set level {level!r}")
    before = cpu.level()
    cpu.set_level(level)
    yield name
    cpu.set_level(before)


@pytest.fixture(params=["triton", "cuda"])
def kernels(request):
    """The backends that have kernels for a GPU; yields the name."""
    if (reason := choice.unavailable(request.param)) is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def gpu_like(monkeypatch):
    """A stand-in for a GPU on a CPU, for backend "cpu"."""
    if (reason := choice.unavailable("cpu")) is not None:
        pytest.skip(reason)
    return GpuLike(monkeypatch)


@pytest.fixture
def threads():
    """Give torch.set_num_threads back what it was."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def threaded(backend):
    """A backend whose results do not depend on the number of threads; yields the name."""
    if backend == "reference":
        pytest.skip("PyTorch's own products depend on the number of threads")
    if backend == "triton" and choice.interpreted():
        pytest.skip("the interpreter has one thread")
    return backend


@pytest.fixture
def seeded():
    """Draw the same random numbers in every run; ``usefixtures`` in the files that want it."""
    torch.manual_seed(0)


@pytest.fixture
def tensors():
    """What a checkpoint holds: matrices, and what is none."""
    return {
        "h.2.fc.weight": torch.randn(24, 16),
        "h.10.fc.weight": 3 * torch.randn(24, 16),
        "conv.weight": torch.randn(8, 4, 3, 3),
        "norm.weight": torch.randn(16),
        "scale": torch.tensor(2.0),
    }


@pytest.fixture
def saved(tmp_path, tensors):
    """One safetensors file of them."""
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture
def compiled_once():
    """Nothing compiled before, and an error where a test has something compiled twice."""
    import torch._dynamo  # which takes a second

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()

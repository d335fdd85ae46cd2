"""The CUDA C++ kernels on a CPU: csrc/ unchanged, compiled with an emulation of CUDA.

``python -m pytest -p tests.support.cuda_emulator --emulator FOLDER FILES`` builds it in FOLDER and
runs the tests of backend "cuda" in FILES, such as tests/backends/test_subspace.py.

Blocks run in a new random order in each launch, several at once, and the threads of a block in
random order between barriers and shuffles. A launch fails if threads wait for others that never
arrive, a load or store is misaligned, or a block writes beyond its shared memory. Not detected:
stale data in an L1 cache, reordering of memory accesses, reads beyond a tensor whose values are not
used, and errors of nvcc and ptxas. Nothing is said about speed.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from spectral_kernels.backends import choice
from spectral_kernels.backends import native as native_backends
from tests import ROOT

from ..buckets import cut_as_on_a_gpu
from ..compiling import objects, run

HERE = Path(__file__).parent
CSRC = ROOT / "csrc"
FLAGS = ["-std=gnu++17", "-fPIC", "-fvisibility=hidden", "-w", "-U_FORTIFY_SOURCE"]
KERNELS = ["-O1", "-ffp-contract=fast", "-x", "c++", "-include", str(HERE / "emulator.h")]
PLAIN = ["-O0", "-DSPECTRAL_CUDA", "-DSPECTRAL_LEVEL=baseline"]


def missing() -> str | None:
    """Return which requirement of the emulator is missing here, or None."""
    if shutil.which(compiler()) is None:
        return f"no C++ compiler: there is no {compiler()!r}"
    if shutil.which("nvcc") is None:
        return "CUDA's headers are missing: there is no nvcc"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    return None


def compiler() -> str:
    """Return the name of the C++ compiler."""
    return os.environ.get("CXX") or "g++"


def includes() -> list[str]:
    """Return options for the folders of headers: nvcc's own, pybind11's and Python's."""
    import pybind11

    dry = ["nvcc", "--dryrun", "-E", "-x", "cu", os.devnull]
    said = subprocess.run(dry, capture_output=True, text=True, check=True).stderr
    (cuda,) = re.findall(r'INCLUDES="-I([^"]+)"', said)
    return [f"-I{x}" for x in (cuda, pybind11.get_include(), sysconfig.get_path("include"))]


def build(folder: Path) -> Path:
    """Compile in ``folder`` what has changed since the last build; return the module's path."""
    target = folder / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    kernels = [HERE / "emulator.cpp", *CSRC.rglob("*.cu")]
    headers = [*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh"), HERE / "emulator.h"]
    flags = [*FLAGS, *includes()]
    options = {x: [*flags, *KERNELS] for x in kernels}
    options |= {x: [*flags, *PLAIN] for x in CSRC.rglob("*.cpp")}
    own = objects(compiler(), folder, options, headers)
    # -Bsymbolic: the emulator's functions, not those of the same names in torch's libraries.
    run(compiler(), "-shared", "-Wl,-Bsymbolic", *own, "-pthread", "-o", target)
    return target


def load(path: Path):
    """Import a module built by :func:`build`."""
    spec = importlib.util.spec_from_file_location("_native", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def emulate(patch, native) -> None:
    """Run backend "cuda" on the emulator, on a CPU, with tiles cut as for a GPU.

    ``patch`` is pytest's monkeypatch, ``native`` what :func:`load` returns.
    """
    patch.setitem(sys.modules, "spectral_kernels._native", native)
    choice.native_module()  # raises if it was built from other tables

    def but_for_cuda(reason):
        return lambda name, *where: None if name == "cuda" else reason(name, *where)

    for reason in (choice.unavailable, choice._refused):
        patch.setattr(choice, reason.__name__, but_for_cuda(reason))
    patch.setattr(native_backends, "_stream", lambda device: (0, 0))
    cut_as_on_a_gpu(patch)


def pytest_addoption(parser):
    parser.addoption("--emulator", type=Path, required=True, help="folder to build the module in")


def pytest_configure(config):
    if config.option.help:
        return
    folder = config.getoption("emulator")
    folder.mkdir(parents=True, exist_ok=True)
    emulate(pytest.MonkeyPatch(), load(build(folder)))


def pytest_collection_modifyitems(config, items):
    from tests import conftest

    def on_device(device, name):
        yield name

    conftest.on_device = on_device  # the CPU, that is

    def runs_kernels(item):
        given = item.callspec.params if hasattr(item, "callspec") else {}
        return given.get("backend") == "cuda@cuda" and torch.float64 not in given.values()

    config.hook.pytest_deselected(items=[x for x in items if not runs_kernels(x)])
    items[:] = filter(runs_kernels, items)

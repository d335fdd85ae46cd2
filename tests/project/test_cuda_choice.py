"""Where CMake builds the CUDA kernels, and for which GPUs; nothing is compiled."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

pytestmark = pytest.mark.takes_seconds


@pytest.fixture
def configured(tmp_path):
    """A function that runs CMake, with nvcc or not, and with GPUs of some compute capabilities."""
    pybind11 = pytest.importorskip("pybind11", reason="building needs the test extra")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("cmake", "ninja", "c++", "g++", "as", "ld", "uname", "sh"):
        if (found := shutil.which(name)) is not None:
            (tools / name).symlink_to(found)
    if not (tools / "c++").exists() or not (tools / "cmake").exists():
        pytest.skip("no C++ compiler or no CMake on this machine")

    def run(gpus=(), nvcc=False, **variables):
        path = str(tools)
        if nvcc:  # which needs tools of its own
            if shutil.which("nvcc") is None:
                pytest.skip("nvcc is not on this machine")
            path += os.pathsep + os.environ["PATH"]
        if gpus:
            lines = "".join(f"echo {x}\n" for x in gpus)
            (tools / "nvidia-smi").write_text(f"#!/bin/sh\n{lines}")
            (tools / "nvidia-smi").chmod(0o755)
        ours = ("CUDACXX", "CUDAARCHS", "CUDA_PATH", "CUDAToolkit_ROOT", "SPECTRAL_KERNELS_CUDA")
        rest = {k: v for k, v in os.environ.items() if k not in ours}
        done = subprocess.run(
            ["cmake", "-S", str(ROOT / "csrc"), "-B", str(tmp_path / "build"), "-G", "Ninja",
             f"-DPython_EXECUTABLE={sys.executable}",
             f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"],
            env={**rest, "PATH": path, **variables},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    return run


def without(configured, **options):
    """Why the CUDA kernels are left out."""
    code, output = configured(**options)
    assert code == 0, output
    assert "CUDA kernels for architectures" not in output
    (why,) = re.findall("spectral_kernels: without CUDA kernels: (.*)", output)
    return why


def architectures(configured, **options):
    """Architectures that the CUDA kernels are to be compiled for."""
    code, output = configured(nvcc=True, **options)
    assert code == 0, output
    (said,) = re.findall("CUDA kernels for architectures (.*); nvcc takes minutes", output)
    return said.split(";")


def test_a_demand_without_nvcc_is_an_error(configured):
    code, output = configured(SPECTRAL_KERNELS_CUDA="1")
    assert code != 0
    assert "no working nvcc" in output


def test_an_unknown_value_is_an_error(configured):
    code, output = configured(SPECTRAL_KERNELS_CUDA="yes")
    assert code != 0
    assert "SPECTRAL_KERNELS_CUDA: expected auto, 0 or 1, got 'yes'" in output


def test_a_wish_to_leave_them_out_is_the_reason(configured):
    why = without(configured, gpus=["9.0"], SPECTRAL_KERNELS_CUDA="0")
    assert why == "SPECTRAL_KERNELS_CUDA=0 was set; to have them, reinstall it"


def test_a_gpu_without_nvcc_leaves_them_out(configured):
    assert without(configured, gpus=["9.0"]).startswith("no nvcc was found; put that of CUDA 11.8")


def test_nvcc_without_a_gpu_leaves_them_out(configured):
    if list(Path("/dev").glob("nvidia[0-9]*")) or shutil.which("nvidia-smi"):
        pytest.skip("there is a GPU")
    assert without(configured, nvcc=True) == (
        "nvcc was found, but no NVIDIA GPU; to have them all the same, reinstall it"
    )


def test_an_nvcc_that_fails_leaves_them_out(configured):
    why = without(configured, gpus=["9.0"], CUDACXX=shutil.which("false"))
    assert why.startswith("the nvcc that was found is older than CUDA 11.8, or fails;")


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [(["9.0", "9.0"], ["90-real"]), (["8.0", "8.6"], ["80-real", "86-real"]),
     (["7.5"], None), (["9.0", "99.9"], None)],
)  # fmt: skip
def test_with_a_gpu_they_are_for_this_gpu_if_nvcc_and_kernels_know_it(configured, gpus, expected):
    found = architectures(configured, gpus=gpus)
    if expected is not None:
        assert found == expected
    else:
        assert found[:2] in (["80-real", "90"], ["80-real", "90-real"])


def test_a_demand_is_for_all_architectures_without_a_gpu(configured):
    found = architectures(configured, SPECTRAL_KERNELS_CUDA="1")
    assert found[:2] in (["80-real", "90"], ["80-real", "90-real"])


def test_architectures_that_are_named_are_taken(configured):
    assert architectures(configured, gpus=["9.0"], CUDAARCHS="89-real") == ["89-real"]

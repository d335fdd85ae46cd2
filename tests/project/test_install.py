"""Builds and installations of the source tree."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests import ROOT


def build_wheel(tmp_path, environment):
    """Build a wheel from a copy of the sources and return pip's output and the wheel's files."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("csrc", "spectral_kernels"):
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
    result = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation",
         "-w", str(tmp_path / "out"), str(source)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    (wheel,) = (tmp_path / "out").glob("*.whl")
    return output, zipfile.ZipFile(wheel).namelist()


@pytest.fixture
def build_tools():
    pytest.importorskip("pybind11", reason="building needs the test extra")
    pytest.importorskip("setuptools", reason="building needs the test extra")


@pytest.mark.takes_seconds
def test_without_a_compiler_the_install_succeeds_and_says_so(tmp_path, build_tools):
    empty = tmp_path / "bin"
    empty.mkdir()
    environment = {**os.environ, "PATH": str(empty)}
    environment.pop("CXX", None)
    output, files = build_wheel(tmp_path, environment)
    assert "no C++ compiler was found" in output
    assert "spectral_kernels/regularizer.py" in files
    assert "spectral_kernels/integrations/transformers.py" in files
    assert "spectral_kernels/py.typed" in files
    assert not any(name.endswith(".so") for name in files)


def configured(tmp_path, value):
    """Run CMake's configuration with a C++ compiler and without nvcc."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("cmake", "ninja", "c++", "g++", "as", "ld", "uname"):
        if (found := shutil.which(name)) is not None:
            (tools / name).symlink_to(found)
    if not (tools / "c++").exists() or not (tools / "cmake").exists():
        pytest.skip("no C++ compiler or no CMake on this machine")
    environment = {**os.environ, "PATH": str(tools), "SPECTRAL_KERNELS_CUDA": value}
    environment.pop("CUDACXX", None)
    import pybind11

    return subprocess.run(
        ["cmake", "-S", str(ROOT / "csrc"), "-B", str(tmp_path / "build"), "-G", "Ninja",
         f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.takes_seconds
@pytest.mark.parametrize(
    ("value", "message"), [("1", "no working nvcc"), ("yes", "SPECTRAL_KERNELS_CUDA: got 'yes'")]
)
def test_cuda_that_cannot_be_had_is_an_error(tmp_path, build_tools, value, message):
    result = configured(tmp_path, value)
    assert result.returncode != 0
    assert message in result.stderr


@pytest.mark.takes_seconds
def test_cuda_is_left_out_when_asked(tmp_path, build_tools):
    result = configured(tmp_path, "0")
    assert result.returncode == 0, result.stderr
    assert "CUDA kernels left out, as asked for" in result.stdout + result.stderr

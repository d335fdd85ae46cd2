"""Builds and installations of the source tree."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

import pytest

from tests import ROOT

REPORT = "spectral_kernels/_native_left_out.txt"
TAG = "tag of the wheel"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
WITHOUT = "spectral_kernels is built without"
NO_GPU = "nvcc was found, but no NVIDIA GPU; to have them all the same, reinstall it"

# In place of CMake. FAILS says what fails: nothing, "cxx" or "nvcc", or that there is no "gpu".
CMAKE = f"""#!{sys.executable}
import os, pathlib, sys
cuda, fails = os.environ["SPECTRAL_KERNELS_CUDA"], os.environ["FAILS"]
if "-S" in sys.argv:
    folder = sys.argv[sys.argv.index("-B") + 1]
    (target,) = [x.partition("=")[2] for x in sys.argv if "LIBRARY_OUTPUT_DIRECTORY" in x]
    pathlib.Path(folder, "target").write_text(target)
    if fails == "gpu":
        print("-- spectral_kernels: without CUDA kernels: {NO_GPU}")
    elif cuda != "0":
        print("-- spectral_kernels: CUDA kernels for architectures 90; nvcc takes minutes")
elif fails == "cxx" or (fails == "nvcc" and cuda != "0"):
    sys.exit("the compiler's words")
else:
    target = pathlib.Path(sys.argv[sys.argv.index("--build") + 1], "target").read_text()
    pathlib.Path(target).mkdir(parents=True, exist_ok=True)
    pathlib.Path(target, "_native{SUFFIX}").write_text(cuda)
"""


@pytest.fixture
def source(tmp_path):
    """A copy of the sources of the package."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "_native_left_out.txt")
    for name in ("csrc", "spectral_kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    return folder


def environment_of(**variables):
    """The environment without what changes a build, but for ``variables``."""
    ours = ("CXX", "CXXFLAGS", "CUDACXX", "SPECTRAL_KERNELS_NATIVE", "SPECTRAL_KERNELS_CUDA")
    return {**{k: v for k, v in os.environ.items() if k not in ours}, **variables}


@pytest.fixture
def cmake(tmp_path):
    """Environment variables with which CMAKE is found as cmake, beside a compiler."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name, text in (("cmake", CMAKE), ("c++", "#!/bin/sh\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def pip_wheel(source, **variables):
    """Let pip build a wheel of ``source``; return its exit code, its output and the wheel's files.

    The files are a mapping from names to bytes, empty if there is no wheel; TAG holds its tag.
    """
    out = Path(tempfile.mkdtemp(dir=source.parent))
    result = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation",
         "-w", str(out), str(source)],
        env=environment_of(**variables), capture_output=True, text=True, check=False,
    )  # fmt: skip
    files = {}
    for wheel in out.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
        files[TAG] = wheel.stem.split("-", 2)[2]
    return result.returncode, result.stdout + result.stderr, files


def has_module(files):
    return f"spectral_kernels/_native{SUFFIX}" in files


def check_pure(files):
    """Assert that a wheel holds Python only, and says that it is for every platform."""
    assert files[TAG] == "py3-none-any"
    (said,) = [text.decode() for name, text in files.items() if name.endswith("/WHEEL")]
    assert "\nRoot-Is-Purelib: true\n" in said
    assert "\nTag: py3-none-any\n" in said
    assert not any(name.endswith(".so") for name in files)
    assert "spectral_kernels/__init__.py" in files


@pytest.fixture
def build_tools():
    pytest.importorskip("pybind11", reason="building needs the test extra")
    pytest.importorskip("setuptools", reason="building needs the test extra")


@pytest.mark.takes_seconds
def test_without_a_compiler_the_install_succeeds_and_says_so(tmp_path, source, build_tools):
    (tmp_path / "empty").mkdir()
    code, output, files = pip_wheel(source, PATH=str(tmp_path / "empty"))
    assert code == 0, output
    assert output.count(f"{WITHOUT} the compiled module: no C++ compiler was found") == 1
    assert {
        "spectral_kernels/regularizer.py", "spectral_kernels/integrations/transformers.py",
        "spectral_kernels/py.typed",
    } <= set(files)  # fmt: skip
    assert not any(name.endswith(".so") for name in files)
    assert files[REPORT].decode().splitlines() == [
        "no C++ compiler was found; install g++ or clang++, then reinstall it"
    ]
    check_pure(files)


FAILING = {"a compiler that does nothing": {"CXX": shutil.which("false") or "false"},
           "headers that are missing": {"CXXFLAGS": "-nostdinc"},
           "a compiler that is not there": {"CXX": "no-such-c++"}}  # fmt: skip


@pytest.mark.takes_seconds
@pytest.mark.parametrize("what", FAILING)
def test_with_a_failing_compiler_the_install_succeeds_and_keeps_its_output(
    source, build_tools, what
):
    if shutil.which("c++") is None or shutil.which("cmake") is None:
        pytest.skip("no C++ compiler or no CMake on this machine")
    code, output, files = pip_wheel(source, SPECTRAL_KERNELS_CUDA="0", **FAILING[what])
    assert code == 0, output
    check_pure(files)
    reason, _, kept = files[REPORT].decode().partition("\n")
    assert reason.startswith("CMake or the compiler")
    assert output.count(f"{WITHOUT} the compiled module: {reason}") == 1
    (where,) = re.findall(r"The output is in (\S+),", output)
    assert Path(where).read_bytes() == files[REPORT]
    last = [line for line in kept.splitlines() if line.strip()][-1]
    assert last in output[output.index(WITHOUT) :]
    assert {"a compiler that does nothing": "FAILED", "headers that are missing": "fatal error",
            "a compiler that is not there": "no-such-c++"}[what] in kept  # fmt: skip


@pytest.mark.takes_seconds
def test_where_python_has_no_headers_the_install_says_what_to_install(
    tmp_path, source, cmake, build_tools
):
    """As Debian's Python does before its package of headers is there."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sysconfig\n"
        "sysconfig._INSTALL_SCHEMES['venv']['include'] = '/no/headers'\n"
        "sysconfig._INSTALL_SCHEMES['posix_prefix']['include'] = '/no/headers'\n"
    )
    code, output, files = pip_wheel(source, **cmake, FAILS="cxx", PYTHONPATH=str(tmp_path))
    assert code == 0, output
    check_pure(files)
    package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
    said = f"/no/headers has no Python.h; install {package} (Debian's name), then reinstall it\n"
    assert files[REPORT].decode().startswith(said)


@pytest.mark.takes_seconds
@pytest.mark.parametrize("demand", ["SPECTRAL_KERNELS_NATIVE", "SPECTRAL_KERNELS_CUDA"])
def test_a_build_that_is_demanded_fails_where_the_compiler_does(source, cmake, build_tools, demand):
    variables = {**cmake, "FAILS": "cxx", demand: "1"}
    code, output, files = pip_wheel(source, **variables)
    assert code != 0
    assert "the compiler's words" in output
    assert "error: CMake or the compiler c++ failed;" in output
    assert WITHOUT not in output
    assert files == {}
    code, _, files = pip_wheel(source, **{**variables, "FAILS": ""})
    assert code == 0
    assert has_module(files)


@pytest.mark.takes_seconds
def test_a_build_that_is_demanded_fails_without_a_compiler(tmp_path, source, build_tools):
    (tmp_path / "empty").mkdir()
    variables = {"PATH": str(tmp_path / "empty"), "SPECTRAL_KERNELS_NATIVE": "1"}
    code, output, _ = pip_wheel(source, **variables)
    assert code != 0
    assert "error: no C++ compiler was found" in output


@pytest.mark.takes_seconds
@pytest.mark.parametrize(
    ("name", "accepted"),
    [("SPECTRAL_KERNELS_NATIVE", "auto, 1"), ("SPECTRAL_KERNELS_CUDA", "auto, 0, 1")],
)
def test_an_unknown_value_of_a_variable_is_an_error(source, cmake, build_tools, name, accepted):
    code, output, _ = pip_wheel(source, **{**cmake, "FAILS": "", name: "yes"})
    assert code != 0
    assert f"{name}: expected {accepted}, got 'yes'" in output


@pytest.mark.takes_seconds
def test_an_nvcc_that_fails_costs_the_cuda_kernels_alone(source, cmake, build_tools):
    code, output, files = pip_wheel(source, **cmake, FAILS="nvcc")
    assert code == 0
    assert files[f"spectral_kernels/_native{SUFFIX}"] == b"0"  # SPECTRAL_KERNELS_CUDA
    reason, _, kept = files[REPORT].decode().partition("\n")
    assert reason == "nvcc failed; fix that, then reinstall it"
    assert "the compiler's words" in kept
    assert f"{WITHOUT} its CUDA kernels: {reason}" in output


@pytest.mark.takes_seconds
def test_cuda_kernels_that_are_left_out_are_recorded_without_an_output(source, cmake, build_tools):
    code, output, files = pip_wheel(source, **cmake, FAILS="gpu")
    assert code == 0
    assert has_module(files)
    assert files[REPORT].decode() == f"{NO_GPU}\n"
    assert f"{WITHOUT} its CUDA kernels: {NO_GPU}\n" in output


MISSING = {"cmake": "cmake: [Errno 2]", "ninja": "'ninja' '--version'", "pybind11": "pybind11: no"}


@pytest.mark.takes_seconds
@pytest.mark.parametrize("what", MISSING)
def test_a_missing_tool_is_like_a_failing_compiler(tmp_path, source, build_tools, what):
    found = {name: shutil.which(name) for name in ("c++", "cmake", "ninja")}
    if None in found.values():
        pytest.skip(f"not on this machine: {[name for name in found if not found[name]]}")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in {*found, "as", "ld", "uname"} - {what}:
        (tools / name).symlink_to(shutil.which(name))
    variables = {"PATH": str(tools), "SPECTRAL_KERNELS_CUDA": "0"}
    if what == "pybind11":  # it is not there for the Python that runs setup.py
        (tmp_path / "pybind11.py").write_text("raise ImportError('no pybind11')\n")
        variables["PYTHONPATH"] = str(tmp_path)
    code, output, files = pip_wheel(source, **variables)
    assert code == 0, output
    check_pure(files)
    reason, _, kept = files[REPORT].decode().partition("\n")
    assert reason == "CMake or the compiler c++ failed; fix that, then reinstall it"
    assert MISSING[what] in kept


@pytest.mark.takes_seconds
def test_nothing_of_an_earlier_build_gets_into_a_wheel(source, cmake, build_tools):
    for fails in ("", "cxx", "nvcc", "gpu", "cxx", ""):
        code, output, files = pip_wheel(source, **cmake, FAILS=fails)
        assert code == 0, output
        assert has_module(files) == (fails != "cxx")
        assert (files[TAG] == "py3-none-any") == (fails == "cxx")
        assert (REPORT in files) == (fails != "")


@pytest.mark.takes_seconds
def test_nothing_of_an_earlier_build_stays_beside_the_sources(source, cmake, build_tools):
    for fails in ("", "cxx", ""):
        done = subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            cwd=source, env=environment_of(**cmake, FAILS=fails),
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert (WITHOUT in done.stderr) == bool(fails)
        assert (source / "spectral_kernels" / f"_native{SUFFIX}").exists() == (not fails)
        assert (source / REPORT).exists() == bool(fails)

"""Builds the native module with CMake and Ninja; everything else is in pyproject.toml."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def cxx_compiler():
    """Return the C++ compiler that CMake would use, or None."""
    candidates = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else []
    for name in [*candidates, "c++", "g++", "clang++"]:
        if shutil.which(name):
            return name
    return None


def build_folder(cxx):
    """Return where objects stay: the next build compiles what has changed, with or without CUDA.

    A folder for each Python, each compiler, and the variables that CMake reads the first time only.
    """
    variables = ("CXX", "CXXFLAGS", "CUDACXX", "CUDAARCHS")
    asked = [shutil.which(cxx), shutil.which("nvcc"), *map(os.getenv, variables)]
    key = hashlib.sha256(repr(asked).encode()).hexdigest()[:12]
    return ROOT / "build" / f"native-{sys.implementation.cache_tag}-{key}"


class CMakeBuild(build_ext):
    """Runs CMake for the one extension; without a C++ compiler the package goes without it."""

    def build_extension(self, ext):
        """Build `ext` into the place where setuptools expects it."""
        cxx = cxx_compiler()
        if cxx is None:
            ext.optional = True
            self.warn(
                "spectral_kernels: no C++ compiler was found, so the C++ backend is left out; "
                "the PyTorch reference will serve. Install one and reinstall to get it."
            )
            return
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = build_folder(cxx)
        ninja = shutil.which("ninja") or "ninja"  # that of the last build may be gone
        build.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [
                *("cmake", "-S", str(ROOT / "csrc"), "-B", str(build), "-G", "Ninja"),
                "-DCMAKE_BUILD_TYPE=Release",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DCMAKE_MAKE_PROGRAM={ninja}",
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            ],
            check=True,
        )
        subprocess.run(["cmake", "--build", str(build)], check=True)


setup(
    ext_modules=[Extension("spectral_kernels._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)

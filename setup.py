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
from setuptools.errors import CompileError, OptionError

ROOT = Path(__file__).parent.resolve()
WHEN = "when spectral_kernels was installed"


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


def asked_for(name, *accepted):
    """Return the value of an environment variable, "auto" if it is not set."""
    value = os.environ.get(name) or "auto"
    if value not in accepted:
        raise OptionError(f"{name}: got {value!r}; accepted are {', '.join(accepted)}")
    return value


def output_of_failure(folder, target, cuda):
    """Compile in `folder` into the folder `target`; return the output if that fails, else None."""
    configure = [
        *("cmake", "-S", str(ROOT / "csrc"), "-B", str(folder), "-G", "Ninja"),
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        # That of the last build may be gone.
        f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja') or 'ninja'}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    environment, lines = {**os.environ, "SPECTRAL_KERNELS_CUDA": cuda}, []
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    for command in (configure, ["cmake", "--build", str(folder)]):
        try:
            running = subprocess.Popen(
                command, env=environment, text=True, errors="replace", **pipes
            )
        except OSError as error:
            return f"cmake: {error}\n"
        with running:
            for line in running.stdout:
                print(line, end="", flush=True)
                lines.append(line)
        if running.returncode:
            return "".join(lines)
    return None


class CMakeBuild(build_ext):
    """Runs CMake for the one extension; where no C++ compiler works, the package goes without it.

    A file of the package then says what failed, and spectral_kernels/tables/native.py reads it.
    """

    def run(self):
        """Build; the package gets what this build has made, and loses what an earlier one has."""
        self.is_built, self.what, self.output = True, None, ""
        super().run()
        package = ROOT if self.inplace else Path(self.build_lib).resolve()
        package = package / "spectral_kernels"
        report = package / "_native_failed.txt"
        report.unlink(missing_ok=True)
        if not self.is_built:
            (package / self.get_ext_filename("_native")).unlink(missing_ok=True)
        if self.what is not None:
            package.mkdir(parents=True, exist_ok=True)
            report.write_text(f"{self.what}\n{self.output}", "utf-8", "replace")
            left_out = "its CUDA kernels" if self.is_built else "the compiled module"
            said = f"spectral_kernels is installed without {left_out}: {self.what}"
            if self.output:
                last = "\n".join([x for x in self.output.splitlines() if x.strip()][-12:])
                said += f". The output is in {report}, installed too; it ends:\n{last}"
            print(said, file=sys.stderr, flush=True)

    def build_extension(self, ext):
        """Build `ext` into the place where setuptools expects it."""
        demanded = asked_for("SPECTRAL_KERNELS_NATIVE", "auto", "1") == "1"
        cuda = asked_for("SPECTRAL_KERNELS_CUDA", "auto", "0", "1")
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        cxx = cxx_compiler()
        if cxx is None:
            self.what = (
                f"no C++ compiler was found {WHEN}; install g++ or clang++, then reinstall it"
            )
        else:
            self.output = output_of_failure(build_folder(cxx), target, cuda)
            if self.output is None:
                return
            had_cuda = cuda == "auto" and "CUDA kernels for architectures" in self.output
            if had_cuda and output_of_failure(build_folder(cxx), target, "0") is None:
                self.what = f"nvcc failed {WHEN}; fix that, then reinstall it"
                return
            self.what = f"CMake or the compiler {cxx} failed {WHEN}; fix that, then reinstall it"
        if demanded or cuda == "1":
            raise CompileError(f"{self.what} (SPECTRAL_KERNELS_NATIVE=1 or _CUDA=1 demands it)")
        self.is_built, ext.optional = False, True


setup(
    ext_modules=[Extension("spectral_kernels._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)

"""Builds the native module with CMake and Ninja, and the description for the package index.

Everything else is in pyproject.toml.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.egg_info import egg_info
from setuptools.errors import CompileError, OptionError

ROOT = Path(__file__).parent.resolve()
README = (ROOT / "README.md").read_text("utf-8")


def cxx_compiler():
    """Return the C++ compiler that CMake would use, or None."""
    candidates = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else []
    for name in [*candidates, "c++", "g++", "clang++"]:
        if shutil.which(name):
            return name
    return None


def failed(cxx):
    """Return what to do about a build that failed: Linux often has a Python without its headers."""
    folder = Path(sysconfig.get_path("include"))
    if (folder / "Python.h").exists():
        return f"CMake or the compiler {cxx} failed; fix that, then reinstall it"
    package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
    return f"{folder} has no Python.h; install {package} (Debian's name), then reinstall it"


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
        raise OptionError(f"{name}: expected {', '.join(accepted)}, got {value!r}")
    return value


def compiled(folder, target, cuda):
    """Compile in `folder` into the folder `target`; return whether that worked, and the output."""
    try:
        import pybind11
    except ImportError as error:  # without pip's isolation of builds
        return False, f"pybind11: {error}\n"
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
            return False, f"cmake: {error}\n"
        with running:
            for line in running.stdout:
                print(line, end="", flush=True)
                lines.append(line)
        if running.returncode:
            return False, "".join(lines)
    return True, "".join(lines)


class CMakeBuild(build_ext):
    """Runs CMake for the one extension; where no C++ compiler works, the package goes without it.

    A file of the package then says what was left out, and why; spectral_kernels/tables/native.py
    reads it.
    """

    def run(self):
        """Build; the package gets what this build has made, and loses what an earlier one has."""
        self.is_built, self.why, self.output = False, None, ""
        super().run()
        package = ROOT if self.inplace else Path(self.build_lib).resolve()
        package = package / "spectral_kernels"
        record = package / "_native_left_out.txt"
        record.unlink(missing_ok=True)
        if not self.is_built:
            (package / self.get_ext_filename("_native")).unlink(missing_ok=True)
            self.distribution.ext_modules = []  # the wheel is for every platform, py3-none-any
            self.get_finalized_command("bdist_wheel").root_is_pure = True
        if self.why is not None:
            package.mkdir(parents=True, exist_ok=True)
            record.write_text(f"{self.why}\n{self.output}", "utf-8", "replace")
            left_out = "its CUDA kernels" if self.is_built else "the compiled module"
            said = f"spectral_kernels is built without {left_out}: {self.why}"
            if self.output:
                last = "\n".join([x for x in self.output.splitlines() if x.strip()][-12:])
                said += f". The output is in {record}, installed too; it ends:\n{last}"
            print(said, file=sys.stderr, flush=True)

    def build_extension(self, ext):
        """Build `ext` into the place where setuptools expects it."""
        demanded = asked_for("SPECTRAL_KERNELS_NATIVE", "auto", "1") == "1"
        cuda = asked_for("SPECTRAL_KERNELS_CUDA", "auto", "0", "1")
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        cxx = cxx_compiler()
        if cxx is None:
            self.why = "no C++ compiler was found; install g++ or clang++, then reinstall it"
        else:
            self.is_built, output = compiled(build_folder(cxx), target, cuda)
            if self.is_built:
                without = re.search(r"spectral_kernels: without CUDA kernels: (.+)", output)
                self.why = without and without[1]
                return
            self.output = output
            if cuda == "auto" and "spectral_kernels: CUDA kernels for architectures" in output:
                self.is_built, _ = compiled(build_folder(cxx), target, "0")
                if self.is_built:
                    self.why = "nvcc failed; fix that, then reinstall it"
                    return
            self.why = failed(cxx)
        if demanded or cuda == "1":
            raise CompileError(f"{self.why} (SPECTRAL_KERNELS_NATIVE=1 or _CUDA=1 demands it)")
        ext.optional = True


class Description(egg_info):
    """Makes links of README.md absolute: the package index has no other file of the repository."""

    def finalize_options(self):
        """Link releases to their tag."""
        super().finalize_options()
        about = self.distribution.metadata
        tag = "HEAD" if re.search("dev|[+]", about.version) else f"v{about.version}"

        def absolute(found):
            kind = "raw" if found[2].endswith(".png") else "blob"
            return f"{found[1]}{about.project_urls['Source']}/{kind}/{tag}/{found[2]}"

        parts = README.split("```")  # every second one is code
        parts[::2] = [
            re.sub(r'(\]\(|src="|href=")(?!\w+:|#)([^)"\s]+)', absolute, x) for x in parts[::2]
        ]
        about.long_description = "```".join(parts)


setup(
    ext_modules=[Extension("spectral_kernels._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "egg_info": Description},
    long_description=README,
    long_description_content_type="text/markdown",
)

"""The package as people get it: ``python -m tests.project.wheel``.

Builds the sdist, and the wheel as it would be published: without CUDA C++, from the objects that
the installation here has left in build/. Compares them, and installs the wheel into an empty
environment beside torch and pytest. There it runs the tests that came with the sdist, all but those
which need more (ELSEWHERE). Meanwhile every extra that is for users is installed and imported, each
on top of the wheel alone.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from tests import ROOT

# Need sources, a module with CUDA C++ or CUDA's headers, or extras: they run where these are.
ELSEWHERE = (
    "project/test_commands.py", "backends/test_cuda_compiled.py", "backends/test_cuda_emulated.py",
    "backends/test_other_processors.py",
    "bench", "cli", "examples", "integrations", "project/test_docs.py", "project/test_install.py",
    "project/test_messages.py", "project/test_readme.py", "project/test_types.py",
    "selection/test_selection_views.py",
)  # fmt: skip
# What an extra is for, by its name.
EXTRAS = {
    "plot": "import spectral_kernels.cli.plot.picture",
    "inspect": "import spectral_kernels.cli.inspect.page, safetensors",
    "demo": "from spectral_kernels.cli.demo.experiment import *; digits(torch.Generator())",
    "transformers": "from spectral_kernels.integrations.transformers import SpectralCallback",
    "lightning": "from spectral_kernels.integrations.lightning import SpectralCallback",
    "stable-baselines3": "from spectral_kernels.integrations.stable_baselines3 import *",
}


def run(*command, cwd, **environment):
    """Run a command whose failure is that of the whole."""
    print("$", *(f"{k}={v}" for k, v in environment.items()), *command, flush=True)
    subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, check=True)


def install(python: str, *what: str) -> None:
    """Install into the environment of ``python``, which needs no pip of its own."""
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", *what, cwd=ROOT)


def environment(folder: Path, on: Path | None = None) -> str:
    """Make a virtual environment, perhaps on top of another one, and return its Python."""
    venv.create(folder)
    python = folder / "bin" / "python"
    if on is not None:
        where = "import sysconfig; print(sysconfig.get_path('purelib'))"
        own, below = (
            subprocess.run([p, "-c", where], capture_output=True, text=True, check=True).stdout
            for p in (python, on / "bin" / "python")
        )
        (Path(own.strip()) / "below.pth").write_text(below)
    return str(python)


def contents(wheel: Path) -> str:
    """Return size and files of a wheel, the large ones and how many others."""
    files = sorted(zipfile.ZipFile(wheel).infolist(), key=lambda f: -f.file_size)
    lines = [f"{wheel.name}: {wheel.stat().st_size / 1e3:.0f} kB, {len(files)} files"]
    lines += [f"  {f.file_size / 1e3:7.1f} kB  {f.filename}" for f in files[:5]]
    rest = sum(f.file_size for f in files[5:])
    return "\n".join([*lines, f"  {rest / 1e3:7.1f} kB  {len(files[5:])} others"])


def environment_with_torch(folder: Path) -> str:
    """Make a virtual environment with this torch and what runs tests, and return its Python."""
    python = environment(folder)
    install(
        python,
        f"torch=={torch.__version__.partition('+')[0]}",
        "pytest",
        "pytest-xdist",
        "hypothesis",
    )
    return python


def built(folder: Path) -> tuple[Path, Path]:
    """Build into ``folder``; return the sources of the sdist, less the package, and the wheel."""
    for scratch in (*ROOT.glob("build/lib*"), *ROOT.glob("build/bdist*")):
        shutil.rmtree(scratch)  # what setuptools finds there it puts into a wheel
    for kind in ("--sdist", "--wheel"):
        run(sys.executable, "-m", "build", kind, "--no-isolation", "--outdir", str(folder),
            str(ROOT), cwd=folder, SPECTRAL_KERNELS_CUDA="0",
            SPECTRAL_KERNELS_NATIVE="1")  # fmt: skip
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    # What the package index would say of them, warnings too.
    run(sys.executable, "-m", "twine", "check", "--strict", str(sdist), str(wheel), cwd=folder)
    print(contents(wheel), flush=True)
    names = set(zipfile.ZipFile(wheel).namelist())
    assert any(name.startswith("spectral_kernels/_native.") for name in names), names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"spectral_kernels"}
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "sources", filter="data")
    (source,) = (folder / "sources").iterdir()
    for name in ("setup.py", "pyproject.toml", *tracked("csrc"), *tracked("spectral_kernels")):
        assert (source / name).read_bytes() == (ROOT / name).read_bytes(), name
    modules = {name for name in names if name.endswith(".py")}
    assert modules == {name for name in tracked("spectral_kernels") if name.endswith(".py")}
    (source / "spectral_kernels").rename(folder / "not imported")
    return source, wheel


def tracked(folder: str) -> list[str]:
    """Return the files of a folder that git knows, relative to the root."""
    found = subprocess.run(
        ["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return found.stdout.splitlines()


def main() -> int:
    """Build, install and test; the exit code is that of the first command that fails."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            check(folder)
        except subprocess.CalledProcessError as error:
            print("failed:", *error.cmd, file=sys.stderr)
            return error.returncode
    return 0


def check(folder: Path) -> None:
    """Do what the module says, in an empty folder."""
    with ThreadPoolExecutor() as pool:  # torch takes a while to unpack
        python = pool.submit(environment_with_torch, folder / "venv")
        source, wheel = built(folder)
    python = python.result()
    install(python, str(wheel))
    run(python, "-m", "spectral_kernels", "env", cwd=source)

    def check_extra(extra: str) -> None:
        own = environment(folder / extra, on=folder / "venv")
        install(own, f"{wheel}[{extra}]")
        run(own, "-c", EXTRAS[extra], cwd=folder)

    left_out = [f"--ignore=tests/{name}" for name in ELSEWHERE]
    with ThreadPoolExecutor() as pool:  # downloads, while tests run
        extras = pool.map(check_extra, EXTRAS)
        run(python, "-m", "pytest", "-n", "auto", "--dist", "loadfile", "-m", "not gpu", *left_out,
            cwd=source, OMP_WAIT_POLICY="PASSIVE")  # fmt: skip
        list(extras)


if __name__ == "__main__":
    sys.exit(main())

"""Which compiled module is used, and what is said where it or its CUDA kernels are missing."""

import json
import shutil
import sys
from importlib.machinery import EXTENSION_SUFFIXES, PathFinder
from importlib.util import spec_from_file_location
from pathlib import Path

import pytest

from spectral_kernels import cli
from spectral_kernels.backends import choice
from spectral_kernels.tables import native
from tests import ROOT
from tests.support import processes

AGAIN = "pip install --force-reinstall --no-deps --no-cache-dir"
PACKAGE = Path(native.__file__).parent.parent


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """Nothing hidden, a record of the build that each test writes, and a known command."""
    monkeypatch.setattr(native, "hidden_package", lambda: None)
    monkeypatch.setattr(native, "command", lambda: AGAIN + " .")
    monkeypatch.setattr(choice, "command", lambda: AGAIN + " .")
    monkeypatch.setattr(native, "RECORD", tmp_path / "record.txt")
    return native.RECORD


@pytest.fixture
def module_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, native.NAME, None)


@pytest.fixture
def cuda_missing(monkeypatch):
    if (reason := choice.unavailable("cpu")) is not None:
        pytest.skip(reason)
    monkeypatch.delattr(native.native_module(), "cuda", raising=False)


def rows_of_env(capsys):
    assert cli.main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {label: value.strip() for label, _, value in (x.partition("  ") for x in lines)}


@pytest.mark.usefixtures("module_missing")
def test_env_tells_in_one_line_why_the_module_is_missing(installed, capsys):
    installed.write_text("no C++ compiler was found; install g++, then reinstall it\n")
    why = (
        "the compiled module is missing: when it was built, no C++ compiler was found; install "
        f"g++, then reinstall it: SPECTRAL_KERNELS_NATIVE=1 {AGAIN} ."
    )
    rows = rows_of_env(capsys)
    assert rows["backend cpu"] == rows["backend cuda"] == f"no: {why}"
    installed.write_text("CMake failed; fix that, then reinstall it\nfatal error: no Python.h\n")
    assert rows_of_env(capsys)["backend cpu"] == (
        "no: the compiled module is missing: when it was built, CMake failed; fix that, then "
        f"reinstall it: SPECTRAL_KERNELS_NATIVE=1 {AGAIN} . (the output of that build is in "
        f"{installed})"
    )
    installed.unlink()
    assert rows_of_env(capsys)["backend cpu"] == (
        f"no: the compiled module is missing: {PACKAGE} has not been built; install it: {AGAIN} ."
    )


@pytest.mark.usefixtures("cuda_missing")
def test_env_tells_in_one_line_why_the_module_has_no_cuda_kernels(installed, capsys):
    installed.write_text("nvcc was found, but no NVIDIA GPU; to have them, reinstall it\n")
    rows = rows_of_env(capsys)
    assert rows["backend cpu"] == "works"
    assert rows["backend cuda"] == (
        "no: the compiled module has no CUDA kernels: when it was built, nvcc was found, but no "
        f"NVIDIA GPU; to have them, reinstall it: SPECTRAL_KERNELS_CUDA=1 {AGAIN} ."
    )
    installed.write_text("nvcc failed; fix that, then reinstall it\nits words\n")
    assert choice.unavailable("cuda").endswith(f"(the output of that build is in {installed})")
    installed.unlink()
    assert choice.unavailable("cuda") == (
        "the compiled module has no CUDA kernels: reinstall the package: "
        f"SPECTRAL_KERNELS_CUDA=1 {AGAIN} ."
    )


@pytest.mark.takes_seconds
def test_the_warning_of_the_reference_says_the_same(tmp_path):
    record = tmp_path / "record.txt"
    record.write_text("CMake failed; fix that, then reinstall it\n")
    result = processes.run(
        "import sys, pathlib; sys.modules['spectral_kernels._native'] = None\n"
        "import torch\n"
        "from spectral_kernels import SpectralRegularizer\n"
        "from spectral_kernels.tables import native\n"
        "native.hidden_package = lambda: None\n"
        f"native.RECORD = pathlib.Path({str(record)!r})\n"
        "for _ in range(2): SpectralRegularizer(torch.nn.Linear(3, 4)).penalty()\n"
    )
    assert result.returncode == 0, result.stderr
    said = "uses its PyTorch reference: the compiled module is missing: when it was built, CMake"
    assert result.stderr.count(said) == 1


class Installed:
    """A distribution that came from ``url``."""

    def __init__(self, **url):
        self.url = url

    def read_text(self, name):
        assert name == "direct_url.json"
        return json.dumps(self.url) if self.url else None


ORIGINS = {
    "a folder": ({"url": "file:///some/where%20else", "dir_info": {}}, "/some/where else"),
    "a repository": (
        {"url": "https://host/package", "vcs_info": {"vcs": "git", "commit_id": "1"}},
        "git+https://host/package",
    ),
    "a wheel": ({"url": "file:///a.whl"}, "--no-binary spectral_kernels spectral_kernels"),
    "the index": ({}, "--no-binary spectral_kernels spectral_kernels"),
}


@pytest.mark.parametrize("origin", ORIGINS)
def test_the_command_installs_from_where_the_package_came(origin, monkeypatch, tmp_path):
    came, source = ORIGINS[origin]
    monkeypatch.setattr(native, "PACKAGE", tmp_path / "site-packages" / "spectral_kernels")
    monkeypatch.setattr(native, "distribution", lambda name: Installed(**came))
    assert native.command() == f"{AGAIN} {source}"


def test_the_command_of_a_checkout_installs_the_checkout(monkeypatch, tmp_path):
    (tmp_path / "setup.py").touch()
    monkeypatch.setattr(native, "PACKAGE", tmp_path / "spectral_kernels")
    assert native.command() == f"{AGAIN} -e {tmp_path}"


@pytest.fixture
def checkout(tmp_path):
    """A folder with the package but without its compiled module."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "_native*")
    shutil.copytree(PACKAGE, tmp_path / "checkout" / "spectral_kernels", ignore=ignored)
    return tmp_path / "checkout"


class Editable:
    """The finder of an editable installation, as setuptools writes it for a flat layout."""

    def __init__(self, package):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name == "spectral_kernels":
            return spec_from_file_location(name, self.package / "__init__.py")
        if name.startswith("spectral_kernels."):
            return PathFinder.find_spec(name, [str(self.package)])
        return None


@pytest.fixture
def another(tmp_path):
    """The module of another package, which no Python could load."""
    package = tmp_path / "another" / "spectral_kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    module = package / f"_native{EXTENSION_SUFFIXES[0]}"
    module.write_text("not to be loaded")
    return module


@pytest.mark.parametrize("how", ["in a folder", "editable"])
def test_a_package_that_hides_an_installed_one_knows_it(monkeypatch, checkout, another, how):
    package = checkout / "spectral_kernels"
    monkeypatch.setattr(native, "PACKAGE", package)
    folders, finders = [str(checkout)], [PathFinder]
    if how == "editable":
        finders.append(Editable(another.parent))
    else:
        folders.append(str(another.parent.parent))
    monkeypatch.setattr(sys, "path", folders)
    monkeypatch.setattr(sys, "meta_path", finders)
    assert native.hidden_package() == (
        f"{package} hides the package that is installed in {another.parent}; work in another "
        f"folder, or install this one: pip install -e {checkout}"
    )
    another.unlink()
    assert native.hidden_package() is None


@pytest.mark.takes_seconds
def test_the_module_of_another_package_is_not_used(checkout, another):
    result = processes.run(
        "import sys; from pathlib import Path\n"
        "from tests.project.test_native_module import Editable\n"
        "for name in [x for x in sys.modules if x.startswith('spectral_kernels')]:\n"
        "    del sys.modules[name]\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "sys.meta_path.append(Editable(Path(sys.argv[2])))\n"
        "from spectral_kernels.backends import choice\n"
        "print(choice.unavailable('cpu'))\n",
        checkout,
        another.parent,
    )
    assert result.returncode == 0, result.stderr
    missing = f"the compiled module is missing: {checkout}/spectral_kernels hides the package"
    assert result.stdout.startswith(missing)


@pytest.mark.takes_seconds
def test_benches_say_on_which_kernels_they_run(checkout):
    pytest.importorskip("pytest_benchmark", reason="needs the bench extra")
    shutil.copytree(ROOT / "tests" / "support", checkout / "tests" / "support")
    for name in ("tests/__init__.py", "pyproject.toml"):
        shutil.copy(ROOT / name, checkout / name)
    shutil.copytree(ROOT / "bench", checkout / "bench", ignore=shutil.ignore_patterns("results"))
    result = processes.run(
        "import os, sys, pytest; os.chdir(sys.argv[1]); sys.path.insert(0, sys.argv[1])\n"
        "sys.exit(pytest.main(['--collect-only', 'bench/suites/test_bench_memory.py']))\n",
        checkout,
    )
    assert result.returncode == 0, result.stdout
    assert "spectral_kernels: without the C++ kernels: the compiled module is missing" in (
        result.stdout
    )

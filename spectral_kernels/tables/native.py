"""The compiled module: loaded here alone, and only with the tables of this version."""

from __future__ import annotations

import importlib
import json
import sys
from importlib.machinery import EXTENSION_SUFFIXES, PathFinder
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit
from urllib.request import url2pathname

from .schema import offsets

NAME = "spectral_kernels._native"
PACKAGE = Path(__file__).parent.parent
# What setup.py leaves where it has left something out: a sentence, then the output if that failed.
RECORD = PACKAGE / "_native_left_out.txt"


def native_module() -> ModuleType:
    """Return the compiled module.

    Raises:
        ImportError: it is missing, cannot be loaded, or was built from another version; the message
            says which, and what to do.
    """
    try:
        # The finder of an editable installation would give the module of that one, of any version.
        if NAME not in sys.modules and PathFinder.find_spec(NAME, [str(PACKAGE)]) is None:
            raise ModuleNotFoundError
        native = importlib.import_module(NAME)
    except ModuleNotFoundError:
        why = (
            hidden_package()
            or left_out("SPECTRAL_KERNELS_NATIVE=1")
            or f"{PACKAGE} has not been built; install it: {command()}"
        )
        raise ImportError(f"the compiled module is missing: {why}") from None
    except ImportError as error:
        raise ImportError(f"the compiled module cannot be used: {error}") from error
    if getattr(native, "tables", None) != offsets() or not hasattr(native, "Guard"):
        raise ImportError(
            "the compiled module cannot be used: it was built from another version of the package; "
            f"reinstall it: {command()}"
        )
    return native


def left_out(variable: str) -> str | None:
    """Return why the build of this package has left something out, and what to do, or None.

    ``variable``, such as "SPECTRAL_KERNELS_CUDA=1", makes the next build an error instead.
    """
    try:
        why, _, output = RECORD.read_text("utf-8", "replace").partition("\n")
    except OSError:
        return None
    said = f"when it was built, {why}: {variable} {command()}"
    return f"{said} (the output of that build is in {RECORD})" if output.strip() else said


def command() -> str:
    """Return the command that installs this package anew from where it came."""
    pip = "pip install --force-reinstall --no-deps --no-cache-dir"
    if (PACKAGE.parent / "setup.py").exists():  # a checkout
        return f"{pip} -e {PACKAGE.parent}"
    try:
        came = json.loads(distribution("spectral_kernels").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        came = {}
    url = urlsplit(came.get("url", ""))
    if "vcs_info" in came:
        return f"{pip} {came['vcs_info']['vcs']}+{url.geturl()}"
    if url.scheme == "file" and not url.path.endswith(".whl"):
        return f"{pip} {url2pathname(url.path)}"
    return f"{pip} --no-binary spectral_kernels spectral_kernels"


def hidden_package() -> str | None:
    """Return that this package hides an installed one with a compiled module, or None.

    Python looks in the current folder first, and in a checkout it finds the sources there. The
    module of the other package is not used: it may be that of another version.
    """
    elsewhere = [path for path in sys.path if Path(path).resolve() != PACKAGE.parent.resolve()]
    specs = [PathFinder.find_spec("spectral_kernels", elsewhere)]
    # An editable installation may have a finder of its own.
    specs += [
        finder.find_spec("spectral_kernels", None)
        for finder in sys.meta_path
        if finder is not PathFinder
    ]
    for spec in specs:
        other = Path(spec.origin).parent if spec and spec.origin else PACKAGE
        modules = [other / f"_native{suffix}" for suffix in EXTENSION_SUFFIXES]
        if other.resolve() != PACKAGE.resolve() and any(module.exists() for module in modules):
            return (
                f"{PACKAGE} hides the package that is installed in {other}; work in another "
                f"folder, or install this one: pip install -e {PACKAGE.parent}"
            )
    return None

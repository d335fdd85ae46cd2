"""The compiled module: loaded here alone, and only with the tables of this version."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from .schema import offsets

# What setup.py leaves where a compiler failed: a sentence, then the output.
FAILURE = Path(__file__).parent.parent / "_native_failed.txt"


def native_module() -> ModuleType:
    """Return the compiled module.

    Raises:
        ImportError: it is missing, cannot be loaded, or was built from another version; the message
            says which, and what to do.
    """
    try:
        native = importlib.import_module("spectral_kernels._native")
    except ModuleNotFoundError:
        why = installation_failure() or (
            "spectral_kernels was installed without a C++ compiler, or not at all; install g++ or "
            "clang++, then reinstall spectral_kernels"
        )
        raise ImportError(f"the compiled module is missing: {why}") from None
    except ImportError as error:
        raise ImportError(f"the compiled module cannot be used: {error}") from error
    if getattr(native, "tables", None) != offsets() or not hasattr(native, "Guard"):
        raise ImportError(
            "the compiled module cannot be used: it was built from another version of the package; "
            "reinstall it"
        )
    return native


def installation_failure() -> str | None:
    """Return what failed when the package was installed, and where its output is, or None."""
    try:
        why, _, output = FAILURE.read_text("utf-8", "replace").partition("\n")
    except OSError:
        return None
    return f"{why}; the output is in {FAILURE}" if output.strip() else why

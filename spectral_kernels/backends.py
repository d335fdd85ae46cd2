"""Which backends exist on this machine, and why the others do not."""

from __future__ import annotations

import importlib
import warnings

import torch

from . import plan as plan_module
from . import reference

NAMES = ("cpu", "reference")
_said: set[str] = set()


class Reference:
    """Plain PyTorch on any device."""

    name = "reference"
    gram_matvec = staticmethod(reference.gram_matvec)
    normalize = staticmethod(reference.normalize)
    rank_one = staticmethod(reference.rank_one)


class Cpu:
    """The C++ kernels, on torch's number of threads."""

    name = "cpu"

    def __init__(self, native):
        self._gram_matvec = native.gram_matvec
        self._normalize = native.normalize
        self._rank_one = native.rank_one

    def gram_matvec(self, plan, state) -> None:
        """See :func:`reference.gram_matvec`."""
        self._gram_matvec(state.address, torch.get_num_threads())

    def normalize(self, plan, state) -> None:
        """See :func:`reference.normalize`."""
        self._normalize(state.address, torch.get_num_threads())

    def rank_one(self, plan, state, grads, accumulate: bool) -> None:
        """See :func:`reference.rank_one`; the plan is bound to ``grads`` already."""
        self._rank_one(state.address, accumulate, torch.get_num_threads())


def native_module():
    """Import the compiled module; ImportError says why there is none that can be used."""
    native = importlib.import_module("spectral_kernels._native")
    expected = {
        "matrix": plan_module.MATRIX.itemsize,
        "tile": plan_module.TILE.itemsize,
        "vector": plan_module.VECTOR.itemsize,
        "header": 8 * len(plan_module.HEADER),
    }
    if native.table_sizes != expected:
        raise ImportError("it was built from another version of the package; reinstall it")
    return native


def unavailable(name: str) -> str | None:
    """Return why backend ``name`` cannot run here, or None if it can."""
    if name == "cpu":
        try:
            native_module()
        except ModuleNotFoundError:
            return (
                "the compiled module is missing: no C++ compiler was found when the package was "
                "installed; install g++ or clang++ and reinstall spectral_kernels"
            )
        except ImportError as error:
            return f"the compiled module cannot be used: {error}"
    return None


def check_name(name: str) -> None:
    """Raise ValueError for an unknown backend and RuntimeError for one that cannot run here."""
    if name not in ("auto", *NAMES):
        accepted = ", ".join(repr(n) for n in ("auto", *NAMES))
        raise ValueError(f"backend: got {name!r}; accepted are {accepted}")
    if name != "auto" and (reason := unavailable(name)) is not None:
        raise RuntimeError(f"backend: {name!r} cannot run here: {reason}")


def choose(name: str, device: torch.device):
    """Return the backend for ``device``: the one asked for, or with "auto" the best there is.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a backend asked for by name that cannot run here or on that device.
    """
    check_name(name)
    if name == "reference":
        return Reference
    on_cpu = device.type == "cpu"
    if name == "cpu":
        if not on_cpu:
            raise RuntimeError(f"backend: 'cpu' serves weights on a CPU; these are on {device}")
        return Cpu(native_module().cpu)
    reason = unavailable("cpu") if on_cpu else f"no compiled backend serves {device.type} devices"
    if reason is None:
        return Cpu(native_module().cpu)
    if reason not in _said:
        _said.add(reason)
        warnings.warn(f"spectral_kernels uses its PyTorch reference: {reason}", stacklevel=2)
    return Reference

"""Which backends exist on this machine, and why the others do not."""

from __future__ import annotations

import importlib
import warnings

import torch

from . import plan as plan_module
from . import reference

NAMES = ("triton", "cpu", "reference")
_said: set[str] = set()


class Reference:
    """Plain PyTorch on any device."""

    name = "reference"
    min_tile_rows = plan_module.MIN_TILE_ROWS
    gram_matvec = staticmethod(reference.gram_matvec)
    normalize = staticmethod(reference.normalize)
    rank_one = staticmethod(reference.rank_one)

    @staticmethod
    def finish(plan, state, grads, accumulate: bool) -> None:
        """Do what normalize and rank_one do."""
        reference.normalize(plan, state)
        reference.rank_one(plan, state, grads, accumulate)


class Cpu:
    """The C++ kernels, on torch's number of threads."""

    name = "cpu"
    min_tile_rows = plan_module.MIN_TILE_ROWS

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

    def finish(self, plan, state, grads, accumulate: bool) -> None:
        """Do what normalize and rank_one do."""
        self.normalize(plan, state)
        self.rank_one(plan, state, grads, accumulate)


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
    if name == "triton":
        try:
            importlib.import_module("triton")
        except ImportError as error:
            return f"triton cannot be imported: {error}"
        if not interpreted() and not torch.cuda.is_available():
            return "torch finds no CUDA device"
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


def interpreted() -> bool:
    """Tell whether Triton runs its kernels in Python, on tensors of a CPU (TRITON_INTERPRET=1)."""
    return importlib.import_module("triton").knobs.runtime.interpret


def _triton():
    return importlib.import_module("spectral_kernels._triton.backend").Triton()


def check_name(name: str) -> None:
    """Raise ValueError for an unknown backend and RuntimeError for one that cannot run here."""
    if name not in ("auto", *NAMES):
        accepted = ", ".join(repr(n) for n in ("auto", *NAMES))
        raise ValueError(f"backend: got {name!r}; accepted are {accepted}")
    if name != "auto" and (reason := unavailable(name)) is not None:
        raise RuntimeError(f"backend: {name!r} cannot run here: {reason}")


def choose(name: str, device: torch.device, dtype: torch.dtype = torch.float32):
    """Return the backend for ``device``: the one asked for, or with "auto" the best there is.

    float64 weights on a GPU go to the reference.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a backend asked for by name that cannot run here or on that device.
    """
    check_name(name)
    on_cpu = device.type == "cpu"
    if name == "cpu" and not on_cpu:
        raise RuntimeError(f"backend: 'cpu' serves weights on a CPU; these are on {device}")
    if name == "triton":
        if on_cpu and not interpreted():
            raise RuntimeError("backend: 'triton' serves weights on a GPU; these are on a CPU")
        return Reference if dtype == torch.float64 else _triton()
    if name == "reference" or (name == "auto" and not on_cpu and dtype == torch.float64):
        return Reference
    if on_cpu:
        reason = unavailable("cpu")
    elif device.type == "cuda":
        reason = "the Triton kernels have not been run on a GPU yet; backend='triton' tries them"
    else:
        reason = f"no compiled backend serves {device.type} devices"
    if reason is None:
        return Cpu(native_module().cpu)
    if reason not in _said:
        _said.add(reason)
        warnings.warn(f"spectral_kernels uses its PyTorch reference: {reason}", stacklevel=2)
    return Reference

"""The choice of a backend: which ones can run on this machine, and why others cannot."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Literal

import torch

from ..selection.arguments import expected, one_of
from ..selection.warn import warn
from ..tables.native import command, left_out, native_module
from .base import Backend, Reference
from .native import Cpu, Cuda
from .selfcheck import disagreement

NAMES = ("triton", "cuda", "cpu", "reference")
BackendName = Literal["auto", "triton", "cuda", "cpu", "reference"]
# By device type, the fastest first (bench/results/2026-11-27-h200); the reference comes last.
_AUTO = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
_said: set[str] = set()
_checked: dict[tuple, str | None] = {}  # by name, device, dtype, r and optionally optimizer


def unavailable(name: str) -> str | None:
    """Return why backend ``name`` cannot run here, or None if it can."""
    if name == "triton":
        try:
            importlib.import_module("triton")
        except ImportError as error:
            return f"triton cannot be imported: {error}"
        if interpreted():
            return None
    if name in ("cpu", "cuda"):
        try:
            native = native_module()
        except ImportError as error:
            return str(error)
        if name == "cuda" and not hasattr(native, "cuda"):
            demand = "SPECTRAL_KERNELS_CUDA=1"
            why = left_out(demand) or f"reinstall the package: {demand} {command()}"
            return f"the compiled module has no CUDA kernels: {why}"
    if name in ("triton", "cuda") and not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return None


def interpreted() -> bool:
    """Return whether Triton interprets its kernels in Python, on a CPU (TRITON_INTERPRET=1)."""
    return importlib.import_module("triton").knobs.runtime.interpret


def failed_check(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    r: int = 1,
    operators: bool = False,
) -> str | None:
    """Return how an available backend differs from the reference on a small problem, or None.

    The check runs once per process, device, dtype and number ``r`` of vectors, or for operators.
    """
    key = name, device, dtype, "operators" if operators else r
    return _check(key, lambda: disagreement(_make(name, dtype), device, dtype, r, operators))


def for_steps(
    backend, optimizer: str, device: torch.device, dtype: torch.dtype, differs: Callable, r: int = 1
):
    """Return ``backend``, or the reference if an optimizer's steps with it are wrong.

    ``differs`` returns what is wrong, or None; it is called once per process, optimizer, device,
    dtype and number ``r`` of vectors, and only for a GPU.
    """
    if device.type != "cuda" or backend.name == "reference":
        return backend
    reason = _check((backend.name, device, dtype, r, optimizer), differs)
    if reason is None:
        return backend
    _say(f"{optimizer}: {reason}", "reference")
    return Reference()


def _check(key: tuple, differs: Callable[[], str | None]) -> str | None:
    if key not in _checked:
        _checked[key] = differs()
    name, device, dtype = key[:3]
    found = _checked[key]
    return None if found is None else f"{name!r} failed its check on {device} in {dtype}: {found}"


def check_backend(backend: str | Backend) -> None:
    """Check the argument ``backend``: a name, or a Backend, which is used as it is.

    Raises:
        TypeError: neither a name nor a Backend.
        ValueError: an unknown name.
        RuntimeError: a named backend that cannot run on this machine.
    """
    if isinstance(backend, Backend):
        return
    wanted = one_of([*map(repr, ("auto", *NAMES)), "a Backend object"])
    if not isinstance(backend, str):
        raise TypeError(expected("backend", wanted, backend))
    if backend not in ("auto", *NAMES):
        raise ValueError(expected("backend", wanted, backend))
    if backend != "auto" and (reason := unavailable(backend)) is not None:
        raise RuntimeError(f"backend: {backend!r} cannot run here: {reason}")


def choose(
    name: str | Backend,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    r: int = 1,
    operators: bool = False,
) -> Backend:
    """Return the backend for ``device``: the named one, or with "auto" the fastest that works.

    float64 weights on a GPU go to the reference. A GPU backend that "auto" finds must agree with
    the reference on a small problem, once per process, device, dtype and number ``r`` of vectors;
    if it does not, the next one is used, with a warning. There is no warning for a backend that is
    not installed or not built for the device, unless only the reference is left. Operators of
    convolutions have no kernels in CUDA C++: those of Triton stand in for "cuda".

    Raises:
        ValueError: an unknown name.
        RuntimeError: a named backend that cannot run on this machine or on that device.
    """
    check_backend(name)
    if isinstance(name, Backend):
        return name
    if name != "auto":
        if (reason := _refused(name, device)) is not None:
            raise RuntimeError(f"backend: {reason}")
        if not operators or name != "cuda":
            return _make(name, dtype)
    if device.type == "cuda" and dtype == torch.float64:
        return Reference()
    if device.type not in _AUTO:
        _say(f"no compiled backend supports {device.type} devices", "reference")
    candidates, missing = _AUTO.get(device.type, ()), []
    if operators:
        candidates = tuple(candidate for candidate in candidates if candidate != "cuda")
    for i, candidate in enumerate(candidates):
        if (reason := unavailable(candidate) or _refused(candidate, device)) is not None:
            missing.append(reason)
            continue
        if device.type == "cuda":
            reason = failed_check(candidate, device, dtype, r, operators)
        if reason is None:
            return _make(candidate, dtype)
        _say(reason, next(filter(_is_there(device), candidates[i + 1 :]), "reference"))
    if missing:
        _say("; ".join(dict.fromkeys(missing)), "reference")
    return Reference()


def _is_there(device: torch.device) -> Callable[[str], bool]:
    """Return a predicate of names: whether that backend can run on ``device``."""
    return lambda name: (unavailable(name) or _refused(name, device)) is None


def _make(name: str, dtype: torch.dtype):
    if name == "reference" or (name in ("triton", "cuda") and dtype == torch.float64):
        return Reference()
    if name == "triton":
        return importlib.import_module("spectral_kernels.backends.triton.backend").Triton()
    return Cpu(native_module().cpu) if name == "cpu" else Cuda(native_module().cuda)


def _refused(name: str, device: torch.device) -> str | None:
    """Return why an available backend does not support ``device``, or None if it does."""
    if name == "cpu" and device.type != "cpu":
        return f"'cpu' supports weights on a CPU; these are on {device}"
    if name == "triton" and device.type == "cpu" and interpreted():
        return None
    if name in ("triton", "cuda") and device.type != "cuda":
        where = "a CPU" if device.type == "cpu" else str(device)
        return f"{name!r} supports weights on a CUDA device; these are on {where}"
    if name == "cuda" and (problem := native_module().cuda.problem(device.index or 0)):
        return f"'cuda' cannot run on {device}: {problem}"
    return None


def _say(reason: str, instead: str) -> None:
    if reason not in _said:
        _said.add(reason)
        serves = "PyTorch reference" if instead == "reference" else f"{instead!r} backend"
        warn(f"spectral_kernels uses its {serves}: {reason}")

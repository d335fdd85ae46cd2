"""Weights that a model computes from others at every use: torch's parametrizations, pruning."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch

from .entries import LazyTensor
from .pool import Pool

_FLOATS = ("float32", "float64", "bfloat16", "float16")
# M.parametrizations.weight.0._u: module, parameter, and what is registered there.
_PLACE = re.compile(r"((?:.*\.)?)parametrizations\.([^.]+)\.(.+)")


def compute(stored: Pool) -> None:
    """Put the effective weights in the place of their parts."""
    for name, v in stored.ending("_v"):  # torch.nn.utils.weight_norm
        if (g := stored.get(f"{name}_g")) is not None:
            _normed(stored, name, g, v)
    for name, weight in stored.ending("_orig"):
        _of_hooks(stored, name, weight)
    places: dict[tuple[str, str], dict[str, LazyTensor]] = {}
    for name, tensor in stored.tensors.items():
        if match := _PLACE.fullmatch(name):
            places.setdefault((match[1], match[2]), {})[match[3]] = tensor
    for (module, parameter), parts in places.items():
        _of_parametrizations(stored, module + parameter, parts)


def _of_parametrizations(stored: Pool, name: str, parts: Mapping[str, LazyTensor]) -> None:
    """Compute weight_norm and spectral_norm of torch.nn.utils.parametrizations."""
    if set(parts) == {"original0", "original1"}:
        _normed(stored, name, parts["original0"], parts["original1"])
    elif set(parts) == {"original", "0._u", "0._v"}:
        _spectrally_normed(stored, name, parts["original"], parts["0._u"], parts["0._v"])
    else:
        # Which functions are applied is not stored.
        weights = sorted(parts.values(), key=lambda t: -len(t.shape))
        stored.leave_out(weights, "the original of a parametrization that is not in the file; "
                         "save the weight itself")  # fmt: skip


def _normed(stored: Pool, name: str, g: LazyTensor, v: LazyTensor) -> None:
    """W = g v / ||v||, with the norm over the dimensions where g has one element."""
    fits = len(g.shape) in (0, len(v.shape)) and all(
        a in (1, b) for a, b in zip(g.shape, v.shape, strict=False)
    )
    if not fits or not {v.dtype, g.dtype} <= set(_FLOATS):
        stored.leave_out([v, g], f"parametrized, and not by a norm: shapes {list(g.shape)} and "
                         f"{list(v.shape)}")  # fmt: skip
        return
    dims = [dim for dim in range(len(v.shape)) if not g.shape or g.shape[dim] == 1]

    def read() -> torch.Tensor:
        weight = _copy(v.read())
        lengths = torch.linalg.vector_norm(weight, dim=dims, keepdim=True) if dims else weight.abs()
        return weight.mul_(g.read().to(weight.dtype) / lengths)

    stored.replace([v, g], name, v.shape, "weight_norm", read, dtype=_wide(v))


def _of_hooks(stored: Pool, name: str, weight: LazyTensor) -> None:
    """Compute ``weight_orig`` of torch.nn.utils.spectral_norm, or of torch.nn.utils.prune."""
    mask, u, v = (stored.get(name + suffix) for suffix in ("_mask", "_u", "_v"))
    if mask is not None and mask.shape == weight.shape:

        def read() -> torch.Tensor:
            return _copy(weight.read()).mul_(mask.read())

        stored.replace([weight, mask], name, weight.shape, "pruned", read, dtype=_wide(weight))
    elif u is not None and v is not None:
        _spectrally_normed(stored, name, weight, u, v)
    elif u is not None:
        stored.leave_out([weight, u], "spectral_norm without its weight_v")


def _spectrally_normed(
    stored: Pool, name: str, weight: LazyTensor, u: LazyTensor, v: LazyTensor
) -> None:
    """W / (u^T W v), with the vectors as they are stored."""
    shape, count = weight.shape, math.prod(weight.shape)
    dims = [dim for dim in (0, 1) if len(shape) >= 2 and u.shape == shape[dim : dim + 1]
            and v.shape == (count // max(shape[dim], 1),)]  # fmt: skip
    if not dims or weight.dtype not in _FLOATS:
        stored.leave_out([weight, u, v], f"spectral_norm whose vectors {list(u.shape)} and "
                         f"{list(v.shape)} do not fit {list(shape)}")  # fmt: skip
        return

    def read() -> torch.Tensor:
        whole = _copy(weight.read())
        left, right = u.read().to(whole.dtype), v.read().to(whole.dtype)
        # Rows are dim 1 of transposed convolutions. Where both fit, the wrong one gives a small
        # value, as the vectors are not its own.
        sigmas = [left @ (whole.movedim(dim, 0).flatten(1) @ right) for dim in dims]
        return whole.div_(max(sigmas, key=abs))

    stored.replace([weight, u, v], name, shape, "spectral_norm", read, dtype=_wide(weight))


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy in float32, or in float64 if it is."""
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _wide(tensor: LazyTensor) -> str:
    return "float64" if tensor.dtype == "float64" else "float32"

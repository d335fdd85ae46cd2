"""Tensors in transforms of torch.func (grad, vmap, jvp, ...) and in forward-mode autograd.

A transform passes wrappers of tensors to its function. They have no address that a kernel could
read, and a captured tensor must not be written to. Both are possible with the wrapped values while
the transforms are suspended.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._C import _functorch as wrappers
from torch.autograd import forward_ad


def check_inactive(what: str, instead: str) -> None:
    """Raise RuntimeError if a transform of torch.func is active; say what works there."""
    if wrappers.peek_interpreter_stack() is not None:
        raise RuntimeError(
            f"{what} cannot run in a transform of torch.func (grad, vmap, jvp, ...); use "
            f"{instead} there"
        )


def is_active() -> bool:
    """Return whether a transform or forward-mode autograd is active."""
    return wrappers.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_differentiated(tensor: torch.Tensor) -> bool:
    """Return whether ``tensor`` requires a gradient, is a transform's wrapper or has a tangent."""
    if tensor.requires_grad or wrappers.is_functorch_wrapped_tensor(tensor):
        return True
    has_level = forward_ad._current_level >= 0
    return has_level and forward_ad.unpack_dual(tensor).tangent is not None


def check_plain(what: str, tensor: torch.Tensor, instead: str) -> None:
    """Raise RuntimeError if ``tensor`` is a transform's wrapper; say what to do instead."""
    if wrappers.is_functorch_wrapped_tensor(tensor):
        raise RuntimeError(
            f"{what}: expected a plain tensor, got one of a transform of torch.func such as grad, "
            f"vmap or jvp ({instead})"
        )


def value_of(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return the value of parameter ``name``, a plain tensor without a graph.

    Raises:
        RuntimeError: the parameter is batched by vmap.
    """
    while wrappers.is_functorch_wrapped_tensor(tensor):
        if wrappers.is_batchedtensor(tensor):
            raise RuntimeError(
                f"parameter {name!r} is batched by torch.func.vmap; call penalty() once per member "
                "of the batch, or, outside of vmap, build a SpectralRegularizer of the stacked "
                "parameters with stacked=[...]"
            )
        tensor = wrappers.get_unwrapped(tensor)
    return tensor.detach()


@contextmanager
def suspended() -> Iterator[None]:
    """Compute without a graph, and outside of the active transforms."""
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    with torch.no_grad(), temporarily_clear_interpreter_stack():
        yield

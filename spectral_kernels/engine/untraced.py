"""Functions that torch.compile leaves out of its graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap ``function`` so that torch.compile breaks the graph and runs it eagerly.

    ``torch.compiler.disable`` does the same, but imports the compiler at once, which takes long,
    and costs more per eager call. Where even this wrapper costs too much, call ``outside``.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return outside(function, *args, **kwargs)
        return function(*args, **kwargs)

    # The compiler limits the number of compiled versions per code object: one that all functions
    # shared would exceed it.
    run.__code__ = run.__code__.replace(co_name=function.__name__)
    return run


def outside(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Return ``function(*args, **kwargs)``, run outside of the graph that is being traced."""
    from . import compiled

    return compiled.outside(function, *args, **kwargs)

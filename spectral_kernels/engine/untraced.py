"""What torch.compile leaves out of its graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


def untraced(function: Callable) -> Callable:
    """Return ``function``; where torch.compile meets it, the graph ends and it runs as it is.

    ``torch.compiler.disable`` does this as well, but loads the compiler at once, which takes long,
    and adds more to every eager call. Where even this wrapper counts, see ``outside``.
    """

    @functools.wraps(function)
    def run(*args, **kwargs):
        if torch.compiler.is_compiling():
            return outside(function, *args, **kwargs)
        return function(*args, **kwargs)

    # Compilers keep a small number of versions of each code: one that all functions shared would
    # have too many.
    run.__code__ = run.__code__.replace(co_name=function.__name__)
    return run


def outside(function: Callable, *args, **kwargs):
    """Return ``function(*args, **kwargs)``, in a function that is being compiled."""
    from . import compiled

    return compiled.outside(function, *args, **kwargs)

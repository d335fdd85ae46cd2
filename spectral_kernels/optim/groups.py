"""Parameter groups as torch.optim takes them, and what a regularizer selects from."""

from __future__ import annotations

import glob
import inspect
from collections.abc import Generator, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..selection.arguments import as_dict, expected
from ..selection.parameters import named_parameters, parameter_refs

Params = (
    nn.Module
    | Iterable[torch.Tensor]
    | Iterable[tuple[str, torch.Tensor]]
    | Iterable[Mapping[str, Any]]
)


def source_and_groups(params, model: nn.Module | None, kind: str):
    """Return what to select from, and parameter groups as torch.optim takes them.

    ``kind`` is the class of the optimizer, for a message.
    """
    if isinstance(params, nn.Module):
        return params, [{"params": list(params.parameters())}]
    wanted = "a module, its parameters or groups of them"
    if isinstance(params, torch.Tensor | str | Mapping) or not isinstance(params, Iterable):
        raise TypeError(expected("params", wanted, params))
    if model is None:
        model = _module_of(params)
    given = list(params)
    if not given:
        raise ValueError(f"params: expected {wanted}, got no parameters")
    if all(as_dict(group) is None for group in given):
        given = [{"params": given}]
    groups = []
    for group in map(as_dict, given):
        if group is None or "params" not in group:
            raise TypeError(
                'params: expected dicts with "params", or parameters, got groups and parameters'
            )
        groups.append({**group, "params": items_of(group["params"])})
    items = [item for group in groups for item in group["params"]]
    named = [isinstance(item, tuple) for item in items]
    if any(named) and not all(named):
        raise ValueError("params: expected names for all or for none, got names for some")
    if model is None and not all(named):
        raise TypeError(
            "params: expected the module, module.parameters() or named parameters, got parameters "
            "without names (pass their module as model= too, or, where a library makes the "
            f"optimizer, functools.partial({kind}, model=module) as its class)"
        )
    return model if model is not None else items, groups


def _module_of(params) -> nn.Module | None:
    """Return the module whose ``parameters()``, called and not used up, is ``params``, or None.

    Libraries that make an optimizer of a class which they are given pass them in this form.
    """
    if not isinstance(params, Generator) or params.gi_code is not nn.Module.parameters.__code__:
        return None
    return inspect.getgeneratorlocals(params).get("self")  # {} once it is used up


def items_of(params) -> list[torch.Tensor | tuple[str, torch.Tensor]]:
    """Return the parameters of a group, or its (name, parameter) pairs, as a list."""
    if isinstance(params, set):
        raise TypeError("params: expected a list, whose order is the same every time, got a set")
    items = [params] if isinstance(params, torch.Tensor) else list(params)
    for item in items:
        name, p = item if isinstance(item, tuple) and len(item) == 2 else ("", item)
        if not isinstance(name, str) or not isinstance(p, torch.Tensor):
            raise TypeError(expected("params", "parameters or (name, parameter) pairs", item))
    return items


def named_alike(items: list, first: Mapping[str, Any], model: nn.Module | None) -> list:
    """Return the items of a new group with names if the ``first`` group has some, else without."""
    are_named = any(isinstance(item, tuple) for item in items)
    if "param_names" not in first:
        return [item[1] for item in items] if are_named else items
    if are_named or model is None:
        return items
    known = {id(p): name for name, p in named_parameters(model)}
    named = [(known[id(p)], p) for p in items if id(p) in known]
    return named if len(named) == len(items) else items


def not_in(groups, model: nn.Module) -> list[str]:
    """Return patterns that match the parameters of ``model`` which no group holds."""
    given = [item for group in groups for item in group["params"]]
    held = {id(item[1] if isinstance(item, tuple) else item) for item in given}
    aliases = [refs for refs in parameter_refs(model) if not refs[0].computed]
    absent = [refs for refs in aliases if id(refs[0].get()) not in held]
    if len(absent) == len(aliases):
        raise ValueError(
            "params: expected parameters as they are in model now (after sharding, or after a move "
            "that replaces them), got none of these"
        )
    return [glob.escape(ref.name) for refs in absent for ref in refs]

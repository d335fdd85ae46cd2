"""Which optimizers attach() can serve: unwrapped, with step hooks, holding the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...selection.arguments import shown
from ...selection.parameters import ParameterRef
from ...selection.warn import warn
from ..model_buckets import ModelBuckets

# Attributes in which wrappers keep the optimizer that they drive, some of them properties.
_INNER = "optimizer", "_optimizer", "optim", "base_optimizer", "base"


def unwrapped(optimizer):
    """Return the optimizer whose ``step`` runs torch's step hooks: the one inside of a wrapper.

    What cannot be unwrapped, because it has no optimizer in it or several, is returned as it is.
    """
    seen = []
    while not _runs_hooks(optimizer) and not any(optimizer is x for x in seen):
        seen.append(optimizer)
        inner = _inside(optimizer)
        if len(inner) == 1:
            (optimizer,) = inner
    return optimizer


def to_attach_to(optimizer) -> torch.optim.Optimizer:
    """Return :func:`unwrapped` of ``optimizer``, if a step hook can add a penalty to its steps.

    Raises:
        TypeError: it cannot.
    """
    given, optimizer = type(optimizer).__name__, unwrapped(optimizer)
    name = type(optimizer).__name__
    if given != name:
        given = f"{given} with {name} inside"
    is_optimizer = isinstance(optimizer, torch.optim.Optimizer)
    if is_optimizer and isinstance(getattr(optimizer, "_buckets", None), ModelBuckets):
        raise TypeError(
            f"optimizer: expected one without the penalty in its step, got {given}, which has it"
        )
    if all(callable(getattr(optimizer, name, None)) for name in ("first_step", "second_step")):
        raise TypeError(
            f"optimizer: expected one that runs step hooks, got {given}, whose first_step() and "
            "second_step() run none (call accumulate_grad_() before second_step() instead)"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(
            f"optimizer: expected one that needs gradients alone, got {given}, which needs the "
            "loss of the same function too (add penalty() to the loss in its closure instead)"
        )
    if getattr(optimizer, "_overlap_with_ddp", False):
        raise TypeError(
            f"optimizer: expected one that updates parameters in step(), got {given}, which does "
            "so in the backward pass (overlap_with_ddp=False turns that off)"
        )
    if _runs_hooks(optimizer):
        return optimizer
    inner = " and ".join(type(x).__name__ for x in _inside(optimizer))
    if inner:
        raise TypeError(
            f"optimizer: expected one that runs step hooks, got {given}, whose step runs none "
            f"(attach what it drives, {inner}: attach([...]) takes several)"
        )
    if is_optimizer:
        raise TypeError(
            f"optimizer: expected one that runs step hooks, got {given}, whose __init__ does not "
            "call that of torch.optim.Optimizer (attach the optimizer that it drives)"
        )
    raise TypeError(f"optimizer: expected a torch.optim.Optimizer or a list of them, got {given}")


def owners(
    refs: Sequence[ParameterRef],
    tensors: Sequence[torch.Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
) -> list[int]:
    """Return the index of the optimizer that holds each of ``tensors``, called ``refs``.

    Raises:
        ValueError: a parameter that none of them holds, or more than one.
    """
    held = [groups_of(optimizer) for optimizer in optimizers]
    names, found = [type(optimizer).__name__ for optimizer in optimizers], []
    for ref, tensor in zip(refs, tensors, strict=True):
        own = [i for i, ids in enumerate(held) if id(tensor) in ids]
        if not own:
            raise ValueError(
                f"optimizer: {' and '.join(names)} {'does' if len(names) == 1 else 'do'} not hold "
                f"parameter {ref.name!r}; attach all optimizers that hold parameters of the "
                "regularizer, attach([first, second]), or leave this one out of it (include, "
                "exclude)"
            )
        if len(own) > 1:
            raise ValueError(
                f"optimizer: {' and '.join(names[i] for i in own)} both hold parameter "
                f"{ref.name!r}, whose penalty would count in the steps of each; take it out of all "
                "but one of them"
            )
        found += own
    return found


def check_held(
    refs: Sequence[ParameterRef],
    tensors: Sequence[torch.Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
) -> None:
    """Raise RuntimeError if none of ``optimizers`` holds one of ``tensors``, called ``refs``."""
    held = set().union(*map(groups_of, optimizers))
    for ref, tensor in zip(refs, tensors, strict=True):
        if id(tensor) not in held:
            names = " and ".join(type(optimizer).__name__ for optimizer in optimizers)
            raise RuntimeError(
                f"parameter {ref.name!r} was replaced in its module, or added, and {names} "
                f"{'does' if len(optimizers) == 1 else 'do'} not hold it; add the new parameter "
                "with optimizer.add_param_group(...), or build a new optimizer (and attach the "
                "penalty to it with attach(new_optimizer), if it was attached)"
            )


def check_directions(
    refs: Sequence[ParameterRef],
    tensors: Sequence[torch.Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    parts: Sequence[int],
) -> None:
    """Raise ValueError for a parameter that an optimizer would move up the penalty's gradient.

    Args:
        refs: the regularized parameters.
        tensors: their present values.
        optimizers: the optimizers.
        parts: the index of the optimizer of each parameter.
    """
    groups = [groups_of(optimizer) for optimizer in optimizers]
    for ref, tensor, part in zip(refs, tensors, parts, strict=True):
        if groups[part][id(tensor)].get("maximize"):
            raise ValueError(
                f"maximize: expected False, got True in the group of parameter {ref.name!r}, whose "
                "penalty would be maximized too (attach(optimizer, decoupled=True) takes it)"
            )


def learning_rates(optimizer: torch.optim.Optimizer) -> list[float | torch.Tensor]:
    """Return the learning rate of each group.

    Raises:
        ValueError: one that is not a number.
    """
    found = [group.get("lr") for group in optimizer.param_groups]
    for i, lr in enumerate(found):
        is_number = lr.numel() == 1 if isinstance(lr, torch.Tensor) else isinstance(lr, int | float)
        if not is_number:
            raise ValueError(
                "lr: expected a number or a tensor with one element with decoupled=True, got "
                f"{shown(lr)} in group {i} of {type(optimizer).__name__}"
            )
    return found


def _orthogonalizes(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the steps of ``optimizer`` are Muon's."""
    is_torchs = isinstance(optimizer, getattr(torch.optim, "Muon", ()))
    return is_torchs or "muon" in type(optimizer).__name__.lower()


def warn_if_too_few(optimizer: torch.optim.Optimizer, n_vectors: int) -> None:
    """Warn that one vector per matrix does not hold a cap under Muon."""
    if n_vectors == 1 and _orthogonalizes(optimizer):
        warn(
            f"{type(optimizer).__name__} raises all singular values of a matrix in every step, and "
            "a cap with n_vectors=1 brings down one of them: sigma can stay far above its target; "
            'n_vectors=16 or constraint="sphere" holds it',
        )


def warn_if_orthogonalized(optimizer: torch.optim.Optimizer) -> None:
    """Warn that the steps of Muon make nothing of the penalty's size."""
    name = type(optimizer).__name__
    if _orthogonalizes(optimizer):
        warn(
            f"{name} orthogonalizes gradients, the penalty's with them: the size of its step, and "
            "with it strength, is lost; attach(optimizer, decoupled=True) keeps it",
        )


def groups_of(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """Return the group of each parameter of ``optimizer``, by the parameter's id."""
    return {id(p): group for group in optimizer.param_groups for p in group["params"]}


def _runs_hooks(optimizer) -> bool:
    """Return whether ``optimizer.step()`` runs step hooks, which torch.optim.Optimizer arranges."""
    step = getattr(type(optimizer), "step", None)
    return (
        isinstance(optimizer, torch.optim.Optimizer)
        and getattr(step, "hooked", False)
        and hasattr(optimizer, "_optimizer_step_pre_hooks")
    )


def _inside(wrapper) -> list[torch.optim.Optimizer]:
    """Return the optimizers in the attributes of ``wrapper``, alone or in a list."""
    values = [getattr(wrapper, name, None) for name in _INNER]
    values += getattr(wrapper, "__dict__", {}).values()
    found: list[torch.optim.Optimizer] = []
    for value in values:
        for x in value if isinstance(value, list | tuple) else [value]:
            if isinstance(x, torch.optim.Optimizer) and not any(x is y for y in (*found, wrapper)):
                found.append(x)
    return found

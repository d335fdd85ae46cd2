"""The role of a parameter: what its module does with it, or else what shape and name tell."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from .layers import (
    BIAS,
    MATRIX,
    TABLE,
    Role,
    holds_table,
    is_convolution,
    known_role,
    registered_role,
)
from .parameters import ParameterRef
from .words import is_bias, is_weight, meaning_of, words_of


def role_of(
    ref: ParameterRef,
    tensor: torch.Tensor,
    others: Mapping[str, torch.Size],
    said: str | None = None,
    included: bool = False,
) -> Role:
    """Return the role of a parameter.

    Args:
        ref: the parameter.
        tensor: its value; only shape and marks count.
        others: name -> shape of the parameters of the same module.
        said: the role that the user said, if any.
        included: whether a pattern of ``include`` names it.
    """
    said = said or registered_role(ref)
    if said is not None:
        return _said_role(ref, tensor, said)
    role = known_role(ref, tensor) or _guessed_role(ref, tensor, others)
    if included and role.kind == "skip" and not role.is_final and tensor.dim() >= 2:
        is_stack = tensor.dim() == 3 and not isinstance(ref.module, nn.MultiheadAttention)
        return Role("stack") if is_stack and ref.module is not None else MATRIX
    return role


def _said_role(ref: ParameterRef, tensor: torch.Tensor, said: str) -> Role:
    """Return the role that was said, for a tensor of this shape."""
    if said == "skip":
        return Role("skip", "role 'skip'")
    if said == "stack" and tensor.dim() == 2 and is_bias(own_words(ref)):
        return Role("biases")
    least = {"matrix": 2, "stack": 3}.get(said, 1)
    if tensor.dim() < least:
        raise ValueError(
            f"roles, stacked: expected a parameter of {least} or more dimensions"
            f"{', (E, out, in),' * (least == 3)} for {said!r}, got {ref.name!r} with shape "
            f"{tuple(tensor.shape)}"
        )
    if said == "stack" and is_bias(own_words(ref)):
        return Role("biases")
    return Role(said)


def own_words(ref: ParameterRef) -> list[str]:
    """Return the words of a parameter's own name; in a list or dict of parameters, the list's."""
    above, _, last = ref.name.rpartition(".")
    if isinstance(ref.module, (nn.ParameterList, nn.ParameterDict)) or last.isdecimal():
        return [*words_of(above.rpartition(".")[2]), *words_of(last)]
    return words_of(last)


def _what_takes_it(shape: torch.Size) -> str:
    """Return which arguments regularize a parameter of this shape all the same."""
    return "include or roles takes it" if len(shape) >= 2 else "roles takes it"


def _guessed_role(
    ref: ParameterRef, tensor: torch.Tensor, others: Mapping[str, torch.Size]
) -> Role:
    """Return the role by shape and name, of a parameter whose module is unknown."""
    shape, words = tensor.shape, own_words(ref)
    n_wide = sum(n != 1 for n in shape)
    meaning = meaning_of(words)
    if is_bias(words) or _may_be_bias(ref):
        role = _guessed_bias(ref, shape, meaning, others)
        if is_bias(words) or role.kind != "skip":
            return role
    if n_wide < 2 and words[-1:] == ["gain"] and shape:
        return Role("gain")
    if meaning is not None:
        return Role("skip", f"{meaning}, by its name ({_what_takes_it(shape)})")
    if getattr(tensor, "_no_weight_decay", False):
        return Role("skip", f"marked _no_weight_decay by its author ({_what_takes_it(shape)})")
    if holds_table(ref.module):
        return TABLE
    # Such as the (1, N) of a head with one output; of unknown tensors nothing else is known.
    is_thin_weight = len(shape) >= 2 and (is_weight(words) or ref.module is None)
    if n_wide < 2 and not (is_thin_weight and (len(shape) == 2 or shape[:2] != (1, 1))):
        return Role("skip", f"{len(shape)}-D, neither a bias nor a gain ({_what_takes_it(shape)})")
    if len(shape) == 2:
        return MATRIX
    if is_convolution(ref.module, tensor):
        return Role("groups") if getattr(ref.module, "groups", 1) != 1 else MATRIX
    if ref.module is None:
        return _guessed_without_module(ref, shape, words)
    if len(shape) == 3 and (n_wide == 3 or is_weight(words)):
        return Role("stack")
    if shape[0] == 1:
        return Role("skip", f"additive embedding or token ({_what_takes_it(shape)})")
    return Role("skip", f"{len(shape)}-D, of an unknown layer ({_what_takes_it(shape)})")


def _may_be_bias(ref: ParameterRef) -> bool:
    """Return whether the name is that of a bias as in formulas: b, b1, b_in."""
    return ref.attribute[:1] == "b" and words_of(ref.attribute)[:1] == ["b"]


def _guessed_bias(
    ref: ParameterRef, shape: torch.Size, meaning: str | None, others: Mapping[str, torch.Size]
) -> Role:
    """Return the role of a parameter that is named as a bias."""
    if meaning is None and ref.module is not None and "." in ref.name:
        above = ref.name.removesuffix("." + ref.attribute).rpartition(".")[2]
        if "dt" in words_of(above):  # the bias of Mamba's dt_proj is the time step itself
            meaning = "a time step"
    if meaning is not None:
        return Role("skip", f"{meaning}, by its name ({_what_takes_it(shape)})")
    if not shape:
        return Role("skip", "0-D, neither a bias nor a gain")
    # Beside a stack of weights: of the same module, and of the same prefix if names have dots.
    prefix = ref.attribute.rpartition(".")[0]
    for name, other in others.items():
        is_stack = len(shape) > 1 and len(other) == 3 and other[0] == shape[0]
        if is_stack and name.rpartition(".")[0] == prefix:
            return Role("biases")
    if sum(n != 1 for n in shape) < 2:
        return BIAS
    return Role("skip", f"a table of biases ({_what_takes_it(shape)})")


def _guessed_without_module(ref: ParameterRef, shape: torch.Size, words: list[str]) -> Role:
    """Return the role in an iterable of (name, tensor), which does not tell convolutions."""
    if shape[0] == 1 and not is_weight(words):
        return Role("skip", f"additive embedding or token ({_what_takes_it(shape)})")
    is_expert = "experts" in words_of(ref.name)
    return Role("stack") if is_expert and len(shape) == 3 else MATRIX

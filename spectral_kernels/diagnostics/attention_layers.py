"""The modules of a model whose queries and keys are known."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..selection.parameters import named_modules
from ..sharding.shards import is_sharded
from .attention import CHANGING, QUERY_KEY, head_dim_of, is_between

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
_HEAD_DIM = ("head_dim", "attention_head_size", "key_value_proj_dim")


class AttentionModule(NamedTuple):
    """One layer: the arguments of :func:`diagnostics.attention.attention_norms`."""

    name: str
    query: torch.Tensor
    key: torch.Tensor
    n_heads: int


def attention_modules(model: nn.Module) -> list[AttentionModule]:
    """Return the layers of attention of a model whose queries and keys are known.

    ``nn.MultiheadAttention``, and modules that hold linear layers of queries and of keys under
    usual names (``q_proj`` and ``k_proj``, ``query`` and ``key``, ...; ``c_attn`` of GPT-2 for
    both), with the number of heads as an attribute or in ``config``. Left out are those which
    normalize queries or keys, as far as modules or ``config`` tell, and weights that are sharded,
    quantized, on the meta device or computed by a parametrization.
    """
    found, seen = [], set()
    for prefix, module in named_modules(model):
        if id(module) in seen:
            continue
        seen.add(id(module))
        weights = _weights(module)
        if weights is None or _is_changed(module):
            continue
        query, key = weights
        n_heads = _n_heads(module, query.shape[0])
        if n_heads is not None and head_dim_of(query.shape[0], key.shape[0], n_heads) is not None:
            found.append(AttentionModule(prefix.removesuffix("."), query, key, n_heads))
    return found


def _weights(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the weights of queries and keys, [rows, d], of a module that has them."""
    if isinstance(module, nn.MultiheadAttention):
        if parametrize.is_parametrized(module):
            return None
        if module.in_proj_weight is None:
            pair = module.q_proj_weight, module.k_proj_weight
        elif _is_usable(module.in_proj_weight):
            pair = module.in_proj_weight.chunk(3)[:2]
        else:
            return None
        return pair if all(map(_is_usable, pair)) else None
    children = module._modules
    for names in QUERY_KEY:
        pair = [_linear(children.get(name)) for name in names]
        if all(weight is not None for weight in pair):
            return pair[0], pair[1]
    fused = _linear(children.get("c_attn"))
    # With multi_query, of GPTBigCode, rows have another order.
    if fused is None or fused.shape[0] != 3 * fused.shape[1] or hasattr(module, "multi_query"):
        return None
    return fused.chunk(3)[:2]


def _linear(module: nn.Module | None) -> torch.Tensor | None:
    """Return the weight (out, in) of a linear layer, None if it is none or cannot be used."""
    if module is None or parametrize.is_parametrized(module):
        return None
    weight = module._parameters.get("weight")
    if weight is None or not _is_usable(weight):
        return None
    if isinstance(module, nn.Linear):
        return weight if weight.shape == (module.out_features, module.in_features) else None
    # Of transformers: (in, out).
    is_conv1d = type(module).__name__ == "Conv1D" and weight.shape[1] == getattr(module, "nf", None)
    return weight.mT if is_conv1d else None


def _is_usable(weight: torch.Tensor) -> bool:
    is_plain = weight.dim() == 2 and weight.is_floating_point() and not weight.is_meta
    return is_plain and weight.numel() > 0 and not is_sharded(weight)


def _is_changed(module: nn.Module) -> bool:
    """Return whether something stands between the projections and their product."""
    names = [name for name, child in module._modules.items()
             if child is not None and not isinstance(child, nn.Identity)]  # fmt: skip
    names += [name for name, parameter in module._parameters.items() if parameter is not None]
    config = getattr(module, "config", None)
    return any(map(is_between, names)) or any(
        bool(getattr(owner, flag, None)) for flag in CHANGING for owner in (module, config)
    )


def _n_heads(module: nn.Module, rows: int) -> int | None:
    """Return the number of heads, None if it is not known or attributes contradict each other."""
    head_dim = _attribute(module, _HEAD_DIM)
    n_heads = _attribute(module, _HEADS) or _attribute(getattr(module, "config", None), _HEADS)
    if n_heads is None:
        return None if head_dim is None else rows // head_dim
    return n_heads if head_dim is None or n_heads * head_dim == rows else None


def _attribute(owner: object, names: tuple[str, ...]) -> int | None:
    for name in names:
        value = getattr(owner, name, None)
        if type(value) is int and value > 0:
            return value
    return None

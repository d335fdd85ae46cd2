"""The bilinear forms of attention: how large the logits can become."""

from __future__ import annotations

import re
from typing import Literal

import torch

from ..tables.device import wide

# Names of the linear layers of queries and of keys, side by side in one module.
QUERY_KEY = (
    ("q_proj", "k_proj"), ("query", "key"), ("to_q", "to_k"), ("q", "k"), ("wq", "wk"),
    ("Wq", "Wk"), ("q_lin", "k_lin"), ("linear_q", "linear_k"),
)  # fmt: skip
# Settings that make a model normalize or clip queries and keys.
CHANGING = ("use_qk_norm", "qk_norm", "qk_layernorm", "use_qk_layernorm", "attn_qk_norm", "qk_ln",
            "clip_qkv")  # fmt: skip
# What stands between the projections and their product, and makes it no bilinear form.
_BETWEEN = re.compile(
    r"(?:^|[._])(?:"
    r"(?:q|k|qk|query|key)_?(?:norm|ln|layer_?norm|conv1d|scale)"
    r"|(?:norm|ln|layer_?norm)_?(?:q|k|qk|query|key)"
    r"|logit_scale)(?=[._]|$)"
)

_SQUARINGS = 14  # (4 * 2^14)-th root of the head dimension: 1 + 9e-5 for 256

FusedLayout = Literal["stacked", "by group"]
"""Rows of a fused weight: all queries, all keys, all values; or so for each head of keys."""


def attention_norms(query: torch.Tensor, key: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Return sigma_1 of W_q^T W_k of every head, which bounds its logits.

    A head's logit of x and y is (W_q x) . (W_k y) = x^T (W_q^T W_k) y, so that it is at most
    sigma_1 |x| |y|, before the division by sqrt(head_dim), and without the biases. With rotary
    embeddings, W_q^T R W_k with a rotation R that depends on the distance, it is that of equal
    positions. A norm of queries or keys between projection and product makes it no bilinear form.

    The form [d_query, d_key] has the rank head_dim and is never made: sigma_1^2 is the largest
    eigenvalue of (W_q W_q^T) (W_k W_k^T), a product of two matrices [head_dim, head_dim]. It comes
    from the Frobenius norm of a power, 2^14, by repeated squaring, in float64: at most
    1e-4 too large, never too small but for rounding, which is 1e-16 |W_q|^2 |W_k|^2 in sigma_1^2.
    Nothing waits for a GPU.

    Args:
        query: weights of the queries [n_heads * head_dim, d_query], head by head.
        key: weights of the keys [n_kv_heads * head_dim, d_key]; n_heads is a multiple of
            n_kv_heads (grouped-query attention: consecutive heads share one of keys).
        n_heads: number of heads of queries.

    Returns:
        [n_heads] on the device of the weights, float64 (float32 on a device without it, where it
        is less exact); nan where a weight is not finite.

    Raises:
        ValueError: shapes that do not fit ``n_heads`` and each other.
    """
    head_dim = head_dim_of(query.shape[0], key.shape[0], n_heads)
    if head_dim is None:
        raise ValueError(
            f"n_heads: expected a number that divides queries {list(query.shape)} and keys "
            f"{list(key.shape)} into heads of the same size, got {n_heads}"
        )
    queries, query_size = _gram(query, head_dim)
    keys, key_size = _gram(key, head_dim)
    # Up to rounding, so that a singular one has a factor too.
    rounding = 16 * torch.finfo(keys.dtype).eps
    unit = torch.eye(head_dim, dtype=keys.dtype, device=keys.device)
    factor, _ = torch.linalg.cholesky_ex(keys + rounding * unit)
    n_groups = n_heads // len(keys)
    factor = factor.repeat_interleave(n_groups, 0)
    norms = _largest_eigenvalue(factor.mT @ queries @ factor).sqrt()
    return norms * query_size.sqrt() * key_size.repeat_interleave(n_groups).sqrt()


def head_dim_of(n_queries: int, n_keys: int, n_heads: int) -> int | None:
    """Return the head dimension for such numbers of rows, None if they do not fit ``n_heads``."""
    if n_heads < 1 or n_queries < n_heads or n_queries % n_heads:
        return None
    head_dim = n_queries // n_heads
    n_kv_heads, rest = divmod(n_keys, head_dim)
    return None if rest or n_kv_heads == 0 or n_heads % n_kv_heads else head_dim


def _gram(weight: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return W W^T / trace [heads, head_dim, head_dim] of every head, and the traces [heads]."""
    heads = wide(weight.detach()).unflatten(0, (-1, head_dim))
    gram = heads @ heads.mT
    traces = gram.diagonal(dim1=1, dim2=2).sum(1)
    return gram / torch.where(traces == 0, 1.0, traces)[:, None, None], traces


def _largest_eigenvalue(matrices: torch.Tensor) -> torch.Tensor:
    """Return the largest eigenvalue of symmetric matrices >= 0, [n, size, size] -> [n]."""
    found, power = torch.zeros_like(matrices[:, 0, 0]), matrices
    for number in range(_SQUARINGS + 1):
        power = power @ power if number > 0 else power
        norm = torch.linalg.matrix_norm(power)
        found = found + norm.log() / 2**number
        power = power / torch.where(norm == 0, 1.0, norm)[:, None, None]
    return found.exp()


def divided(
    fused: torch.Tensor, layout: FusedLayout, n_heads: int, n_kv_heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights of queries and keys of a fused one, for :func:`attention_norms`.

    Args:
        fused: queries, keys and values [(n_heads + 2 n_kv_heads) * head_dim, d].
        layout: in which order its rows are.
        n_heads, n_kv_heads: numbers of heads of queries and of keys.
    """
    head_dim = fused.shape[0] // (n_heads + 2 * n_kv_heads)
    if layout == "stacked":
        query, key = fused[: n_heads * head_dim], fused[n_heads * head_dim :]
        return query, key[: n_kv_heads * head_dim]
    groups = fused.unflatten(0, (n_kv_heads, n_heads // n_kv_heads + 2, head_dim))
    return groups[:, :-2].flatten(0, 2), groups[:, -2].flatten(0, 1)


def is_between(name: str) -> bool:
    """Return whether a parameter of this name, in a module of attention, changes the form."""
    return _BETWEEN.search(name) is not None

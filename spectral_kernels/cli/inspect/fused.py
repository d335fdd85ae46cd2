"""Weights that hold several matrices, recognized by name, shape and config.json.

What is recognized is certain; where a name has several meanings, the shape or the configuration
decides, and if neither does, the weight stays whole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...selection.arguments import expected
from ...selection.matrices import Matrix

_QKV = ("q", "k", "v")
_GATED = ("gate", "up")
# The last part of a weight's name -> the equal parts of its rows.
_EQUAL = {
    "qkv": _QKV, "qkv_linear": _QKV, "to_qkv": _QKV, "in_proj_weight": _QKV, "W_pack": _QKV,
    "w12": _GATED,
}  # fmt: skip
_BY_HEAD = "rows of q, k and v alternate"
_INTERLEAVED_MODELS = {"gpt_oss", "openai_privacy_filter"}
# Models whose qkv_proj is stored in another order.
_OTHER_QKV_PROJ = {"codegen", "minimax", "minimax_text_01", "minimax_m1"}
_CONV1D = ("c_attn", "q_attn", "c_fc", "c_proj")  # of GPT-2 and its kin, stored (in, out)
_STACKS = re.compile(r"\.block_sparse_moe\.(input|output)_linear\.weight$")


@dataclass(frozen=True)
class Fused:
    """How a weight is stored: which dimension counts its outputs, and the parts of that."""

    row_dim: int = 0
    """1 for a weight that is stored (in, out)."""
    sizes: tuple[int, ...] = ()
    """Of the parts along ``row_dim``; () for a weight that is one matrix."""
    labels: tuple[str, ...] = ()
    whole: str | None = None
    """Why a weight that holds several matrices has no parts here."""


class Recognizer:
    """Knows fused weights by the names and shapes of a checkpoint and its configuration."""

    def __init__(self, shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any]) -> None:
        """Take what all names tell together.

        Args:
            shapes: name -> shape of every tensor.
            config: config.json of the model; {} if there is none.
        """
        self._shapes = shapes
        self._parts = [config, *(c for c in config.values() if isinstance(c, Mapping))]
        self._models = {m for c in self._parts if isinstance(m := c.get("model_type"), str)}
        # Their c_attn is (d, 3 d), where a linear layer's is (3 d, d).
        self._has_conv1d = any(
            len(shape) == 2 and shape[1] == 3 * shape[0]
            for name, shape in shapes.items() if _own(name) == "c_attn"
        )  # fmt: skip

    def is_stack(self, name: str) -> bool:
        """Return whether a tensor is known to be a stack of matrices, one for each expert."""
        return len(self._shapes[name]) == 3 and _STACKS.search(f".{name}") is not None

    def is_bias(self, name: str) -> bool:
        """Return whether a tensor (E, out) holds the biases of experts."""
        path = name.split(".")
        is_named = path[-1] == "bias" or path[-1].endswith("_bias")
        return is_named and "experts" in path and len(self._shapes[name]) == 2

    def of(self, name: str) -> Fused | None:
        """Return how a weight is stored; None if nothing is known of it."""
        shape = tuple(self._shapes[name])
        own = _own(name)
        if len(shape) == 3:
            return self._of_experts(name, shape)
        if len(shape) != 2 or 0 in shape:
            return None
        if own == "c_attn":
            return self._c_attn(shape)
        if own in _CONV1D and self._has_conv1d:
            return Fused(row_dim=1)
        if own in _EQUAL:
            return self._in_equal_parts(name, own, shape)
        if own == "gate_up_proj":
            return _equal(shape, 0, _GATED)
        if own in ("qkv_proj", "Wqkv"):
            return self._by_config(own, shape)
        if own in ("query_key_value", "linear_qkv", "wqkv"):
            multi_query = any(c.get("multi_query_attention") is True for c in self._parts)
            if "chatglm" in self._models and multi_query:
                return self._by_config(own, shape)
            return Fused(whole=_BY_HEAD)
        return None

    def _in_equal_parts(self, name: str, own: str, shape: tuple[int, ...]) -> Fused | None:
        if own == "qkv":
            # Two families order it by head: MaxViT, and LeViT with TinyViT.
            biases = f"{name.removesuffix('.weight').rpartition('.')[0]}.attention_biases"
            if re.search(r"\.attn_(block|grid)\.", name) or biases in self._shapes:
                return Fused(whole=_BY_HEAD)
            if shape[0] % (3 * shape[1]):  # of GCViT, where q is of another layer
                return None
        return _equal(shape, 0, _EQUAL[own])

    def _c_attn(self, shape: tuple[int, ...]) -> Fused | None:
        if "gpt_bigcode" in self._models:
            return self._gpt_bigcode(shape)
        if shape[1] == 3 * shape[0]:
            return _equal(shape, 1, _QKV)
        if self._has_conv1d and shape[1] == 2 * shape[0]:  # of cross-attention
            return _equal(shape, 1, ("k", "v"))
        return _equal(shape, 0, _QKV) if shape[0] == 3 * shape[1] else None

    def _gpt_bigcode(self, shape: tuple[int, ...]) -> Fused | None:
        width, heads = shape[1], next((c["n_head"] for c in self._parts if "n_head" in c), 0)
        if any(c.get("multi_query") is False for c in self._parts):
            return Fused(whole=_BY_HEAD)
        if _is_count(heads) and width % heads == 0 and shape[0] == width + 2 * (width // heads):
            return Fused(0, (width, width // heads, width // heads), _QKV)
        return None

    def _by_config(self, own: str, shape: tuple[int, ...]) -> Fused | None:
        """Return q, k and v by the numbers of heads, if these add up to the rows."""
        if own == "qkv_proj" and self._models & _OTHER_QKV_PROJ:
            return Fused(whole=_BY_HEAD)
        if own == "Wqkv" and shape[0] == 3 * shape[1]:  # MPT, ModernBERT, flash-attn
            return _equal(shape, 0, _QKV)
        sizes = {s for c in self._parts for s in _heads(c, shape[1]) if sum(s) == shape[0]}
        if len(sizes) == 1:
            return Fused(0, sizes.pop(), _QKV)
        return Fused(whole="config.json does not tell the sizes of q, k and v")

    def _of_experts(self, name: str, shape: tuple[int, ...]) -> Fused | None:
        """Return how each matrix of a stack (E, ...) is stored."""
        base, own = name.rpartition(".")[0], _own(name)
        if own in ("gate_up_proj", "down_proj") and "experts" in name.split("."):
            pair = [self._shapes.get(f"{base}.{part}") for part in ("gate_up_proj", "down_proj")]
            row_dim = _row_dim(*pair)
            if row_dim is None:
                return None
            if own == "down_proj":
                return Fused(row_dim)
            interleaved = f"{name}_bias" in self._shapes or self._models & _INTERLEAVED_MODELS
            if row_dim == 1 and interleaved:
                return Fused(row_dim, whole="columns of gate and up alternate")
            return _equal(shape[1:], row_dim, _GATED)
        if self.is_stack(name) and "input_linear" in name:
            output = self._shapes.get(name.replace("input_linear", "output_linear"), ())
            if len(output) == 3 and shape[1] == 2 * output[2]:
                return _equal(shape[1:], 0, _GATED)
        return None


def _own(name: str) -> str:
    """Return the part of a name that says what the weight is: ``qkv`` of ``h.0.qkv.weight``."""
    return name.removesuffix(".weight").rpartition(".")[2]


def _equal(shape: Sequence[int], dim: int, labels: tuple[str, ...]) -> Fused | None:
    """Return equal parts, if they are; None if not."""
    size, rest = divmod(shape[dim], len(labels))
    return Fused(dim, (size,) * len(labels), labels) if size and not rest else None


def _row_dim(fused: Sequence[int] | None, down: Sequence[int] | None) -> int | None:
    """Return which dimension of each expert's weights counts outputs, by the shapes of both.

    gate_up is (E, 2 I, H) and down (E, H, I), or (E, H, 2 I) and (E, I, H); None if neither fits.
    """
    if fused is None or down is None or len(fused) != 3 or len(down) != 3:
        return None
    if fused[1] == 2 * down[2] and fused[2] == down[1]:
        return 0
    return 1 if fused[2] == 2 * down[1] and fused[1] == down[2] else None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _heads(config: Mapping[str, Any], width: int) -> Iterator[tuple[int, int, int]]:
    """Yield the sizes of q, k and v that a configuration tells, if any."""
    attention = config.get("attn_config")
    inner = attention if isinstance(attention, Mapping) else {}
    heads = config.get("num_attention_heads", config.get("n_heads"))
    few = config.get("num_key_value_heads", config.get("multi_query_group_num"))
    few = few if few is not None else inner.get("kv_n_heads", heads)
    if not _is_count(heads) or not _is_count(few):
        return
    size = config.get("head_dim", config.get("kv_channels"))
    size = size if size is not None else width // heads if width % heads == 0 else None
    if _is_count(size):
        yield heads * size, few * size, few * size


def divided(matrix: Matrix, fused: Fused) -> list[Matrix]:
    """Return the parts of one matrix of a tensor, or the matrix with its rows as they are stored.

    Args:
        matrix: of a tensor (M, N), or of a stack (E, M, N); not a part itself.
        fused: how it is stored; its sizes add up to that dimension.
    """
    dim = fused.row_dim
    shape = list(matrix.whole if matrix.index is None else matrix.whole[1:])
    cols = math.prod(shape) // max(shape[dim], 1)
    if not fused.sizes:
        return [replace(matrix, shape=(shape[dim], cols), row_dim=dim)]
    parts, start = [], 0
    for size, label in zip(fused.sizes, fused.labels, strict=True):
        parts.append(replace(
            matrix, name=f"{matrix.name}[{label}]", shape=(size, cols), row_dim=dim,
            part=(start, size), periods=matrix.periods if dim == 0 else None,
            side=matrix.side if dim == 0 else None,
        ))  # fmt: skip
        start += size
    return parts


def by_hand(
    name: str, shape: Sequence[int], pattern: str, wanted: int | Sequence[int], dim: int
) -> Fused:
    """Return the parts that ``--splits`` asks for.

    Args:
        name: of the tensor.
        shape: of the matrix, or of each one of a stack.
        pattern: that names it.
        wanted: number of equal parts, or their sizes.
        dim: along which it is divided.

    Raises:
        ValueError: they do not add up to the dimension.
    """
    total = shape[dim]
    sizes: Sequence[int] = ()
    if not isinstance(wanted, int):
        sizes = wanted
    elif total % wanted == 0:
        sizes = (total // wanted,) * wanted
    if not sizes or sum(sizes) != total or min(sizes) < 1:
        accepted = (
            f"a number of equal parts or sizes that add up to the {total} outputs (dim {dim}) of "
            f"{name!r}"
        )
        raise ValueError(expected(f"splits[{pattern!r}]", accepted, wanted))
    return Fused(dim, tuple(sizes), tuple(map(str, range(len(sizes)))))

"""The attention layers of a checkpoint: found by name and configuration, and measured by head."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...diagnostics.attention import (
    CHANGING,
    QUERY_KEY,
    FusedLayout,
    attention_norms,
    divided,
    head_dim_of,
    is_between,
)
from ...diagnostics.checkpoints import LazyTensor, Skipped
from .parallel import for_each

# End of the name of a fused weight -> order of its rows, and the models (``model_type``; None: a
# config.json without it, or none) that have it. Others order the rows of the same name differently.
_FUSED: Mapping[str, tuple[FusedLayout, Sequence[str | None]]] = {
    "in_proj_weight": ("stacked", (None,)),
    "c_attn.weight": (
        "stacked", (None, "gpt2", "openai-gpt", "imagegpt", "decision_transformer", "qwen")
    ),
    "qkv.weight": ("stacked", (None, "qwen2_vl", "qwen2_5_vl")),
    "to_qkv.weight": ("stacked", (None,)),
    "qkv_proj.weight": ("stacked", ("phi3",)),
    "Wqkv.weight": ("stacked", ("mpt", "modernbert")),
    "query_key_value.weight": ("by group", ("gpt_neox", "bloom", "persimmon", "falcon")),
    "wqkv.weight": ("by group", ("internlm2",)),
}  # fmt: skip
# End of the name of the queries' weight, or of a fused one -> that of the keys, None if fused.
_ENDS: Mapping[str, str | None] = {
    q + end: k + end for q, k in QUERY_KEY for end in (".weight", "_weight")
} | dict.fromkeys(_FUSED)
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_HEAD_DIM = ("head_dim", "d_kv", "kv_channels")
_WIDTH = ("hidden_size", "d_model", "n_embd", "embed_dim")
# Part of a model that has its own configuration -> components of the names of its tensors.
_PARTS = {
    "text": {"text_model", "language_model", "text_encoder"},
    "vision": {"vision_model", "vision_tower", "visual", "vision_encoder", "image_encoder"},
    "audio": {"audio_model", "audio_tower", "audio_encoder"},
}

UNKNOWN_HEADS = "number of heads unknown (--heads N)"


@dataclass(frozen=True)
class AttentionLayer:
    """Where the queries and keys of one layer are."""

    name: str
    query: LazyTensor
    key: LazyTensor | None
    """None: the weight ``query`` is fused, and has queries, keys and values."""
    n_heads: int
    n_kv_heads: int
    layout: FusedLayout = "stacked"
    """Of a fused weight."""
    is_transposed: bool = False
    """A fused weight is (in, out), as of the Conv1D of GPT-2."""

    @property
    def size(self) -> int:
        """Number of elements that are read."""
        return math.prod(self.query.shape) + (math.prod(self.key.shape) if self.key else 0)


@dataclass(frozen=True)
class AttentionRow:
    """sigma_1 of W_q^T W_k of every head of a layer; nan where a weight is not finite."""

    name: str
    norms: tuple[float, ...]

    @property
    def head(self) -> int:
        """The head with the largest, from 0 on; the first that is nan, if there is one."""
        return max(range(len(self.norms)), key=lambda i: (math.isnan(self.norms[i]), self.norms[i]))

    @property
    def largest(self) -> float:
        """The largest of them, nan if one is."""
        return self.norms[self.head]

    @property
    def median(self) -> float:
        """The median over the heads, nan if one is."""
        return math.nan if math.isnan(self.largest) else statistics.median(self.norms)


class _LeftOutError(Exception):
    """Why a layer is left out."""


def find_attention(
    tensors: Iterable[LazyTensor],
    names: Iterable[str],
    config: Mapping[str, Any],
    n_heads: int | None = None,
) -> tuple[list[AttentionLayer], list[Skipped]]:
    """Return the layers whose queries and keys are known, and those left out, and why.

    Args:
        tensors: weights that can be read.
        names: of all tensors of the checkpoint.
        config: of the model, see ``Checkpoint.config``.
        n_heads: number of heads of every layer; None: as ``config`` says.
    """
    by_name = {t.name: t for t in tensors if len(t.shape) == 2}
    changed = {module for name in names for module in _changed_by(name)}
    found, left_out = [], []
    for name, query in by_name.items():
        for end in _ENDS:
            layer = _before(name, end)
            if layer is None:
                continue
            key = by_name.get(_joined(layer, _ENDS[end])) if _ENDS[end] else None
            if _ENDS[end] and key is None:
                continue
            try:
                if layer in changed:
                    raise _LeftOutError("queries or keys are changed before their product")
                settings = _of_part(config, name)
                found.append(_known(layer, end, query, key, settings, n_heads))
            except _LeftOutError as why:
                left_out.append(Skipped(layer, str(why)))
    return found, left_out


def _changed_by(name: str) -> list[str]:
    """Return the modules in which a parameter with this name changes the form."""
    parts = name.split(".")
    starts = (i for i in range(len(parts)) if is_between(".".join(parts[i:])))
    return [".".join(parts[:i]) for i in starts]


def _before(name: str, end: str) -> str | None:
    if name == end:
        return ""
    return name.removesuffix(f".{end}") if name.endswith(f".{end}") else None


def _joined(layer: str, name: str) -> str:
    return f"{layer}.{name}" if layer else name


def _known(
    name: str,
    end: str,
    query: LazyTensor,
    key: LazyTensor | None,
    config: Mapping[str, Any],
    n_heads: int | None,
) -> AttentionLayer:
    """Return the layer with its heads, as far as config.json and shapes agree."""
    nested = config.get("attn_config")
    for settings in (config, nested if isinstance(nested, Mapping) else {}):
        if set_ := [flag for flag in CHANGING if settings.get(flag)]:
            raise _LeftOutError(f"{set_[0]} of config.json changes queries and keys")
    heads = n_heads or _number(config, *_heads_of(query.name), *_HEADS)
    if heads is None:
        raise _LeftOutError(UNKNOWN_HEADS)
    rows, width = query.shape
    is_transposed = end == "c_attn.weight" and width == 3 * rows
    if is_transposed:
        rows, width = width, rows
    # What --heads says is of all layers, whatever config.json says.
    stated = {} if n_heads else config
    head_dim = _number(stated, *_HEAD_DIM)
    widths = {_number(stated, key) for key in _WIDTH} - {None}
    if widths and width not in widths:
        raise _LeftOutError(f"its inputs are {width}, which config.json does not say")
    if key is not None:
        found = head_dim_of(rows, key.shape[0], heads)
        if found is None or head_dim not in (None, found):
            raise _LeftOutError(f"its rows are not those of {heads} heads")
        n_kv_heads, layout = key.shape[0] // found, "stacked"
    else:
        layout = _layout(end, config)
        found = head_dim or width // heads
        n_kv_heads, rest = divmod(rows - heads * found, 2 * found) if found else (0, 1)
        if rest or n_kv_heads < 1 or heads % n_kv_heads:
            raise _LeftOutError(f"its rows are not those of {heads} heads")
    if _number(stated, "num_key_value_heads") not in (None, n_kv_heads):
        raise _LeftOutError(f"its keys have {n_kv_heads} heads, in config.json another number")
    return AttentionLayer(name, query, key, heads, n_kv_heads, layout, is_transposed)


def _layout(end: str, config: Mapping[str, Any]) -> FusedLayout:
    layout, models = _FUSED[end]
    model = config.get("model_type")
    if model not in models:
        raise _LeftOutError("the order of the rows of its fused weight is unknown")
    return layout


def _heads_of(name: str) -> list[str]:
    """Return the settings of a model with an encoder and a decoder."""
    return [f"{p}_attention_heads" for p in ("decoder", "encoder") if p in name.split(".")]


def _of_part(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the configuration of the part of a model that a tensor belongs to."""
    components = set(name.split("."))
    parts = [part for part, names in _PARTS.items() if names & components]
    if not parts and _number(config, *_HEADS) is None:
        parts = ["text"]
    for part in parts:
        if isinstance(own := config.get(f"{part}_config"), Mapping):
            return own
    return config


def _number(config: Mapping[str, Any], *keys: str) -> int | None:
    """Return the first setting that is a positive whole number."""
    for key in keys:
        value = config.get(key)
        if type(value) is int and 0 < value < 1 << 31:
            return value
    return None


def measure_attention(
    layers: Sequence[AttentionLayer],
    step: Callable[[str, int], None] = lambda name, elements: None,
    most: int | None = None,
) -> list[AttentionRow]:
    """Measure the heads of every layer.

    Args:
        layers: of one checkpoint.
        step: called with a layer's name and 0 before it is read, its number of elements after; by
            several threads.
        most: elements in memory, see ``for_each``; a layer has its two tensors, whatever that is.

    Raises:
        CheckpointError: a tensor that cannot be read.
    """
    rows = {}

    def measured(layer: AttentionLayer) -> None:
        step(layer.name, 0)
        rows[layer.query.name] = AttentionRow(layer.name, _norms(layer))
        step(layer.name, layer.size)

    in_order = sorted(layers, key=lambda one: str(one.query.file))
    for_each(measured, in_order, lambda layer: layer.size, most)
    return [rows[layer.query.name] for layer in layers]


def _norms(layer: AttentionLayer) -> tuple[float, ...]:
    weight = layer.query.read()
    if layer.key is not None:
        query, key = weight, layer.key.read()
    else:
        weight = weight.mT if layer.is_transposed else weight
        query, key = divided(weight, layer.layout, layer.n_heads, layer.n_kv_heads)
    return tuple(attention_norms(query, key, layer.n_heads).tolist())

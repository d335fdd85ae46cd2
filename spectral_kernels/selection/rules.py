"""Which parameters of a model are regularized, and how each is viewed as matrices."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from . import transforms
from .arguments import check_flag, check_pattern_list, check_patterns, check_splits, match_any
from .matrices import (
    CONVOLUTIONS,
    FROZEN,
    TRANSPOSED,
    Elementwise,
    NothingSelected,
    Selection,
    matrices_of,
)
from .options import Patterns, Source, Splits
from .parameters import ParameterRef, made_before_use, parameter_refs

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_NORMS = tuple(
    getattr(nn, name)
    for name in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "InstanceNorm1d",
                 "InstanceNorm2d", "InstanceNorm3d", "GroupNorm", "LayerNorm", "RMSNorm")
)  # fmt: skip
_GAINS = ("weight", "gamma", "scale", "gain", "g")
_SHIFTS = ("bias", "beta", "shift", "b")
# Norms that multiply by (1 + weight): pulling |weight| to one would double their gain.
_OFFSET_GAINS = (
    "GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm", "MiniMaxM3VLRMSNorm",
    "MuseGlimmerTextCenteredRMSNorm", "MuseSparkTextCenteredRMSNorm",
    "MuseSparkTextInputScaledRMSNorm", "NemotronLayerNorm1P", "Qwen3NextRMSNorm", "Qwen3_5RMSNorm",
    "Qwen3_5MoeRMSNorm", "Qwen4ExpTextRMSNorm", "RecurrentGemmaRMSNorm", "Step3p7RMSNorm",
    "T5GemmaRMSNorm", "T5Gemma2RMSNorm", "VaultGemmaRMSNorm", "VideoPrismLayerNorm",
)  # fmt: skip


def select(
    source: Source,
    *,
    biases: bool = True,
    norms: bool = True,
    include: Patterns | None = None,
    exclude: Patterns | None = (),
    splits: Splits | None = None,
    stacked: Patterns | None = (),
    trainable_only: bool = True,
    known: Collection[str] | None = None,
) -> Selection:
    """Choose the matrices and elementwise parameters of a model.

    A tensor with several names (tied weights) counts once; a pattern may name it by any of them.

    Args:
        source: a module, or an iterable of (name, tensor).
        biases: select biases of layers; the shifts of norms belong to ``norms``.
        norms: select the gains and shifts of normalization layers.
        include: a glob pattern or several; if given, only parameters whose name matches one are
            selected, embedding tables included.
        exclude: a glob pattern or several, of names to leave out.
        splits: pattern -> number of equal parts, or their sizes, along the output dimension
            (dim 0; dim 1 for transposed convolutions and transformers' ``Conv1D``).
        stacked: a pattern or several, of parameters (E, out, in) that are stacks of E matrices.
        trainable_only: leave out parameters that do not require a gradient.
        known: names of parameters that were selected before, when a changed model is selected
            again: these need not require a gradient, and patterns may match nothing any more.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a pattern without a match, sizes that do not add up, a parameter that cannot be
            regularized, nothing selected.
    """
    biases, norms = check_flag("biases", biases), check_flag("norms", norms)
    include = check_pattern_list("include", include)
    exclude = check_pattern_list("exclude", exclude) or []
    stacked = check_pattern_list("stacked", stacked) or []
    splits = check_splits(splits)
    refs = parameter_refs(source)
    names = [ref.name for group in refs for ref in group]
    for argument, patterns in (
        ("include", include or []), ("exclude", exclude), ("splits", splits), ("stacked", stacked)
    ):  # fmt: skip
        if known is None:
            check_patterns(argument, patterns, names)

    root = source if isinstance(source, nn.Module) else None
    found = Selection(root=root, names=frozenset(names))
    for group in refs:
        ref = next((o for o in group if not _is_embedding(o)), group[0])
        with torch.enable_grad():
            aliases, tensor = [o.name for o in group], ref.get()
        is_needed = trainable_only and ref.name not in (known or ())
        reason = _reason_to_skip(ref, aliases, tensor, include, exclude, is_needed)
        if reason is None:
            chosen = include is not None or match_any(aliases, stacked) is not None
            role = _role(ref, tensor, chosen)
            if role == "matrix":
                found.matrices += matrices_of(ref, aliases, tensor, splits, stacked)
                continue
            if role in ("bias", "shift", "gain"):
                wanted, argument = (biases, "biases") if role == "bias" else (norms, "norms")
                if wanted:
                    kind = "gain" if role == "gain" else "shift"
                    found.elementwise.append(Elementwise(ref.name, ref, kind))
                    continue
                role = f"{argument}=False"
            reason = role
        if reason == FROZEN:
            found.frozen.append(ref)
        found.skipped.append((ref.name, reason))
    if not found.matrices and not found.elementwise:
        raise NothingSelected(found.skipped)
    return found


def _is_embedding(ref: ParameterRef) -> bool:
    return isinstance(ref.module, (nn.Embedding, nn.EmbeddingBag))


def _reason_to_skip(ref, aliases, tensor, include, exclude, trainable_only) -> str | None:
    if include is not None and match_any(aliases, include) is None:
        return "not in include"
    if (pattern := match_any(aliases, exclude)) is not None:
        return f"exclude {pattern!r}"
    if trainable_only and not transforms.is_differentiated(tensor):
        return FROZEN
    if tensor.dtype not in FLOAT_DTYPES:
        return f"dtype {str(tensor.dtype).removeprefix('torch.')}"
    if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
        raise ValueError(
            f"parameter {ref.name!r} is not initialized yet: run the lazy module once before "
            "building the regularizer"
        )
    if isinstance(ref.module, nn.utils.parametrize.ParametrizationList):
        return "part of a parametrization; the weight that it makes is taken instead"
    if (problem := made_before_use(ref)) is not None:
        raise ValueError(f"parameter {ref.name!r} {problem}, or leave it out with exclude")
    if tensor.layout != torch.strided:
        return f"layout {str(tensor.layout).removeprefix('torch.')}"
    return None


def _role(ref: ParameterRef, tensor: torch.Tensor, chosen: bool) -> str:
    """Return "matrix", "bias", "gain" or "shift", or else the reason to skip the parameter."""
    kind = type(ref.module).__name__
    if isinstance(ref.module, _NORMS) or ("norm" in kind.lower() and tensor.dim() == 1):
        if ref.attribute in _GAINS:
            is_offset = kind in _OFFSET_GAINS or getattr(ref.module, "unit_offset", False)
            return f"a gain of {kind} is stored as its distance from one" if is_offset else "gain"
        if ref.attribute in _SHIFTS:
            return "shift"
    if _is_embedding(ref) and not chosen:
        return "embedding table (name it in include to regularize it)"
    if tensor.dim() >= 2:
        layers = (nn.Linear, nn.Bilinear, *CONVOLUTIONS, *TRANSPOSED)
        is_weight = ref.attribute.startswith("weight") and isinstance(ref.module, layers)
        if tensor.dim() >= 3 and tensor.shape[0] == 1 and not (is_weight or chosen):
            return "additive embedding or token (name it in include to regularize it)"
        return "matrix"
    if tensor.dim() == 1 and (ref.attribute.startswith("bias") or ref.attribute.endswith("bias")):
        return "bias"
    return f"{tensor.dim()}-D, neither a bias nor a parameter of a norm"

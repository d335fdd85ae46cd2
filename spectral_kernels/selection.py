"""Which parameters of a model are regularized, and how each is viewed as matrices."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from .owners import Owner, made_before_use, owners_of

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_NORMS = tuple(
    getattr(nn, name)
    for name in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "InstanceNorm1d",
                 "InstanceNorm2d", "InstanceNorm3d", "GroupNorm", "LayerNorm", "RMSNorm")
)  # fmt: skip
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_GATES = {
    nn.LSTM: ("i", "f", "g", "o"), nn.LSTMCell: ("i", "f", "g", "o"),
    nn.GRU: ("r", "z", "n"), nn.GRUCell: ("r", "z", "n"),
}  # fmt: skip
_RECURRENT = (nn.RNN, nn.RNNCell, *_GATES)
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


@dataclass(frozen=True)
class Matrix:
    """One matrix: a part of a parameter, flattened to (rows, everything else).

    ``index`` picks one of a stack along dim 0; ``part = (start, length)`` a range of the output
    dimension ``row_dim`` (counted after ``index``). ``whole`` is the shape of the parameter that
    was divided so. Of a sharded parameter, what one rank holds is such a matrix too, of the local
    tensor: ``side`` is then how it has to lie (see ``layout.Layout``), and ``absent`` the shape of
    a part that this rank has nothing of.
    """

    name: str
    owner: Owner
    shape: tuple[int, int]
    view: str
    whole: tuple[int, ...]
    row_dim: int = 0
    index: int | None = None
    part: tuple[int, int] | None = None
    side: str | None = None
    absent: tuple[int, ...] | None = None

    def shape_now(self) -> tuple[int, int]:
        """Return (M, N) of the parameter as it is now; ``shape`` is that at selection."""
        part = self.of(self.owner.get())
        others = [n for d, n in enumerate(part.shape) if d != self.row_dim]
        return part.shape[self.row_dim], torch.Size(others).numel()

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the part of ``tensor`` that is this matrix, its rows in dim ``row_dim``."""
        if self.absent is not None:
            return tensor.new_empty(self.absent)
        if self.index is not None:
            tensor = tensor.select(0, self.index)
        if self.part is not None:
            tensor = tensor.narrow(self.row_dim, *self.part)
        return tensor


@dataclass(frozen=True)
class Vector:
    """A bias or a norm's shift (``kind="shift"``), or a norm's gain (``kind="gain"``)."""

    name: str
    owner: Owner
    kind: str


@dataclass
class Selection:
    """What is regularized, and what was skipped and why."""

    matrices: list[Matrix] = field(default_factory=list)
    vectors: list[Vector] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    root: nn.Module | None = None


class NothingSelected(ValueError):
    """Not one matrix or vector: ``skipped`` has every name and why."""

    def __init__(self, skipped: list[tuple[str, str]]) -> None:
        shown = "; ".join(f"{n}: {why}" for n, why in skipped[:8]) or "no parameters"
        super().__init__(f"nothing to regularize was found ({shown})")
        self.skipped = skipped


def match(name: str, patterns: Iterable[str]) -> str | None:
    """Return the first glob pattern that ``name`` matches, or None."""
    return match_any([name], patterns)


def match_any(names: Sequence[str], patterns: Iterable[str]) -> str | None:
    """Return the first glob pattern that one of the ``names`` of a tensor matches, or None."""
    return next((p for p in patterns if any(fnmatch.fnmatchcase(n, p) for n in names)), None)


def check_patterns(argument: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    """Raise ValueError when a pattern matches no parameter: most likely a misspelt name."""
    names = list(names)
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise ValueError(f"{argument}: {pattern!r} matches no parameter; there are: {shown}")


def select(
    source: nn.Module | Iterable[tuple[str, torch.Tensor]],
    *,
    biases: bool = True,
    norms: bool = True,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    splits: Mapping[str, int | Sequence[int]] | None = None,
    stacked: Sequence[str] = (),
    trainable_only: bool = True,
) -> Selection:
    """Choose the matrices and vectors of a model.

    A tensor with several names (tied weights) counts once; a pattern may name it by any of them.

    Args:
        source: a module, or an iterable of (name, tensor).
        biases: select biases.
        norms: select the gains and shifts of normalization layers.
        include: glob patterns; when given, only parameters whose name matches one are selected,
            embedding tables among them.
        exclude: glob patterns of names to leave out.
        splits: pattern -> number of equal parts, or their sizes, along the output dimension
            (dim 0; dim 1 for transposed convolutions and transformers' ``Conv1D``).
        stacked: patterns of stacks (E, out, in) that are E matrices.
        trainable_only: leave out parameters that do not require a gradient.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a pattern that matches nothing, sizes that do not add up, nothing selected.
    """
    include = _patterns("include", include)
    exclude, stacked = _patterns("exclude", exclude) or [], _patterns("stacked", stacked) or []
    splits = {} if splits is None else splits
    if not isinstance(splits, Mapping) or not all(isinstance(p, str) for p in splits):
        raise TypeError(
            f"splits: got {splits!r:.80}; accepted is a mapping from name patterns to a "
            'number of parts or their sizes, such as {"*.qkv.weight": 3}'
        )
    owners = owners_of(source)
    names = [owner.name for group in owners for owner in group]
    for argument, patterns in (
        ("include", include or []), ("exclude", exclude), ("splits", splits), ("stacked", stacked)
    ):  # fmt: skip
        check_patterns(argument, patterns, names)

    found = Selection(root=source if isinstance(source, nn.Module) else None)
    for group in owners:
        owner = next((o for o in group if not _is_embedding(o)), group[0])
        with torch.enable_grad():
            aliases, tensor = [o.name for o in group], owner.get()
        reason = _reason_to_skip(owner, aliases, tensor, include, exclude, trainable_only)
        if reason is None:
            chosen = include is not None or match_any(aliases, stacked) is not None
            role = _role(owner, tensor, chosen)
            if role == "matrix":
                found.matrices += _matrices(owner, aliases, tensor, splits, stacked)
                continue
            if role in ("bias", "shift", "gain"):
                wanted, argument = (biases, "biases") if role == "bias" else (norms, "norms")
                if wanted:
                    kind = "gain" if role == "gain" else "shift"
                    found.vectors.append(Vector(owner.name, owner, kind))
                    continue
                role = f"{argument}=False"
            reason = role
        found.skipped.append((owner.name, reason))
    if not found.matrices and not found.vectors:
        raise NothingSelected(found.skipped)
    return found


def _patterns(argument: str, patterns: Sequence[str] | None) -> list[str] | None:
    if patterns is None:
        return None
    found = None
    if isinstance(patterns, Iterable) and not isinstance(patterns, str):
        found = list(patterns)
    if found is None or not all(isinstance(p, str) for p in found):
        raise TypeError(f"{argument}: got {patterns!r}; accepted is a list of glob patterns")
    return found


def _is_embedding(owner: Owner) -> bool:
    return isinstance(owner.module, (nn.Embedding, nn.EmbeddingBag))


def _is_hf_conv1d(owner: Owner) -> bool:
    """Tell whether the owner is transformers' Conv1D, whose weight is stored (in, out)."""
    return type(owner.module).__name__ == "Conv1D" and hasattr(owner.module, "nf")


def _reason_to_skip(owner, aliases, tensor, include, exclude, trainable_only) -> str | None:
    if include is not None and match_any(aliases, include) is None:
        return "not in include"
    if (pattern := match_any(aliases, exclude)) is not None:
        return f"exclude {pattern!r}"
    if trainable_only and not tensor.requires_grad:
        return "requires_grad is False"
    if tensor.dtype not in FLOAT_DTYPES:
        return f"dtype {str(tensor.dtype).removeprefix('torch.')}"
    if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
        raise ValueError(
            f"parameter {owner.name!r} is not initialized yet: run the lazy module once before "
            "building the regularizer"
        )
    if isinstance(owner.module, nn.utils.parametrize.ParametrizationList):
        return "part of a parametrization; the weight that it makes is taken instead"
    if (problem := made_before_use(owner)) is not None:
        raise ValueError(f"parameter {owner.name!r} {problem}, or leave it out with exclude")
    if tensor.layout != torch.strided:
        return f"layout {str(tensor.layout).removeprefix('torch.')}"
    return None


def _role(owner: Owner, tensor: torch.Tensor, chosen: bool) -> str:
    """Return "matrix", "bias", "gain", "shift", or the reason why it is none of them."""
    kind = type(owner.module).__name__
    if isinstance(owner.module, _NORMS) or ("norm" in kind.lower() and tensor.dim() == 1):
        if owner.attribute in _GAINS:
            is_offset = kind in _OFFSET_GAINS or getattr(owner.module, "unit_offset", False)
            return f"a gain of {kind} is stored as its distance from one" if is_offset else "gain"
        if owner.attribute in _SHIFTS:
            return "shift"
    if _is_embedding(owner) and not chosen:
        return "embedding table (name it in include to regularize it)"
    if tensor.dim() >= 2:
        layers = (nn.Linear, nn.Bilinear, *_CONVOLUTIONS, *_TRANSPOSED)
        is_weight = owner.attribute.startswith("weight") and isinstance(owner.module, layers)
        if tensor.dim() >= 3 and tensor.shape[0] == 1 and not (is_weight or chosen):
            return "additive embedding or token (name it in include to regularize it)"
        return "matrix"
    if tensor.dim() == 1 and (
        owner.attribute.startswith("bias") or owner.attribute.endswith("bias")
    ):
        return "bias"
    return f"{tensor.dim()}-D, neither a bias nor a parameter of a norm"


def _matrices(
    owner: Owner, aliases: Sequence[str], tensor: torch.Tensor, splits, stacked
) -> list[Matrix]:
    shape = whole = tuple(tensor.shape)
    view = []
    stack: Sequence[int | None] = (None,)
    if (pattern := match_any(aliases, stacked)) is not None:
        if len(shape) < 3:
            raise ValueError(
                f"stacked: {pattern!r} matches {owner.name!r} of shape {shape}; accepted are "
                "stacks with at least three dimensions, (E, out, in)"
            )
        stack, shape = range(shape[0]), shape[1:]
        view.append(f"stack of {len(stack)}")
    transposed = isinstance(owner.module, _TRANSPOSED)
    row_dim = 1 if transposed or _is_hf_conv1d(owner) else 0
    sizes, labels = _parts(owner, aliases, shape, row_dim, splits)
    if sizes is None:
        parts: list[tuple[str, tuple[int, int] | None]] = [("", None)]
        row_dim = 1 if transposed else 0
    else:
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        parts = [(label, (a, n)) for label, a, n in zip(labels, starts, sizes, strict=True)]
        view.append(f"split {'+'.join(map(str, sizes))}")
    if len(shape) > 2 or transposed:
        view.append(f"flattened (dim {row_dim}, rest)")
    matrices = []
    for index in stack:
        for label, part in parts:
            rows = shape[row_dim] if part is None else part[1]
            others = [n for d, n in enumerate(shape) if d != row_dim]
            cols = torch.Size(others).numel()
            name = owner.name + ("" if index is None else f"[{index}]") + (label and f"[{label}]")
            matrices.append(
                Matrix(name, owner, (rows, cols), ", ".join(view), whole, row_dim, index, part)
            )
    return matrices


def _parts(
    owner: Owner, aliases: Sequence[str], shape, row_dim: int, splits
) -> tuple[list[int] | None, Sequence[str]]:
    """Return sizes and labels of the parts along the output dimension; None: it is not split."""
    total = shape[row_dim]
    pattern = match_any(aliases, splits)
    if pattern is not None:
        wanted = splits[pattern]
        if isinstance(wanted, int) and not isinstance(wanted, bool):
            sizes = [total // wanted] * wanted if wanted > 0 and total % wanted == 0 else []
        else:
            sizes = list(wanted) if isinstance(wanted, Sequence) else []
        if not all(isinstance(n, int) and n > 0 for n in sizes) or sum(sizes) != total or not sizes:
            raise ValueError(
                f"splits: {pattern!r}: {wanted!r} does not divide the {total} outputs (dim "
                f"{row_dim}) of {owner.name!r}; accepted are a number of equal parts or sizes "
                f"that add up to {total}"
            )
        return sizes, [str(i) for i in range(len(sizes))]
    if isinstance(owner.module, nn.MultiheadAttention) and owner.attribute == "in_proj_weight":
        return [total // 3] * 3, ("q", "k", "v")
    if isinstance(owner.module, _RECURRENT) and owner.attribute.startswith(
        ("weight_ih", "weight_hh")
    ):
        gates = next((g for t, g in _GATES.items() if isinstance(owner.module, t)), None)
        if gates is not None:
            return [total // len(gates)] * len(gates), gates
    return None, ()

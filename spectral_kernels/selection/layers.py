"""What modules do with their parameters: the layers that are known, and those that are taught."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from .arguments import check_names, check_role, expected
from .parameters import ParameterRef
from .words import is_norm, is_table

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
GATES = {
    nn.LSTM: ("i", "f", "g", "o"), nn.LSTMCell: ("i", "f", "g", "o"),
    nn.GRU: ("r", "z", "n"), nn.GRUCell: ("r", "z", "n"),
}  # fmt: skip
RECURRENT = (nn.RNN, nn.RNNCell, *GATES)
_NORMS = tuple(
    getattr(nn, name)
    for name in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "InstanceNorm1d",
                 "InstanceNorm2d", "InstanceNorm3d", "GroupNorm", "LayerNorm", "RMSNorm")
)  # fmt: skip
_GAINS = ("weight", "gamma", "scale", "gain", "g")
_SHIFTS = ("bias", "beta", "shift", "b")
# Norms that multiply by (1 + weight): pulling |weight| to one would double their gain.
_OFFSET_GAINS = {
    "GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm", "MiniMaxM3VLRMSNorm",
    "MuseGlimmerTextCenteredRMSNorm", "MuseSparkTextCenteredRMSNorm",
    "MuseSparkTextInputScaledRMSNorm", "NemotronLayerNorm1P", "Qwen3NextRMSNorm", "Qwen3_5RMSNorm",
    "Qwen3_5MoeRMSNorm", "Qwen4ExpTextRMSNorm", "RecurrentGemmaRMSNorm", "Step3p7RMSNorm",
    "T5GemmaRMSNorm", "T5Gemma2RMSNorm", "VaultGemmaRMSNorm", "VideoPrismLayerNorm",
}  # fmt: skip
# Global response normalization, x + g N(x): its gain is added to one.
_RESPONSE_NORMS = {"ConvNextV2GRN", "GRN", "GlobalResponseNorm", "GlobalResponseNormMlp"}


class Role(NamedTuple):
    """What a parameter is.

    Attributes:
        kind: "matrix", "stack" (E matrices along dim 0), "groups" (a matrix per group of a
            convolution), "bias", "biases" (E biases along dim 0), "shift", "gain" or "skip".
        reason: why it is skipped.
        is_final: ``include`` does not change that it is skipped.
    """

    kind: str
    reason: str = ""
    is_final: bool = False


MATRIX, BIAS = Role("matrix"), Role("bias")
TABLE = Role("skip", "embedding table (include or roles takes it)")

_registered: dict[type[nn.Module], dict[str, str]] = {}


def register_layer(cls: type[nn.Module], *, roles: Mapping[str, str]) -> None:
    """Say what the parameters of a class of modules are, once for all models.

    It holds for subclasses, too, and goes before what the package knows or guesses; the arguments
    ``roles``, ``include`` and ``exclude`` go before it. Registering a class again replaces what was
    said before.

    Args:
        cls: a subclass of ``torch.nn.Module``.
        roles: name of a parameter in the module -> "matrix" (dim 0, rest), "stack" (E matrices, or
            biases, along dim 0), "bias" (pulled to 0), "gain" (each element pulled to 1), "skip".

    Raises:
        TypeError: ``cls`` is no class of modules, ``roles`` no mapping from names to strings.
        ValueError: another role.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(expected("cls", "a subclass of torch.nn.Module", cls))
    found = check_names("roles", roles, "a mapping from names of parameters to roles")
    _registered[cls] = {n: check_role(f"roles[{n!r}]", role) for n, role in found.items()}


def registered_role(ref: ParameterRef) -> str | None:
    """Return what :func:`register_layer` was told about a parameter, or None."""
    for cls in type(ref.module).__mro__:
        if ref.attribute in _registered.get(cls, ()):
            return _registered[cls][ref.attribute]
    return None


def is_embedding(ref: ParameterRef) -> bool:
    """Return whether ``ref`` is the table of an embedding of torch."""
    return isinstance(ref.module, (nn.Embedding, nn.EmbeddingBag))


def is_hf_conv1d(ref: ParameterRef) -> bool:
    """Return whether ``ref`` is of transformers' Conv1D, whose weight is stored (in, out)."""
    return type(ref.module).__name__ == "Conv1D" and hasattr(ref.module, "nf")


def known_role(ref: ParameterRef, tensor: torch.Tensor) -> Role | None:
    """Return the role of a parameter in its module if the module is known, or None."""
    module, name = ref.module, ref.attribute
    if module is None:
        return None
    if is_embedding(ref):
        return TABLE
    is_weight = name == "weight" and tensor.dim() >= 2
    if is_weight and isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
        return Role("groups") if module.groups > 1 else MATRIX
    if is_weight and (isinstance(module, (nn.Linear, nn.Bilinear)) or is_hf_conv1d(ref)):
        return MATRIX
    if isinstance(module, RECURRENT) and name.startswith("weight_") and tensor.dim() == 2:
        return MATRIX
    if isinstance(module, nn.MultiheadAttention):
        if name in ("bias_k", "bias_v"):
            return Role("skip", "a token (include or roles takes it)")
        if name.endswith("proj_weight") and tensor.dim() == 2:
            return MATRIX
    if isinstance(module, nn.PReLU):
        return Role("skip", "a slope")
    return _role_in_norm(ref, tensor)


def _role_in_norm(ref: ParameterRef, tensor: torch.Tensor) -> Role | None:
    """Return the role of a gain or shift of a norm, of torch or by the name of its class."""
    module, names = ref.module, {cls.__name__ for cls in type(ref.module).__mro__}
    is_own = isinstance(module, _NORMS)
    if not is_own and not is_norm(type(module).__name__) and not names & _RESPONSE_NORMS:
        return None
    # NormLinear.weight is a matrix, MultiheadNorm.gamma a gain per head and element.
    is_flat = sum(n != 1 for n in tensor.shape) < 2
    if ref.attribute in _GAINS and tensor.dim() and (is_own or is_flat or ref.attribute[0] == "g"):
        if names & _OFFSET_GAINS or getattr(module, "unit_offset", False):
            kind = type(module).__name__
            return Role("skip", f"a gain of {kind} is stored as its distance from one", True)
        if names & _RESPONSE_NORMS:
            return Role("skip", "the gain of a branch that is added to its input", True)
        return Role("gain")
    if ref.attribute in _SHIFTS and tensor.dim() and (is_own or is_flat):
        return Role("shift")
    return None


def is_convolution(module: nn.Module | None, tensor: torch.Tensor) -> bool:
    """Return whether the module has a kernel size, and it is the size of ``tensor`` after dim 1."""
    size = getattr(module, "kernel_size", None)
    if isinstance(size, int):
        size = (size,) * (tensor.dim() - 2)
    if not isinstance(size, tuple) or tensor.dim() < 3:
        return False
    return tuple(tensor.shape[2:]) == size


def holds_table(module: nn.Module | None) -> bool:
    """Return whether the name of a module's class says that it holds an embedding table."""
    return module is not None and is_table(type(module).__name__)

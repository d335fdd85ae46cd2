"""Types of the arguments that choose parameters, which several public functions share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import nn
from typing_extensions import TypedDict

Source = nn.Module | Iterable[tuple[str, torch.Tensor]]
Patterns = str | Iterable[str]
Splits = Mapping[str, int | Iterable[int]]
Roles = Mapping[str, Literal["matrix", "stack", "bias", "gain", "skip"]]
Convolutions = Literal["flattened", "operator"]


class MatrixOptions(TypedDict, total=False):
    """Which parameters are matrices; see ``SpectralRegularizer``."""

    include: Patterns | None
    exclude: Patterns | None
    splits: Splits | None
    stacked: Patterns | None
    roles: Roles | None
    convolutions: Convolutions


class SelectionOptions(MatrixOptions, total=False):
    """Which parameters are regularized; see ``SpectralRegularizer``."""

    biases: bool
    norms: bool


class StartOptions(SelectionOptions, total=False):
    """Which parameters are regularized, and how vectors start; see ``SpectralRegularizer``."""

    warmup: int
    seed: int

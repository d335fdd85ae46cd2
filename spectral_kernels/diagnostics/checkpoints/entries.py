"""The tensors of a checkpoint, not read yet, and what was left out."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .messages import CheckpointError as CheckpointError
from .stored import Piece


@dataclass(frozen=True)
class LazyTensor:
    """One tensor of a checkpoint, which :meth:`read` brings into memory.

    A weight that is made of several stored tensors, such as one of float8 with its scales, is one
    LazyTensor too; ``parts`` has their names.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    """As torch names it, ``"bfloat16"``; as the file does where torch has no such type."""
    file: Path
    key: str
    """The name inside the file."""
    unusable: str | None = None
    """Why it cannot be taken as a matrix, whatever its dtype."""
    in_optimizer: bool = False
    """It belongs to the state of an optimizer."""
    parts: tuple[str, ...] = ()
    """Names of the stored tensors that it is made of, if it is not stored itself."""
    made_by: str | None = None
    """How it is made of them, such as ``"float8_e4m3fn with block scales 128 x 128"``."""
    reader: Callable[[LazyTensor], torch.Tensor] | None = field(
        default=None, repr=False, compare=False
    )
    factors: Callable[[], tuple[torch.Tensor, torch.Tensor]] | None = field(
        default=None, repr=False, compare=False
    )
    """Reads B [M, r] and A [r, N] of a weight that is their product, which need not be made."""

    piece: Piece | None = None
    """Which part of a larger tensor it is, if it is one, such as the shard of a rank."""

    def read(self) -> torch.Tensor:
        """Return the tensor, on the CPU; release it before the next one to limit memory.

        Raises:
            CheckpointError: it cannot be read.
        """
        assert self.reader is not None
        return self.reader(self)


@dataclass(frozen=True)
class Skipped:
    """A file or a tensor of a checkpoint that was left out, and why."""

    name: str
    reason: str
    shape: tuple[int, ...] = ()
    dtype: str = ""

    @classmethod
    def of(cls, tensor: LazyTensor, reason: str) -> Skipped:
        """Return what is said of a tensor."""
        return cls(tensor.name, reason, tensor.shape, tensor.dtype)


def natural(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key for names that orders numbers by value: 2 before 10."""
    pieces = re.split(r"(\d+)", name)
    return [(1, int(p), "") if p.isdecimal() and p.isascii() and len(p) < 20 else (0, 0, p)
            for p in pieces]  # fmt: skip


def short(kind) -> str:
    """Return the name of a dtype or layout as text, without ``torch.``."""
    return str(kind).removeprefix("torch.")

"""The stored tensors of a checkpoint, of which the weights of the model are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from .entries import CheckpointError, LazyTensor, Skipped


class Pool:
    """The tensors by name; each is a weight, a part of one, or left out.

    Attributes:
        tensors: name -> what is there now: stored ones, and weights made of them.
        left_out: what is no weight, and why.
    """

    def __init__(self, tensors: Sequence[LazyTensor]) -> None:
        self.tensors = {tensor.name: tensor for tensor in tensors if not tensor.in_optimizer}
        self.left_out: list[Skipped] = []
        self._of_optimizer = [tensor for tensor in tensors if tensor.in_optimizer]
        self._places = {tensor.name: place for place, tensor in enumerate(tensors)}

    def weights(self) -> list[LazyTensor]:
        """Return the tensors that are there, in the order of the stored ones."""
        found = [*self.tensors.values(), *self._of_optimizer]
        return sorted(found, key=lambda tensor: self._places[tensor.name])

    def ending(self, suffix: str) -> list[tuple[str, LazyTensor]]:
        """Return the tensors whose name ends with ``suffix``, each after the name without it."""
        cut = len(suffix)
        return [(name[:-cut], t) for name, t in self.tensors.items() if name.endswith(suffix)]

    def get(self, name: str) -> LazyTensor | None:
        """Return the tensor of that name, if there is one."""
        return self.tensors.get(name)

    def replace(
        self,
        parts: Sequence[LazyTensor],
        name: str,
        shape: Sequence[int],
        made_by: str,
        read: Callable[[], torch.Tensor],
        factors: Callable[[], tuple[torch.Tensor, torch.Tensor]] | None = None,
        dtype: str = "float32",
    ) -> None:
        """Put a weight in the place of its parts.

        Args:
            parts: the stored tensors, the one that gives the weight its place first.
            name: of the weight.
            shape: of the weight.
            made_by: see ``LazyTensor.made_by``.
            read: makes the weight of its parts, which it reads.
            factors: see ``LazyTensor.factors``.
            dtype: what ``read`` returns.
        """
        main = parts[0]
        names = [part.name for part in parts]
        if name in self.tensors and name not in names:
            self.leave_out(parts, f"{name} is stored too")
            return
        # Scales may be those of another weight too; only what else is wrong with them counts.
        wrong = [
            p.unusable for p in parts[1:] if p.unusable and not p.unusable.startswith("it is ")
        ]

        def reader(entry: LazyTensor) -> torch.Tensor:
            try:
                return read()
            except CheckpointError:
                raise
            except Exception as error:
                first = f"{type(error).__name__}: {error}".split("\n")[0]
                raise CheckpointError(
                    f"{entry.file}: '{entry.name}': cannot be made of its tensors: {first[:200]}"
                ) from None

        self._places[name] = self._places[main.name]
        self.drop(parts)
        self.tensors[name] = replace(
            main, name=name, shape=tuple(shape), dtype=dtype, parts=tuple(names), made_by=made_by,
            unusable=main.unusable or next(iter(wrong), None), reader=reader, factors=factors,
        )  # fmt: skip

    def drop(self, parts: Sequence[LazyTensor]) -> None:
        """Take tensors out."""
        for part in parts:
            self.tensors.pop(part.name, None)

    def leave_out(self, parts: Sequence[LazyTensor], reason: str) -> None:
        """Take tensors out, and say why, for the first of them."""
        self.drop(parts)
        self.left_out.append(Skipped.of(parts[0], reason))

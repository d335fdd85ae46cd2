"""What an adapter, or fine-tuning, adds to the weights of a base model: ``--base``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ...diagnostics.checkpoints import Checkpoint, CheckpointError, LazyTensor, Skipped
from ...diagnostics.checkpoints.adapters import Config
from ...selection.matrices import Matrix
from ..console import some
from .matching import unwrapped
from .measure import READABLE, Plan
from .rows import Added, Measured
from .values import sigma_and_norm

# As Shuttleworth et al. and peft's reduce_intruder_dimension() have them.
VECTORS, EPSILON = 10, 0.5
# The two full SVDs of a square matrix of this size take about 4 s on a core, of 2048 rows 40 s.
LIMIT = 1024
_OF_PEFT = re.compile(r"^(?:base_model\.(?:model\.)?)+")
_LORA = re.compile(r"\.lora(?:\.[^.]+)?$")
_MISSING = "no weight of that name and shape"


def compare(
    plan: Plan,
    base: Checkpoint,
    measured: Measured,
    step: Callable[[str, int], None] = lambda name, elements: None,
    backend: str = "auto",
) -> None:
    """Fill ``Added`` into the rows of a checkpoint.

    Args:
        plan: of the checkpoint: low-rank updates, or the weights of a fine-tuned model.
        base: holds the weights before.
        measured: its rows are replaced, and what has no weight in ``base`` is listed.
        step: as for ``measure``.
        backend: as for ``measure``.

    Raises:
        CheckpointError: ``base`` has none of the weights, or cannot be read.
    """
    found = _Names(base.tensors)
    measured.base = base.path
    rows = {row.name: place for place, row in enumerate(measured.rows)}
    n_matched = 0
    for name, (entry, matrices) in plan.matrices.items():
        weight, why = found.of(entry)
        n_matched += weight is not None
        if weight is None or why is not None:
            measured.unmatched.append(Skipped.of(entry, why or _MISSING))
            step(name, math.prod(entry.shape))
            continue
        step(name, 0)
        for matrix, added in _added(entry, weight, matrices, backend):
            if matrix.name in rows:
                place = rows[matrix.name]
                measured.rows[place] = replace(measured.rows[place], added=added)
        step(name, math.prod(entry.shape))
    if not n_matched:
        wanted = [
            f"{_target(entry.name)} {list(entry.shape)}" for entry, _ in plan.matrices.values()
        ]
        raise CheckpointError(
            f"{base.path}: has none of the weights of {plan.checkpoint.path}; looked for names "
            f"that end with {some(wanted)}"
        )


def work(plan: Plan, base: Path | None) -> int:
    """Return the number of elements that :func:`compare` tells to ``step``; 0 without a base."""
    if base is None:
        return 0
    return sum(math.prod(entry.shape) for entry, _ in plan.matrices.values())


class _Names:
    """Finds the weights of a base model by names that may have other prefixes."""

    def __init__(self, tensors: Sequence[LazyTensor]) -> None:
        self._by_end: dict[str, list[tuple[str, LazyTensor]]] = {}
        self._flat: dict[str, LazyTensor] = {}
        for tensor in tensors:
            name = _plain(tensor.name)
            self._by_end.setdefault(_end(name), []).append((name, tensor))
            self._flat[name.removesuffix(".weight").replace(".", "_")] = tensor

    def of(self, entry: LazyTensor) -> tuple[LazyTensor | None, str | None]:
        """Return the weight that an entry is added to or made of, and why it cannot be used."""
        name = _target(entry.name)
        found = [
            (other, tensor) for other, tensor in self._by_end.get(_end(name), ())
            if _is_end(other, name) and _fits(tensor, entry)
        ]  # fmt: skip
        exact = [pair for pair in found if pair[0] == name] or found
        if not exact and entry.factors is not None and "." not in name.removesuffix(".weight"):
            # kohya: lora_unet_ and the module's name with underscores for its dots.
            flat = name.removesuffix(".weight")
            ends = (flat[match.end() :] for match in re.finditer("_", flat))
            exact = [("", t) for e in ends if (t := self._flat.get(e)) and _fits(t, entry)][:1]
        if len(exact) != 1:
            return None, "several weights have such a name" if exact else None
        tensor = exact[0][1]
        if tensor.unusable is not None or tensor.dtype not in READABLE:
            return tensor, f"base: {tensor.unusable or f'dtype {tensor.dtype}'}"
        if "DoRA" in (entry.made_by or ""):
            return tensor, "DoRA sets the norms of columns too, which B A does not show"
        return tensor, None


def _plain(name: str) -> str:
    return _OF_PEFT.sub("", unwrapped(name)).replace(".base_layer.", ".")


def _target(name: str) -> str:
    """Return the name of the weight that an update is added to, or of the weight itself."""
    name = _plain(name)
    return _LORA.sub(".weight", name) if _LORA.search(name) else name


def _end(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _is_end(one: str, other: str) -> bool:
    """Return whether one of two names ends with the other, after a dot."""
    return one == other or one.endswith(f".{other}") or other.endswith(f".{one}")


def _fits(weight: LazyTensor, entry: LazyTensor) -> bool:
    is_turned = entry.factors is not None and len(weight.shape) == 2
    return weight.shape == entry.shape or (is_turned and weight.shape[::-1] == entry.shape)


def _added(
    entry: LazyTensor, weight: LazyTensor, matrices: Sequence[Matrix], backend: str
) -> list[tuple[Matrix, Added]]:
    """Read the two tensors and measure what was added, per matrix."""
    before = weight.read().float()
    if entry.factors is None:
        after = entry.read().float()
        update = after - before
    else:
        update = entry.read().float()
        if before.shape != update.shape or Config.beside(entry.file).is_transposed:
            before = before.T
        after = before + update
    found = []
    for matrix in matrices:
        plain = replace(matrix, periods=None, side=None)
        sigma, norm = sigma_and_norm(plain, before, backend)
        whole, part = sigma_and_norm(plain, after, backend), sigma_and_norm(plain, update, backend)
        relative = part[1] / norm if norm else math.inf if part[1] else 0.0
        intruders, why = _intruders(plain, before, after)
        found.append((matrix, Added(weight.name, sigma, whole[0], part[0], relative,
                                    intruders, why)))  # fmt: skip
    return found


def _intruders(
    matrix: Matrix, before: torch.Tensor, after: torch.Tensor
) -> tuple[int | None, str | None]:
    """Count the intruder dimensions, or say why not.

    They are those of the first 10 left singular vectors of the matrix after whose cosine with each
    left singular vector of that before is below 0.5 in magnitude (Shuttleworth et al., "LoRA vs
    full fine-tuning: an illusion of equivalence", arXiv 2410.21228).
    """
    pair = [matrix.of(t).movedim(matrix.row_dim, 0).flatten(1).double() for t in (before, after)]
    if min(pair[0].shape) > LIMIT:
        return None, f"both sides are above {LIMIT}"
    if not all(bool(torch.isfinite(w).all()) for w in pair):
        return None, "an element is not finite"
    x, y = (torch.linalg.svd(w, full_matrices=False).U for w in pair)
    nearest = (y[:, :VECTORS].T @ x).abs().amax(1)
    return int((nearest < EPSILON).sum()), None

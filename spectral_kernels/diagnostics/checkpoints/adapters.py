"""Low-rank updates of weights (LoRA, Hu et al. 2021, arXiv 2106.09685) as one matrix each."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .entries import LazyTensor
from .pool import Pool

_CONFIG_BYTES = 1 << 24
# The ending of A's name, and of B's: peft, also with the adapter's name; its embeddings; diffusers;
# kohya. An adapter's name stands before or at the end.
_ENDINGS = (
    (r"\.lora_A((?:\.[^.]+)?)\.weight", ".lora_B{}.weight"),
    (r"\.lora_embedding_A((?:\.[^.]+)?)", ".lora_embedding_B{}"),
    (r"(?:\.|_)lora((?:_linear_layer)?)\.down\.weight", "lora{}.up.weight"),
    (r"\.lora_down((?:\.[^.]+)?)\.weight", ".lora_up{}.weight"),
)
_PAIRS = [(re.compile(f"(.+){ending}"), other) for ending, other in _ENDINGS]
# Other adapters: AdaLoRA, LoCon's core, LoHa and LoKr.
_OTHERS = re.compile(
    r"(.+)\.(lora_E(?:\.[^.]+)?|lora_mid\.weight|hada_[wt]\d.*|lokr_[wt]\d.*|lokr_[wt]\d)"
)
_FLOATS = ("float32", "float64", "bfloat16", "float16")


@dataclass(frozen=True)
class Config:
    """What peft stores of an adapter beside it, in adapter_config.json."""

    found: Mapping[str, Any]

    @classmethod
    def beside(cls, file: Path) -> Config:
        """Read the adapter_config.json in the folder of a file; empty if there is none."""
        path = file.parent / "adapter_config.json"
        try:
            if not path.is_file() or path.stat().st_size > _CONFIG_BYTES:
                return cls({})
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return cls({})
        return cls(found if isinstance(found, dict) else {})

    @property
    def is_transposed(self) -> bool:
        """Whether the weights that it is added to are (in, out), as those of Conv1D."""
        return self.found.get("fan_in_fan_out") is True

    def scale(self, module: str, rank: int) -> float | None:
        """Return what B A is multiplied by: alpha / r, or alpha / sqrt(r); None if not known."""
        alpha = self._of("alpha_pattern", module, self.found.get("lora_alpha"))
        rank = self._of("rank_pattern", module, rank)
        if type(alpha) not in (int, float) or type(rank) is not int or rank < 1:
            return None
        try:
            scale = alpha / (math.sqrt(rank) if self.found.get("use_rslora") is True else rank)
        except OverflowError:
            return None
        return scale if math.isfinite(scale) else None

    def _of(self, patterns: str, module: str, usual: Any) -> Any:
        """Return the value for a module; None where a regular expression would decide.

        Expressions of unknown origin are not run, as they can be made to take forever.
        """
        found = self.found.get(patterns)
        for key, value in found.items() if isinstance(found, Mapping) else ():
            name = key.removeprefix("^")
            if re.search(r"[^\w.\-]", name):
                return None
            if module == name or (name == key and module.endswith(f".{name}")):
                return value
        return usual


def multiply(stored: Pool) -> None:
    """Put B A times its scale in the place of A and B."""
    for name in list(stored.tensors):
        if match := _OTHERS.fullmatch(name):
            _leave_out(stored, match[1])
    configs: dict[Path, Config] = {}
    for name, down in list(stored.tensors.items()):
        for pattern, other in _PAIRS:
            if match := pattern.fullmatch(name):
                module, adapter = match[1], match[2]
                joint = name[len(module)] if other[0] != "." else ""
                up = stored.get(f"{module}{joint}{other.format(adapter)}")
                if name not in stored.tensors:
                    break
                if up is None:
                    stored.leave_out([down], "a factor of an update whose other one is missing")
                    break
                if down.file not in configs:
                    configs[down.file] = Config.beside(down.file)
                _multiply(stored, module, adapter, down, up, configs[down.file])
                break


def _leave_out(stored: Pool, module: str) -> None:
    """Leave out all parts of an adapter of another kind."""
    names = ("lora_", "hada_", "lokr_")
    parts = [t for name, t in stored.tensors.items()
             if name.startswith(tuple(f"{module}.{kind}" for kind in names))]  # fmt: skip
    if parts:
        parts.sort(key=lambda part: -len(part.shape))
        stored.leave_out(parts, "an adapter that is no product B A: AdaLoRA, LoCon, LoHa or LoKr")


def _multiply(
    stored: Pool, module: str, adapter: str, down: LazyTensor, up: LazyTensor, config: Config
) -> None:
    """Put the update of one module in the place of its factors A = ``down`` and B = ``up``."""
    rank = down.shape[0] if down.shape else 0
    fits = (
        len(down.shape) >= 2
        and len(up.shape) == len(down.shape)
        and up.shape[1] == rank
        and math.prod(up.shape[2:]) == 1
        and {down.dtype, up.dtype} <= set(_FLOATS)
    )
    if not fits:
        stored.leave_out([down, up], f"factors {list(down.shape)} and {list(up.shape)} do not fit")
        return
    is_embedding = "lora_embedding_A" in down.name
    parts = [down, up]
    alpha, magnitude = stored.get(f"{module}.alpha"), _magnitude(stored, module, adapter)
    parts += [part for part in (alpha, magnitude) if part is not None]
    plain = module.removeprefix("base_model.model.")
    scale = config.scale(plain, rank)
    if alpha is not None and math.prod(alpha.shape) == 1:
        scale = float(alpha.read().double()) / rank
    shape = (up.shape[0], *down.shape[1:])
    made_by = "B A" if scale is None else f"{scale:.4g} B A"
    made_by += " (LoRA" + ("; its scale is not known)" if scale is None else ")")
    if magnitude is not None:
        made_by += ", without the magnitudes of DoRA"

    def factors() -> tuple[torch.Tensor, torch.Tensor]:
        a, b = down.read().float().flatten(1), up.read().float().flatten(1)
        b = b * (1.0 if scale is None else scale)
        return (a.T, b.T) if is_embedding else (b, a)

    if is_embedding:
        shape = shape[::-1]

    def read() -> torch.Tensor:
        b, a = factors()
        return (b @ a).view(shape)

    is_named = adapter.startswith(".") and adapter != ".default"
    name = f"{module}.lora" + (adapter if is_named else "")
    stored.replace(parts, name, shape, made_by, read, factors)


def _magnitude(stored: Pool, module: str, adapter: str) -> LazyTensor | None:
    """Return the magnitudes of DoRA (Liu et al. 2024, arXiv 2402.09353), if it is that."""
    names = [f"{module}.lora_magnitude_vector{adapter}{end}" for end in (".weight", "")]
    return next(filter(None, map(stored.get, [*names, f"{module}.dora_scale"])), None)

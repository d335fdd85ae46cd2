"""Names by which the state of an optimizer, a scheduler or a generator is known."""

from __future__ import annotations

import re

# As Trainer, accelerate, Lightning, FSDP, DeepSpeed and people name it in a checkpoint.
_PARTS = re.compile(
    r"optim(izer|iser)?s?(_?(states?|state_dicts?|dict|sd|params))?"
    r"|(lr_)?schedulers?(_?(states?|state_dict))?|(.*_)?rng_states?(_all)?"
    r"|exp_avg(_sq|_slow|_fast)?|max_exp_avg_sq|exp_inf|momentum_buffer|square_avg|acc_delta"
)
_FILES = re.compile(
    r"(optim(izer)?s?|(lr_)?scheduler|rng_state|random_states|scaler|sampler)([._-].*|\d+)?"
    r"|.*[._-]optim(izer|_states)?"
)


def of_optimizer(name: str) -> bool:
    """Return whether one of the parts of a dotted name is that of an optimizer's state."""
    return any(_PARTS.fullmatch(part) for part in name.split("."))


def is_optimizers(file: str) -> bool:
    """Return whether a file or folder of this name holds the state of an optimizer."""
    return _FILES.fullmatch(re.sub(r"\.\w+$", "", file)) is not None

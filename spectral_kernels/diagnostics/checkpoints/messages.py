"""What is said of a file that cannot be read."""

from __future__ import annotations

import re
from pathlib import Path

from .entries import CheckpointError


def broken(file: Path, error: Exception, where: str = "") -> CheckpointError:
    """Return an error that says in one line why a file cannot be read."""
    text = str(error)
    if unsupported := re.search(r"GLOBAL ([\w.<>]+)", text):
        why = (
            f"it holds more than tensors ({unsupported[1]}); it was not unpickled, since that "
            "could run code of its author. If you trust it, save its state_dict() separately"
        )
    elif isinstance(error, MemoryError | RecursionError):
        why = f"it needs more memory than this machine has ({type(error).__name__})"
    elif isinstance(error, LookupError | UnicodeError | TypeError | AttributeError | EOFError):
        why = f"broken or truncated: its pickle is invalid ({type(error).__name__})"
    else:
        # torch explains at length how to load unsafely before it names the error.
        said = re.sub(r"(?s)^.*WeightsUnpickler error:", "", text).split("\n")
        first = next((line.strip() for line in said if line.strip()), type(error).__name__)
        why = f"broken or truncated: {first}"
    return CheckpointError(f"{file}: {where}{why[:300]}")

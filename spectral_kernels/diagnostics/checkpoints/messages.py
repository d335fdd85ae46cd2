"""What is said of a file that cannot be read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..untrusted import printable
from .pickles import HostileError, PickleError


class CheckpointError(Exception):
    """A checkpoint that cannot be read; the message names the file and the reason, escaped."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


@contextmanager
def listing(file: Path, holds: str) -> Iterator[None]:
    """Raise a CheckpointError for whatever is wrong with a file of which the pickles are read.

    Args:
        file: that is named.
        holds: what it should hold, such as ``"tensors"``.
    """
    try:
        yield
    except HostileError as error:
        raise CheckpointError(
            f"{file}: it holds more than {holds}: unpickling it would call {error}, as only "
            "pickles made to do harm do. Nothing of it was run"
        ) from None
    except (CheckpointError, FileNotFoundError):
        raise
    except Exception as error:
        raise broken(file, error) from None


def broken(file: Path, error: Exception, where: str = "") -> CheckpointError:
    """Return an error that says in one line why a file cannot be read."""
    if isinstance(error, MemoryError | RecursionError):
        why = f"it needs more memory than this machine has ({type(error).__name__})"
    elif isinstance(error, LookupError | UnicodeError | TypeError | AttributeError | EOFError):
        why = f"broken or truncated: its pickle is invalid ({type(error).__name__})"
    elif isinstance(error, ValueError) and not isinstance(error, PickleError):
        why = f"broken or truncated: its pickle is invalid ({str(error)[:100]})"
    else:
        first = next((line for line in str(error).split("\n") if line.strip()), "")
        why = f"broken or truncated: {first.strip() or type(error).__name__}"
    return CheckpointError(f"{file}: {where}{why[:300]}")

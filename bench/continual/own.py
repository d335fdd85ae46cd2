"""Classes in files of one's own: ``FILE.py:CLASS`` stands where a name of the bench does."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import inspect
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from torch.optim.optimizer import register_optimizer_step_pre_hook

KINDS = ("problem", "model", "method")
GUARD = 'put what is not a definition under if __name__ == "__main__":'
LONG = 10.0  # seconds of an import, after which a line explains where the time goes
LONGEST_LABEL = 40  # characters

# Inherited by processes, so that one that a file starts while it is imported knows of it.
VARIABLE = "BENCH_CONTINUAL_IMPORTS"


class Own(NamedTuple):
    """A class in a file, as it was when the call began: worker processes run the same source."""

    given: str  # FILE.py:CLASS, as on the command line
    path: str  # absolute
    class_name: str
    source: bytes

    @property
    def name(self) -> str:
        """What stands in keys of runs: file, class, and a hash of the source."""
        digest = hashlib.sha256(self.source).hexdigest()[:8]
        return f"{Path(self.path).name}:{self.class_name}@{digest}"


class StartsWorkError(Exception):
    """A file does something while it is imported that it must not do then."""


_registered: dict[str, Own] = {}


def is_own(text: str) -> bool:
    """Return whether ``text`` names a file rather than something of the bench."""
    return text.endswith(".py") or ".py:" in text


def register(kind: str, given: str) -> str:
    """Import a class; return its name in keys.

    Args:
        kind: one of KINDS, for messages.
        given: FILE.py:CLASS, relative to the current folder.

    Raises:
        ValueError: no such file or class, or a file that cannot be imported, or that does more than
            define things.
    """
    file, _, class_name = given.rpartition(":")
    if not file.endswith(".py") or not class_name:
        raise ValueError(f"{kind}: expected FILE.py:CLASS, got {given!r}")
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise ValueError(f"{kind}: expected FILE.py:CLASS with a file that exists, got {given!r}")
    own = Own(given, str(path), class_name, path.read_bytes())
    try:
        module = _module(own)
    except StartsWorkError as error:
        raise ValueError(
            f"{kind}: expected {file} to define things alone when it is imported, got one that "
            f"{error}: {GUARD}"
        ) from None
    except Exception as error:
        raise ValueError(
            f"{kind}: expected {file} to be importable, got {described(error, own)}"
        ) from None
    if not isinstance(found := getattr(module, class_name, None), type):
        classes = [name for name, value in vars(module).items()
                   if isinstance(value, type) and value.__module__ == module.__name__]  # fmt: skip
        raise ValueError(f"{kind}: expected a class that is in {file} ({', '.join(classes)}), got "
                         f"{class_name!r}")  # fmt: skip
    label = label_of(found)
    is_line = isinstance(label, str) and 0 < len(label) <= LONGEST_LABEL and label.isprintable()
    if not is_line or label[0] in " _":  # matplotlib has no legend for what begins with "_"
        raise ValueError(
            f"{kind}: expected the label of {given} to be 1 to {LONGEST_LABEL} characters in a "
            f"line that begin with a word, got {label!r}"
        )
    _registered[own.name] = own
    return own.name


def registered() -> tuple[Own, ...]:
    """Return all that was registered, for a worker process."""
    return tuple(_registered.values())


def register_again(every: tuple[Own, ...]) -> None:
    """Make a worker process know what another one has registered."""
    _registered.update((own.name, own) for own in every)


def known(name: str) -> bool:
    """Return whether ``name`` is that of a registered class."""
    return name in _registered


def given(name: str) -> str:
    """Return what was given on the command line: FILE.py:CLASS for a class of one's own."""
    return _registered[name].given if name in _registered else name


def find(bench: Mapping[str, Any], name: str) -> Any:
    """Return what ``name`` means: something of the bench, or a registered class."""
    return bench[name] if name in bench else _load(_registered[name])


def label_of(found: Any) -> Any:
    """Return how tables and figures call a class: its label, or its name."""
    return getattr(found, "label", found.__name__.lstrip("_"))


def labels(names: Mapping[str, str]) -> dict:
    """Return what goes with a run: labels of its own classes by kind, or nothing if it has none."""
    found = {kind: label_of(_load(_registered[names[kind]])) for kind in KINDS
             if names[kind] in _registered}  # fmt: skip
    return {"labels": found} if found else {}


def described(error: BaseException, own: Own) -> str:
    """Return an error in a line, with the last line of the file of ``own`` that it came through."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
             if frame.filename == own.path]  # fmt: skip
    if isinstance(error, SyntaxError) and error.filename == own.path:
        lines = [error.lineno]
    words = [*str(error).splitlines(), ""][0]
    where = f" in line {lines[-1]}" if lines else ""
    return f"{type(error).__name__}{where}" + (f": {words}" if words else "")


def refuse(name: str, kind: str, wanted: str, error: BaseException) -> ValueError:
    """Return the error of a class of one's own that raised ``error`` where it must not."""
    return ValueError(f"{kind}: expected {wanted}, got {described(error, _registered[name])}")


def check_takes(function: Callable, arguments: tuple, kind: str, wanted: str) -> None:
    """Raise ValueError if ``function`` cannot be called with ``arguments``."""
    signature = inspect.signature(function)
    try:
        signature.bind(*arguments)
    except TypeError:
        raise ValueError(f"{kind}: expected {wanted}, got {function.__name__}{signature}") from None


def refuse_restart() -> None:
    """Raise StartsWorkError in a process that is importing a file of one's own for a benchmark.

    Also in processes that such a file has started.
    """
    if VARIABLE in os.environ:
        raise StartsWorkError("starts the benchmark")


def _load(own: Own) -> Any:
    return getattr(_module(own), own.class_name)


@functools.cache
def _module(own: Own) -> ModuleType:
    """Import the file of ``own``, from the source that it had."""
    digest = hashlib.sha256(own.path.encode() + own.source).hexdigest()[:16]
    name = f"{Path(own.path).stem}_{digest}"
    if name in sys.modules:  # imported for another of its classes
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, own.path)
    module = importlib.util.module_from_spec(spec)
    if (folder := str(Path(own.path).parent)) not in sys.path:
        sys.path.append(folder)  # for files beside it
    sys.modules[name] = module
    try:
        with _only_definitions(own):
            exec(compile(own.source, own.path, "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextlib.contextmanager
def _only_definitions(own: Own) -> Iterator[None]:
    """Let an import start neither another benchmark nor training, nor end the process."""

    def refuse_step(*_) -> None:
        raise StartsWorkError("takes a step of an optimizer")

    def explain() -> None:
        print(f"{own.given}: its import has taken {LONG:g} s, and every worker process imports it "
              f"too: {GUARD}", file=sys.stderr, flush=True)  # fmt: skip

    hook = register_optimizer_step_pre_hook(refuse_step)
    timer = threading.Timer(LONG, explain)
    timer.daemon = True
    os.environ[VARIABLE] = own.path
    timer.start()
    try:
        yield
    except SystemExit:
        raise StartsWorkError("ends the process") from None
    finally:
        timer.cancel()
        del os.environ[VARIABLE]
        hook.remove()

"""Checks of arguments, name patterns, and numbers by name pattern.

Values of other libraries, such as numpy's numbers and lists of a configuration, become Python's own
here, so that states and checkpoints hold nothing else.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, get_args

import numpy as np
import torch
from typing_extensions import get_type_hints

if TYPE_CHECKING:
    from .matrices import Selection

P = ParamSpec("P")
R = TypeVar("R")


# ------------------------------------------------------------------------------------- one value


def plain(value: Any) -> Any:
    """Return a real number or 0-d array as Python's int or float; anything else as it is."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def shown(value: Any) -> str:
    """Return ``value`` for an error message, tensors and arrays without their contents."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    if type(value) in (list, tuple) and len(value) <= 8:
        inside = ", ".join(map(shown, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    if type(value) is dict and len(value) <= 8:
        return "{" + ", ".join(f"{key!r}: {shown(x)}" for key, x in value.items()) + "}"
    text = f"{value!r:.80}"
    return type(value).__name__ if "tensor(" in text or "array(" in text else text


def expected(argument: str, wanted: str, value: Any) -> str:
    """Return the text of an error: what was expected of ``argument``, and the value that came."""
    return f"{argument}: expected {wanted}, got {shown(value)}"


def one_of(choices: Iterable[str]) -> str:
    """Return choices in words: ``"a"``, ``"a or b"``, ``"a, b or c"``."""
    *others, last = choices
    return f"{', '.join(others)} or {last}" if others else last


def check_number(argument: str, value, at_least: float = 0.0, words: Sequence[str] = ()) -> float:
    """Return ``value`` if it is a finite number >= ``at_least``; TypeError or ValueError if not."""
    if type(value) is not float:
        value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(expected(argument, one_of(["a number", *map(repr, words)]), value))
    if not math.isfinite(value) or value < at_least:
        least = f" >= {at_least:g}" if at_least > -math.inf else ""
        raise ValueError(expected(argument, f"a finite number{least}", value))
    return value


def check_scalar(argument: str, value, at_least: float = 0.0) -> float | torch.Tensor:
    """Return a number as :func:`check_number` does, or a tensor with one real element, 0-d.

    The tensor shares the memory of ``value``. On a GPU this waits for it.
    """
    if not isinstance(value, torch.Tensor):
        return check_number(argument, value, at_least)
    if value.numel() != 1 or value.dtype == torch.bool or value.is_complex():
        raise ValueError(
            f"{argument}: expected a number or a tensor with one real element, got {shown(value)} "
            f"and dtype {value.dtype}"
        )
    check_number(argument, value.item(), at_least)
    return value if value.dim() == 0 else value.detach().view(())


def check_count(argument: str, value, at_least: int, words: Sequence[str] = ()) -> int:
    """Return ``value`` if it is an integer >= ``at_least``; TypeError or ValueError if not."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(expected(argument, one_of(["an integer", *map(repr, words)]), value))
    if value < at_least:
        raise ValueError(expected(argument, f"an integer >= {at_least}", value))
    return value


def check_choice(argument: str, value, accepted: Sequence[int]) -> int:
    """Return ``value`` if it is one of ``accepted``; TypeError or ValueError if not."""
    value, wanted = plain(value), one_of(map(str, accepted))
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(expected(argument, wanted, value))
    if value not in accepted:
        raise ValueError(expected(argument, wanted, value))
    return value


def check_word(argument: str, value, accepted: Sequence[str | None]) -> str | None:
    """Return ``value`` if it is one of ``accepted``; TypeError or ValueError if not."""
    wanted = one_of(map(repr, accepted))
    if not isinstance(value, str) and (value is not None or None not in accepted):
        raise TypeError(expected(argument, wanted, value))
    if value not in accepted:
        raise ValueError(expected(argument, wanted, value))
    return value if value is None else str(value)


def check_flag(argument: str, value) -> bool:
    """Return ``value`` as a bool if it is one, or 0 or 1; TypeError if not.

    A string such as "false", which is true in Python, is refused.
    """
    if isinstance(value, np.bool_ | np.ndarray) and value.ndim == 0 and value.dtype == bool:
        return bool(value)
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    raise TypeError(expected(argument, "True or False", value))


# ------------------------------------------------------------------------------------- keywords


@functools.cache
def keywords_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of a function's parameters, those of an Unpack[TypedDict] included."""
    names: list[str] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not parameter.VAR_KEYWORD:
            names.append(name)
            continue
        (options,) = get_args(get_type_hints(function)[name])
        names += get_type_hints(options)
    return tuple(name for name in names if name != "self")


def check_keywords(owner: str, given: Iterable[str], accepted: Sequence[str]) -> None:
    """Raise TypeError, with the nearest name, if a keyword of ``given`` is not ``accepted``."""
    for name in given:
        if name not in accepted:
            near = difflib.get_close_matches(name, accepted, 1)
            said = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(accepted)}"
            raise TypeError(f"{owner}: expected a known keyword, got {name!r} ({said})")


def known_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """Let ``function`` raise a TypeError with the nearest name for a keyword that it lacks.

    The error names the function, or the class that is called if the function is ``__init__``.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if kwargs:
            is_method = function.__name__ == "__init__" and args
            owner = type(args[0]).__name__ if is_method else function.__name__
            check_keywords(owner, kwargs, keywords_of(function))
        return function(*args, **kwargs)

    return run


# ------------------------------------------------------------------------- containers, patterns


def as_dict(value: Any) -> dict[Any, Any] | None:
    """Return a mapping, or an object with ``keys`` and items like one, as a dict, or else None."""
    if isinstance(value, Mapping) or (hasattr(value, "keys") and hasattr(value, "__getitem__")):
        return {key: value[key] for key in value.keys()}  # noqa: SIM118
    return None


def match_any(names: Sequence[str], patterns: Iterable[str]) -> str | None:
    """Return the first glob pattern that one of the ``names`` of a tensor matches, or None."""
    return next((p for p in patterns if any(fnmatch.fnmatchcase(n, p) for n in names)), None)


def check_patterns(argument: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    """Raise ValueError if a pattern matches no parameter, which is most likely a typing error."""
    names = list(names)
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise ValueError(
                f"{argument}: expected a pattern that matches a parameter, got {pattern!r} "
                f"(there are {listed})"
            )


def check_pattern_list(argument: str, patterns) -> list[str] | None:
    """Return ``patterns`` as a list, or None; TypeError if it is not a string or several."""
    if patterns is None:
        return None
    if isinstance(patterns, str):
        return [str(patterns)]
    found = list(patterns) if isinstance(patterns, Iterable) else None
    if found is None or not all(isinstance(p, str) for p in found):
        wanted = "a glob pattern or a list of glob patterns"
        raise TypeError(expected(argument, wanted, patterns if found is None else found))
    found = list(map(str, found))
    return sorted(found) if isinstance(patterns, Set) else found


def check_names(argument: str, value, wanted: str) -> dict[str, Any]:
    """Return a mapping from strings as a dict; TypeError, with what is ``wanted``, if not."""
    found = as_dict(value)
    if found is None or not all(isinstance(name, str) for name in found):
        raise TypeError(expected(argument, wanted, value))
    return {str(name): x for name, x in found.items()}


def check_splits(splits) -> dict[str, Any]:
    """Return ``splits`` as a dict from patterns to an int or to a list; TypeError if it is none."""
    if splits is None:
        return {}
    wanted = (
        "a mapping from name patterns to a number of parts or their sizes, such as "
        '{"*.qkv.weight": 3}'
    )
    return {p: _sizes(value) for p, value in check_names("splits", splits, wanted).items()}


ROLES = ("matrix", "stack", "bias", "gain", "skip")


def check_role(argument: str, role) -> str:
    """Return ``role`` if it is one of ROLES; TypeError or ValueError if not."""
    wanted = one_of(map(repr, ROLES))
    if not isinstance(role, str):
        raise TypeError(expected(argument, wanted, role))
    if role not in ROLES:
        near = difflib.get_close_matches(role, ROLES, 1)
        said = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(expected(argument, wanted, role) + said)
    return str(role)


def check_roles(roles) -> dict[str, str]:
    """Return ``roles`` as a dict from patterns to roles; TypeError or ValueError if it is none."""
    if roles is None:
        return {}
    wanted = 'a mapping from name patterns to roles, such as {"*.scale": "gain"}'
    found = check_names("roles", roles, wanted)
    return {p: check_role(f"roles[{p!r}]", role) for p, role in found.items()}


def _sizes(value: Any) -> Any:
    value = plain(value)
    is_list = isinstance(value, Iterable) and not isinstance(value, str | Mapping)
    return [plain(size) for size in value] if is_list else value


# ------------------------------------------------------------------------------ numbers by name


def check_by_pattern(
    argument: str, value, words: Sequence[str] = ()
) -> float | str | dict[str, float | str]:
    """Return a number, one of ``words`` or a mapping to these, as Python's own.

    Raises:
        TypeError: neither a number, one of ``words``, nor a mapping from strings to these. With
            the word "mup" its multiples, such as "0.5*mup", are accepted too.
        ValueError: a number below 0 or not finite.
    """
    if as_dict(value) is None:
        return _number_or_word(argument, value, words)
    wanted = "a mapping from name patterns to numbers"
    return {
        pattern: _number_or_word(f"{argument}[{pattern!r}]", x, words)
        for pattern, x in check_names(argument, value, wanted).items()
    }


def _number_or_word(argument: str, value, words: Sequence[str]) -> float | str:
    if isinstance(value, str) and (value in words or ("mup" in words and mup_factor(value))):
        return str(value)
    multiple = ["0.5*mup"] if "mup" in words else []
    return check_number(argument, value, words=[*words, *multiple])


def mup_factor(target: float | str) -> float | None:
    """Return 2 for "2*mup" and 1 for "mup"; None for anything else, and for other than above 0."""
    if target == "mup":
        return 1.0
    factor, _, word = target.partition("*") if isinstance(target, str) else ("", "", "")
    if word.strip() != "mup":
        return None
    try:
        found = float(factor)
    except ValueError:
        return None
    return found if math.isfinite(found) and found > 0 else None


def by_name(
    argument: str,
    value: float | str | Mapping[str, float | str],
    selection: Selection,
    is_first: bool = True,
) -> dict[str, Any]:
    """Return the value of ``argument`` for every matrix and elementwise parameter by name.

    Args:
        argument: its name, for error messages.
        value: what :func:`check_by_pattern` returns.
        selection: the matrices and elementwise parameters.
        is_first: False when a changed model was selected again: patterns may match nothing then.

    Raises:
        ValueError: a pattern without a match, a name that no pattern matches.
    """
    entries = [*selection.matrices, *selection.elementwise]
    if not isinstance(value, Mapping):
        return {entry.name: value for entry in entries}
    owned = dict.fromkeys(entry.ref.name for entry in entries)
    names = {name: selection.names_of(name) for name in (*owned, *dict(selection.skipped))}
    if is_first:
        check_patterns(argument, value, [alias for own in names.values() for alias in own])
    found = {}
    for name in owned:
        pattern = match_any(names[name], value)
        if pattern is None:
            raise ValueError(
                f"{argument}: expected a pattern for every parameter, got none for {name!r} (end "
                "the mapping with a '*' entry)"
            )
        found[name] = value[pattern]
    return {entry.name: found[entry.ref.name] for entry in entries}

"""Names of two checkpoints that are those of one model: wrappers' prefixes and other roots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ...diagnostics.checkpoints import LazyTensor
from ..console import counted

# What wrappers insert anywhere: DistributedDataParallel, torch.compile, FSDP, Fabric.
_WRAPPERS = {
    "module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module",
}  # fmt: skip
# What checkpoints of trainers, and PEFT, put before all names.
_CONTAINERS = {
    "state_dict", "model_state_dict", "model_state", "model", "base_model", "network", "net",
}  # fmt: skip
_MOST_ALIKE = 4  # names with a common end that are tried against each other
_MOST_PARTS = 32  # of a name that may belong to its root
Shapes = Mapping[str, Sequence[int]]


@dataclass
class Matching:
    """Which names of another checkpoint are which names of the first one."""

    names: dict[str, str] = field(default_factory=dict)
    """Name in the other checkpoint -> name in the first one."""
    notes: list[str] = field(default_factory=list)
    """What was matched under another name, and what could not be told."""

    def renamed(self, tensors: Sequence[LazyTensor]) -> list[LazyTensor]:
        """Return tensors of the other checkpoint under their names in the first one."""
        return [_renamed(entry, self.names.get(entry.name, entry.name)) for entry in tensors]


def _renamed(entry: LazyTensor, name: str) -> LazyTensor:
    if name == entry.name:
        return entry
    return replace(entry, name=name, reader=lambda _: entry.read())  # a reader may know the name


def matched(first: Shapes, other: Shapes) -> Matching:
    """Match the names of two checkpoints; what fits several names is left unmatched.

    Equal names go first. Of the rest, those are the same that are equal without what wrappers
    insert; then without what trainers put before them; at last, with one root in place of another
    (``h.`` for ``transformer.h.``), if more than half of the smaller checkpoint fits then.

    Args:
        first: name -> shape.
        other: name -> shape, of the checkpoint that is compared with it.
    """
    found = Matching({name: name for name in other if name in first})
    for removed in (unwrapped, _uncontained):
        _match_without(removed, first, other, found)
    _match_roots(first, other, found)
    return found


def _rest(first: Shapes, other: Shapes, found: Matching) -> tuple[list[str], list[str]]:
    taken = set(found.names.values())
    return [n for n in first if n not in taken], [n for n in other if n not in found.names]


def unwrapped(name: str) -> str:
    """Return a name without what wrappers insert; the last part is a tensor's own."""
    *path, own = name.split(".")
    return ".".join([*(part for part in path if part not in _WRAPPERS), own])


def _uncontained(name: str) -> str:
    parts = unwrapped(name).split(".")
    while len(parts) > 1 and parts[0] in _CONTAINERS:
        del parts[0]
    return ".".join(parts)


def _match_without(removed, first: Shapes, other: Shapes, found: Matching) -> None:
    """Match names that are equal after ``removed``, if only one name on each side is."""
    sides: list[dict[str, list[str]]] = []
    for names in _rest(first, other, found):
        sides.append({})
        for name in names:
            sides[-1].setdefault(removed(name), []).append(name)
    without: Counter[str] = Counter()
    for short, theirs in sides[1].items():
        ours = sides[0].get(short, ())
        if len(ours) == len(theirs) == 1:
            found.names[theirs[0]] = ours[0]
            without[_difference(ours[0], theirs[0])] += 1
        elif ours:
            several = ours if len(ours) > 1 else theirs
            found.notes.append(
                f"not matched, since {' and '.join(several[:3])} are the same without what "
                f"wrappers add: {(theirs if several is ours else ours)[0]}"
            )
    for parts, count in without.most_common():
        found.notes.append(f"{counted(count, 'name', 'names')} matched without {parts}")


def _difference(one: str, other: str) -> str:
    """Return the parts that only one of two names has, quoted."""
    parts, others = Counter(one.split(".")), Counter(other.split("."))
    only = (".".join(left.elements()) for left in (parts - others, others - parts))
    return " and ".join(f"'{text}.'" for text in only if text)


def _match_roots(first: Shapes, other: Shapes, found: Matching) -> None:
    """Match names where one root stands for another, for most of the smaller checkpoint."""
    ours, theirs = _rest(first, other, found)
    tried = []
    for old, new in _candidates(ours, theirs, first, other):
        names = dict(_with_root(ours, theirs, old, new, first, other))
        tried.append((len(names), old, new, names))
    least = max(2, min(len(first), len(other)) // 2 + 1)
    tried = sorted((t for t in tried if t[0] >= least), key=lambda t: (-t[0], t[1:3]))
    if not tried:
        return
    count, old, new, names = tried[0]
    for equal in tried[1:]:
        if equal[0] == count and equal[3] != names:
            found.notes.append(
                f"not matched, since {_shown(old)} may be {_shown(new)}, or {_shown(equal[1])} "
                f"{_shown(equal[2])}"
            )
            return
    found.names |= names
    found.notes.append(
        f"{counted(count, 'name', 'names')} matched with {_shown(new)} for {_shown(old)}"
    )


def _shown(root: str) -> str:
    return f"'{root}'" if root else "no prefix"


def _candidates(
    ours: Sequence[str], theirs: Sequence[str], first: Shapes, other: Shapes
) -> Iterator[tuple[str, str]]:
    """Yield roots (of the first, of the other) by the longest common ends of names, best first."""
    by_end: dict[str, list[str]] = {}
    for name in theirs:
        for common in _ends(name):
            by_end.setdefault(common, []).append(name)
    votes: Counter[tuple[str, str]] = Counter()
    for name in ours:
        end = next((e for e in _ends(name) if e in by_end), None)
        alike = [] if end is None else by_end[end]
        if end is None or len(alike) > _MOST_ALIKE:
            continue
        for one in alike:
            if tuple(first[name]) == tuple(other[one]):
                votes[name[: -len(end)], one[: -len(end)]] += 1
    for roots, _ in votes.most_common(20):
        yield roots


def _ends(name: str) -> Iterator[str]:
    """Yield the ends of a name that begin after a dot, the longest first, and the name itself."""
    yield name
    for _ in range(_MOST_PARTS):
        _, dot, name = name.partition(".")
        if not dot:
            return
        yield name


def _with_root(
    ours: Sequence[str], theirs: Sequence[str], old: str, new: str, first: Shapes, other: Shapes
) -> Iterator[tuple[str, str]]:
    """Yield (name in the other, name in the first) where ``new`` in place of ``old`` gives it."""
    known = set(theirs)
    for name in ours:
        one = new + name[len(old) :] if name.startswith(old) else None
        if one is not None and one in known and tuple(first[name]) == tuple(other[one]):
            yield one, name

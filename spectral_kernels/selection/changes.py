"""Modules of a model that are replaced, deleted, unfrozen or added, and what to select then.

A step compares the edges of the module tree (parent, key, child) on the paths to the parameters
that are selected, and whether frozen ones still are. If something differs, the model is selected
again, and of that are taken: what was selected before, by name; everything below a module that was
replaced; what was frozen. Parameters that were added elsewhere wait for ``reselect()``.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from . import transforms
from .matrices import COMPUTED, NothingSelected, Selection, refs_of
from .parameters import ParameterRef, parameter_refs, unwrapped, wrapped_as
from .warn import warn

_requires_grad = operator.attrgetter("requires_grad")


class Edge(NamedTuple):
    """That ``parent._modules[key]`` is ``child``; ``prefix`` of the names of its parameters."""

    parent: nn.Module
    key: str
    child: nn.Module
    prefix: str


class Followed(NamedTuple):
    """A selection of the changed model.

    Attributes:
        selection: the parameters.
        gone: names of the parameters that are no longer selected.
        new: names of the matrices and elementwise parameters that are of other tensors than before.
    """

    selection: Selection
    gone: list[str]
    new: set[str]


class Follower:
    """What a selection depends on, and how it is made again.

    Args:
        choose: returns the selection, and takes ``before``, see ``rules.select``.
        selection: the selection.
    """

    def __init__(self, choose: Callable[..., Selection], selection: Selection):
        self._choose, self._root = choose, unwrapped(selection.root)
        self._told: set[str] = set()  # names of added parameters that a warning has named
        self.look_at(selection)

    def look_at(self, selection: Selection) -> None:
        """Compare with ``selection`` from now on."""
        refs = refs_of(selection.matrices, selection.elementwise)
        self.frozen, self._names = selection.frozen, selection.names
        modules = {id(ref.module) for ref in (*refs, *self.frozen)}
        self.edges: list[Edge] = []
        _edges(self._root, modules, "", self.edges)
        self._tables: tuple[list, list, list] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is made from modules, which a copy may not have filled yet."""
        return {**self.__dict__, "_tables": None}

    def leave_out(self, exclude: list[str]) -> None:
        """Replace the argument ``exclude`` of the selection."""
        self._choose = partial(self._choose, exclude=exclude)

    def without_computed(self, selection: Selection) -> Followed:
        """Return ``selection`` without the weights of parametrizations, which stay left out.

        Raises:
            ValueError: there are no others.
        """
        self._choose = partial(self._choose, computed=False)
        now = copy.copy(selection)
        names = [o.name for o in refs_of(now.matrices, now.elementwise) if o.computed]
        now.skipped = [*now.skipped, *((name, COMPUTED) for name in names)]
        now.matrices = [m for m in now.matrices if not m.ref.computed]
        now.elementwise = [e for e in now.elementwise if not e.ref.computed]
        if not now.matrices and not now.elementwise:
            raise NothingSelected(now.skipped)
        return Followed(now, [], set())

    # --------------------------------------------------------------------------- in every step

    def has_changed(self) -> bool:
        """Return whether a module on a path was replaced, or a frozen parameter may be no more."""
        children, parameters, attributes = self._tables or self._tabulate()
        try:
            for parent, get, own in children:
                if not all(map(operator.is_, get(parent._modules), own)):
                    return True
            return any(map(_requires_grad, map(operator.getitem, parameters, attributes)))
        except (KeyError, AttributeError):  # deleted
            return True

    def lookups(self) -> list[tuple[dict, str, Any]]:
        """Return (dict, key, value) of what is compared here; see tables.guard.Watched."""
        parents = {id(edge.parent): edge.parent for edge in self.edges}.values()
        return [
            *((p.__dict__, "_modules", p._modules) for p in parents),
            *((edge.parent._modules, edge.key, edge.child) for edge in self.edges),
            *((r.module._parameters, r.attribute, p)
              for r, p in zip(self.frozen, self.frozen_parameters(), strict=True)),
        ]  # fmt: skip

    def frozen_parameters(self) -> list[nn.Parameter | None]:
        """Return the present frozen parameters; None for one that was removed."""
        return [ref.module._parameters.get(ref.attribute) for ref in self.frozen]

    def _tabulate(self) -> tuple[list, list, list]:
        by_parent: dict[int, list[Edge]] = {}
        for edge in self.edges:
            by_parent.setdefault(id(edge.parent), []).append(edge)
        children = []
        for edges in by_parent.values():
            edges = edges * 2 if len(edges) == 1 else edges  # itemgetter then returns a tuple
            keys = [edge.key for edge in edges]
            own = [edge.child for edge in edges]
            children.append((edges[0].parent, operator.itemgetter(*keys), own))
        parameters = [ref.module._parameters for ref in self.frozen]
        self._tables = children, parameters, [ref.attribute for ref in self.frozen]
        return self._tables

    # ------------------------------------------------------------------------ selecting again

    def followed(self, selection: Selection, is_resized: bool = False) -> Followed | None:
        """Return the selection of the changed model; None if nothing that it depends on differs.

        Args:
            selection: the one before.
            is_resized: whether parameters have got other shapes.

        Raises:
            ValueError: a parameter that cannot be selected, nothing to regularize.
            RuntimeError: a parameter of an unchanged module that cannot be regularized any more.
        """
        prefixes = [e.prefix for e in self.edges if e.parent._modules.get(e.key) is not e.child]
        unfrozen = self._unfrozen()
        if not (prefixes or unfrozen or is_resized):
            return None
        refs = refs_of(selection.matrices, selection.elementwise)
        names, tensors = {ref.name for ref in refs}, _tensors(refs)
        places = {ref.place for ref in (*refs, *selection.frozen)}

        def stays(ref: ParameterRef) -> bool:
            below = any(ref.name.startswith(prefix) for prefix in prefixes)
            is_known = ref.name in names or ref.place in places
            return below or is_known or bool(_tensors([ref]) & tensors)

        now = self._choose(before=selection)
        found = refs_of(now.matrices, now.elementwise)
        added = [ref.name for ref in found if not stays(ref)]
        now.names -= {*added, *(ref.name for ref in now.frozen if not stays(ref))}
        # A bias that has got two dimensions in its module stays a bias.
        was = {entry.ref.place: entry for entry in selection.elementwise}
        turned = {place: was[place] for m in now.matrices if (place := m.ref.place) in was}
        now.matrices = [m for m in now.matrices if stays(m.ref) and m.ref.place not in turned]
        now.elementwise = [entry for entry in now.elementwise if stays(entry.ref)]
        now.elementwise += turned.values()
        now.frozen = [ref for ref in now.frozen if stays(ref)]
        now.skipped += [(name, _ADDED) for name in added]
        return self._compared(selection, now)

    def reselected(self, selection: Selection) -> Followed:
        """Return the selection of all that is in the model now."""
        return self._compared(selection, self._choose(before=selection))

    def _unfrozen(self) -> bool:
        """Return whether frozen parameters are no more; tensors of transforms do not count."""
        if transforms.is_active():
            return False
        found = (ref.module._parameters.get(ref.attribute) for ref in self.frozen)
        return any(isinstance(p, nn.Parameter) and p.requires_grad for p in found)

    def _compared(self, before: Selection, now: Selection) -> Followed:
        refs = refs_of(now.matrices, now.elementwise)
        names, tensors = {ref.name for ref in refs}, _tensors(refs)
        modules = {id(module) for module in self._root.modules()}
        skipped, gone = dict(now.skipped), []
        for ref in refs_of(before.matrices, before.elementwise):
            if ref.name in names or _tensors([ref]) & tensors:
                continue
            if id(ref.module) in modules:
                ref.get()  # raises if it is no longer a parameter
                raise RuntimeError(
                    f"parameter {ref.name!r} cannot be regularized any more: "
                    f"{skipped.get(ref.name, 'it has another name')}; build a new "
                    "SpectralRegularizer after such a change"
                )
            gone.append(ref.name)
        if not refs:
            raise RuntimeError(
                f"{_listed(gone)} removed from the model, and nothing to regularize is left; build "
                "a new SpectralRegularizer"
            )
        known = _wholes(before)
        new = {name for name, x in _wholes(now).items() if known.get(name) != x}
        return Followed(now, gone, new)

    # ----------------------------------------------------------------------------------- added

    def added(self, selection: Selection) -> list[str]:
        """Return the names of parameters that ``reselect()`` would take in."""
        now = {ref.name for group in parameter_refs(self._root) for ref in group}
        if now <= self._names:
            return []
        own = refs_of(selection.matrices, selection.elementwise)
        found = self._choose(before=selection)
        tensors = _tensors(own)
        added = [ref.name for ref in refs_of(found.matrices, found.elementwise)
                 if not _tensors([ref]) & tensors]  # fmt: skip
        # The others are skipped for good.
        self._names |= now.difference(added, (ref.name for ref in found.frozen))
        return added

    def tell(self, names: list[str]) -> None:
        """Warn about added parameters, once."""
        if new := [name for name in names if name not in self._told]:
            self._told.update(new)
            warn(
                f"{_listed(new)} added to the model and not regularized; reselect() takes "
                f"{'it' if len(new) == 1 else 'them'} in"
            )


_ADDED = "added later; reselect() takes it in"


def selected(choose: Callable[..., Selection], source: Any, **options: Any) -> Selection:
    """Return ``choose(source, **options)``, with a follower if ``source`` is a module."""
    options = {n: list(x) if isinstance(x, Iterator) else copy.copy(x) for n, x in options.items()}
    selection = choose(source, **options)
    if selection.root is not None:
        selection.follower = Follower(partial(choose, source, **options), selection)
    return selection


def aligned(
    parts: Sequence[int] | None, before: Sequence[ParameterRef], now: Sequence[ParameterRef]
) -> list[int] | None:
    """Return the parts of the parameters ``now`` by name; of new ones 0, until they are held."""
    if parts is None:
        return None
    known = {ref.name: part for ref, part in zip(before, parts, strict=True)}
    return [known.get(ref.name, 0) for ref in now]


def warn_of_gone(names: list[str]) -> None:
    """Warn that parameters are no longer in the model."""
    if names:
        warn(
            f"{_listed(names)} removed from the model, and no longer regularized; if names have "
            "changed, reselect() takes in the new ones"
        )


def warn_of_computed(names: list[str]) -> None:
    """Warn that weights which a parametrization computes are left out."""
    warn(
        f"{_listed(names)} left out: made by a parametrization at every use, and regularized by "
        "penalty() alone; add that to the loss"
    )


def _listed(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:8])) + (", ..." if len(names) > 8 else "")
    return f"parameter {shown} was" if len(names) == 1 else f"parameters {shown} were"


def _wholes(selection: Selection) -> dict[str, tuple]:
    """Return name -> what a matrix or elementwise parameter is a view of."""
    entries = (*selection.matrices, *selection.elementwise)
    return {x.name: (x.ref.place, x.whole) for x in entries}


def _tensors(refs: Sequence[ParameterRef]) -> set[int]:
    """Return the ids of the present parameters; computed ones have none."""
    return {id(x) for r in refs if (x := r.module._parameters.get(r.attribute)) is not None}


def _edges(module: nn.Module, modules: set[int], path: str, found: list[Edge]) -> bool:
    """Add the edges on all paths from ``module`` to ``modules``, given by their ids, to ``found``.

    Returns:
        Whether there are such paths.
    """
    is_on_path, inner = id(module) in modules, wrapped_as(module)
    for key, child in module._modules.items():
        below = path if key == inner else f"{path}{key}."
        if inner in (None, key) and child is not None and _edges(child, modules, below, found):
            found.append(Edge(module, key, child, below))
            is_on_path = True
    return is_on_path

"""What SpectralAdamW and SpectralSGD save and load: moments, vectors, measured targets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..backends.base import Rule
from ..engine.initial import checked_initial
from ..engine.loading import vectors_of
from ..engine.model_buckets import ModelBuckets
from ..engine.operators import checked_next_search
from ..engine.prepared import Preparation
from ..regularizer import SpectralRegularizer
from ..selection.matrices import Elementwise, Matrix
from ..selection.warn import warn
from .states import check_state

NEXT_SEARCH = "spectral_next_search"  # in the states of parameters that have operators


class Checkpoints(torch.optim.Optimizer):
    """Base class of SpectralOptimizer: its state_dict, and what copies and pickles carry."""

    regularizer: SpectralRegularizer
    _buckets: ModelBuckets
    _rule: Rule
    _state_dtype: torch.dtype | None

    def state_dict(self) -> dict[str, Any]:
        """Return a state_dict that torch's counterpart can load, with "spectral_..." entries added.

        In the state of a parameter are its matrices' vectors, [n_vectors, N] each, what was
        measured for the target "initial", and the steps until operators are searched again: there
        torch.distributed.checkpoint finds them by the parameter's name. States of parameters that
        are in no group any more are left out.
        """
        with self._buckets.lock:
            self._keep_vectors()
            held = {id(p) for group in self.param_groups for p in group["params"]}
            everything = self.state
            is_saved = {p: not isinstance(p, torch.Tensor) or id(p) in held for p in everything}
            try:  # torch expects that all states are of parameters in the groups
                self.state = {p: state for p, state in everything.items() if is_saved[p]}
                found = super().state_dict()
            finally:
                self.state = everything
        found["state"] = {
            i: {**state, "step": state["step"].clone()} if "step" in state else state
            for i, state in found["state"].items()
        }
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state_dict of this class or of its counterpart in torch.optim.

        Raises:
            TypeError, ValueError: groups, moments, step counts or vectors that do not fit or are
                not finite; nothing is changed then.
        """
        for group in state_dict["param_groups"]:
            self._check_options(group)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        states = [state_dict["state"].get(i, {}) for i in saved]
        by_id = {id(p): state for p, state in zip(own, states, strict=False)}
        vectors = {"vectors": {}, "left": {}, "initial": {}}
        wanted, missing = set(self._buckets.coefficients.initial_names()), []
        for entry, p, name in self._entries():
            for kind, found in vectors.items():
                key = f"spectral_{kind}{name}"
                if key in by_id.get(id(p), {}):
                    found[entry.name] = by_id[id(p)][key]
            is_known = entry.name not in wanted or entry.name in vectors["initial"]
            if not is_known and by_id.get(id(p)):
                missing.append(entry.name)
        searches = [checked_next_search(state.get(NEXT_SEARCH)) for state in by_id.values()]
        next_search = min((n for n in searches if n is not None), default=None)
        loaded = vectors_of(vectors, self._buckets.selection.matrices)
        initial = checked_initial(vectors["initial"], self._buckets.selection)
        for p, state in zip(own, states, strict=False):
            check_state(self._name_of(p), p, state, self._rule.moments)
        with self._buckets.lock:
            super().load_state_dict(state_dict)  # it checks that the groups match
            for p, state in zip(own, states, strict=True):
                for name, kept in state.items():
                    if name in self._rule.moments and kept is not None and self._state_dtype:
                        # torch has converted it to the parameter's dtype.
                        self.state[p][name] = kept.to(p.device, self._state_dtype, copy=True)
                    elif isinstance(kept, torch.Tensor) and self.state[p].get(name) is kept:
                        self.state[p][name] = kept.clone()  # state_dict keeps its own
            for group in self.param_groups:
                group.update(self._checked_options(group))  # Python's own numbers
            self.regularizer._load(loaded, initial, next_search)
            self._updates = None
        if not loaded.vectors and not loaded.left and any(states):
            warn(
                f"{type(self).__name__}: the checkpoint has no vectors of the spectral penalty, "
                "like one of torch's own optimizer; they are warmed up, and there is nothing to do",
            )
        if missing:
            warn(f"{type(self).__name__}: the checkpoint has no initial targets of "
                 f"{', '.join(missing)}; those measured before are kept, and assigning target "
                 "measures them anew")  # fmt: skip

    def _entries(self) -> Iterable[tuple[Matrix | Elementwise, torch.Tensor, str]]:
        """Yield every entry, its parameter, and its name's suffix after the parameter's."""
        buckets = self._buckets
        parameters = dict(zip(buckets.refs, buckets.tensors(), strict=True))
        for entry in (*buckets.selection.matrices, *buckets.selection.elementwise):
            yield entry, parameters[entry.ref], entry.name.removeprefix(entry.ref.name)

    def _keep_vectors(self) -> None:
        """Store vectors and measured targets in the state of the parameters that have one."""
        if not self.state:
            return
        known = self.regularizer.state_dict()
        for entry, p, name in self._entries():
            if p not in self.state:
                continue
            state = self.state[p]
            for kind in ("vectors", "left", "initial"):
                state.pop(f"spectral_{kind}{name}", None)
                value = known.get(kind, {}).get(entry.name)
                if isinstance(value, float):
                    value = torch.tensor(value, dtype=torch.float64, device="cpu")
                if value is not None:
                    state[f"spectral_{kind}{name}"] = value
            state.pop(NEXT_SEARCH, None)
            if isinstance(entry, Matrix) and entry.periods is not None:
                state[NEXT_SEARCH] = torch.tensor(known["next_search"], device="cpu")

    def __getstate__(self) -> dict[str, Any]:
        """Leave out addresses; copies and pickles carry moments and vectors."""
        kept = ("regularizer", "_backend", "_state_dtype", "_decoupled", "_constraint",
                "_excluded", "_absent")  # fmt: skip
        by_place = [[self._name_of(p) for p in g["params"]] for g in self.param_groups]
        return {
            **super().__getstate__(),
            **{name: getattr(self, name) for name in kept},
            "_by_place": by_place,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_constraint", None)  # older pickles have none
        if (by_place := self.__dict__.pop("_by_place", None)) is not None:
            self._updates, self._preparation = None, Preparation()
            self._names = {
                id(p): (p, name)
                for names, group in zip(by_place, self.param_groups, strict=True)
                for p, name in zip(group["params"], names, strict=True)
            }

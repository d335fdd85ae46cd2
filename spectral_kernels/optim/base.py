"""Base class of SpectralAdamW and SpectralSGD: groups, checkpoints, and the order of a step."""

from __future__ import annotations

import glob
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, TypeVar, overload

import torch
from torch import nn

from ..backends import choice, selfcheck
from ..diagnostics.readings import Readings
from ..engine.assignable import Assignable
from ..engine.bucket import Bucket
from ..engine.model_buckets import ModelBuckets, iterations_of
from ..engine.untraced import untraced
from ..regularizer import SpectralRegularizer
from ..selection.arguments import (
    as_dict,
    check_flag,
    check_pattern_list,
    check_scalar,
    shown,
)
from ..selection.matrices import listing
from ..selection.parameters import parameter_refs
from ..sharding import shards
from ..tables import device as device_tables
from .update import Rule, Update, check_dtype

Loss = TypeVar("Loss")
Params = (
    nn.Module
    | Iterable[torch.Tensor]
    | Iterable[tuple[str, torch.Tensor]]
    | Iterable[Mapping[str, Any]]
)


class SpectralOptimizer(Assignable, Readings, torch.optim.Optimizer):
    """Base class of SpectralAdamW and SpectralSGD; see there."""

    regularizer: SpectralRegularizer
    _rule: Rule
    # Options of the counterpart in torch.optim that do not change our step, with their defaults: in
    # the groups they make checkpoints interchangeable.
    _flags: ClassVar[Mapping[str, bool | None]]
    _step_supports_amp_scaling = True  # GradScaler then sets grad_scale and found_inf

    def __init__(
        self, params, defaults, strength, exponent, target, *, model, decoupled, state_dtype,
        n_power_iterations, n_vectors, backend, **options,
    ):  # fmt: skip
        flags = {name: options.pop(name, default) for name, default in self._flags.items()}
        defaults = self._checked_options({**defaults, **flags})
        self._decoupled = check_flag("decoupled", decoupled)
        if state_dtype not in (None, torch.float32):
            raise ValueError(f"state_dtype: got {state_dtype}; accepted are None and torch.float32")
        iterations_of(n_power_iterations, is_in_optimizer=True)
        source, groups = _source_and_groups(params, model)
        self._names: dict[int, str] = {}
        if isinstance(source, nn.Module):
            self._names = {id(p): name for name, p in source.named_parameters()}
            left_out = check_pattern_list("exclude", options.get("exclude")) or []
            options["exclude"] = [*left_out, *_not_in(groups, source)]
        self.regularizer = SpectralRegularizer(
            source, strength, exponent, target, n_power_iterations, n_vectors=n_vectors,
            backend=backend, **options,
        )  # fmt: skip
        self._buckets.check_in_place()
        self._buckets.settings = replace(self._buckets.settings, is_in_optimizer=True)
        self._backend, self._state_dtype = backend, state_dtype
        self._updates: list[Update] | None = None
        super().__init__(groups, defaults)

    # -------------------------------------------------------------------------------- a step

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    @untraced
    @torch.no_grad()
    def step(self, closure: Callable[[], Loss] | None = None) -> Loss | None:
        """Take a step with the gradients in ``.grad`` and the penalty's; ``.grad`` does not change.

        Args:
            closure: evaluates the model again and returns the loss.

        Raises:
            RuntimeError: a parameter that was replaced or is on the meta device.
            ValueError: a parameter, gradient or hyperparameter that cannot be used; no parameter is
                changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updates = self._bound()
        on_device = all(update.backend.scalars_on_device for update in updates)
        found_inf, grad_scale = (getattr(self, n, None) for n in ("found_inf", "grad_scale"))
        if found_inf is not None and not on_device:
            if float(found_inf) > 0:
                return loss
            found_inf = None
        rows = [self._row(group) for group in self.param_groups]
        rows = [(lr if on_device and _is_on_gpu(lr) else float(lr), *row) for lr, *row in rows]
        for update in updates:
            update.set_options(rows, self._decoupled)
            update.set_scaling(grad_scale, found_inf)
            update.look_ahead(self._changed)
        self._changed = False
        for update in updates:
            update.run()
        return loss

    _changed = False  # whether refresh() was called

    def refresh(self) -> None:
        """Recompute sigma at the next step, after an edit of weights that torch does not track.

        Edits through torch (``copy_``, ``load_state_dict``, clipping) are noticed without it; those
        through ``.data`` or numpy are not.
        """
        self._changed = True

    def _bound(self) -> list[Update]:
        """Return the updates, with tables that point at the current parameters and gradients."""
        buckets = self._buckets.bound()
        groups = [group["params"] for group in self.param_groups]
        flags = [p.requires_grad for params in groups for p in params]
        shape = [id(b) for b in buckets], flags, list(map(len, groups))
        if self._updates is None or shape != self._shape:
            # Moments, steps and tables outlive an inference mode that is active here.
            with torch.inference_mode(False):
                self._build(buckets)
            self._shape = shape
        for update, params, is_sharded in zip(
            self._updates, self._params, self._are_sharded, strict=True
        ):
            if not is_sharded:
                update.bind(params, [p.grad for p in params])
                continue
            grads = [shards.local_grad(n, p) for n, p in zip(update.names, params, strict=True)]
            update.bind([shards.local_of(p) for p in params], grads)
        for update, params in zip(self._updates, self._params, strict=True):
            now = () if update.bucket is None else update.bucket.parameters
            if any(map(operator.is_not, params, now)):
                name = next(n for n, p, x in zip(update.names, params, now, strict=False)
                            if p is not x)  # fmt: skip
                raise RuntimeError(
                    f"parameter {name!r} was replaced in its module; build a new optimizer"
                )
        return self._updates

    def _build(self, buckets: list[Bucket]) -> None:
        """Group the parameters by device and dtype, those of a bucket first, in its order."""
        group_of = {id(p): i for i, g in enumerate(self.param_groups) for p in g["params"]}
        parts: dict[tuple, list[torch.Tensor]] = {}
        of: dict[tuple, Bucket] = {}
        taken: set[int] = set()
        for i, b in enumerate(buckets):
            # Parameters without a penalty go with the unsharded ones of their device and dtype.
            key = (b.plan.device, b.plan.dtype, i if b.is_sharded else None)
            parts[key], of[key] = list(b.parameters), b
            taken |= {id(p) for p in b.parameters}
        for p in (p for group in self.param_groups for p in group["params"]):
            if id(p) not in taken and (p.grad is not None or p.requires_grad):
                device = shards.local_of(p).device
                parts.setdefault((device, p.dtype, None), []).append(p)
                taken.add(id(p))  # a group may hold it twice, with torch's warning
        self._updates, self._params = [], []
        for (device, dtype, place), params in parts.items():
            bucket = of.get((device, dtype, place))
            r = self.regularizer.n_vectors
            kernels = bucket.kernels if bucket else choice.choose(self._backend, device, dtype, r)
            if self._backend == "auto":
                kernels = self._checked(kernels, device, dtype)
            if bucket is not None:
                bucket.kernels = kernels
            narrow = dtype.itemsize == 2
            moment_dtype = torch.float32 if narrow and self._state_dtype else dtype
            update = Update(
                self._rule, bucket.backend if bucket else kernels, bucket,
                [self._names.get(id(p), "?") for p in params],
                [shards.local_of(p) for p in params],
                [tuple(map(shards.local_of, self._moments(p, moment_dtype))) for p in params],
                [group_of[id(p)] for p in params], moment_dtype, len(self.param_groups),
            )  # fmt: skip
            found = [self.state[p].get("step", 0) for p in params]
            on_host = [0.0 if _is_on_gpu(step) else float(step) for step in found]
            device_tables.fill(update.steps, on_host)
            for i, (p, step) in enumerate(zip(params, found, strict=True)):
                if _is_on_gpu(step):
                    update.steps[i].copy_(step)
                self.state[p]["step"] = update.steps[i]
            self._updates.append(update)
            self._params.append(params)
        self._are_sharded = [any(map(shards.is_sharded, params)) for params in self._params]
        self._keep_vectors()

    def _checked(self, backend, device: torch.device, dtype: torch.dtype):
        """Return ``backend``, or the reference if its steps on a GPU are wrong."""
        kind, r = type(self), self.regularizer.n_vectors
        return choice.for_steps(
            backend, kind.__name__, device, dtype,
            lambda: selfcheck.step_disagreement(kind, backend.name, device, dtype, r), r,
        )  # fmt: skip

    def _moments(self, p: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Return the moments in the state of ``p``, created or converted if needed."""
        state, found = self.state[p], []
        for name in self._rule.moments:
            if not self._keeps_moments():
                state[name] = None
                continue
            like = torch.zeros_like(p, dtype=dtype, requires_grad=False)
            kept = state.get(name)
            if kept is not None:
                if "step" not in state:  # torch.optim.SGD does not count steps
                    state["step"] = torch.ones(())
                fits = kept.dtype == dtype and kept.stride() == like.stride()
                like = kept if fits and kept.device == p.device else like.copy_(kept)
            state[name] = like
            found.append(like)
        return tuple(found)

    def _keeps_moments(self) -> bool:
        return True

    # ------------------------------------------------------------------------ hyperparameters

    def add_param_group(self, param_group: Mapping[str, Any]) -> None:
        """Add a parameter group; parameters not in the model at construction get no penalty.

        Args:
            param_group: "params", parameters or (name, parameter) pairs, and options. As in torch,
                either all groups have names or none has.

        Raises:
            TypeError: a group that is not a mapping, a set of parameters.
            ValueError: an option out of range, a parameter in two groups, names for some only.
        """
        group = as_dict(param_group)
        if group is None or "params" not in group:
            raise TypeError(
                f'param_group: got {shown(param_group)}; accepted is a dict with "params"'
            )
        group = self._checked_options(group)
        group["params"] = _items(group["params"])
        names = {id(x[1]): x[0] for x in group["params"] if isinstance(x, tuple)}
        for item in group["params"]:
            p = item[1] if isinstance(item, tuple) else item
            if p.requires_grad:
                check_dtype({**self._names, **names}.get(id(p), "?"), p.dtype)
        super().add_param_group(group)
        self._names |= names
        self._updates = None

    def _check_options(self, group: Mapping[str, Any]) -> None:
        """Raise TypeError or ValueError for an option that no step can have."""
        self._checked_options(group)

    def _checked_options(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return a group with its options as Python's numbers and flags, or as tensors."""
        found = dict(group)
        for name in ("lr", "weight_decay", "eps", "momentum"):
            if name in found:
                found[name] = check_scalar(name, found[name])
        for name in ("amsgrad", "maximize", "differentiable"):
            if name in found and check_flag(name, found[name]):
                raise ValueError(f"{name}: got True; accepted is False")
        for name in ("amsgrad", "maximize", "differentiable", "foreach", "fused", "capturable"):
            if found.get(name) is not None:
                found[name] = bool(found[name])
        return found

    def _row(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        """Return a group's hyperparameters in the order of schema.GROUP."""
        raise NotImplementedError

    def __repr__(self) -> str:
        groups = super().__repr__()
        arguments = {**self._assigned(), "decoupled": self._decoupled}
        lines = [f"{name}: {value}" for name, value in arguments.items()]
        lines += listing(self._buckets.selection)
        return "\n    ".join((groups.removesuffix(")") + "Penalty", *lines)) + "\n)"

    # -------------------------------------------------------------------------------------- state

    @property
    def _buckets(self) -> ModelBuckets:
        return self.regularizer._buckets

    def state_dict(self) -> dict[str, Any]:
        """Return a state_dict that torch's counterpart can load, with "spectral_..." entries added.

        The vectors of a parameter's matrices, [n_vectors, N] each, are in its state, so that
        torch.distributed.checkpoint finds them by the parameter's name.
        """
        self._keep_vectors()
        found = super().state_dict()
        found["state"] = {
            i: {**state, "step": state["step"].clone()} if "step" in state else state
            for i, state in found["state"].items()
        }
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state_dict of this class or of its counterpart in torch.optim."""
        for group in state_dict["param_groups"]:
            self._check_options(group)
        super().load_state_dict(state_dict)
        self._own(state_dict)
        # torch has converted moments to the parameter's dtype; with state_dtype restore float32.
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, own, strict=True):
            for name in self._rule.moments:
                kept = state_dict["state"].get(i, {}).get(name)
                if kept is not None and self._state_dtype is not None:
                    self.state[p][name] = kept.to(p.device, self._state_dtype, copy=True)
        by_id = {id(p): state_dict["state"].get(i, {}) for i, p in zip(saved, own, strict=True)}
        vectors, initial = {}, {}
        for matrix, p, name in self._matrices():
            state = by_id[id(p)]
            if f"spectral_vectors{name}" in state:
                vectors[matrix] = state[f"spectral_vectors{name}"]
            if f"spectral_initial{name}" in state:
                initial[matrix] = state[f"spectral_initial{name}"]
        if not vectors and any(by_id.values()):
            warnings.warn(
                f"{type(self).__name__}: the checkpoint has no vectors of the spectral penalty; "
                "they are warmed up",
                stacklevel=2,
            )
        self.regularizer.load_state_dict({"vectors": vectors, "initial": initial})
        self._updates = None

    def _own(self, state_dict: Mapping[str, Any]) -> None:
        """Copy tensors that torch has taken over from ``state_dict``, and normalize options."""
        theirs = {id(x) for state in state_dict["state"].values() if isinstance(state, Mapping)
                  for x in state.values() if isinstance(x, torch.Tensor)}  # fmt: skip
        for state in self.state.values():
            if isinstance(state, dict):
                state.update({name: x.clone() for name, x in state.items() if id(x) in theirs})
        for group in self.param_groups:
            group.update(self._checked_options(group))

    def _matrices(self) -> Iterable[tuple[str, torch.Tensor, str]]:
        """Yield name, parameter, and the name's suffix after the parameter's, of every matrix."""
        buckets = self._buckets
        parameters = dict(zip(buckets.refs, buckets.tensors(), strict=True))
        for matrix in buckets.selection.matrices:
            ref = matrix.ref
            yield matrix.name, parameters[ref], matrix.name.removeprefix(ref.name)

    def _keep_vectors(self) -> None:
        """Store vectors and measured targets in the state of the parameters that have one."""
        known = self.regularizer.state_dict() if self.state else {"vectors": {}}
        for matrix, p, name in self._matrices():
            if matrix in known["vectors"] and p in self.state:
                self.state[p][f"spectral_vectors{name}"] = known["vectors"][matrix]
                if matrix in known["initial"]:
                    initial = torch.tensor(known["initial"][matrix], dtype=torch.float64)
                    self.state[p][f"spectral_initial{name}"] = initial

    def __getstate__(self) -> dict[str, Any]:
        """Leave out addresses; copies and pickles carry moments and vectors."""
        kept = ("regularizer", "_backend", "_state_dtype", "_decoupled")
        by_place = [[self._names.get(id(p), "?") for p in g["params"]] for g in self.param_groups]
        return {
            **super().__getstate__(),
            **{name: getattr(self, name) for name in kept},
            "_by_place": by_place,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if (by_place := self.__dict__.pop("_by_place", None)) is not None:
            self._updates = None
            self._names = {
                id(p): name
                for names, group in zip(by_place, self.param_groups, strict=True)
                for name, p in zip(names, group["params"], strict=True)
            }


def _source_and_groups(params, model: nn.Module | None):
    """Return what to select from, and parameter groups as torch.optim takes them."""
    if isinstance(params, nn.Module):
        return params, [{"params": list(params.parameters())}]
    accepted = "accepted are a module, its parameters or groups of them"
    if isinstance(params, torch.Tensor | str | Mapping) or not isinstance(params, Iterable):
        raise TypeError(f"params: got {shown(params)}; {accepted}")
    given = list(params)
    if not given:
        raise ValueError(f"params: got no parameters; {accepted}")
    if all(as_dict(group) is None for group in given):
        given = [{"params": given}]
    groups = []
    for group in map(as_dict, given):
        if group is None or "params" not in group:
            raise TypeError('params: got groups and parameters; accepted are dicts with "params"')
        groups.append({**group, "params": _items(group["params"])})
    items = [item for group in groups for item in group["params"]]
    named = [isinstance(item, tuple) for item in items]
    if any(named) and not all(named):
        raise ValueError("params: some have names and others have none; accepted are names for all")
    if model is None and not all(named):
        raise TypeError(
            "params: got parameters without names; pass the module or model.named_parameters(), "
            "or the module as model= beside them"
        )
    return model if model is not None else items, groups


def _items(params) -> list[torch.Tensor | tuple[str, torch.Tensor]]:
    """Return the parameters of a group, or its (name, parameter) pairs, as a list."""
    if isinstance(params, set):
        raise TypeError("params: got a set; accepted are lists, whose order is the same every time")
    items = [params] if isinstance(params, torch.Tensor) else list(params)
    for item in items:
        name, p = item if isinstance(item, tuple) and len(item) == 2 else ("", item)
        if not isinstance(name, str) or not isinstance(p, torch.Tensor):
            raise TypeError(
                f"params: got an item {shown(item)}; accepted are parameters and "
                "(name, parameter) pairs"
            )
    return items


def _not_in(groups, model: nn.Module) -> list[str]:
    """Return patterns that match the parameters of ``model`` which no group holds."""
    given = [item for group in groups for item in group["params"]]
    held = {id(item[1] if isinstance(item, tuple) else item) for item in given}
    aliases = [refs for refs in parameter_refs(model) if not refs[0].computed]
    absent = [refs for refs in aliases if id(refs[0].get()) not in held]
    if len(absent) == len(aliases):
        raise ValueError(
            "params: none of them is a parameter of model; accepted are parameters as they are in "
            "the model now (after sharding, or after a move that replaces them)"
        )
    return [glob.escape(ref.name) for refs in absent for ref in refs]


def _is_on_gpu(value) -> bool:
    return isinstance(value, torch.Tensor) and not device_tables.shares_memory(value.device)

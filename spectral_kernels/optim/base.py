"""Base class of SpectralAdamW and SpectralSGD: groups, checkpoints, and the order of a step."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..backends import choice, selfcheck
from ..diagnostics.readings import Readings
from ..engine.bucket import Bucket
from ..engine.model_buckets import ModelBuckets
from ..engine.stability import StabilityWatch
from ..engine.untraced import untraced
from ..regularizer import SpectralRegularizer, Strength
from ..sharding import shards
from ..tables import device as device_tables
from .update import Rule, Update

# Further options that torch.optim keeps in a group; they make checkpoints interchangeable.
TORCH_OPTIONS = {"maximize": False, "foreach": None, "differentiable": False, "fused": None}


class SpectralOptimizer(Readings, torch.optim.Optimizer):
    """Base class of SpectralAdamW and SpectralSGD; see there."""

    _rule: Rule
    _step_supports_amp_scaling = True  # GradScaler then sets grad_scale and found_inf

    def __init__(
        self, params, defaults, strength, exponent, target, *, model, decoupled, state_dtype,
        n_power_iterations, backend, **selection,
    ):  # fmt: skip
        source, groups = _named_groups(params, model)
        if state_dtype not in (None, torch.float32):
            raise ValueError(f"state_dtype: got {state_dtype}; accepted are None and torch.float32")
        if n_power_iterations not in (1, "auto"):
            raise ValueError(
                f"n_power_iterations: got {n_power_iterations!r}; accepted are 1 and 'auto'"
            )
        self.regularizer = SpectralRegularizer(
            source, strength, exponent, target, n_power_iterations, backend=backend, **selection
        )
        self._buckets.check_in_place()
        self._backend, self._state_dtype, self._decoupled = backend, state_dtype, bool(decoupled)
        self._names = {id(p): name for group in groups for name, p in group["params"]}
        plain = [{**group, "params": [p for _, p in group["params"]]} for group in groups]
        for group in plain:
            self._check_options({**defaults, **group})
        held = {id(p) for group in plain for p in group["params"]}
        for ref in self._buckets.refs:
            if id(ref.get()) not in held:
                raise ValueError(
                    f"params: they do not hold parameter {ref.name!r}, which is regularized; "
                    "leave it out with include or exclude"
                )
        self._updates: list[Update] | None = None
        super().__init__(plain, defaults)

    # -------------------------------------------------------------------------------- a step

    @untraced
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None):
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
        if groups := self._sgd_groups():
            self._watch.step(self._buckets.buckets, groups)
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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; parameters not in the model at construction get no penalty."""
        self._check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        self._updates = None

    def _check_options(self, group: Mapping[str, Any]) -> None:
        for name in ("amsgrad", "maximize", "differentiable"):
            if group.get(name):
                raise ValueError(f"{name}: got True; accepted is False")
        for name in ("lr", "weight_decay", "eps", "momentum"):
            if name in group and not _at_least_zero(group[name]):
                raise ValueError(f"{name}: got {group[name]!r}; accepted are finite numbers >= 0")

    def _row(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        """Return a group's hyperparameters in the order of schema.GROUP."""
        raise NotImplementedError

    # ----------------------------------------------------------------------- strength and state

    @property
    def strength(self) -> Strength:
        """Factor of R; assign a number, a 0-d tensor or a mapping at any time."""
        return self.regularizer.strength

    @strength.setter
    def strength(self, strength: Strength) -> None:
        self.regularizer.strength = strength

    @property
    def _buckets(self) -> ModelBuckets:
        return self.regularizer._buckets

    @property
    def _watch(self) -> StabilityWatch:
        return self.regularizer._watch

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
                    initial = torch.tensor(
                        known["initial"][matrix], dtype=torch.float64, device="cpu"
                    )
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


def _named_groups(params, model: nn.Module | None):
    """Return the source to select from, and groups whose "params" are (name, parameter) pairs."""
    if isinstance(params, nn.Module):
        return params, [{"params": list(params.named_parameters())}]
    given = list(params) if isinstance(params, Iterable) else None
    if not given:
        raise ValueError(f"params: got {params!r}; accepted are a module or parameters")
    groups = given if isinstance(given[0], dict) else [{"params": given}]
    names = {} if model is None else {id(p): name for name, p in model.named_parameters()}
    found = []
    for group in groups:
        own = group["params"]
        own = [own] if isinstance(own, torch.Tensor) else list(own)
        if not all(isinstance(x, tuple) for x in own) and model is None:
            raise TypeError(
                "params: got parameters without names; accepted are a module, (name, parameter) "
                "pairs, or parameters together with model="
            )
        pairs = [x if isinstance(x, tuple) else (names.get(id(x), "?"), x) for x in own]
        found.append({**group, "params": pairs})
    return model or [pair for group in found for pair in group["params"]], found


def _is_on_gpu(value) -> bool:
    return isinstance(value, torch.Tensor) and not device_tables.shares_memory(value.device)


def _at_least_zero(value) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | torch.Tensor):
        return False
    return math.isfinite(float(value)) and float(value) >= 0

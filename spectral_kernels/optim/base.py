"""Base class of SpectralAdamW and SpectralSGD: groups, checkpoints, and the order of a step."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeVar, overload

import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from ..backends import choice, selfcheck
from ..diagnostics.readings import Readings
from ..engine.assignable import Assignable
from ..engine.attach import in_steps_of
from ..engine.bucket import Bucket
from ..engine.model_buckets import ModelBuckets
from ..engine.prepared import Preparation
from ..engine.settings import check_constraint, iterations_of
from ..engine.untraced import untraced
from ..regularizer import SpectralRegularizer
from ..selection.arguments import (
    as_dict,
    check_flag,
    check_pattern_list,
    check_scalar,
    expected,
)
from ..selection.parameters import named_parameters
from ..sharding import shards
from ..tables import device as device_tables
from ..tables.schema import GROUP
from .checkpoints import Checkpoints
from .groups import items_of, named_alike, not_in, source_and_groups
from .prepared import Option, PreparedUpdate
from .states import state_of
from .update import Rule, Update, check_dtype

Loss = TypeVar("Loss")
_GLOBAL_HOOKS = _global_optimizer_pre_hooks, _global_optimizer_post_hooks


class SpectralOptimizer(Assignable, Readings, Checkpoints):
    """Base class of SpectralAdamW and SpectralSGD; see there."""

    regularizer: SpectralRegularizer
    _rule: Rule
    _options: ClassVar[Sequence[Option]]
    _counts_steps: bool  # whether torch's counterpart keeps a step count
    # Options of the counterpart in torch.optim that do not change our step, with their defaults: in
    # the groups they make checkpoints interchangeable.
    _flags: ClassVar[Mapping[str, bool | None]]
    _step_supports_amp_scaling = True  # GradScaler then sets grad_scale and found_inf

    def __init__(
        self, params, defaults, strength, exponent, target, *, model, decoupled, state_dtype,
        n_power_iterations, n_vectors, backend, side, constraint, **options,
    ):  # fmt: skip
        flags = {name: options.pop(name, default) for name, default in self._flags.items()}
        defaults = self._checked_options({**defaults, **flags})
        self._decoupled = check_flag("decoupled", decoupled)
        self._constraint = check_constraint(constraint, self._decoupled)
        if state_dtype not in (None, torch.float32):
            raise ValueError(expected("state_dtype", "None or torch.float32", state_dtype))
        iterations_of(n_power_iterations, is_in_optimizer=True)
        source, groups = source_and_groups(params, model, type(self).__name__)
        # Of the parameters that it was built with, by id, which they keep as long as they are here.
        # torch.utils.swap_tensors refuses tensors that have weak references.
        self._names: dict[int, tuple[torch.Tensor, str]] = {}
        # Patterns that are left out, and the names of parameters of the model that no group holds.
        self._excluded = check_pattern_list("exclude", options.get("exclude")) or []
        self._absent: list[str] = []
        if isinstance(source, nn.Module):
            self._names = {id(p): (p, name) for name, p in named_parameters(source)}
            self._absent = not_in(groups, source)
        options["exclude"] = [*self._excluded, *self._absent]
        self.regularizer = SpectralRegularizer(
            source, strength, exponent, target, n_power_iterations, n_vectors=n_vectors,
            side=side, backend=backend, **options,
        )  # fmt: skip
        self._buckets.leave_out_computed()
        self._buckets.settings = replace(self._buckets.settings, is_in_optimizer=True)
        self._backend, self._state_dtype = backend, state_dtype
        self._updates: list[Update] | None = None
        self._preparation: Preparation[PreparedUpdate] = Preparation()
        self._seen: list = []  # what the updates were built from
        super().__init__(groups, defaults)
        in_steps_of(self, self._buckets)

    # -------------------------------------------------------------------------------- a step

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    @untraced
    def step(self, closure: Callable[[], Loss] | None = None) -> Loss | None:
        """Take a step with the gradients in ``.grad`` and the penalty's; ``.grad`` does not change.

        Args:
            closure: evaluates the model again and returns the loss.

        Raises:
            RuntimeError: a parameter that was replaced or is on the meta device, or whose ``.grad``
                contains the penalty already.
            ValueError: a parameter, gradient or hyperparameter that cannot be used; no parameter is
                changed then.
        """
        given = () if closure is None else (closure,)
        return self._hooked_step(*given) if self._has_hooks() else self._whole_step(*given)

    # torch.optim wraps every step() in a function that runs hooks and names it for the profiler,
    # which takes as long as half of a small network's step.
    step.hooked = True

    def _has_hooks(self) -> bool:
        """Return whether there is something for that function to do."""
        own = self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks
        return any(own) or any(_GLOBAL_HOOKS) or torch.autograd._profiler_enabled()

    def _whole_step(self, closure: Callable[[], Loss] | None = None) -> Loss | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._buckets.lock:
            in_steps_of(self, self._buckets).check()
            self._buckets.searches.count(self._buckets.buckets)
            if not self._take_prepared():
                self._step()
        return loss

    _hooked_step = torch.optim.Optimizer.profile_hook_step(_whole_step)

    @torch.no_grad()
    def _step(self) -> None:
        updates = self._bound()
        on_device = all(update.backend.scalars_on_device for update in updates)
        found_inf, grad_scale = (getattr(self, n, None) for n in ("found_inf", "grad_scale"))
        if found_inf is not None and not on_device:
            if float(found_inf) > 0:
                return
            found_inf = None
        rows = [self._row(group) for group in self.param_groups]
        rows = [(lr if on_device and _is_on_gpu(lr) else float(lr), *row) for lr, *row in rows]
        for update in updates:
            update.set_options(rows, self._decoupled, self._constraint)
            update.set_scaling(grad_scale, found_inf)
            update.look_ahead(self._changed)
        self._changed = False
        if groups := self._sgd_groups():
            self._buckets.watch.step(self._buckets.buckets, groups)
        for update in updates:
            update.run()
        self._preparation.renew(lambda: PreparedUpdate(self, updates))

    def _take_prepared(self) -> bool:
        """Take the step that native code has ready; return False if there is none that fits."""
        prepared, own = self._preparation.step, self.__dict__
        if prepared is None or not prepared.is_native:
            return False
        watch = self._buckets.watch if self._sgd_groups() else None
        is_special = self._changed or "found_inf" in own or "grad_scale" in own
        if is_special or (watch is not None and watch.is_next):
            self._preparation.drop()
            return False
        if self._buckets.coefficients.strength_tensor is not None:
            self._buckets.fill_strength()
        if not prepared.take(self):
            self._preparation.drop()
            return False
        if watch is not None:
            watch.skip()
        return True

    _changed = False  # whether refresh() was called

    def refresh(self) -> None:
        """Recompute sigma at the next step, after an edit of weights that torch does not track.

        Edits through torch (``copy_``, ``load_state_dict``, clipping) are noticed without it, and
        so is ``p.data = x`` that gives a parameter another address; others through ``.data`` or
        numpy are not.
        """
        self._changed = True

    def _bound(self) -> list[Update]:
        """Return the updates, with tables that point at the current parameters and gradients."""
        if (prepared := self._preparation.step) is not None:
            if prepared.fits(self):
                return self._updates
            self._preparation.drop()
        buckets = self._buckets.bound(owner=in_steps_of(self, self._buckets))
        is_known = self._updates is not None and _same(self._look(buckets), self._seen)
        if not is_known or not self._bind(self._updates):
            self._updates = None  # until all of them are built, should that be interrupted
            # Moments, steps and tables outlive an inference mode that is active here.
            with torch.inference_mode(False):
                self._learn_names(buckets)
                updates = self._build(buckets)
                if not self._bind(updates):
                    raise RuntimeError(
                        f"{type(self).__name__}: its state was changed while its step was "
                        "prepared; change it between two steps"
                    )
                self._keep_states(updates)
            self._updates, self._seen = updates, self._look(buckets)
        return self._updates

    def _learn_names(self, buckets: list[Bucket]) -> None:
        """Name the regularized parameters; those that are in no group and no bucket are let go."""
        names = {id(p): (p, ref.name) for bucket in buckets
                 for ref, p in zip(bucket.plan.refs, bucket.parameters, strict=True)}  # fmt: skip
        held = {id(p) for group in self.param_groups for p in group["params"]}
        kept = {i: x for i, x in self._names.items() if i in held and i not in names}
        self._names = {**kept, **names}

    def _look(self, buckets: list[Bucket]) -> list:
        """Return the objects that the updates are built from; they are compared in every step."""
        params = [p for group in self.param_groups for p in group["params"]]
        sizes = [len(group["params"]) for group in self.param_groups]
        frozen = [i for i, p in enumerate(params) if not p.requires_grad]
        stepped = [i for i in frozen if params[i].grad is not None]
        found = [*buckets, *params, *self.state, *self.state.values()]
        return [sizes, frozen, stepped, self._keeps_moments(), found]

    def _bind(self, updates: Sequence[Update]) -> bool:
        """Bind ``updates`` to the present parameters; return whether all of them still fit."""
        for update, params, is_sharded in zip(
            updates, self._params, self._are_sharded, strict=True
        ):
            if not is_sharded:
                fits = update.bind(params, [p.grad for p in params])
            else:
                grads = [shards.local_grad(n, p) for n, p in zip(update.names, params, strict=True)]
                fits = update.bind([shards.local_of(p) for p in params], grads)
            if not fits:
                return False
        return True

    def _build(self, buckets: list[Bucket]) -> list[Update]:
        """Group the parameters by device and dtype, those of a bucket first, in its order."""
        group_of = {id(p): i for i, g in enumerate(self.param_groups) for p in g["params"]}
        parts: dict[tuple, list[torch.Tensor]] = {}
        of: dict[tuple, Bucket] = {}
        taken: set[int] = set()
        for i, b in enumerate(buckets):
            # Parameters without a penalty go with the unsharded matrices of their device and dtype.
            is_apart = b.is_sharded or b.plan.operators is not None
            key = (b.plan.device, b.plan.dtype, i if is_apart else None)
            parts[key], of[key] = list(b.parameters), b
            taken |= {id(p) for p in b.parameters}
        for p in (p for group in self.param_groups for p in group["params"]):
            if id(p) not in taken and (p.grad is not None or p.requires_grad):
                device = shards.local_of(p).device
                parts.setdefault((device, p.dtype, None), []).append(p)
                taken.add(id(p))  # a group may hold it twice, with torch's warning
        states = {key: [self._state_of(p) for p in params] for key, params in parts.items()}
        updates = []
        for key, params in parts.items():
            device, dtype, _ = key
            bucket = of.get(key)
            r = self.regularizer.n_vectors
            kernels = bucket.kernels if bucket else choice.choose(self._backend, device, dtype, r)
            if self._backend == "auto":
                kernels = self._checked(kernels, device, dtype)
            if bucket is not None:
                bucket.kernels = kernels
            update = Update(
                self._rule, bucket.backend if bucket else kernels, bucket,
                [self._name_of(p) for p in params], [shards.local_of(p) for p in params],
                states[key], self._moment_names(), [group_of.get(id(p), -1) for p in params],
                self._moment_dtype(dtype), len(self.param_groups),
            )  # fmt: skip
            found = [state["step"] for state in states[key]]
            device_tables.fill(update.steps, [0.0 if _is_on_gpu(x) else float(x) for x in found])
            for i, (state, step) in enumerate(zip(states[key], found, strict=True)):
                if _is_on_gpu(step):
                    update.steps[i].copy_(step)
                state["step"] = update.steps[i]
            updates.append(update)
        self._params = list(parts.values())
        self._are_sharded = [any(map(shards.is_sharded, params)) for params in self._params]
        return updates

    def _keep_states(self, updates: Sequence[Update]) -> None:
        """Put the states of ``updates``, which can take a step, into the optimizer's state."""
        for update, params in zip(updates, self._params, strict=True):
            for i, p in enumerate(params):
                if update.group_of[i] >= 0:  # those of no group have none
                    self.state[p].update(update.states[i])
                    update.states[i] = self.state[p]
        self._keep_vectors()

    def _checked(self, backend, device: torch.device, dtype: torch.dtype):
        """Return ``backend``, or the reference if its steps on a GPU are wrong."""
        kind, r = type(self), self.regularizer.n_vectors
        return choice.for_steps(
            backend, kind.__name__, device, dtype,
            lambda: selfcheck.step_disagreement(kind, backend.name, device, dtype, r), r,
        )  # fmt: skip

    def _state_of(self, p: torch.Tensor) -> dict[str, Any]:
        """Return moments and step count of ``p``: those in its state, converted if needed, or new.

        Raises:
            ValueError: some of them are missing, or a moment does not have the parameter's shape.
        """
        return state_of(
            self._name_of(p), p, self.state.get(p, {}), self._rule.moments, self._moment_names(),
            self._moment_dtype(p.dtype), self._counts_steps,
        )  # fmt: skip

    def _moment_names(self) -> tuple[str, ...]:
        return self._rule.moments if self._keeps_moments() else ()

    def _moment_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if dtype.itemsize == 2 and self._state_dtype else dtype

    def _name_of(self, p: torch.Tensor) -> str:
        return self._names[id(p)][1] if id(p) in self._names else "?"

    def _keeps_moments(self) -> bool:
        return True

    # ------------------------------------------------------------------------ hyperparameters

    def add_param_group(self, param_group: Mapping[str, Any]) -> None:
        """Add a parameter group.

        A parameter of a module that was replaced, such as a new head, is regularized from the next
        step on; others that were not in the model at construction, after :meth:`reselect`.

        Args:
            param_group: "params", parameters or (name, parameter) pairs, and options. If the groups
                have no names, those of a new one are used in messages only; if they have, it needs
                names too.

        Raises:
            TypeError: a group that is not a mapping, a set of parameters.
            ValueError: an option out of range, a parameter in two groups, one without a name.
        """
        group = as_dict(param_group)
        if group is None or "params" not in group:
            raise TypeError(expected("param_group", 'a dict with "params"', param_group))
        group = self._checked_options(group)
        group["params"] = items_of(group["params"])
        names = {id(x[1]): (x[1], x[0]) for x in group["params"] if isinstance(x, tuple)}
        for item in group["params"]:
            p = item[1] if isinstance(item, tuple) else item
            if p.requires_grad:
                check_dtype(names[id(p)][1] if id(p) in names else self._name_of(p), p.dtype)
        if self.param_groups:
            root = self._buckets.selection.root
            group["params"] = named_alike(group["params"], self.param_groups[0], root)
        super().add_param_group(group)
        self._names.update(names)
        self._updates = None

    @untraced
    def reselect(self) -> None:
        """Regularize parameters that were added to the model, and to a group.

        Parameters of the model that no group held at construction count as added once one does.
        See :meth:`SpectralRegularizer.reselect`.

        Raises:
            ValueError: see there.
            RuntimeError: see there; a parameter that was added to the model is in no group.
        """
        with self._buckets.lock:
            selection = self._buckets.selection
            if selection.follower is not None:
                absent = set(not_in(self.param_groups, selection.root))
                self._absent = [name for name in self._absent if name in absent]
                selection.follower.leave_out([*self._excluded, *self._absent])
            self.regularizer.reselect()

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
                raise ValueError(expected(name, "False", True))
        for name in ("amsgrad", "maximize", "differentiable", "foreach", "fused", "capturable"):
            if found.get(name) is not None:
                found[name] = bool(found[name])
        return found

    def _row(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        """Return a group's hyperparameters in the order of schema.GROUP; lr may be a tensor."""
        found = dict.fromkeys(GROUP.names, 0.0)
        for option in self._options:
            value = group[option.key]
            found[option.field] = value if option.index < 0 else value[option.index]
        lr, *others = found.values()
        return (lr, *map(float, others))

    def __repr__(self) -> str:
        groups = super().__repr__()
        arguments = {**self._assigned(), "decoupled": self._decoupled}
        if self._constraint is not None:
            arguments["constraint"] = self._constraint
        lines = [f"{name}: {value}" for name, value in arguments.items()]
        lines += self._listing()
        return "\n    ".join((groups.removesuffix(")") + "Penalty", *lines)) + "\n)"

    @property
    def _buckets(self) -> ModelBuckets:
        return self.regularizer._buckets


def _same(now: list, before: list) -> bool:
    """Return whether ``SpectralOptimizer._look`` has found the same objects as before."""
    *facts, found = now
    *facts_before, found_before = before
    same_number = len(found) == len(found_before)
    return facts == facts_before and same_number and all(map(operator.is_, found, found_before))


def _is_on_gpu(value) -> bool:
    return isinstance(value, torch.Tensor) and not device_tables.shares_memory(value.device)

"""attach(): hooks that add the penalty to an optimizer's steps, and the handle that ends them."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch.utils.hooks import RemovableHandle

from ...selection.changes import aligned
from ...selection.parameters import ParameterRef
from ...selection.warn import warn
from ..model_buckets import ModelBuckets
from ..settings import check_constraint
from ..untraced import outside, untraced
from .decoupled import Decoupled
from .once import StepPenalty, names_of, others_with
from .optimizers import (
    check_directions,
    groups_of,
    learning_rates,
    owners,
    to_attach_to,
    warn_if_orthogonalized,
    warn_if_too_few,
)

# The code of the function around step() that runs step hooks, the same for all optimizers.
_STEP = torch.optim.Optimizer.profile_hook_step(lambda: None).__code__


class Regularizer(Protocol):
    """What attach() needs of a SpectralRegularizer."""

    _buckets: ModelBuckets


class Attachment:
    """Handle of an attached regularizer, which keeps neither it nor its optimizers alive.

    Copies and pickles that contain optimizers and regularizer, or this handle with the optimizers,
    have the copy of the regularizer attached to the copies of the optimizers.

    Args:
        regularizer: the regularizer.
        optimizers: the optimizers.
        parts: the index of the optimizer of each parameter of the regularizer.
        decoupled: whether the penalty acts on the weights, beside the steps.
        shared: whether other optimizers' steps may add a penalty of these parameters too.
        constraint: None, or what holds the weights in place of the penalty: "cap" or "sphere".

    Attributes:
        decoupled: as given.
        constraint: as given.
        kinds: the optimizers' classes.
    """

    def __init__(
        self,
        regularizer: Regularizer,
        optimizers: Sequence[torch.optim.Optimizer],
        parts: Sequence[int],
        decoupled: bool,
        shared: bool,
        constraint: str | None = None,
    ):
        self.__setstate__(
            {"regularizer": regularizer, "optimizers": optimizers, "parts": parts,
             "decoupled": decoupled, "shared": shared, "constraint": constraint}
        )  # fmt: skip

    @property
    def regularizer(self) -> Regularizer | None:
        """The regularizer, or None if it is gone."""
        return None if self._regularizer is None else self._regularizer()

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizers whose steps contain the penalty, as far as they are there."""
        return [optimizer for ref in self._optimizers if (optimizer := ref()) is not None]

    @property
    def active(self) -> bool:
        """Whether steps contain the penalty: not after ``remove()``, nor without optimizers."""
        return any(step.is_active for step in self._steps)

    def remove(self) -> None:
        """Stop adding the penalty; calling it again does nothing."""
        for handle in self._handles:
            handle.remove()
        self.stop()
        self._handles, self._steps, self._optimizers = [], [], []

    def stop(self) -> None:
        """Stop adding the penalty, but leave the hooks, which no hook of theirs can remove."""
        for step in self._steps:
            step.end()

    # ------------------------------------------------------------- a model that changes

    @property
    def parts(self) -> Sequence[int]:
        """The index of the optimizer of each parameter."""
        return self._parts

    @property
    def is_divided(self) -> bool:
        """Whether several optimizers hold the parameters."""
        return len(set(self._parts)) > 1

    def align(self, before: Sequence[ParameterRef], now: Sequence[ParameterRef]) -> None:
        """Keep the parts of parameters by name, now that the regularizer has others."""
        self._parts = aligned(self._parts, before, now)

    def hold(
        self, buckets: ModelBuckets, new: Sequence[int], tensors: Sequence[torch.Tensor]
    ) -> None:
        """Find the optimizers of ``tensors``, the parameters with the indices ``new``."""
        optimizers = {i: o for i, ref in enumerate(self._optimizers) if (o := ref()) is not None}
        refs, living = [buckets.refs[i] for i in new], list(optimizers.values())
        found = owners(refs, tensors, living)
        if not self.decoupled:
            check_directions(refs, tensors, living, found)
        parts, numbers = list(self._parts), list(optimizers)
        for i, own in zip(new, found, strict=True):
            parts[i] = numbers[own]
        if parts != self._parts:
            self._parts = parts
            buckets.divide(parts if self.is_divided else None)

    def is_stale(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Return whether its optimizers no longer hold all of ``tensors``, the parameters."""
        held = set().union(*map(groups_of, self.optimizers))
        return not all(id(tensor) in held for tensor in tensors)

    # -------------------------------------------------------------------------- the hooks

    def resume(self) -> None:
        """Register the hooks, unless they are, or unless a copy is not complete yet."""
        regularizer = self.regularizer if self.__dict__ else None
        if regularizer is None or self._steps or "_buckets" not in regularizer.__dict__:
            return
        buckets = regularizer._buckets
        if self.is_divided:
            buckets.divide(self._parts)
        elif not any(step.is_active for step in buckets.in_steps):
            buckets.divide(None)
        for number, ref in enumerate(self._optimizers):
            optimizer = ref()
            known = any(x.is_active and x.optimizer is optimizer for x in buckets.in_steps)
            if optimizer is None or known:  # known: this is a shallow copy
                continue
            step = StepPenalty(buckets, optimizer, self, number, self._shared)
            own = Decoupled(self.constraint) if self.decoupled else None
            hook = _Hook(self, regularizer, step, own)
            self._steps.append(step)
            self._handles += [
                optimizer.register_step_pre_hook(hook.before),
                optimizer.register_step_post_hook(hook.after),
            ]

    def __getstate__(self) -> dict[str, Any]:
        regularizer = self.regularizer if self.active else None
        optimizers = [] if regularizer is None else [ref() for ref in self._optimizers]
        return {"regularizer": regularizer, "optimizers": optimizers, "parts": self._parts,
                "decoupled": self.decoupled, "shared": self._shared,
                "constraint": self.constraint}  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        regularizer, optimizers = state["regularizer"], state["optimizers"]
        self._regularizer = None if regularizer is None else weakref.ref(regularizer)
        self._optimizers = [_reference(optimizer) for optimizer in optimizers]
        self._parts = list(state["parts"])
        self.decoupled, self._shared = state["decoupled"], state["shared"]
        self.constraint = state.get("constraint")  # absent in older pickles
        self.kinds = " and ".join(type(x).__name__ for x in optimizers if x is not None)
        self._handles: list[RemovableHandle] = []
        self._steps: list[StepPenalty] = []
        self.resume()


def _reference(optimizer: torch.optim.Optimizer | None):
    """Return a weak reference; one of several optimizers may be gone."""
    return (lambda: None) if optimizer is None else weakref.ref(optimizer)


class _Hook:
    """What runs before and after the steps of one optimizer, which keeps it alive.

    Args:
        attachment: the handle.
        regularizer: the regularizer.
        step: what these steps add.
        decoupled: if the penalty acts beside the steps, what does that.
    """

    def __init__(
        self,
        attachment: Attachment,
        regularizer: Regularizer,
        step: StepPenalty,
        decoupled: Decoupled | None,
    ):
        self._attachment, self._regularizer, self._step = attachment, regularizer, step
        self._decoupled = decoupled
        self._inside = False  # a step has begun and not ended; it may have raised an error
        self._nested = 0  # steps inside of it, of a base class, for which torch runs hooks too

    def before(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]):
        """Add the penalty; with a closure, after its evaluation."""
        # Without the wrapper of ``untraced``: in the step of a small network it counts.
        if torch.compiler.is_compiling():
            return outside(_Hook.before, self, optimizer, args, kwargs)
        if not self._step.is_active:
            return None
        if self._inside and _steps_under_way(optimizer) > 1:
            self._nested += 1
            return None
        self._inside, self._nested = True, 0
        # args starts with the optimizer itself.
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._step.check()
        if self._decoupled is not None:
            self._prepare(optimizer)
        elif closure is None:
            self._add(optimizer)
        if closure is None:
            return None

        def with_penalty():
            loss = closure()
            self._after_closure(optimizer)
            return loss

        if len(args) > 1:
            return (args[0], with_penalty, *args[2:]), kwargs
        return args, {**kwargs, "closure": with_penalty}

    def after(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        """End the step."""
        if not self._step.is_active:
            return
        if self._nested:
            self._nested -= 1
            return
        self._inside = False
        if self._decoupled is not None:
            self._apply(optimizer)

    @untraced
    def _apply(self, optimizer: torch.optim.Optimizer) -> None:
        with self._regularizer._buckets.lock:
            self._decoupled.apply(optimizer)

    @untraced
    def _after_closure(self, optimizer: torch.optim.Optimizer) -> None:
        self._step.check()
        if self._decoupled is None:
            self._add(optimizer)

    def _add(self, optimizer: torch.optim.Optimizer) -> None:
        # GradScaler leaves the gradients of a fused optimizer scaled, and sets this attribute.
        scale, buckets = getattr(optimizer, "grad_scale", None), self._regularizer._buckets
        buckets.accumulate_gradients(buckets.iterations, scale, self._step)
        if isinstance(optimizer, torch.optim.SGD) and self._step.adds_some:
            buckets.watch.step(buckets.buckets, optimizer.param_groups)

    def _prepare(self, optimizer: torch.optim.Optimizer) -> None:
        buckets = self._regularizer._buckets
        with buckets.lock:
            buckets.searches.count(buckets.buckets)
            buckets.leave_out_computed()
            own = buckets.of_owner(self._step)
            self._decoupled.prepare(own, buckets.iterations, optimizer)


def _steps_under_way(optimizer: torch.optim.Optimizer) -> int:
    """Return how many calls of step() of ``optimizer``, one in another, run step hooks."""
    count, frame = 0, sys._getframe(1)
    while frame is not None:
        if frame.f_code is _STEP:
            count += any(value is optimizer for value in frame.f_locals.values())
        frame = frame.f_back
    return count


def attach(
    regularizer: Regularizer,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    decoupled: bool,
    replace: bool,
    shared: bool,
    constraint: str | None,
) -> Attachment:
    """See ``SpectralRegularizer.attach``."""
    check_constraint(constraint, decoupled)
    given = optimizer if isinstance(optimizer, list | tuple) else [optimizer]
    if not given:
        raise TypeError("optimizer: expected one or several, got none")
    optimizers = [to_attach_to(one) for one in given]
    buckets = regularizer._buckets
    buckets.tell_of_added()
    buckets.leave_out_computed()
    tensors = buckets.tensors()
    parts = owners(buckets.refs, tensors, optimizers)
    if not decoupled:
        check_directions(buckets.refs, tensors, optimizers, parts)
    serving = [one for i, one in enumerate(optimizers) if i in parts]
    for one in serving if decoupled and constraint is None else ():
        learning_rates(one)
    found = _others(buckets, optimizers, shared)
    if found and not replace:
        gc.collect()  # an optimizer that only a cycle of references keeps alive does not count
        found = _others(buckets, optimizers, shared)
    stale = [x for x in attachments_of(buckets) if x.is_stale(tensors)]  # cannot go on
    for other, parameter in found:
        if other.attachment is None or not (replace or other.attachment in stale):
            raise RuntimeError(_problem(buckets, optimizers, other, parameter))
    ended = list(dict.fromkeys([*stale, *(other.attachment for other, _ in found)]))
    _check_parts(buckets, parts, ended)
    for one in () if decoupled else serving:
        warn_if_orthogonalized(one)
    for one in serving if constraint == "cap" else ():
        warn_if_too_few(one, buckets.settings.n_vectors)
    for attachment in ended:
        attachment.remove()
    return Attachment(regularizer, optimizers, parts, decoupled, shared, constraint)


def _others(buckets: ModelBuckets, optimizers, shared: bool) -> list[tuple[StepPenalty, str]]:
    """Return what adds the penalty of a parameter already, with the name of that parameter."""
    found = [] if shared else list(others_with(names_of(buckets)))
    same = [x for x in buckets.in_steps
            if x.is_active and any(x.optimizer is y for y in optimizers)]  # fmt: skip
    return found + [(x, "") for x in same if not any(x is y for y, _ in found)]


def _problem(buckets: ModelBuckets, optimizers, other: StepPenalty, parameter: str) -> str:
    name = type(other.optimizer).__name__
    if other in buckets.in_steps and any(other.optimizer is x for x in optimizers):
        return (
            f"optimizer: this regularizer is attached to it already ({name}); "
            "attach(optimizer, replace=True) attaches it anew"
        )
    if other.attachment is None:
        return (
            f"parameter {parameter!r} has its penalty in the steps of {name} already; leave it out "
            "of this regularizer (include, exclude), or say shared=True if both are meant"
        )
    return (
        f"parameter {parameter!r} gets a penalty in the steps of {name} already, from an attached "
        "regularizer; end that with handle.remove(), where handle is what attach() returned, or "
        "with attach(optimizer, replace=True), or leave the parameter out of this regularizer "
        "(include, exclude), or say shared=True if both are meant"
    )


def _check_parts(buckets: ModelBuckets, parts: list[int], ended: list[Attachment]) -> None:
    """Raise RuntimeError if other optimizers divide the parameters of ``buckets`` otherwise."""
    divided = None if len(set(parts)) == 1 else parts
    kept = [x for x in buckets.in_steps if x.is_active and x.attachment not in ended]
    if kept and divided is not None and buckets.parts not in (None, divided):
        names = " and ".join(type(x.optimizer).__name__ for x in kept)
        raise RuntimeError(
            f"optimizer: this regularizer is attached to {names} too, which divide its parameters "
            "in another way; attach another regularizer"
        )


def attachments_of(buckets: ModelBuckets) -> list[Attachment]:
    """Return the active attachments of a regularizer."""
    active = [step.attachment for step in buckets.in_steps if step.is_active]
    return list(dict.fromkeys(found for found in active if found is not None))


def sgd_groups(buckets: ModelBuckets) -> list[dict[str, Any]]:
    """Return the parameter groups of SGD in whose gradients an attachment puts the penalty."""
    optimizers = [o for a in attachments_of(buckets) if not a.decoupled for o in a.optimizers]
    return [g for o in optimizers if isinstance(o, torch.optim.SGD) for g in o.param_groups]


def resume(regularizer: Regularizer, attachments: Sequence[Attachment]) -> None:
    """Let ``attachments``, which came with a copy of ``regularizer``, attach it."""
    buckets = regularizer._buckets
    for attachment in attachments:
        attachment.resume()
    own = [x for x in attachments if not x.__dict__ or x.regularizer is regularizer]
    if own:
        buckets.at_next_build = partial(_warn_if_lost, own)


def _warn_if_lost(attachments: Sequence[Attachment], buckets: ModelBuckets) -> None:
    if not attachments_of(buckets):
        warn(
            "this copy of a SpectralRegularizer is not attached: the optimizer to which the "
            f"original is, {attachments[0].kinds}, was not copied together with it, or is gone; "
            "attach(optimizer) attaches the copy",
        )

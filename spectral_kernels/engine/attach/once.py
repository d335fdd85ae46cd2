"""One penalty per step: what else gives a parameter the penalty that an optimizer's step adds.

A parameter would count twice if the steps of two optimizers added its penalty, or if a gradient of
the penalty were in ``.grad`` already, from ``penalty()`` or ``accumulate_grad_()``, when a step
adds it. Such a gradient leaves a mark at its regularizer's buckets, in a process where steps add
penalties at all. A step looks at marks only if there is a new one; otherwise it compares two
numbers.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import TYPE_CHECKING

import torch
from torch.autograd.graph import _get_grad_fn_or_grad_acc

from ...selection.parameters import ParameterRef
from ..model_buckets import ModelBuckets
from ..prepared import Preparation, PreparedPenalty
from .optimizers import check_held

if TYPE_CHECKING:
    from .attachment import Attachment

_events = count(1)
_last = 0  # number of the last event: a mark, or an optimizer whose steps add a penalty from now on
adds_in_steps = False  # whether there has been such an optimizer; for compilers, which guard it


def _next_event() -> int:
    global _last
    _last = event = next(_events)
    return event


class Mark:
    """That a gradient of a penalty has gone into ``.grad`` outside of an optimizer's step.

    The gradient carries the number of the event. A weak reference to it or to its parameter would
    do, if torch.utils.swap_tensors did not refuse tensors that have one.

    Args:
        way: the call that did it, for messages.
        grad: the gradient of one of the parameters, which contains that of the penalty.
    """

    __slots__ = "event", "refused", "way"

    def __init__(self, way: str, grad: torch.Tensor):
        self.way = way
        self.refused: int | None = None  # the version of the gradient that a step has refused
        self.event = grad._spectral_event = _next_event()

    def grad(self, buckets: ModelBuckets) -> torch.Tensor | None:
        """Return the gradient if it is still that of a parameter: zero_grad() puts it away."""
        grads = (tensor.grad for _, tensor in _present(buckets, None))
        return next((g for g in grads if getattr(g, "_spectral_event", 0) == self.event), None)


def mark_accumulated(buckets: ModelBuckets) -> None:
    """Leave a mark: ``accumulate_grad_()`` has been called directly."""
    if not _last:  # no steps add penalties
        return
    for bucket in buckets.buckets:
        for i, parameter in enumerate(bucket.parameters):
            if i not in bucket.left_out and (grad := parameter.grad) is not None:
                buckets.mark = Mark("accumulate_grad_()", grad)
                return


def mark_backward(buckets: ModelBuckets, parameters: Sequence[torch.Tensor]) -> None:
    """Leave a mark at the end of the running backward pass, unless it changes no ``.grad``.

    That of ``torch.autograd.grad`` does not.
    """
    # No steps add penalties, or no backward pass is running.
    if not _last or torch._C._current_graph_task_id() == -1:
        return
    engine = torch.autograd.Variable._execution_engine
    leaves = (p for p in parameters if p.requires_grad and p.is_leaf)
    # "valid" is a pass that is not about given inputs: all parameters get a gradient.
    changed = next(leaves, None) if engine.is_checkpoint_valid() else _accumulating(leaves)
    if changed is None:
        return

    def at_its_end() -> None:
        if (grad := changed.grad) is not None:
            buckets.mark = Mark("penalty()", grad)

    engine.queue_callback(at_its_end)


def _accumulating(parameters: Iterable[torch.Tensor]) -> torch.Tensor | None:
    """Return a parameter whose ``.grad`` the running backward pass changes, or None."""
    for p in parameters:
        try:
            if torch._C._will_engine_execute_node(_get_grad_fn_or_grad_acc(p)):
                return p
        except RuntimeError:  # that of torch.autograd.grad
            return None
    return None


class StepPenalty:
    """That the steps of an optimizer add the penalty of a regularizer's parameters.

    Args:
        buckets: those of the regularizer; referred to weakly, as the optimizer is.
        optimizer: the optimizer.
        attachment: the handle of attach(); None for an optimizer that adds it by itself.
        number: of the optimizer among those of the handle.
        shared: whether steps of other optimizers may add a penalty of these parameters too.
    """

    def __init__(
        self,
        buckets: ModelBuckets,
        optimizer: torch.optim.Optimizer,
        attachment: Attachment | None = None,
        number: int = 0,
        shared: bool = False,
    ):
        self._buckets, self._optimizer = weakref.ref(buckets), weakref.ref(optimizer)
        self._number, self.shared = number, shared
        self._attachment = None if attachment is None else weakref.ref(attachment)
        self._ended, self._seen = False, _next_event() - 1  # the first step looks
        self.preparation: Preparation[PreparedPenalty] = Preparation()
        buckets.in_steps = [*(x for x in buckets.in_steps if x.is_active), self]
        global adds_in_steps
        adds_in_steps = True

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer, or None if it is gone."""
        return self._optimizer()

    @property
    def attachment(self) -> Attachment | None:
        """The handle of attach(), or None."""
        return None if self._attachment is None else self._attachment()

    @property
    def is_active(self) -> bool:
        """Whether the optimizer is there, and nothing has ended it."""
        return not self._ended and self.optimizer is not None

    def end(self) -> None:
        """Say that steps no longer add the penalty."""
        self._ended = True
        self.preparation.drop()

    @property
    def part(self) -> int | None:
        """The part of the buckets that these steps add, see ``ModelBuckets.divide``; None: all."""
        if self.attachment is None or self.attachment.is_divided:
            return None if self.attachment is None else self._number
        return None if self.adds_some else -1

    @property
    def adds_some(self) -> bool:
        """Whether the optimizer holds some of the parameters."""
        return self.attachment is None or self._number in self.attachment.parts

    @property
    def indices(self) -> Sequence[int] | None:
        """Those of the parameters whose penalty these steps add, among refs; None: all."""
        if self.attachment is None:
            return None
        return [i for i, own in enumerate(self.attachment.parts) if own == self._number]

    def parameters(self) -> dict[int, str]:
        """Return the names of the present parameters, by their id."""
        buckets = self._buckets()
        return {} if buckets is None else names_of(buckets, self.indices)

    def hold(self, tensors: Sequence[torch.Tensor]) -> None:
        """See that the optimizers hold those of the parameters that were not there before.

        Args:
            tensors: the present parameters, one per ref.

        Raises:
            RuntimeError: one that no optimizer holds.
            ValueError: one that two of them hold, or with ``maximize``.
        """
        buckets = self._buckets()
        held = buckets.held.get(self, ())
        if len(tensors) == len(held) and all(map(operator.is_, tensors, held)):
            return
        before = set(map(id, held))
        new = [i for i, tensor in enumerate(tensors) if id(tensor) not in before]
        refs, own = [buckets.refs[i] for i in new], [tensors[i] for i in new]
        self.check_holds(refs, own)
        if self.attachment is not None:
            self.attachment.hold(buckets, new, own)
        buckets.held[self] = list(tensors)

    def check_holds(self, refs: Sequence[ParameterRef], tensors: Sequence[torch.Tensor]) -> None:
        """Raise RuntimeError if the optimizers do not hold one of ``tensors``, called ``refs``."""
        if self.is_active:
            own = [self.optimizer] if self.attachment is None else self.attachment.optimizers
            check_held(refs, tensors, own)

    def check(self) -> None:
        """See that the step which is about to add the penalty adds it once.

        Raises:
            RuntimeError: a gradient of the penalty is in ``.grad`` already; or, for an optimizer
                that adds the penalty by itself, another one has an attached regularizer.
        """
        if self._seen != _last and not self.shared:
            self._look(_last)

    def _look(self, last: int) -> None:
        own, name = self.parameters(), type(self.optimizer).__name__
        if self._attachment is None:
            for other, parameter in others_with(own, self):
                raise RuntimeError(
                    f"parameter {parameter!r}: its penalty is in the steps of {name}, and of the "
                    f"{type(other.optimizer).__name__} to which a regularizer is attached; end "
                    "that with remove() of the handle that attach() returned, or attach with "
                    "shared=True if both are meant"
                )
        for buckets in _living():
            mark = buckets.mark
            if mark is None or mark.event <= self._seen or (grad := mark.grad(buckets)) is None:
                continue
            if mark.refused is not None and mark.refused != grad._version:
                continue  # it has changed since then: it was zeroed in place
            parameter = _first_with_grad(buckets, own)
            if parameter is None:
                continue
            mark.refused = grad._version
            adds = "the step of" if self._attachment is None else "the regularizer attached to"
            raise RuntimeError(
                f"parameter {parameter!r}: {mark.way} has put the gradient of its penalty into "
                f".grad, and {adds} {name} adds it again; leave out {mark.way}, and clear the "
                "gradients with zero_grad() before you go on"
            )
        self._seen = last


def in_steps_of(optimizer: torch.optim.Optimizer, buckets: ModelBuckets) -> StepPenalty:
    """Return the StepPenalty of an optimizer that adds the penalty of ``buckets`` by itself."""
    for found in buckets.in_steps:
        if found.optimizer is optimizer:
            return found
    return StepPenalty(buckets, optimizer)


def others_with(
    parameters: Mapping[int, str], own: StepPenalty | None = None
) -> Iterator[tuple[StepPenalty, str]]:
    """Yield what else adds a penalty of one of ``parameters``, and the name of that parameter.

    Args:
        parameters: names by id.
        own: left out. If it is given, so are optimizers that add the penalty by themselves.
    """
    for buckets in _living():
        for found in buckets.in_steps:
            if found is own or found.shared or not found.is_active:
                continue
            if own is not None and found.attachment is None:
                continue
            theirs = found.parameters()
            common = next((name for i, name in parameters.items() if i in theirs), None)
            if common is not None:
                yield found, common


def names_of(buckets: ModelBuckets, indices: Sequence[int] | None = None) -> dict[int, str]:
    """Return the names of the present parameters of ``buckets``, by their id; see StepPenalty."""
    return {id(tensor): name for name, tensor in _present(buckets, indices)}


def _living() -> list[ModelBuckets]:
    refs = ModelBuckets.by_number.valuerefs()
    return [buckets for ref in refs if (buckets := ref()) is not None]


def _present(
    buckets: ModelBuckets, indices: Sequence[int] | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and tensor of the parameters that are still there."""
    for i in range(len(buckets.refs)) if indices is None else indices:
        ref = buckets.refs[i]
        if ref.computed:
            continue
        try:
            yield ref.name, ref.get()
        except RuntimeError:  # it was removed from its module
            continue


def _first_with_grad(buckets: ModelBuckets, parameters: Mapping[int, str]) -> str | None:
    """Return the name of one of ``parameters`` that ``buckets`` has too, with a ``.grad``."""
    for _, tensor in _present(buckets, None):
        if id(tensor) in parameters and tensor.grad is not None:
            return parameters[id(tensor)]
    return None

"""The hook that adds the penalty's gradient at the start of optimizer.step()."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..selection.parameters import ParameterRef


class Attachment:
    """Handle of an attached regularizer."""

    def __init__(self, optimizer: torch.optim.Optimizer, hook):
        self.optimizer = optimizer
        self._handle = optimizer.register_step_pre_hook(hook)
        self.active = True

    def remove(self) -> None:
        """Stop adding the penalty; calling it again does nothing."""
        self._handle.remove()
        self.active = False


def attach(
    accumulate_grad: Callable[[torch.Tensor | None], None],
    optimizer: torch.optim.Optimizer,
    refs: Sequence[ParameterRef],
    others: Sequence[Attachment],
    afterwards: Callable[[], None] | None,
) -> Attachment:
    """Call ``accumulate_grad(grad_scale)``, then ``afterwards()``, at the start of every step.

    See ``SpectralRegularizer.attach``.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer: got {type(optimizer).__name__}; accepted is a torch.optim.Optimizer"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(
            "optimizer: LBFGS needs the loss and the gradient of the same function; add "
            "penalty() to the loss in its closure instead of attach()"
        )
    if any(other.optimizer is optimizer for other in others):
        raise RuntimeError("optimizer: this regularizer is attached to it already")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for ref in refs:
        if id(ref.get()) not in held:
            raise ValueError(
                f"optimizer: it does not hold parameter {ref.name!r}; build one "
                "SpectralRegularizer per optimizer, each with the parameters of that optimizer "
                "(include, exclude)"
            )

    def accumulate() -> None:
        # GradScaler leaves the gradients of a fused optimizer scaled, and sets this attribute.
        accumulate_grad(getattr(optimizer, "grad_scale", None))
        if afterwards is not None:
            afterwards()

    def hook(_, args, kwargs):
        # args starts with the optimizer itself.
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            accumulate()
            return None

        def with_penalty():
            loss = closure()
            accumulate()
            return loss

        if len(args) > 1:
            return (args[0], with_penalty, *args[2:]), kwargs
        return args, {**kwargs, "closure": with_penalty}

    return Attachment(optimizer, hook)

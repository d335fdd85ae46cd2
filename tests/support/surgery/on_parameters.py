"""Surgery on parameters and their gradients."""

import copy
import math

import torch
from torch import nn

from .refusals import reasons
from .subject import DTYPES, Subject, is_readable


class OnParameters:
    """Operations on the parameters and gradients of ``subject``."""

    subject: Subject
    given: set[str]  # parameters whose gradient the next step leaves as it is

    def freeze(self, name: str, trainable: bool) -> None:
        """Set ``requires_grad``."""
        self.subject.get(name).requires_grad_(trainable)

    def move_dtype(self, name: str | None, dtype: str, replace: bool) -> None:
        """Move the module of a parameter, or the model, to another dtype.

        Args:
            name: a parameter of the module, or None: the model.
            dtype: a key of DTYPES.
            replace: whether the parameters then move to memory regions of their own.
        """
        subject = self.subject
        if subject.has_freed():
            return
        module = subject.model
        if name is not None:
            module = module.get_submodule(name.rpartition(".")[0])
        module.to(DTYPES[dtype])
        if replace:
            for p in module.parameters():
                p.data = subject.moved(p)

    def resize(self, name: str, rows: int, cols: int, state: str, grad: str) -> None:
        """Give a parameter another size through ``.data``.

        Args:
            name: of the parameter.
            rows: size of its first dimension.
            cols: size of its second dimension, if it has one.
            state: "keep" or "drop" the optimizer's state of it.
            grad: "keep" or "drop" its gradient.
        """
        p = self.subject.get(name)
        shape = (rows, cols, *p.shape[2:])[: p.dim()]
        p.data = self.subject.values(shape, p.dtype, size=0.5)
        if state == "drop":
            self.subject.optimizer.state.pop(p, None)
        if grad == "drop":
            p.grad = None

    def place(self, name: str, how: str) -> None:
        """Give a parameter other memory through ``.data``.

        Args:
            name: of the parameter.
            how: "inside" a larger buffer, "columns" (stored column by column or channels_last),
                "gaps" between the rows or elements, "mixed" (neither rows nor columns are
                contiguous), "expanded" (one element), "negative" (the negative bit).
        """
        p, subject = self.subject.get(name), self.subject
        if how == "inside":
            buffer = subject.values((p.numel() + 20,), p.dtype, size=0.5)
            p.data = buffer[7 : 7 + p.numel()].view(p.shape)
        elif how == "expanded":
            p.data = subject.values((1,) * p.dim(), p.dtype).expand(p.shape)
        elif how == "negative":
            p.data = torch._neg_view(subject.values(p.shape, p.dtype, size=0.5))
        else:
            p.data = subject.values(p.shape, p.dtype, strides_of(p.shape, how), size=0.5)

    def replace_module(self, name: str, in_optimizer: bool) -> None:
        """Replace the module of a parameter, and perhaps its parameters in the groups."""
        model, (path, _, _) = self.subject.model, name.rpartition(".")
        module = copy.copy(model.get_submodule(path))
        module._parameters = dict(module._parameters)
        setattr(model, path, module)
        for attribute, p in module._parameters.items():
            if p is not None:
                self.replace_parameter(f"{path}.{attribute}", in_optimizer)

    def replace_parameter(self, name: str, in_optimizer: bool) -> None:
        """Put a new Parameter into the module, and perhaps into the optimizer's group."""
        subject, old = self.subject, self.subject.get(name)
        new = nn.Parameter(subject.values(old.shape, old.dtype, size=0.5))
        subject.put(name, new)
        if in_optimizer:
            held = subject.held[name]
            for group in subject.optimizer.param_groups:
                group["params"] = [new if p is held else p for p in group["params"]]
            subject.optimizer.state.pop(held, None)
            subject.held[name] = new

    def swap_tensors(self, name: str, other: str | None) -> None:
        """Exchange the contents of a parameter with those of another one, or of a new one."""
        first = self.subject.get(name)
        second = nn.Parameter(self.subject.values(first.shape, first.dtype, size=0.5))
        if other is not None:
            second = self.subject.get(other)
        if first is not second:
            torch.utils.swap_tensors(first, second)

    def share_memory(self, name: str, other: str, shift: int | None) -> None:
        """Put two parameters into one piece of memory.

        Args:
            name: of one parameter.
            other: of another one.
            shift: elements from the start of the first to that of the second; None: as many as the
                first has, so that the two have nothing in common.
        """
        a, b = self.subject.get(name), self.subject.get(other)
        if a is b or a.dtype != b.dtype:
            return
        start = a.numel() if shift is None else shift
        n = max(a.numel(), start + b.numel())
        buffer = self.subject.values((n,), a.dtype, size=0.5)
        a.data = buffer[: a.numel()].view(a.shape)
        b.data = buffer[start : start + b.numel()].view(b.shape)

    def free_storage(self, name: str, offset: int, keep: bool) -> None:
        """Free the storage behind a parameter that our code reads, or a part of it.

        Args:
            name: of the parameter.
            offset: elements in front of it in its storage.
            keep: whether half of its elements stay.
        """
        p = self.subject.get(name)
        if p.numel() == 0 or self._is_only_torchs(name):
            return
        buffer = torch.randn(offset + p.numel()).to(p.dtype)
        p.data = buffer[offset:].view(p.shape)
        n = offset + p.numel() // 2 if keep else 0
        buffer.untyped_storage().resize_(n * p.itemsize)

    def edit(self, name: str, tracked: bool) -> None:
        """Change the values of a parameter, so that torch knows, or through ``.data``."""
        p = self.subject.get(name)
        if not is_readable(p) or name in reasons(self.subject):
            return
        with torch.no_grad():
            (p if tracked else p.data).copy_(self.subject.values(p.shape, p.dtype, size=0.4))
        if not tracked and not self.subject.is_attached:
            self.subject.optimizer.refresh()

    def give_gradient(self, name: str, how: str) -> None:
        """Give a parameter, trainable or not, a gradient that the next step takes as it is.

        Args:
            name: of the parameter.
            how: "plain", "contiguous", "columns", "gaps", "mixed", "expanded" or "negative" as in
                :meth:`place`, "dtype" (another one), "weight" (the weight's memory), "freed", or
                "shared" (one memory with the gradient of another parameter).
        """
        subject, p = self.subject, self.subject.get(name)
        if how == "freed" and self._is_only_torchs(name):
            return
        p.grad = self._gradient_like(p, how)
        if how == "dtype":
            other = torch.float64 if p.dtype == torch.float32 else torch.float32
            p.grad.data = subject.values(p.shape, other)
        self.given.add(name)
        if how == "shared":
            fitting = [n for n in subject.held if n != name and subject.get(n).requires_grad
                       and subject.get(n).dtype == p.dtype]  # fmt: skip
            other = next(iter(fitting), None)
            if other is not None:
                q = subject.get(other)
                buffer = subject.values((max(p.numel(), q.numel()),), p.dtype)
                for each, x in ((name, p), (other, q)):
                    x.grad = buffer[: x.numel()].view(x.shape)
                    self.given.add(each)

    def _is_only_torchs(self, name: str) -> bool:
        """Return whether torch alone uses a parameter: it crashes if the memory is freed."""
        return self.subject.is_attached and self.subject.kind(name) is None

    def _gradient_like(self, p, how: str) -> torch.Tensor:
        subject = self.subject
        if how in ("columns", "gaps", "mixed"):
            return subject.values(p.shape, p.dtype, strides_of(p.shape, how))
        if how == "expanded":
            return subject.values((1,) * p.dim(), p.dtype).expand(p.shape)
        if how == "negative":
            return torch._neg_view(subject.values(p.shape, p.dtype, p.stride()))
        if how == "weight":
            return p.detach().view_as(p)
        if how == "freed":
            grad = torch.randn(p.shape).to(p.dtype)
            grad.untyped_storage().resize_(0)
            return grad
        if how == "contiguous":
            return subject.values(p.shape, p.dtype)
        return subject.values(p.shape, p.dtype, torch.empty_like(p, device="meta").stride())


def strides_of(shape, how: str) -> tuple[int, ...]:
    """Return strides in which the elements of ``shape`` are "columns", "gaps" or "mixed"."""
    last = torch.empty(shape, device="meta").stride()
    if how == "gaps":
        return tuple(2 * step for step in last) if len(shape) == 1 else (last[0] + 3, *last[1:])
    if how == "columns":
        if len(shape) == 4:
            return torch.empty(shape, device="meta", memory_format=torch.channels_last).stride()
        return torch.empty(shape[::-1], device="meta").stride()[::-1]
    order = [1, 0, 2, 3] if len(shape) == 4 else list(range(len(shape)))  # in memory
    step, found = 1 if len(shape) == 4 else 2, [0] * len(shape)
    for d in reversed(order):
        found[d], step = step, step * max(shape[d], 1)
    assert math.prod(shape) >= 0
    return tuple(found)

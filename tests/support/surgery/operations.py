"""Surgery on a subject: each method of :class:`Surgery` is one operation."""

from collections import defaultdict

import torch
from torch import nn

from ..forked import Failed
from . import steps
from .refusals import reasons
from .subject import DTYPES, NAMES, Setting, Subject


class Surgery:
    """A subject, made by :meth:`build`, and what is done to it between steps."""

    def build(self, **setting) -> None:
        """Make the subject."""
        self.subject = Subject(Setting(**setting))
        self.saved = None
        self.kept = []  # memory that parameters have left, but that somebody else still holds

    # ---------------------------------------------------------------------------------- a step

    def step(self, without, fresh: bool, size: float) -> str:
        """Take a step with new gradients, but for those of ``without``; then repair what it refuses.

        Args:
            without: names of parameters without a gradient.
            fresh: whether there are new gradients; otherwise ``.grad`` is left as it is.
            size: of the gradients.
        """
        subject = self.subject
        if fresh:
            for name, p in subject.tracked().items():
                p.grad = None
                if name not in without and p.requires_grad:
                    p.grad = self._gradient(p, size)
        outcome = steps.take(subject)
        if outcome != "taken":
            again = steps.take(subject)
            if again.partition(":")[0] != outcome.partition(":")[0]:
                raise Failed(f"refused once ({outcome}), and then {again}")
            self._repair()
        self._keep_small()
        return outcome

    def _gradient(self, p, size: float):
        strides = torch.empty_like(p, device="meta").stride()
        return self.subject.values(p.shape, p.dtype, strides, size)

    def _repair(self) -> None:
        """Do what a refusal asks for: plain parameters, no gradients, moments that fit."""
        subject = self.subject
        for name in reasons(subject):
            if name not in subject.held:
                continue
            p = subject.held[name]
            subject.put(name, p)
            where = next(g for g in subject.optimizer.param_groups
                         if any(p is x for x in g["params"]))  # fmt: skip
            assert where is not None
            p.data = subject.values(p.shape, p.dtype)
            p.grad = None
            subject.optimizer.state.pop(p, None)
        subject.optimizer.zero_grad()
        subject.model.zero_grad()
        if left := reasons(subject):
            raise AssertionError(f"not repaired: {left}")

    def _keep_small(self) -> None:
        """Bring weights that the penalty or the steps have made large back."""
        for p in self.subject.tracked().values():
            if p.numel() and not float(p.detach().abs().max()) < 20:
                with torch.no_grad():
                    p.copy_(self.subject.values(p.shape, p.dtype, size=0.3))

    # ------------------------------------------------------------------------------ parameters

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

    def replace_parameter(self, name: str, in_optimizer: bool) -> None:
        """Put a new Parameter into the module, and perhaps into the optimizer's group."""
        subject, old = self.subject, self.subject.get(name)
        new = nn.Parameter(subject.values(old.shape, old.dtype, size=0.5))
        subject.put(name, new)
        if in_optimizer:
            for group in subject.optimizer.param_groups:
                group["params"] = [new if p is subject.held[name] else p for p in group["params"]]
            subject.optimizer.state.pop(subject.held[name], None)
            subject.held[name] = new

    def swap_tensors(self, name: str, other: str | None) -> None:
        """Exchange the contents of a parameter with those of another one, or of a new one."""
        subject = self.subject
        first = subject.get(name)
        second = nn.Parameter(subject.values(first.shape, first.dtype, size=0.5))
        if other is not None:
            second = subject.get(other)
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
        """Free the storage behind a parameter, or a part of it.

        Args:
            name: of the parameter.
            offset: elements in front of it in its storage.
            keep: whether half of its bytes are kept.
        """
        p = self.subject.get(name)
        if p.numel() == 0:
            return
        buffer = torch.randn(offset + p.numel()).to(p.dtype)
        p.data = buffer[offset:].view(p.shape)
        storage = buffer.untyped_storage()
        storage.resize_(p.itemsize * (offset + p.numel() // 2) if keep else 0)

    # ---------------------------------------------------------------------- state and groups

    def clear_state(self, how: str, name: str) -> None:
        """Forget the state: "clear", "new" (another dict), or of one parameter: "pop", "empty"."""
        optimizer, p = self.subject.optimizer, self.subject.held[name]
        if how == "clear":
            optimizer.state.clear()
        elif how == "new":
            optimizer.state = defaultdict(dict)
        elif how == "pop":
            optimizer.state.pop(p, None)
        else:
            optimizer.state[p] = {}

    def replace_moment(self, name: str, which: int, how: str) -> None:
        """Replace a moment by another tensor.

        Args:
            name: of the parameter.
            which: which of its moments.
            how: "zeros", "copy", "dtype" (another one), "rows" (one more), "fewer" (one row fewer),
                "strides" (those of the transposed), "expanded", "negative" (the negative bit),
                "gone" (deleted), "weight" (the weight's memory).
        """
        subject, p = self.subject, self.subject.held[name]
        kept = subject.moments(p)
        if not kept:
            return
        key = sorted(kept)[which % len(kept)]
        state, old = subject.optimizer.state[p], kept[key]
        if how == "gone":
            del state[key]
            return
        state[key] = self._other_moment(p, old, how)

    def _other_moment(self, p, old, how: str):
        subject = self.subject
        if how == "zeros":
            return subject.empty(old.shape, old.dtype, old.stride()).zero_()
        if how == "copy":
            return subject.empty(old.shape, old.dtype, old.stride()).copy_(old)
        if how == "dtype":
            other = torch.float64 if old.dtype == torch.float32 else torch.float32
            return subject.empty(old.shape, other).copy_(old)
        if how in ("rows", "fewer"):
            rows = max(0, old.shape[0] + (1 if how == "rows" else -1))
            return subject.values((rows, *old.shape[1:]), old.dtype).abs_()
        if how == "strides":
            strides = torch.empty(old.shape[::-1], device="meta").stride()[::-1]
            return subject.empty(old.shape, old.dtype, strides).copy_(old)
        if how == "expanded":
            return subject.empty((1,) * old.dim(), old.dtype).fill_(0.5).expand(old.shape)
        if how == "negative":
            return torch._neg_view(subject.empty(old.shape, old.dtype).copy_(-old))
        assert how == "weight"
        return p.detach().view_as(p)

    def change_step(self, name: str, how: str) -> None:
        """Delete the step count of a parameter ("gone"), or replace it by 0 ("zero") or 1000."""
        state = self.subject.optimizer.state.get(self.subject.held[name], {})
        if "step" not in state:
            return
        if how == "gone":
            del state["step"]
        else:
            state["step"] = torch.tensor(0.0 if how == "zero" else 1000.0)

    def change_options(self, group: int, lr: float, strength, as_tensor: bool) -> None:
        """Change learning rate and strength."""
        subject = self.subject
        groups = subject.optimizer.param_groups
        groups[group % len(groups)]["lr"] = torch.tensor(lr, dtype=torch.float64) if as_tensor else lr
        subject.strength = strength
        given = strength
        if as_tensor and not isinstance(strength, dict):
            given = torch.tensor(strength, dtype=torch.float64)
        subject.readings.strength = given

    def zero_grad(self, set_to_none: bool) -> None:
        """Call the optimizer's ``zero_grad``."""
        self.subject.optimizer.zero_grad(set_to_none=set_to_none)

    def save(self) -> None:
        """Save the optimizer's state."""
        import copy

        self.saved = copy.deepcopy(self.subject.optimizer.state_dict())


_ = NAMES

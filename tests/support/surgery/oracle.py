"""One step of torch.optim in float64, on copies of what a subject holds at this moment."""

import torch
from torch import nn

from .subject import NAMES, Subject, is_readable

_MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


class Mirror:
    """Float64 copies of tensors that share memory as the originals do.

    Args:
        share: whether they share memory; otherwise each is contiguous.
    """

    def __init__(self, share: bool = True):
        self._share, self._storages = share, {}

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the copy of ``tensor``, which has its strides."""
        tensor = tensor.detach()
        if not self._share or tensor.numel() == 0:
            return tensor.double().clone(memory_format=torch.contiguous_format)
        storage = tensor.untyped_storage()
        key = storage.data_ptr(), tensor.dtype
        if key not in self._storages:
            n = storage.nbytes() // tensor.itemsize
            whole = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, (n,), (1,))
            # The original is kept: its address is not used for another one meanwhile.
            self._storages[key] = storage, whole.to(torch.float64, copy=True)
        copy = self._storages[key][1].as_strided(
            tensor.shape, tensor.stride(), tensor.storage_offset()
        )
        return torch._neg_view(copy) if tensor.is_neg() else copy


def penalty_gradient(
    kind: str, w: torch.Tensor, setting, strength: float, vector
) -> tuple[torch.Tensor, float, torch.Tensor]:
    """Return strength * dR/dW of a float64 ``w``, and the size of the terms that cancel in it.

    And the distance of every element from where it has no penalty, along the gradient: a decoupled
    step goes no farther.
    """
    k, target = setting.exponent, setting.tau
    if kind == "shift":
        gradient = strength * 2 * k * float((w * w).sum()) ** (k - 1) * w
        return gradient, _largest(gradient), w.abs()
    if kind == "gain":
        size = w.abs() ** (k - 1)
        gradient = strength * 2 * k * (w.abs() ** k - 1) * size * w.sign()
        terms = strength * 2 * k * _largest((w.abs() ** k + 1) * size)
        return gradient, terms, (w.abs() - 1).abs()
    v, is_left = vector
    matrix = w.flatten(1).mT if is_left else w.flatten(1)
    s = matrix @ v
    sigma = float(s.norm())
    if sigma == 0:
        return torch.zeros_like(w), 0.0, torch.zeros_like(w)
    factor = strength * 2 * k * sigma ** (k - 1) / sigma
    outer = torch.outer(s, v)
    outer = (outer.mT if is_left else outer).reshape(w.shape)
    terms = factor * (sigma**k + target**k) * sigma
    gradient = factor * (sigma**k - target**k) * outer
    return gradient, terms, abs(sigma - target) / sigma * outer.abs()


def _largest(x: torch.Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


class Before:
    """What a subject holds before a step."""

    @property
    def is_ambiguous(self) -> bool:
        """Whether a parameter has more than one of ``choices``."""
        return any(len(self.choices(name)) > 1 for name in self.parameters)

    def __init__(self, subject: Subject):
        self.subject, self.problem = subject, None
        self.parameters = subject.stepped()
        self.setting, self.strengths = subject.setting, subject.strengths()
        self.groups = [dict(g) for g in subject.optimizer.param_groups]
        self.states = {n: _state(subject, p) for n, p in self.parameters.items()}
        # Copies on which torch steps, and what they are made from.
        weights, moments = {}, {}
        self.unreadable = [
            n for n, p in self.parameters.items()
            if not all(is_readable(x) for x in (p, p.grad, *subject.moments(p).values())
                       if x is not None)
        ]  # fmt: skip
        if self.unreadable:
            return
        for share in (True, False):
            mirror = Mirror(share)
            weights[share] = {n: mirror.of(p) for n, p in self.parameters.items()}
            moments[share] = {
                n: {key: mirror.of(m) for key, m in subject.moments(p).items()}
                for n, p in self.parameters.items()
            }
            if share:
                grads = {n: mirror.of(p.grad) for n, p in self.parameters.items()
                         if p.grad is not None}  # fmt: skip
        self.weights, self.grads, self.moments = weights, grads, moments

    def choices(self, name: str) -> list[tuple[bool, bool]]:
        """Return the accepted pairs: does the parameter take a step, with the penalty in it?"""
        p = self.parameters[name]
        has_grad, kind = p.grad is not None, self.subject.kind(name)
        if kind is None:
            return [(has_grad, False)]
        if not p.requires_grad:  # a frozen parameter with a gradient
            return [(has_grad, False)]
        if not has_grad and self.strengths[name] == 0:
            return [(True, True), (False, False)]
        return [(True, True)]

    def penalties(self) -> dict[str, tuple[torch.Tensor, float, torch.Tensor]]:
        """Return the penalty's gradient of every parameter, for the recorded vectors."""
        vectors, found = self.subject.recorder.vectors, {}
        for name in NAMES:
            kind = self.subject.kind(name)
            if kind is None or name not in self.parameters:
                continue
            if kind == "matrix" and name not in vectors:
                continue
            w = self.weights[True][name]
            vector = vectors.get(name)
            if vector is not None and w.numel():
                length = w.shape[0] if vector[1] else w[0].numel()
                if len(vector[0]) != length:
                    raise AssertionError(
                        f"{name}: of shape {tuple(w.shape)}, but the vector of its matrix has "
                        f"{len(vector[0])} elements"
                    )
            found[name] = (
                penalty_gradient(kind, w, self.setting, self.strengths[name], vector)
                if w.numel() else (torch.zeros_like(w), 0.0, torch.zeros_like(w))
            )  # fmt: skip
        return found


def _state(subject: Subject, p) -> dict:
    """Return the optimizer's state of ``p``, with the number of steps so far as a number."""
    state = dict(subject.optimizer.state.get(p, {}))
    if isinstance(state.get("step"), torch.Tensor):
        state["step"] = float(state["step"])
    return state


class Expected:
    """The step of torch.optim from :class:`Before`.

    Args:
        before: what there is.
        penalties: name -> the penalty's gradient and the size of its terms; empty if unknown.
        choice: 0 or -1, which of ``Before.choices`` is taken.
        copied_moments: give each parameter its own dense moments.
    """

    def __init__(self, before: Before, penalties, choice: int = 0, copied_moments: bool = False):
        self.before, self.error = before, None
        self.acts = {n: before.choices(n)[choice] for n in before.parameters}
        self.penalties = {
            n: penalties[n] if self.acts[n][1] and n in penalties else None
            for n in before.parameters
        }
        try:
            self._step(copied_moments)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            self.error = error

    def _step(self, copied_moments: bool) -> None:
        before, decoupled = self.before, self.before.setting.decoupled
        again = Mirror()  # so that a second Expected starts from the same numbers
        self.twins = {n: nn.Parameter(again.of(w)) for n, w in before.weights[True].items()}
        self.combined = {}
        for name, twin in self.twins.items():
            takes_step, with_penalty = self.acts[name]
            if not takes_step:
                continue
            grad = before.grads.get(name)
            grad = torch.zeros_like(twin) if grad is None else again.of(grad)
            penalty = self.penalties[name]
            if with_penalty and not decoupled and penalty is not None:
                grad = grad + penalty[0]
            twin.grad = self.combined[name] = grad
        kind = torch.optim.AdamW if "Adam" in before.setting.way else torch.optim.SGD
        of = {id(p): self.twins[n] for n, p in before.parameters.items()}
        groups = [{**g, "params": [of[id(p)] for p in g["params"]]} for g in before.groups]
        for group in groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"] = float(group["lr"])
        # In float64 the plain loop is what torch's other implementations are measured by.
        self.optimizer = kind([{**g, "foreach": False, "fused": False} for g in groups])
        for name in before.parameters:
            self._fill_state(name, again, copied_moments)
        self.optimizer.step()
        if decoupled:
            for group in groups:
                for twin in group["params"]:
                    name = next(n for n, t in self.twins.items() if t is twin)
                    if self.acts[name][1] and self.penalties[name] is not None:
                        gradient, _, most = self.penalties[name]
                        twin.data.sub_((group["lr"] * gradient).clamp(-most, most))

    def _fill_state(self, name: str, again: Mirror, copied_moments: bool) -> None:
        state = self.before.states[name]
        moments = self.before.moments[not copied_moments][name]
        own = {n: m if copied_moments else again.of(m) for n, m in moments.items()}
        if copied_moments:
            own = {n: m.clone() for n, m in own.items()}
        buffer = own.get("momentum_buffer")
        if buffer is not None and state.get("step") == 0 and not buffer.any():
            del own["momentum_buffer"]  # ours are made before the first step
        if "step" in state and "Adam" in self.before.setting.way:
            own["step"] = torch.tensor(float(state["step"]))
        own.update({n: x for n, x in state.items() if n in _MOMENTS and n not in own and x is None})
        if own:
            self.optimizer.state[self.twins[name]] = own

    def state(self, name: str) -> dict:
        """Return torch's state of a parameter after the step."""
        return self.optimizer.state.get(self.twins[name], {})

    def group(self, name: str) -> dict:
        """Return the group of a parameter."""
        return next(g for g in self.optimizer.param_groups
                    if any(p is self.twins[name] for p in g["params"]))  # fmt: skip


class ExpectedGradients:
    """Every ``.grad`` after the penalty's gradient was added; see :class:`Expected`."""

    def __init__(self, before: Before, penalties, choice: int = 0):
        again, self.grads = Mirror(), {}
        for name in before.parameters:
            grad = before.grads.get(name)
            self.grads[name] = None if grad is None else again.of(grad)
        for name in before.parameters:
            takes_step, with_penalty = before.choices(name)[choice]
            if not takes_step or not with_penalty:
                continue
            if self.grads[name] is None:
                self.grads[name] = torch.zeros_like(before.weights[False][name])
            if name not in penalties and before.parameters[name].numel():
                raise AssertionError(f"the backend was not asked for the gradient of {name}")
            self.grads[name] += penalties[name][0]

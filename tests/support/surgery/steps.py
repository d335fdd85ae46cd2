"""A step of the subject, compared with the oracle."""

import traceback
from pathlib import Path

import torch

import spectral_kernels

from .. import guarded
from ..forked import Failed
from .oracle import Before, Expected, ExpectedGradients
from .refusals import is_named, must, reasons
from .subject import NAMES, Subject, is_readable
from .tolerance import RELATIVE, Noise, apart

_PACKAGE = str(Path(spectral_kernels.__file__).parent)


class Bits:
    """Copies of every weight, gradient and moment, and of the groups."""

    def __init__(self, subject: Subject):
        self.subject = subject
        self.kept = [(where, t, _copy(t)) for where, t in self._tensors()]
        self.groups = _settings(subject.optimizer)

    def _tensors(self):
        own = self.subject.tracked()
        own |= {f"module's {n}": p for n in NAMES if (p := self.subject.get(n)) is not own.get(n)}
        for name, p in own.items():
            yield name, p
            if p.grad is not None:
                yield f"gradient of {name}", p.grad
            for key, x in self.subject.optimizer.state.get(p, {}).items():
                if isinstance(x, torch.Tensor) and not key.startswith("spectral_"):
                    yield f"{key} of {name}", x

    def changes(self, same_objects: bool = True) -> list[str]:
        """Return what is no longer as it was; with ``same_objects``, tensors by identity too."""
        now = dict(self._tensors())
        found = [f"{where} has other values" for where, t, copy in self.kept
                 if not _same(t if same_objects else now.get(where), copy)]  # fmt: skip
        if same_objects:
            found += [f"{w} is another tensor" for w, t, _ in self.kept if now.get(w) is not t]
        known = {where for where, _, _ in self.kept}
        # A step may have made moments at rest before it looks at other parameters.
        found += [f"{w} is new" for w, t in now.items()
                  if w not in known and (not is_readable(t) or bool((t != 0).any()))]  # fmt: skip
        if _settings(self.subject.optimizer) != self.groups:
            found.append("the parameter groups have changed")
        return found[:6]


def _settings(optimizer) -> list:
    return [
        {n: [id(p) for p in x] if n == "params" else x for n, x in group.items()}
        for group in optimizer.param_groups
    ]


def _copy(tensor: torch.Tensor) -> torch.Tensor | None:
    return tensor.detach().clone() if is_readable(tensor) else None


def _same(tensor: torch.Tensor | None, copy: torch.Tensor | None) -> bool:
    if tensor is None:
        return False
    if copy is None or not is_readable(tensor):
        return copy is None and not is_readable(tensor)
    if tensor.shape != copy.shape or tensor.dtype != copy.dtype:
        return False
    now = tensor.detach()
    return torch.equal(now, copy) or torch.equal(now.nan_to_num(1e30), copy.nan_to_num(1e30))


def take(subject: Subject) -> str:
    """Take a step and compare it; return how it ended.

    Raises:
        Failed: the step was not as it should be.
    """
    before, bits, memory = Before(subject), Bits(subject), guarded.Bytes()
    found = reasons(subject)
    required = must(subject, found)
    subject.recorder.vectors.clear()
    try:
        subject.optimizer.step()
    except Exception as error:
        return _refused(subject, bits, memory, found, error)
    if required:
        raise Failed(f"the step was taken, but should have been refused: {', '.join(required)}")
    if before.unreadable:
        return "taken"  # around memory that it does not need
    if subject.is_attached:
        _check_gradients(before, found)
        written = subject.tensors()
    else:
        _check_step(subject, before, bits)
        written = [x for p in subject.tracked().values() for x in (p, *subject.moments(p).values())]
        others = [c for c in bits.changes() if c.startswith("gradient of")]
        if others:
            raise Failed(f"the step changed what it must not: {', '.join(others)}")
    if (where := memory.written_outside(written)) is not None:
        raise Failed(f"the step wrote outside of its tensors: {where}")
    _check_sigma(subject, before)
    return "taken"


# ------------------------------------------------------------------------------------ refusals


def _refused(subject, bits, memory, found, error) -> str:
    """Check that a refusal is right, names a parameter, and that nothing has changed."""
    said = f"{type(error).__name__}: {error}"
    if subject.is_attached and not _is_ours(error):
        return f"torch refuses: {said}"
    check_refusal(found, error)
    changes = bits.changes()
    if (where := memory.written_outside([])) is not None:
        changes.append(f"memory: {where}")
    if changes:
        raise Failed(f"the step was refused after changes: {', '.join(changes)}\n{said}")
    return f"refused: {said}"


def check_refusal(found: dict[str, list[str]], error: Exception) -> None:
    """Check that there is a reason to refuse, and that a parameter that has one is named."""
    said = f"{type(error).__name__}: {error}"
    stack = "".join(traceback.format_exception(error)[-3:])
    if not found:
        raise Failed(f"refused without a reason: {said}\n{stack}")
    because = "; ".join(f"{name} ({', '.join(own)})" for name, own in found.items())
    if not isinstance(error, ValueError | RuntimeError):
        raise Failed(f"refused by another error than a ValueError or RuntimeError: {said}\n"
                     f"because of {because}\n{stack}")  # fmt: skip
    if not is_named(error, found):
        raise Failed(f"the refusal names no parameter that has a reason: {said}\n"
                     f"because of {because}\n{stack}")  # fmt: skip


def _is_ours(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return any(frame.filename.startswith(_PACKAGE) for frame in frames)


# ------------------------------------------------------------------------------------ the step


def _check_step(subject: Subject, before: Before, bits: Bits) -> None:
    penalties = before.penalties()
    choices = (0, -1) if before.is_ambiguous else (0,)
    accepted = [Expected(before, penalties, choice) for choice in choices]
    if all(e.error is not None for e in accepted):
        # Moments whose elements share memory: torch raises; ours may copy them.
        first = accepted[0].error
        accepted = [Expected(before, penalties, choice, True) for choice in choices]
        if all(e.error is not None for e in accepted):
            raise Failed(f"the step was taken, but torch refuses it: {type(first).__name__}: "
                         f"{first}")  # fmt: skip
    accepted = [e for e in accepted if e.error is None]
    for name, p in subject.tracked().items():
        tried = [_difference(subject, before, bits, e, penalties, name, p) for e in accepted]
        if all(tried):
            raise Failed(f"{name}: {tried[0]}")


def _difference(subject, before, bits, expected, penalties, name, p) -> str | None:
    """Return how a parameter differs from the expected step, or None."""
    if expected.acts[name][1] and subject.kind(name) == "matrix" and name not in penalties and (
        p.numel() and subject.strengths()[name]
    ):  # fmt: skip
        return "the backend was not asked for the gradient of its penalty"
    twin = expected.twins[name].detach()
    if not expected.acts[name][0] and torch.equal(twin, before.weights[True][name]):
        changed = [c for c in bits.changes() if c in (f"{name} has other values",)]
        return f"it takes no step (no gradient), but {changed}" if changed else None
    if p.shape != twin.shape:
        return f"has shape {tuple(p.shape)} after the step, {tuple(twin.shape)} before"
    if not expected.acts[name][0]:
        # It shares memory with one that takes a step, where the two are compared.
        stays = twin == before.weights[True][name]
        is_same = torch.equal(p.detach().double()[stays], twin[stays])
        return None if is_same else "it takes no step, but has changed where it has its own memory"
    noise = Noise(expected, penalties, name, p)
    step = float(expected.group(name)["lr"])
    problem = apart(p.detach(), twin, noise.weight, before.weights[True][name], step)
    if problem:
        return f"the weight {problem}"
    return _state_differs(subject, expected, noise, name, p)


def _state_differs(subject, expected, noise, name, p) -> str | None:
    kept, state = subject.moments(p), expected.state(name)
    for key, truth in state.items():
        if key == "step":
            found = subject.optimizer.state.get(p, {}).get("step")
            if found is None or float(found) != float(truth):
                return f"the step count is {found}, torch's {float(truth):g}"
        elif truth is not None:
            if key not in kept:
                return f"its state has no {key}"
            if kept[key].shape != truth.shape:
                return f"its {key} has shape {tuple(kept[key].shape)}"
            # Without momentum torch leaves a buffer of any shape as it is.
            allowed = noise.moments[key] if truth.shape == p.shape else 0
            problem = apart(kept[key], truth, allowed)
            if problem:
                return f"its {key} {problem}"
    return None


# ------------------------------------------------------------------------- an attached regularizer


def _check_gradients(before: Before, found: dict[str, list[str]]) -> None:
    """Check that the penalty's gradient was added to every ``.grad``, and nothing else.

    But for gradients that lie in the memory of a weight, where torch's step writes.
    """
    penalties = before.penalties()
    expected = [ExpectedGradients(before, penalties, choice) for choice in (0, -1)]
    for name, p in before.parameters.items():
        if any("gradient: memory" in r or "common with gradient" in r for r in found.get(name, ())):
            continue
        tried = [_gradient_differs(e.grads[name], penalties.get(name), p) for e in expected]
        if all(tried):
            raise Failed(f"{name}: the gradient {tried[0]}")


def penalize(subject: Subject, between, cut: bool) -> None:
    """Take ``penalty()``, call ``between()``, and go backward.

    After surgery (``cut``) torch may refuse the gradient, but nothing may be written elsewhere.
    """
    before, memory = Before(subject), guarded.Bytes()
    subject.recorder.vectors.clear()
    loss = subject.regularizer.penalty()
    between()
    try:
        loss.backward()
    except (RuntimeError, ValueError):
        if not cut:
            raise
    written = [p.grad for p in subject.stepped().values() if p.grad is not None]
    if (where := memory.written_outside(written)) is not None:
        raise Failed(f"backward wrote outside of the gradients: {where}")
    if cut:
        return
    penalties = before.penalties()
    for name, p in before.parameters.items():
        truth, rounded = before.grads.get(name), 0.0
        if not before.strengths.get(name) and truth is p.grad is None:
            continue
        if subject.kind(name) is not None and p.requires_grad:
            penalty = penalties[name][0]
            if truth is not None:  # autograd rounds what it adds to a gradient
                rounded = 0.51 * torch.finfo(p.dtype).eps * penalty.abs()
            truth = penalty if truth is None else truth + penalty
        if (problem := _gradient_differs(truth, penalties.get(name), p, rounded)) is not None:
            raise Failed(f"{name}: the gradient of penalty() {problem}")


def _gradient_differs(truth, penalty, p, rounded=0.0) -> str | None:
    if truth is None or p.grad is None:
        return None if p.grad is truth is None else f"is {p.grad}, expected {truth}"
    if p.grad.shape != truth.shape:
        return f"has shape {tuple(p.grad.shape)}, expected {tuple(truth.shape)}"
    relative = RELATIVE[p.dtype]
    noise = relative * ((penalty[1] if penalty else 0) + truth.abs())
    return apart(p.grad, truth, noise + rounded)


def _check_sigma(subject: Subject, before: Before) -> None:
    """Check that sigma is not above the largest singular value, and near one of them."""
    found = zip(subject.readings.names, subject.readings.sigma.tolist(),
                subject.readings.residual.tolist(), strict=True)  # fmt: skip
    for name, sigma, residual in found:
        p = subject.get(name).detach()
        w = before.weights[False][name] if subject.is_attached else p.double()
        if w.numel() == 0 or not bool(torch.isfinite(w).all()):
            continue
        values = torch.linalg.svdvals(w.flatten(1))
        rounded = 1e-3 if p.dtype == torch.bfloat16 else 1e-5
        if not sigma <= float(values[0]) * (1 + rounded):
            raise Failed(f"sigma of {name} is {sigma}, above the largest singular value, "
                         f"{float(values[0])}")  # fmt: skip
        nearest = float((values - sigma).abs().min())
        if not nearest <= residual + 10 * rounded**0.5 * float(values[0]):
            raise Failed(
                f"sigma of {name} is {sigma}, with a residual of {residual}; the nearest "
                f"singular value is {nearest} away, the largest is {float(values[0])}"
            )
